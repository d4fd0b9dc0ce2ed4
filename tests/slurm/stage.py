"""Stands in for every script of run.sh: it saves, stops and goes on as they do, and computes nothing.

``SECONDS_prune`` in its environment says how long prune.py works, and ``STATUS_distill="0 -"`` with which
status each rank of distill.py ends at once, or that it never ends; ``SAVES_NOTHING`` keeps it from saving."""

import os
import signal
import sys
import time
from pathlib import Path

name = Path(sys.argv[0]).stem
flags = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=False))
rank, tasks = int(os.environ.get("SLURM_PROCID", 0)), os.environ.get("SLURM_STEP_NUM_TASKS", "none")
told = []
if trains := "--exp_dir" in flags:
    signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
    signal.signal(signal.SIGUSR1, lambda number, frame: told.append(number))
saved = Path(flags["--exp_dir"]) / "ckpts" / "last.ckpt" if trains else Path(flags["--out"])
done = float(saved.read_text()) if trains and saved.exists() else 0
module = os.environ.get("MODULE", "")
print(f"{name} from {done:g}, rank {rank} of {tasks}{module}", flush=True)
status = os.environ.get(f"STATUS_{name}", "").split()
if status:
    while status[rank] == "-":
        time.sleep(1)
    sys.exit(int(status[rank]))
begin = time.monotonic() - done
finished = not trains and saved.exists()
while not (told or finished) and time.monotonic() - begin < float(os.environ.get(f"SECONDS_{name}", 0.3)):
    time.sleep(0.05)
if rank == 0 and "SAVES_NOTHING" not in os.environ:
    saved.parent.mkdir(parents=True, exist_ok=True)
    saved.write_text(f"{time.monotonic() - begin:.2f}")
# The ranks of a real run leave one after the other.
time.sleep(0.3 * rank)
print(f"{name} ends", flush=True)
sys.exit(128 + told[0] if told else 0)
