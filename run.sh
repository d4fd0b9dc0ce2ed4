#!/usr/bin/env bash
#SBATCH --job-name=distill-prune
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=13
#SBATCH --mem=200G
#SBATCH --time=48:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#
# The whole recipe: distil and prune, cut, distil again, save. `sbatch run.sh` on a cluster, `bash run.sh` elsewhere.
# Every variable below can be set from outside: `train_subset=train100 gpus=1 accum_grad=4 bash run.sh`.
# `root_dir=EXP sbatch run.sh finetune.py FLAG...` runs this one command in the same way.
# Run it again, and each stage sees from what lies in its folder whether it is finished, goes on or starts.
# Before its time limit and when it is preempted, a job saves and SLURM runs it again; `scancel JOB` saves and ends it.
set -euo pipefail

# data
: "${tsv_dir:=data/librispeech}" "${train_subset:=train960}"
: "${long_utterances:=drop}" # recordings above 15.6 s: drop, or split into equal pieces

# shared by both distillations
: "${teacher_ckpt:=pretrained/hubert-base-ls960.hf.pth}" "${student_ckpt:=$teacher_ckpt}"
: "${distill_layers:=0.4,8,12}" "${distill_mode:=layer2layer}"
: "${student_layers:=}" "${predlayer_activation:=gelu}" # layers of a student of another depth; gelu or none
: "${l2_weight:=0}" "${l1_weight:=1}" "${cos_weight:=1}" "${cos_type:=raw}" "${seed:=2022}"
: "${head_weight:=}" # weight of the loss on the head's outputs; empty means 1 if both models have a head, else 0

# stage 1: distil and prune
: "${lr:=0.0002}" "${warmup:=15000}" "${max:=50000}"
: "${pruning_units:=conv,head,interm}" "${reg_lr:=0.02}" "${target_sparsity:=0.75}" "${sparsity_warmup:=5000}"
: "${sparsity_of:=params}" "${match_target:=0}" # params or macs; 1 prunes to exactly the target

# stage 3: distil the pruned model
: "${final_lr:=0.0001}" "${final_warmup:=5000}" "${final_max:=25000}"

# machine; 4 GPUs x 160 s is the batch of the paper, so fewer GPUs want more seconds_per_batch, or accum_grad
: "${nodes:=${SLURM_JOB_NUM_NODES:-1}}" "${gpus:=4}" "${seconds_per_batch:=160}" "${accum_grad:=1}"
: "${cpu_tasks:=1}" # processes on each node where gpus is 0
: "${precision:=16}" "${num_workers:=12}" "${clip_norm:=10}" "${save_interval:=1000}" "${log_interval:=50}"
# 1: less memory for more work; faster products for --precision 32; torch.compile
: "${activation_checkpointing:=0}" "${tf32:=0}" "${compile:=0}"
: "${python:=python}" "${allow_changed:=}"

if (($#)) && [ -z "${root_dir:-}" ]; then
    echo "run.sh: name the folder of the run of $1: root_dir=EXP" >&2
    exit 2
fi

# The folder is named by what matters, which the stages check too.
model=$(basename "$teacher_ckpt" .pth) && model=${model/#hubert-base-ls960.hf/hubert-base}
[ "$student_ckpt" = "$teacher_ckpt" ] || model+=_$(basename "$student_ckpt" .pth)
: "${root_dir:=exp/${model}_${train_subset}_sp${target_sparsity}${sparsity_of#params}_spup${sparsity_warmup}_lr${lr}_up${warmup}_max${max}_${distill_mode}${predlayer_activation#gelu}${distill_layers}${student_layers:+of$student_layers}_reglr${reg_lr}_${pruning_units}$([ "$seed" = 2022 ] || echo "_seed$seed")}"
: "${final_dir:=$root_dir/lr${final_lr}_up${final_warmup}_max${final_max}}"
pruned=$root_dir/ckpts/pruned_hubert_base.pth

# A signal to this shell goes to its stage, which saves: again and again, since what is just starting may not hear it.
# srun passes SIGUSR1 on to its tasks, and at other signals kills them.
job=${SLURM_JOB_ID:-} told='' stage=''
pass_on() {
    told=$1
    [ -z "$job" ] || set -- USR1
    [ -z "$stage" ] || while kill -"$1" "$stage"; do sleep 5; done &>/dev/null &
}
trap 'pass_on TERM' HUP INT TERM
trap 'pass_on USR1' USR1

export PYTHONUNBUFFERED=1
tasks=$((gpus > 0 ? gpus : cpu_tasks))
[ "$gpus" != 0 ] || export LOCAL_WORLD_SIZE=$cpu_tasks
here=$(CDPATH= cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
show_job() { scontrol show job "$job" 2>/dev/null || true; }
if [ -n "$job" ]; then
    # sbatch runs a copy of this file, away from the scripts; SLURM knows where it was.
    [ -f "$here/distill.py" ] || here=$(dirname "$(show_job | sed -n 's/^ *Command=//p')")
    cpus=${SLURM_JOB_CPUS_PER_NODE%%[(,]*} per_task=${SLURM_CPUS_PER_TASK:-1}
    if ((nodes > SLURM_JOB_NUM_NODES || gpus > ${SLURM_GPUS_ON_NODE:-$gpus} || tasks * per_task > cpus)); then
        echo "run.sh: this job has no room for $tasks tasks and $gpus GPUs on each of $nodes nodes: set nodes," \
            "gpus or cpu_tasks, or give sbatch --nodes, --ntasks-per-node and --gpus-per-node" >&2
        exit 2
    fi
    # The run's folder leads to the job's output.
    mkdir -p "$root_dir" && ln -s "$(show_job | sed -n 's/^ *StdOut=//p')" "$root_dir" 2>/dev/null || true
fi

# again STATUSES: has SLURM start this job again if its time limit, a signal before it or a preemption has stopped it.
again() {
    local now saved
    now=$(show_job)
    [[ ($told || $1 =~ 138|143) && $now == *Requeue=1*" Restarts=${SLURM_RESTART_COUNT:-0} "*BatchFlag=1* ]] || return 0
    if [[ $now != *JobState=RUNNING*PreemptTime=[0-9]* ]]; then
        [[ $now == *Reason=TimeLimit* || ($now == *JobState=RUNNING* && ($told || $1 =~ 138)) ]] || return 0
        saved="job $job: $(stat -c '%n %s %Y' "$root_dir"/ckpts/* "$final_dir"/ckpts/* 2>/dev/null || true)"
        if [ "$saved" = "$(cat "$root_dir/.requeued" 2>/dev/null)" ]; then
            echo "run.sh: nothing was saved since this job was requeued: its time limit (--time) is too short" >&2
            return 0
        fi
        echo "$saved" >"$root_dir/.requeued"
    fi
    scontrol requeue "$job" && echo "run.sh: SLURM starts this job again, which then goes on" >&2 || true
}

# run SCRIPT NODES TASKS_A_NODE FLAG...
run() {
    local script=$1 command=("$python" "$here/$1" "${@:4}") status said=$root_dir/.$1.$job.$$
    # Only the stage itself, by its first task, says whether it is finished: srun's status is 0 where a node is lost.
    [ -z "$job" ] || command=(srun --export=ALL --overlap --kill-on-bad-exit=0 --wait=60 --nodes="$2"
        --ntasks=$(($2 * $3)) --ntasks-per-node="$3" ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"}
        bash -c 'trap : HUP INT TERM USR1
        "$@"; status=$?; [ "$SLURM_PROCID" != 0 ] || echo $status >"$0"; exit $status' "$said" "${command[@]}")
    [ -z "$told" ] || command=(bash -c 'kill $$') # a signal between two stages
    "${command[@]}" 2>&1 &
    stage=$!
    [ -z "$told" ] || pass_on "$told"
    while wait "$stage" && status=0 || status=$?; kill -0 "$stage" 2>/dev/null; do :; done
    stage=
    [ -z "$job" ] || status="$(cat "$said" 2>/dev/null || echo 1) $status"
    rm -f "$said"
    [ "${status%% *}" != 0 ] || return 0
    echo "run.sh: $script is not finished: status ${status%% *} (above 128: a signal); run it again to go on" >&2
    [ -z "$job" ] || again "$status"
    [ "$script" != report.py ] || status=0
    exit "${status%% *}"
}

if (($#)); then
    run "$1" "$nodes" "$tasks" "${@:2}" --exp_dir "$root_dir" --num_nodes "$nodes" --gpus "$gpus"
    exit
fi

switches=()
[ "$activation_checkpointing" = 0 ] || switches+=(--activation_checkpointing)
[ "$tf32" = 0 ] || switches+=(--tf32)
[ "$compile" = 0 ] || switches+=(--compile)
[ -z "$head_weight" ] || switches+=(--head_weight "$head_weight")
[ -z "$student_layers" ] || switches+=(--student_layers "$student_layers")

train() {
    run "$1" "$nodes" "$tasks" "${@:2}" --allow_changed "$allow_changed" \
        --long_utterances "$long_utterances" \
        --tsv_dir "$tsv_dir" --train_subset "$train_subset" --teacher_ckpt "$teacher_ckpt" \
        --distill_layers "$distill_layers" --distill_mode "$distill_mode" \
        --predlayer_activation "$predlayer_activation" --l2_weight "$l2_weight" \
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
run prune.py 1 1 --distilled_ckpt "$root_dir/ckpts/last.ckpt" --original_ckpt "$student_ckpt" \
    --out "$pruned" --allow_changed "$allow_changed" ${match[@]+"${match[@]}"}
train final_distill.py --exp_dir "$final_dir" --student_ckpt "$pruned" --learning_rate "$final_lr" \
    --warmup_updates "$final_warmup" --max_updates "$final_max"
run save_final_ckpt.py 1 1 --config_path "$pruned" --allow_changed "$allow_changed" \
    --ckpt_after_final_distill "$final_dir/ckpts/last.ckpt" --out "$final_dir/ckpts/pruned_hubert_base.pth"
run report.py 1 1 --teacher_ckpt "$teacher_ckpt" --root_dir "$root_dir" --final_dir "$final_dir" --tsv_dir "$tsv_dir" \
    --out "$final_dir/report"
