"""The first import of every command: a signal ends it with one sentence also during the slow imports that
follow, and it can do without standard streams and in any locale. A process that only imports the command, a
worker or a test, is left as it is."""

import sys
from pathlib import Path

from utils.processes import handle_signals, quit_at_once, settle_streams

_main = getattr(sys.modules["__main__"], "__file__", None)
if _main is not None and Path(_main).resolve().parent == Path(__file__).resolve().parents[1]:
    settle_streams()
    handle_signals(quit_at_once)
