"""The processes of a run: which one speaks for all, and how they end where there is nothing to save.

It imports nothing heavy, so that a script can call ``quit_on_signals`` before it imports torch for seconds.
"""

import multiprocessing
import os
import signal
import sys
from contextlib import suppress

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""What asks a run to save and stop: preemption, Ctrl-C, SLURM's warning before the time limit."""


def in_slurm_step() -> bool:
    """Whether srun has given this process its rank. A job's script and its shells have a SLURM_PROCID too."""
    return "SLURM_STEP_NUM_TASKS" in os.environ and "RANK" not in os.environ


def is_first() -> bool:
    """Whether this is the first process of the run, the one that speaks and writes."""
    if "RANK" in os.environ:
        return os.environ["RANK"] == "0"
    if in_slurm_step():
        return os.environ["SLURM_PROCID"] == "0"
    return os.environ.get("LOCAL_RANK", "0") == os.environ.get("NODE_RANK", "0") == "0"


def reports_errors() -> bool:
    """Whether this process says what went wrong: the first one of a node does, and all do once they have come
    together and read data of their own."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return True
    return os.environ.get("SLURM_LOCALID" if in_slurm_step() else "LOCAL_RANK", "0") == "0"


def say(text: str) -> None:
    """Prints a line for the user, on the first process alone."""
    if is_first():
        # A run goes on where its terminal is gone or the disk of its log is full.
        with suppress(OSError):
            print(text, file=sys.stderr, flush=True)


def available_cpus() -> int:
    """The processors that this process may use, which SLURM makes fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def end_children() -> None:
    """Ends this process's loader workers at once, where Python gets no chance to do so by itself."""
    # torch would raise an error for each of them.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in multiprocessing.active_children():
        child.kill()


def quit_on_signals() -> None:
    """From now on a signal ends this process at once, with one sentence and status 128 + its number."""
    for number in SIGNALS:
        signal.signal(number, _quit)


def _quit(number: int, frame) -> None:
    if multiprocessing.parent_process() is None:
        name = os.path.basename(sys.argv[0])
        say(f"{name}: stopped by {signal.Signals(number).name} with nothing to save; run it again to go on")
        end_children()
    os._exit(128 + number)
