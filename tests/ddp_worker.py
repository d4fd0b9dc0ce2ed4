"""One rank of stage 1, which notes what it read and what it ended with: ``ddp_worker.py OUT FLAGS OF
distill.py``."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import dataset.batches
import distill
import training

out = Path(sys.argv.pop(1))
batches, batches_an_epoch = [], []
crops, train = dataset.batches.BucketBatchSampler._crops, training.train


def note_batch(self, utterances, epoch):
    if self.shuffle:
        batches.append(utterances.tolist())
        batches_an_epoch.append(self.batches_an_epoch)
    return crops(self, utterances, epoch)


def note_end(module, args):
    train(module, args)
    weights = {
        key: value for key, value in module.state_dict().items() if not key.startswith("teacher_model.")
    }
    content = {"weights": weights, "batches": batches, "batches_an_epoch": batches_an_epoch[0]}
    torch.save(content, out / f"rank{module.global_rank}.pt")


dataset.batches.BucketBatchSampler._crops = note_batch
training.train = note_end
distill.main()
