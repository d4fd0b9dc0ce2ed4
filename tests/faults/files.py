"""Files with random changes: each is refused in one sentence, or read."""

import random

from converters.fairseq import load_fairseq
from tests.faults.table import MUTATIONS, SEED, Case, Outcome, finished
from tests.helpers.convert import GOLDEN
from training.resume import read_training_checkpoint
from utils.checkpoint import load_model
from utils.files import UserError
from utils.run_record import read_run

FAIRSEQ = GOLDEN / "fairseq_hubert_base.pt"


def mutated(read, good):
    def do(world):
        content, generator = good(world).read_bytes(), random.Random(SEED)
        path = world.tmp / "run.json"
        for _ in range(MUTATIONS):
            changed = bytearray(content)
            for _ in range(generator.choice([1, 1, 3, 20])):
                # Half of the changes are in the end of the file, where a checkpoint's structure is.
                start = generator.choice([0, max(0, len(changed) - 5_000)])
                changed[generator.randrange(start, len(changed))] = generator.randrange(256)
            if generator.random() < 0.2:
                del changed[generator.randrange(len(changed)) :]
            path.write_bytes(changed)
            try:
                read(path)
            except UserError as error:
                assert "\n" not in str(error) and "weights_only" not in str(error)
        return Outcome(0, "")

    return do


READERS = {
    "a model": (load_model, lambda world: world.teacher),
    "a checkpoint of training": (
        read_training_checkpoint,
        lambda world: world.stages / "ckpts" / "last.ckpt",
    ),
    "fairseq's file": (lambda path: load_fairseq(str(path), "hubert"), lambda world: FAIRSEQ),
    "run.json": (lambda path: read_run(path.parent), lambda world: world.stages / "run.json"),
}

CASES = [Case(f"random changes to {name}", mutated(*reader), finished()) for name, reader in READERS.items()]
