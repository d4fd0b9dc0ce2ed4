"""The devices and processes of a run, and what its models need for them."""

from __future__ import annotations

import argparse
import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial

import torch
from pytorch_lightning.plugins.environments import ClusterEnvironment, LightningEnvironment, SLURMEnvironment
from pytorch_lightning.strategies import DDPStrategy

from lightning import DistillModule
from utils.files import UserError
from utils.processes import in_slurm_step, say

DIST_TIMEOUT = timedelta(seconds=600)
"""How long the processes of a run wait for each other."""


def devices_per_node(args: argparse.Namespace) -> tuple[str, int]:
    """``Trainer``'s ``accelerator`` for --gpus on this machine, and the processes of a node, one per device.

    Raises:
        UserError: this machine, or the tasks that SLURM has started, are not what the flag asks for.
    """
    tasks = slurm_tasks(args) if in_slurm_step() else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not (args.gpus and found):
        return "cpu", tasks
    if in_slurm_step() and tasks != args.gpus:
        raise UserError(
            f"--gpus {args.gpus}: SLURM has started {tasks} tasks per node; give srun "
            f"--ntasks-per-node={args.gpus}"
        )
    if args.gpus > found and not _sees_one_gpu(args):
        raise UserError(f"--gpus {args.gpus}: this machine has {found}; ask for at most {found}")
    return "gpu", args.gpus


def slurm_tasks(args: argparse.Namespace) -> int:
    """The tasks that srun has started on each node: the job's header may have asked for other ones."""
    tasks, nodes = (int(os.environ[f"SLURM_STEP_NUM_{what}"]) for what in ("TASKS", "NODES"))
    a_node = tasks // args.num_nodes
    on_each = os.environ["SLURM_STEP_TASKS_PER_NODE"].removesuffix(f"(x{nodes})")
    if nodes != args.num_nodes or on_each != str(a_node):
        raise UserError(
            f"--num_nodes {args.num_nodes}: SLURM has started {tasks} tasks on {nodes} nodes; give srun "
            f"--nodes={args.num_nodes} and --ntasks-per-node"
        )
    return a_node


def world_size(args: argparse.Namespace) -> int:
    """How many processes train together."""
    return devices_per_node(args)[1] * args.num_nodes


def _sees_one_gpu(args: argparse.Namespace) -> bool:
    """Whether SLURM has bound one GPU to each task, so that none sees the others'."""
    return in_slurm_step() and torch.cuda.device_count() == 1 < args.gpus


def trainer_devices(args: argparse.Namespace) -> dict:
    """``Trainer``'s ``accelerator``, ``devices``, ``num_nodes`` and ``strategy``."""
    accelerator, devices = devices_per_node(args)
    if accelerator == "cpu":
        say(f"warning: {'no GPU is found' if args.gpus else '--gpus 0'}: training on the CPU, which is slow")
    chosen = {"accelerator": accelerator, "devices": devices, "num_nodes": args.num_nodes}
    if world_size(args) == 1:
        return chosen
    if args.num_nodes > 1 and not in_slurm_step() and "RANK" not in os.environ:
        port = os.environ.setdefault("MASTER_PORT", "29400")
        say(
            f"--num_nodes {args.num_nodes}: waiting for the other nodes for up to "
            f"{DIST_TIMEOUT.seconds} s; run this command there with NODE_RANK=1 and so on, "
            f"MASTER_ADDR this machine's address and MASTER_PORT={port}"
        )
    if accelerator == "gpu" and _sees_one_gpu(args):
        chosen["devices"] = 1
    # The models' buffers are constants, which need not be sent to the other processes at every pass.
    return {**chosen, "strategy": DDPStrategy(timeout=DIST_TIMEOUT, broadcast_buffers=False)}


def cluster(args: argparse.Namespace) -> list[ClusterEnvironment]:
    """``Trainer``'s plugin for what has started this process: srun, torchrun (which Lightning recognises
    without a plugin), or neither."""
    if not in_slurm_step():
        # Lightning would take the tasks that a job may have for this run's, in its script or shell too.
        return [] if "RANK" in os.environ else [LightningEnvironment()]
    step = {"NTASKS": "NUM_TASKS", "NNODES": "NUM_NODES", "NODELIST": "NODELIST"}
    os.environ.update({f"SLURM_{name}": os.environ[f"SLURM_STEP_{of}"] for name, of in step.items()})
    os.environ["SLURM_NTASKS_PER_NODE"] = str(slurm_tasks(args))
    # A port of its own for each step, also beside one that SLURM has lost sight of.
    job, number, restart = (
        int(os.environ.get(f"SLURM_{name}", "0")) for name in ("JOB_ID", "STEP_ID", "RESTART_COUNT")
    )
    os.environ.setdefault("MASTER_PORT", str(15_000 + (job + 101 * number + 1_009 * restart) % 10_000))
    # Lightning looks at the job's name too, and would start processes of its own inside salloc.
    return [BoundTask() if _sees_one_gpu(args) else SLURMEnvironment(auto_requeue=False)]


class BoundTask(SLURMEnvironment):
    """SLURM where each task sees one GPU alone (``--gpus-per-task``), which is number 0 to each of them."""

    def __init__(self) -> None:
        super().__init__(auto_requeue=False)

    def local_rank(self) -> int:
        return 0

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Lightning would want as many GPUs in sight as there are tasks."""


@contextmanager
def prepared_process(args: argparse.Namespace) -> Iterator[None]:
    """Sets this process up for its device, before CUDA starts, and undoes at the end what would stay."""
    if devices_per_node(args)[0] == "gpu":
        prepare_gpu(args.tf32)
        yield
    else:
        from training import onednn

        keep_freed_memory()
        onednn.enable()
        try:
            yield
        finally:
            onednn.disable()


def prepare_gpu(tf32: bool) -> None:
    """Makes the settings that have to stand before CUDA starts."""
    if not {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"} & os.environ.keys():
        # Batches of many lengths would leave gaps between blocks of fixed size.
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    # cuDNN's attention would build a plan for each new length of a batch.
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32


def keep_freed_memory() -> None:
    """Lets glibc keep freed memory for the next update, which it would give back to the system and take again
    page by page (benchmarks/README.md has the difference)."""
    trim_threshold, mmap_threshold = -1, -3  # numbers in glibc's malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # other C libraries have no such function
        if not mallopt(mmap_threshold, 2**30):
            mallopt(mmap_threshold, 2**25)  # the most that older releases take
        mallopt(trim_threshold, 2**30)


def prepare_models(module: DistillModule, args: argparse.Namespace, precision: str) -> None:
    """Sets the models up for the device and as the flags ask for; ``precision`` is Lightning's name of it."""
    if devices_per_node(args)[0] == "gpu":
        from training.gpu_weights import HALF, cast_frozen_weights, narrowed_together

        if precision in HALF and module.teacher_model is not None:
            cast_frozen_weights(module.teacher_model, HALF[precision])
        # Several processes send the gradients of a quarter of a Base model while others are computed.
        module.narrow = partial(narrowed_together, layers=3 if world_size(args) > 1 else 12)
    if args.activation_checkpointing:
        from training.layers import checkpoint_activations

        checkpoint_activations(module.student_model)
    if args.compile:
        from training.layers import compile_layers

        compile_layers(module)
