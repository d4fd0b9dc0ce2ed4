"""One rank of stage 1, which notes its process, its batches and its end in the folder ``NOTES`` of the
environment: ``ddp_worker.py FLAGS OF distill.py``."""

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

import dataset.batches
import distill
from training import trainer
from utils.cli import run_script

out, rank = Path(os.environ["NOTES"]), os.environ.get("RANK") or os.environ.get("LOCAL_RANK", "0")
(out / f"rank{rank}.pid").write_text(str(os.getpid()))
batches, batches_an_epoch, broadcasts = [], [], []
crops, train = dataset.batches.BucketBatchSampler._crops, trainer.train
broadcast = torch.distributed.broadcast


def note_batch(self, utterances, epoch):
    if self.shuffle:
        batches.append(utterances.tolist())
        batches_an_epoch.append(self.batches_an_epoch)
    return crops(self, utterances, epoch)


def note_broadcast(*args, **kwargs):
    broadcasts.append(args)
    return broadcast(*args, **kwargs)


def note_end(module, run):
    train(module, run)
    weights = {
        key: value for key, value in module.state_dict().items() if not key.startswith("teacher_model.")
    }
    content = {"weights": weights, "batches": batches, "batches_an_epoch": (batches_an_epoch or [0])[0]}
    content["broadcasts"] = len(broadcasts)
    torch.save(content, out / f"rank{rank}.pt")


dataset.batches.BucketBatchSampler._crops = note_batch
trainer.train = note_end
torch.distributed.broadcast = note_broadcast
try:
    run_script(distill.main)
except SystemExit as exit:
    (out / f"rank{rank}.status").write_text(str(exit.code))
    raise
