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
# Run it again, and each stage sees from what lies in its folder whether it is finished, goes on or starts.
set -euo pipefail

# data
: "${tsv_dir:=data/librispeech}" "${train_subset:=train960}"
: "${long_utterances:=drop}" # recordings above 15.6 s: drop, or split into equal pieces

# shared by both distillations
: "${teacher_ckpt:=pretrained/hubert-base-ls960.hf.pth}" "${student_ckpt:=$teacher_ckpt}"
: "${distill_layers:=0.4,8,12}" "${distill_mode:=layer2layer}"
: "${l2_weight:=0}" "${l1_weight:=1}" "${cos_weight:=1}" "${cos_type:=raw}" "${seed:=2022}"

# stage 1: distil and prune
: "${lr:=0.0002}" "${warmup:=15000}" "${max:=50000}"
: "${pruning_units:=conv,head,interm}" "${reg_lr:=0.02}" "${target_sparsity:=0.75}" "${sparsity_warmup:=5000}"
: "${sparsity_of:=params}" "${match_target:=0}" # params or macs; 1 prunes to exactly the target

# stage 3: distil the pruned model
: "${final_lr:=0.0001}" "${final_warmup:=5000}" "${final_max:=25000}"

# machine; 4 GPUs x 160 s is the batch of the paper, so fewer GPUs want more seconds_per_batch, or accum_grad
: "${nodes:=${SLURM_JOB_NUM_NODES:-1}}" "${gpus:=4}" "${seconds_per_batch:=160}" "${accum_grad:=1}"
: "${precision:=16}" "${num_workers:=12}" "${clip_norm:=10}" "${save_interval:=1000}" "${log_interval:=50}"
# 1: less memory for more work; faster products for --precision 32; torch.compile
: "${activation_checkpointing:=0}" "${tf32:=0}" "${compile:=0}"
: "${python:=python}" "${allow_changed:=}"

# The folder is named by what matters, which the stages check too.
model=$(basename "$teacher_ckpt" .pth) && model=${model/#hubert-base-ls960.hf/hubert-base}
[ "$student_ckpt" = "$teacher_ckpt" ] || model+=_$(basename "$student_ckpt" .pth)
: "${root_dir:=exp/${model}_${train_subset}_sp${target_sparsity}${sparsity_of#params}_spup${sparsity_warmup}_lr${lr}_up${warmup}_max${max}_${distill_mode}${distill_layers}_reglr${reg_lr}_${pruning_units}}"
: "${final_dir:=$root_dir/lr${final_lr}_up${final_warmup}_max${final_max}}"
pruned=$root_dir/ckpts/pruned_hubert_base.pth

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# sbatch runs a copy of this file, away from the scripts.
[ -f "$here/distill.py" ] || here=${SLURM_SUBMIT_DIR:?run.sh is not beside distill.py}
launch=()
if [ -n "${SLURM_JOB_ID:-}" ]; then
    launch=(srun --kill-on-bad-exit=1 "--nodes=$nodes" "--ntasks-per-node=$((gpus > 0 ? gpus : 1))")
    # srun does not inherit it from sbatch.
    [ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
fi
export PYTHONUNBUFFERED=1

# A signal to this shell alone goes to the stage, which saves. Not under SLURM: there the stages get their signals from
# SLURM, and srun would kill them before they have saved. To stop a job early: scancel --signal=USR1 JOB.
stage=
pass_on() { [ -z "$stage" ] || [ -n "${SLURM_JOB_ID:-}" ] || kill -"$1" "$stage" 2>/dev/null || true; }
trap 'pass_on TERM' INT TERM
trap 'pass_on USR1' USR1

# run SCRIPT COMMAND...
run() {
    local script=$1 status
    shift
    "$@" 2>&1 &
    stage=$!
    while wait "$stage" && status=0 || status=$?; kill -0 "$stage" 2>/dev/null; do :; done
    [ "$status" -ne 0 ] || return 0
    echo "run.sh: $script failed with status $status (above 128: a signal); run it again to go on" >&2
    [ "$status" -ne 138 ] || [ -z "${SLURM_JOB_ID:-}" ] || scontrol requeue "$SLURM_JOB_ID"
    exit "$status"
}

switches=()
[ "$activation_checkpointing" = 0 ] || switches+=(--activation_checkpointing)
[ "$tf32" = 0 ] || switches+=(--tf32)
[ "$compile" = 0 ] || switches+=(--compile)

train() {
    run "$1" ${launch[@]+"${launch[@]}"} "$python" "$here/$1" "${@:2}" --allow_changed "$allow_changed" \
        --long_utterances "$long_utterances" \
        --tsv_dir "$tsv_dir" --train_subset "$train_subset" --teacher_ckpt "$teacher_ckpt" \
        --distill_layers "$distill_layers" --distill_mode "$distill_mode" --l2_weight "$l2_weight" \
        --l1_weight "$l1_weight" --cos_weight "$cos_weight" --cos_type "$cos_type" --clip_norm "$clip_norm" \
        --num_nodes "$nodes" --gpus "$gpus" --seconds_per_batch "$seconds_per_batch" --accum_grad "$accum_grad" \
        --precision "$precision" --num_workers "$num_workers" --save_interval "$save_interval" \
        --log_interval "$log_interval" --seed "$seed" ${switches[@]+"${switches[@]}"}
}

train distill.py --exp_dir "$root_dir" --student_ckpt "$student_ckpt" --learning_rate "$lr" \
    --warmup_updates "$warmup" --max_updates "$max" --pruning_units "$pruning_units" \
    --reg_learning_rate "$reg_lr" --target_sparsity "$target_sparsity" --sparsity_of "$sparsity_of" \
    --sparsity_warmup_updates "$sparsity_warmup"
match=()
[ "$match_target" = 0 ] || match=(--target_sparsity "$target_sparsity")
run prune.py "$python" "$here/prune.py" --distilled_ckpt "$root_dir/ckpts/last.ckpt" --original_ckpt "$student_ckpt" \
    --out "$pruned" --allow_changed "$allow_changed" ${match[@]+"${match[@]}"}
train final_distill.py --exp_dir "$final_dir" --student_ckpt "$pruned" --learning_rate "$final_lr" \
    --warmup_updates "$final_warmup" --max_updates "$final_max"
run save_final_ckpt.py "$python" "$here/save_final_ckpt.py" --config_path "$pruned" --allow_changed "$allow_changed" \
    --ckpt_after_final_distill "$final_dir/ckpts/last.ckpt" --out "$final_dir/ckpts/pruned_hubert_base.pth"
"$python" "$here/report.py" --teacher_ckpt "$teacher_ckpt" --root_dir "$root_dir" --final_dir "$final_dir" \
    --tsv_dir "$tsv_dir" --out "$final_dir/report" ||
    echo "run.sh: the model is finished, but its report could not be written" >&2
