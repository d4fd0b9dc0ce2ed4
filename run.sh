#!/usr/bin/env bash
#SBATCH --job-name=distill-prune
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=13
#SBATCH --mem=200G
#SBATCH --time=48:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#
# The whole recipe: distil and prune, cut, distil again, save. `sbatch run.sh` on a cluster, `bash run.sh` elsewhere.
# Every variable below can be set from outside: `train_subset=train100 gpus=1 accum_grad=4 bash run.sh`.
# Run again, it skips the stages that are finished and goes on with the one that was cut.

set -euo pipefail

# data
: "${tsv_dir:=data/librispeech}"
: "${train_subset:=train960}"

# shared by both distillations
: "${teacher_ckpt:=pretrained/hubert-base-ls960.hf.pth}"
: "${student_ckpt:=$teacher_ckpt}"
: "${distill_layers:=0.4,8,12}"
: "${distill_mode:=layer2layer}"
: "${l2_weight:=0}"
: "${l1_weight:=1}"
: "${cos_weight:=1}"
: "${cos_type:=raw}"

# stage 1: distil and prune
: "${lr:=0.0002}"
: "${warmup:=15000}"
: "${max:=50000}"
: "${pruning_units:=conv,head,interm}"
: "${reg_lr:=0.02}"
: "${target_sparsity:=0.75}"
: "${sparsity_warmup:=5000}"

# stage 3: distil the pruned model
: "${final_lr:=0.0001}"
: "${final_warmup:=5000}"
: "${final_max:=25000}"

# machine; 4 GPUs x 160 s is the batch of the paper, so fewer GPUs want more accum_grad
: "${nodes:=${SLURM_JOB_NUM_NODES:-1}}"
: "${gpus:=4}"
: "${seconds_per_batch:=160}"
: "${accum_grad:=1}"
: "${precision:=16}"
: "${num_workers:=12}"
: "${clip_norm:=10}"
: "${save_interval:=1000}"
: "${log_interval:=50}"
: "${python:=python}"

: "${root_dir:=exp/hubert-base_${train_subset}_sp${target_sparsity}_spup${sparsity_warmup}_lr${lr}_up${warmup}_max${max}_${distill_mode}${distill_layers}_reglr${reg_lr}_${pruning_units}}"
: "${final_dir:=$root_dir/lr${final_lr}_up${final_warmup}_max${final_max}}"

distilled=$root_dir/ckpts/last.ckpt
pruned=$root_dir/ckpts/pruned_hubert_base.pth
final_distilled=$final_dir/ckpts/last.ckpt
final=$final_dir/ckpts/pruned_hubert_base.pth

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# sbatch runs a copy of this file, away from the scripts.
[ -f "$here/distill.py" ] || here=${SLURM_SUBMIT_DIR:?run.sh is not beside distill.py}
# srun does not inherit it from sbatch.
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
export PYTHONUNBUFFERED=1

child=
forward() { [ -z "$child" ] || kill -"$1" "$child" 2>/dev/null || true; }
for name in TERM USR1; do trap "forward $name" "$name"; done
trap 'forward TERM' INT

# run LOG COMMAND...: runs the command with its output in the log too; a failure ends the recipe.
run() {
    local log=$1 status=0
    shift
    mkdir -p "$(dirname "$log")"
    "$@" > >(tee -i -a "$log") 2>&1 &
    child=$!
    while :; do
        status=0
        wait "$child" || status=$?
        kill -0 "$child" 2>/dev/null || break
    done
    child=
    if [ "$status" -eq 138 ] && [ -n "${SLURM_JOB_ID:-}" ]; then
        echo "run.sh: time is up, the state is saved: requeueing job $SLURM_JOB_ID" >&2
        scontrol requeue "$SLURM_JOB_ID"
    elif [ "$status" -gt 128 ]; then
        echo "run.sh: stopped by a signal; run it again to go on" >&2
    elif [ "$status" -ne 0 ]; then
        echo "run.sh: failed with status $status; see $log, and run it again when it is mended" >&2
    fi
    [ "$status" -eq 0 ] || exit "$status"
}

# train DIR UPDATES COMMAND...: a training stage on all GPUs, from its last checkpoint where RESUME names one.
train() {
    local dir=$1 updates=$2 launcher=()
    shift 2
    [ -z "${SLURM_JOB_ID:-}" ] || launcher=(srun "--nodes=$nodes" "--ntasks-per-node=$((gpus > 0 ? gpus : 1))")
    run "$dir/train.log" ${launcher[@]+"${launcher[@]}"} "$python" "$here/$1" "${@:2}" \
        --tsv_dir "$tsv_dir" --train_subset "$train_subset" --teacher_ckpt "$teacher_ckpt" --exp_dir "$dir" \
        --max_updates "$updates" --distill_layers "$distill_layers" --distill_mode "$distill_mode" \
        --l2_weight "$l2_weight" --l1_weight "$l1_weight" --cos_weight "$cos_weight" --cos_type "$cos_type" \
        --num_nodes "$nodes" --gpus "$gpus" --seconds_per_batch "$seconds_per_batch" --accum_grad "$accum_grad" \
        --precision "$precision" --num_workers "$num_workers" --clip_norm "$clip_norm" \
        --save_interval "$save_interval" --log_interval "$log_interval"
}

# finished DIR UPDATES [AFTER]: the stage has done its updates, since the file AFTER was written.
finished() {
    [ -f "$1/finished" ] && [ "$(cat "$1/finished")" = "$2" ] && { [ -z "${3:-}" ] || [ "$1/finished" -nt "$3" ]; }
}

if finished "$root_dir" "$max"; then
    echo "run.sh: stage 1 is finished: $distilled"
else
    resume=()
    [ ! -f "$distilled" ] || resume=(--resume_checkpoint "$distilled")
    train "$root_dir" "$max" distill.py --student_ckpt "$student_ckpt" --learning_rate "$lr" \
        --warmup_updates "$warmup" --pruning_units "$pruning_units" --reg_learning_rate "$reg_lr" \
        --target_sparsity "$target_sparsity" --sparsity_warmup_updates "$sparsity_warmup" ${resume[@]+"${resume[@]}"}
fi

if [ "$pruned" -nt "$distilled" ]; then
    echo "run.sh: stage 2 is finished: $pruned"
else
    run "$root_dir/prune.log" "$python" "$here/prune.py" --distilled_ckpt "$distilled" --original_ckpt "$student_ckpt" \
        --out "$pruned"
fi

if finished "$final_dir" "$final_max" "$pruned"; then
    echo "run.sh: stage 3 is finished: $final_distilled"
else
    resume=()
    [ ! "$final_distilled" -nt "$pruned" ] || resume=(--resume_checkpoint "$final_distilled")
    train "$final_dir" "$final_max" final_distill.py --student_ckpt "$pruned" --learning_rate "$final_lr" \
        --warmup_updates "$final_warmup" ${resume[@]+"${resume[@]}"}
fi

if [ "$final" -nt "$final_distilled" ]; then
    echo "run.sh: stage 4 is finished: $final"
else
    run "$final_dir/save.log" "$python" "$here/save_final_ckpt.py" --config_path "$pruned" \
        --ckpt_after_final_distill "$final_distilled" --out "$final"
fi
