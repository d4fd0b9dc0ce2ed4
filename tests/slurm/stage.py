"""Stands in for every script that run.sh runs: it saves, stops and goes on as they do, and computes nothing.

``SECONDS_prune`` and the like in its environment say how long a script works; ``STATUS_prune`` how it ends."""

import os
import signal
import sys
import time
from pathlib import Path

name = Path(sys.argv[0]).stem
flags = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=False))
rank, tasks = os.environ.get("SLURM_PROCID", "0"), os.environ.get("SLURM_STEP_NUM_TASKS", "none")
told = []
trains = "--exp_dir" in flags
for number in (signal.SIGTERM, signal.SIGUSR1) if trains else ():
    signal.signal(number, lambda number, frame: told.append(number))
saved = Path(flags["--exp_dir"]) / "ckpts" / "last.ckpt" if trains else Path(flags["--out"])
saved.parent.mkdir(parents=True, exist_ok=True)
seconds = float(os.environ.get(f"SECONDS_{name}", 0.5))
done = float(saved.read_text()) if trains and saved.exists() else 0
print(f"{name} from {done:g}, rank {rank} of {tasks}", flush=True)
begin = time.monotonic() - done
while not told and time.monotonic() - begin < seconds:
    time.sleep(0.05)
status = int(os.environ.get(f"STATUS_{name}", 0))
if rank == "0" and not status and not os.environ.get("SAVES_NOTHING"):
    saved.write_text(f"{time.monotonic() - begin:.2f}")
# The ranks of a real run leave one after the other.
time.sleep(float(rank))
print(f"{name} ends", flush=True)
sys.exit(status or (128 + told[0] if told else 0))
