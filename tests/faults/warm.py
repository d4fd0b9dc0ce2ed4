"""Runs scripts of the checkout in forks of a process that has imported what takes seconds to import.

It reads lines of JSON: ``argv``, ``environment`` and ``log``, the file of the output. For each it prints the
fork's ``pid``, and when a fork has ended, its ``pid`` and ``status``.
"""

import json
import os
import runpy
import select
import sys
from datetime import timedelta


def answer(**content) -> None:
    print(json.dumps(content), flush=True)


def serve() -> dict:
    """Forks; returns in each fork, with the request."""
    unread = b""
    while True:
        if select.select([0], [], [], 0.01)[0]:
            read = os.read(0, 2**16)
            if not read:
                os._exit(0)
            *lines, unread = (unread + read).split(b"\n")
            for line in lines:
                if (pid := os.fork()) == 0:
                    return json.loads(line)
                answer(pid=pid)
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid == 0:
                break
            answer(pid=pid, status=os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    import torch.utils.tensorboard  # noqa: F401

    import final_distill  # noqa: F401
    import prune  # noqa: F401
    from tests.faults.table import PATIENCE
    from training import hardware

    hardware.DIST_TIMEOUT = timedelta(seconds=PATIENCE)

    request = serve()
    os.setsid()
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.environ.update(request["environment"])
    sys.argv = request["argv"]
    runpy.run_path(sys.argv[0], run_name="__main__")
