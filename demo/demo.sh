#!/usr/bin/env bash
# The product's own commands on a corpus and a teacher small enough for a laptop's CPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${python:-python}
out=${out:-exp/demo}
# Models this small gain nothing from more threads.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
rm -rf "$out"

$python demo/corpus.py --out "$out/corpus"
$python demo/teacher.py --out "$out/hubert"
$python prepare_data.py --data "$out/corpus" --out "$out/data"
$python convert_hubert_from_hf.py --model "$out/hubert" --out "$out/teacher.pth"
python=$python tsv_dir=$out/data train_subset=train100 teacher_ckpt=$out/teacher.pth \
    root_dir=$out/stage1 final_dir=$out/stage3 gpus=0 precision=32 num_workers=1 seconds_per_batch=6 \
    distill_layers=0.2,4,6 lr=0.001 warmup=40 max=1000 reg_lr=0.08 target_sparsity=0.75 sparsity_warmup=280 \
    final_lr=0.001 final_warmup=20 final_max=150 log_interval=50 bash run.sh
echo "# the demo took $SECONDS s; open $PWD/$out/stage3/report/report.html in a browser"
