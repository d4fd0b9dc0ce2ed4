"""The processes of a command: how they begin, which one speaks for all, and how signals end them.

It imports nothing heavy, since ``utils.begin`` imports it before the seconds in which torch is imported.
"""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
"""What asks a run to save and stop: preemption, Ctrl-C, SLURM's warning before the time limit, a lost
connection."""


def settle_streams() -> None:
    """Lets a script print where its standard streams are closed, and name files in UTF-8 in any locale."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        # What is closed would become the next file that is opened, and be written to by libraries.
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # A name may have bytes that are none of its encoding.
            stream.reconfigure(errors="backslashreplace")


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


def handle_signals(handler: Callable) -> dict:
    """Gives :data:`SIGNALS` to ``handler``, but for a SIGHUP that is ignored, as nohup does. Returns what had
    them before, by number."""
    hung_up = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return {n: signal.signal(n, handler) for n in SIGNALS if n != signal.SIGHUP or not hung_up}


def quit_at_once(number: int, frame) -> None:
    """A handler that ends this process at once, with one sentence and status 128 + the signal's number."""
    _say_what_ends(number)
    os._exit(128 + number)


def unwind(number: int, frame) -> None:
    """A handler that ends this process by a SystemExit, so that what is half-written is removed, and at a
    second signal at once."""
    handle_signals(lambda number, frame: os._exit(128 + number))
    # A thread that serves the children, as a pool of processes has one, may fail over their end.
    threading.excepthook = lambda failure: None
    _say_what_ends(number)
    sys.exit(128 + number)


def _say_what_ends(number: int) -> None:
    if multiprocessing.parent_process() is None:
        name = os.path.basename(sys.argv[0])
        say(f"{name}: stopped by {signal.Signals(number).name} with nothing to save; run it again")
        end_children()
    else:
        os._exit(128 + number)
