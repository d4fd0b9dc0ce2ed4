"""What torch and Lightning raise about a run's processes and its machine, as sentences with a remedy."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from training import hardware
from training.callbacks import StopOnSignal
from utils.cli import memory_shortage
from utils.files import UserError
from utils.processes import is_first, say

LESS_MEMORY = "lower --seconds_per_batch and raise --accum_grad, or give --activation_checkpointing"
"""What helps where memory is short."""


@contextmanager
def errors_as_sentences(args: argparse.Namespace, stopper: StopOnSignal) -> Iterator[None]:
    """Wraps a training stage: raises UserErrors in place of what is raised about processes, compilers and
    disks. No error is another process's end where this one has got a signal, which stopped them both."""
    try:
        yield
    except (OSError, RuntimeError, MemoryError) as error:
        # torch would raise an error for each further worker that ends, wherever this process then is.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        reader, rank = lost_reader(error), lost_rank(error, args)
        sentence = reader or rank or machine_failed(error, args)
        if sentence is None or memory_shortage(error):
            raise  # run_script has a sentence for the latter
        if not ((reader or rank) and stopper.received):
            if rank and not is_first():
                raise SystemExit(2) from error
            raise UserError(sentence) from error
        stopper.signal = stopper.received
        name = signal.Signals(stopper.signal).name
        say(f"stopped by {name} before the update was over; run the same command again to go on")


def lost_reader(error: OSError | RuntimeError) -> str | None:
    """The sentence for one of this process's loaders that has died; None where the error is another one."""
    # The first two are what a loader's process leaves that has died while it handed a batch over.
    nameless = isinstance(error, (ConnectionError, FileNotFoundError)) and error.filename is None
    if nameless or "DataLoader worker" in str(error):
        return (
            "a process that reads audio was killed, often for want of memory: run the same command again to "
            "go on from the last checkpoint, with a lower --num_workers if it happens again"
        )
    return None


def lost_rank(error: OSError | RuntimeError, args: argparse.Namespace) -> str | None:
    """The sentence for another rank that has ended or failed; None where the error is another one."""
    said = str(error)
    if "clients joined" in said or "client socket has timed out" in said:
        return (
            f"not all processes of the run have come together within {hardware.DIST_TIMEOUT.seconds} s "
            f"(--num_nodes {args.num_nodes}, --gpus {args.gpus}): start this command on every node"
        )
    # gloo's own errors have no type.
    gloo = "gloo" in said or "Connection closed by peer" in said
    if isinstance(error, torch.distributed.DistError) or (isinstance(error, RuntimeError) and gloo):
        # torch's reason comes after the place in its source, and before its advice.
        reason = said.partition("\n")[0].rpartition("] ")[2].partition(". ")[0] or "no reason given"
        return (
            f"another process of this run has ended or does not answer ({reason}): see its message, and run "
            "the same command again to go on from the last checkpoint"
        )
    return None


def machine_failed(error: OSError | RuntimeError, args: argparse.Namespace) -> str | None:
    """The sentence for a compiler or disk that failed; None where the error is another one."""
    if args.compile and isinstance(error, torch._dynamo.exc.TorchDynamoException):
        reason = str(error).splitlines()[0]
        return f"--compile: torch cannot compile here ({reason}): run without it, or install it"
    if isinstance(error, OSError) and error.filename is None:
        return f"cannot write the logs in {args.exp_dir}/logs: {error.strerror or error}"
    return None
