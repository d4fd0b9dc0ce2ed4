"""The processes that read audio: how they start, and which signals they heed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from multiprocessing import connection

from utils.files import UserError

SECONDS, ATTEMPTS = 10.0, 5
"""For how long a new process may be silent, and how often another one is started in its place."""


def start_method() -> multiprocessing.context.BaseContext | None:
    """How a ``DataLoader`` starts its processes; None leaves it to Python, where Python does not fork."""
    return ForkThatArrives() if multiprocessing.get_context().get_start_method() == "fork" else None


if hasattr(os, "fork"):
    from multiprocessing import context, popen_fork

    _report: tuple[int, int] | None = None

    def _arrive() -> None:
        global _report
        if _report is not None:
            os.write(_report[1], b"1")
            for end in _report:
                os.close(end)
            _report = None

    os.register_at_fork(after_in_child=_arrive)

    class _Popen(popen_fork.Popen):
        def _launch(self, process) -> None:
            global _report
            for _ in range(ATTEMPTS):
                _report = heard, said = os.pipe()
                try:
                    super()._launch(process)
                finally:
                    _report = None
                    os.close(said)
                # One that ends at once closes its end, and is found to have ended by those who wait for it.
                arrived = connection.wait([heard], SECONDS)
                os.close(heard)
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
        @staticmethod
        def _Popen(process) -> _Popen:
            return _Popen(process)

    class ForkThatArrives(context.ForkContext):
        """Python's fork, tried again where the new process stands still.

        A process that forks while another of its threads holds a lock of Python's own may leave its child
        waiting for this lock. Up to Python 3.11 there is one that starting and ending threads take, as those
        of a distributed run do at any moment. The child then stands still before it runs a line, and heeds no
        signal but SIGKILL.
        """

        Process = _Process


def leave_signals_to_training(worker: int) -> None:
    """A signal that asks training to save and stop reaches all its processes: the readers have to go on.

    A SIGTERM of training's own is how Python ends what is left of them, so it has to be told from others'.
    """
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_for_parent_alone, args=(os.getppid(),), daemon=True).start()


def _end_for_parent_alone(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
