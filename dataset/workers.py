"""The processes that read audio: how they start, and which signals they heed."""

import os
import signal
import sys
import threading
from multiprocessing import connection, context

from utils.files import UserError
from utils.processes import SIGNALS

SECONDS, ATTEMPTS = 10.0, 5
"""For how long a new process may be silent, and how often another one is started in its place."""


def start_method() -> context.BaseContext | None:
    """How a ``DataLoader`` starts its processes: by fork on Linux, elsewhere as Python does by default."""
    return ForkThatArrives() if sys.platform == "linux" else None


if sys.platform == "linux":
    from multiprocessing import popen_fork

    class _Popen(popen_fork.Popen):
        def _launch(self, process: "_Process") -> None:
            for _ in range(ATTEMPTS):
                arrival, process.report = os.pipe()
                # The new process keeps them blocked, also before leave_signals_to_training.
                blocked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
                try:
                    super()._launch(process)
                finally:
                    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
                    os.close(process.report)
                # A process that ends at once closes its end too: whoever waits for it finds out.
                arrived = connection.wait([arrival], SECONDS)
                os.close(arrival)
                if arrived:
                    return
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                self.finalizer()
            raise UserError(
                f"{ATTEMPTS} processes that were to read audio stood still for {SECONDS:g} s each: run the "
                "same command again, or give --num_workers 0"
            )

    class _Process(context.ForkProcess):
        _Popen = _Popen

        def _bootstrap(self, *args, **kwargs) -> int:
            os.close(self.report)
            return super()._bootstrap(*args, **kwargs)

    class ForkThatArrives(context.ForkContext):
        """Python's fork, tried again where the new process stands still.

        Up to Python 3.11, a process that forks while another of its threads starts or ends may leave its
        child waiting for a lock of Python's own. The forkserver has no such fault, but a reader that it
        starts imports torch and Lightning anew: it takes 7 s in place of 0.03, holds 460 MiB of its own in
        place of 3 (one core of an AMD EPYC, 2026-11-26), and outlives a training process that was killed.
        """

        Process = _Process


def leave_signals_to_training(worker: int) -> None:
    """A ``worker_init_fn``: readers go on when a signal to the whole run asks training to save and stop.

    Python ends its remaining readers by SIGTERM, so only a SIGTERM from the training process counts.
    """
    for number in set(SIGNALS) - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        threading.Thread(target=_end_for_parent_alone, args=(os.getppid(),), daemon=True).start()


def _end_for_parent_alone(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
