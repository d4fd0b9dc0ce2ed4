#!/usr/bin/env bash
# The whole recipe on a small teacher and a few minutes of recorded speech, or on the recordings in the folder DATA.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
data=${DATA:-$root/demo/speech}
[ -d "$data" ] || { echo "demo.sh: error: DATA=$data: there is no such folder; give that of your recordings" >&2; exit 2; }
data=$(cd "$data" && pwd -P)
cd "$root"
python=${python:-python}
mkdir -p "${out:=exp/demo}"
out=$(cd "$out" && pwd -P)
case $data/ in "$out"/*)
    echo "demo.sh: error: DATA=$data lies in $out, which the demo makes anew; copy the recordings elsewhere" >&2
    exit 2 ;;
esac
# Models this small gain nothing from more threads.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
rm -rf "$out"/{audio,data,teacher.pth,stage1,stage3}

$python prepare_data.py --data "$data" --layout flat --valid_share 0.15 --convert_to "$out/audio" --out "$out/data"
$python convert_hubert_from_hf.py --model demo/teacher --out "$out/teacher.pth"
python=$python tsv_dir=$out/data train_subset=train long_utterances=split teacher_ckpt=$out/teacher.pth \
    root_dir=$out/stage1 final_dir=$out/stage3 gpus=0 precision=32 num_workers=1 seconds_per_batch=8 \
    distill_layers=0.4,6 target_sparsity=0.75 match_target=1 log_interval=20 \
    lr=0.001 warmup=20 max=${max:-200} reg_lr=0.3 sparsity_warmup=$((${max:-200} * 3 / 5)) \
    final_lr=0.0005 final_warmup=10 final_max=${final_max:-60} bash run.sh
$python -m demo.compare --teacher "$out/teacher.pth" --student "$out/stage3/ckpts/pruned_hubert_base.pth" \
    --tsv_dir "$out/data"
echo "The demo took $SECONDS s. Open $out/stage3/report/report.html in a browser."
