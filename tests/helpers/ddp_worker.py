"""One rank of stage 1, which notes its process, its batches and its end in the folder ``NOTES`` of the
environment and waits for other ranks for ``PATIENCE`` seconds: ``ddp_worker.py FLAGS OF distill.py``."""

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

import dataset.batches
import distill
from training import hardware
from utils.cli import run_script

out, rank = Path(os.environ["NOTES"]), os.environ.get("RANK") or os.environ.get("LOCAL_RANK", "0")
(out / f"rank{rank}.pid").write_text(str(os.getpid()))
hardware.DIST_TIMEOUT = timedelta(seconds=int(os.environ.get("PATIENCE", "600")))
modules, batches, samplers, broadcasts = [], [], [], []
crops, make_module = dataset.batches.BucketBatchSampler._crops, distill.DistillModule
broadcast = torch.distributed.broadcast


def note_batch(self, utterances, epoch):
    if self.shuffle:
        batches.append(utterances.tolist())
        samplers.append(self)
    return crops(self, utterances, epoch)


def note_broadcast(*args, **kwargs):
    broadcasts.append(args)
    return broadcast(*args, **kwargs)


def note_module(**arguments):
    modules.append(make_module(**arguments))
    return modules[-1]


dataset.batches.BucketBatchSampler._crops = note_batch
distill.DistillModule = note_module
torch.distributed.broadcast = note_broadcast
try:
    run_script(distill.main)
except SystemExit as exit:
    (out / f"rank{rank}.status").write_text(str(exit.code))
    raise
weights = {k: v for k, v in modules[0].state_dict().items() if not k.startswith("teacher_model.")}
content = {"weights": weights, "batches": batches, "broadcasts": len(broadcasts)}
content["batches_an_epoch"] = samplers[0].batches_an_epoch if samplers else 0
torch.save(content, out / f"rank{rank}.pt")
