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
        what, sentence = explained(error, args)
        if what is None or memory_shortage(error):
            raise  # run_script has a sentence for the latter
        if what == "machine" or not stopper.received:
            if what == "rank" and not is_first():
                raise SystemExit(2) from error
            raise UserError(sentence) from error
        stopper.signal = stopper.received
        name = signal.Signals(stopper.signal).name
        say(f"stopped by {name} before the update was over; run the same command again to go on")


def explained(error: Exception, args: argparse.Namespace) -> tuple[str | None, str]:
    """What has failed, and the sentence for it: a "reader", one of this process's loaders, that has died;
    another "rank" that has ended or failed; this "machine", a compiler or disk; None for any other error."""
    said = str(error)
    nameless = isinstance(error, OSError) and error.filename is None
    # The first two are what a loader's process leaves that has died while it handed a batch over.
    left = (ConnectionError, FileNotFoundError)
    if (nameless and isinstance(error, left)) or "DataLoader worker" in said:
        return "reader", (
            "a process that reads audio was killed, often for want of memory: run the same command again to "
            "go on from the last checkpoint, with a lower --num_workers if it happens again"
        )
    if "clients joined" in said or "client socket has timed out" in said:
        return "rank", (
            f"not all processes of the run have come together within {hardware.DIST_TIMEOUT.seconds} s "
            f"(--num_nodes {args.num_nodes}, --gpus {args.gpus}): start this command on every node"
        )
    # gloo's own errors have no type.
    gloo = "gloo" in said or "Connection closed by peer" in said
    if isinstance(error, torch.distributed.DistError) or (isinstance(error, RuntimeError) and gloo):
        # torch's reason comes after the place in its source, and before its advice.
        reason = said.partition("\n")[0].rpartition("] ")[2].partition(". ")[0] or "no reason given"
        return "rank", (
            f"another process of this run has ended or does not answer ({reason}): see its message, and run "
            "the same command again to go on from the last checkpoint"
        )
    if args.compile and isinstance(error, torch._dynamo.exc.TorchDynamoException):
        reason = said.splitlines()[0]
        return "machine", f"--compile: torch cannot compile here ({reason}): run without it, or install it"
    if nameless:
        return "machine", f"cannot write the logs in {args.exp_dir}/logs: {error.strerror or error}"
    return None, ""
