"""Files that are damaged or hostile, or hold other values than they should: one sentence, no code is run."""

import copy
import functools
import os
import random

import torch

from converters.fairseq import load_fairseq
from tests.faults.table import MUTATIONS, SEED, Case, Outcome, finished, refused, same_checkpoint
from tests.helpers.stages import ROOT
from training.resume import read_training_checkpoint
from utils.checkpoint import load_model
from utils.files import UserError
from utils.run_record import read_run

LAYER_NORM = "encoder.transformer.layer_norm.weight"


class Call:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def model(change):
    """Exports a model from a file whose content is changed."""

    def do(world):
        path, content = world.tmp / "odd.pth", torch.load(world.teacher, weights_only=True)
        changed = change(content)
        torch.save(content if changed is None else changed, path)
        return world.call("export_to_hf", "--ckpt", path, "--out", world.tmp / "new")

    return do


def config(key, value):
    return model(lambda content: content["config"].update({key: value}))


def weight(value, key=LAYER_NORM):
    return model(lambda content: content["state_dict"].update({key: value}))


def call_of_system(world):
    """Exports a model whose file calls a function that would leave a mark."""
    mark = world.tmp / "ran"
    outcome = model(lambda content: content.update(extra=Call(os.system, f"touch {mark}")))(world)
    assert not mark.exists()
    return outcome


def trained(change):
    """Trains with a teacher whose weights are changed."""

    def do(world):
        path, content = world.tmp / "teacher.pth", torch.load(world.teacher, weights_only=True)
        change(content["state_dict"])
        torch.save(content, path)
        return world.call("distill", *world.distill(teacher_ckpt=path))

    return do


def as_type(dtype):
    return trained(lambda tensors: tensors.update({key: value.to(dtype) for key, value in tensors.items()}))


def huge(tensors):
    for key in tensors:
        if key.endswith("output_dense.weight"):
            tensors[key] = torch.full_like(tensors[key], 3e38)


def stage_1(key, value):
    """Prunes what stage 1 has left, with another entry."""

    def do(world):
        path = world.tmp / "last.ckpt"
        torch.save({**world.content("last.ckpt"), key: value}, path)
        return world.call("prune", *world.pruning(path))

    return do


def resumed(*keys, value=None, harmless=False):
    """Goes on from update 8 with the entry that keys lead to changed, or removed where there is no value; a
    harmless change leads to the unbroken run's weights."""

    def do(world):
        content, ckpts = copy.deepcopy(world.content("previous.ckpt")), world.tmp / "exp" / "ckpts"
        *outer, last = keys
        place = functools.reduce(lambda holder, key: holder[key], outer, content)
        if value is None:
            del place[last]
        else:
            place[last] = value
        ckpts.mkdir(parents=True)
        torch.save(content, ckpts / "last.ckpt")
        outcome = world.call("distill", *world.distill())
        if harmless:
            same_checkpoint(ckpts / "last.ckpt", world.stages / "ckpts" / "last.ckpt")
        return outcome

    return do


def mutated(read, good):
    """Random changes to a file: each is refused in one sentence, or the file is read."""

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
    "fairseq's file": (
        lambda path: load_fairseq(str(path), "hubert"),
        lambda world: ROOT / "tests" / "golden" / "fairseq_hubert_base.pt",
    ),
    "run.json": (lambda path: read_run(path.parent), lambda world: world.stages / "run.json"),
}

RESUMED = {
    "no optimiser": resumed("optimizer_states"),
    "no record": resumed("run"),
    "a record with line breaks": resumed("run", "flags", "cos_type", value="a\nb\x1b[2J"),
    "a missing weight": resumed("state_dict", "lambda1"),
    "a weight of another shape": resumed("state_dict", "lambda1", value=torch.zeros(2)),
}
HARMLESS = {
    "a learning rate of 10**9": ("optimizer_states", 0, "param_groups", 0, "lr"),
    "an unknown callback's state": ("callbacks", "x"),
}

ODD_CONFIG = {
    "extractor_conv_layer_config": [(16, 3, 0)],
    "encoder_embed_dim": None,
    "encoder_num_heads": 1.5,
}
MODELS = {
    "a state dict that is a list": model(lambda content: content.update(state_dict=[1])),
    "a config that is a list": model(lambda content: content.update(config=[1])),
    "a weight that is a text": weight("x"),
    "a weight of whole numbers": weight(torch.ones(32).long()),
    "a weight that is NaN": weight(torch.full((32,), torch.nan)),
    "a call of os.system": call_of_system,
}

CASES = [
    *(Case(f"{key} {value}", config(key, value), refused("odd.pth")) for key, value in ODD_CONFIG.items()),
    *(Case(name, do, refused("odd.pth")) for name, do in MODELS.items()),
    Case(
        "a name that moves the cursor",
        weight(torch.ones(1), "a\nb\x1b]0;x\x07"),
        refused(r"a\nb\x1b]0;x\x07"),
    ),
    Case("weights of 3e38", trained(huge), refused("update 1: the loss is ")),
    Case("weights in int8", as_type(torch.int8), refused("teacher.pth")),
    Case("weights in float16", as_type(torch.float16), finished("update 10/10")),
    Case("weights in float64", as_type(torch.float64), finished("update 10/10")),
    Case("stage 1's settings a list", stage_1("hyper_parameters", [1]), refused("last.ckpt")),
    Case("stage 1's weights a list", stage_1("state_dict", [1]), refused("last.ckpt")),
    Case("stage 1's record a list", stage_1("run", [1]), refused("last.ckpt")),
    *(Case(name, do, refused("/ckpts/last.ckpt")) for name, do in RESUMED.items()),
    *(
        Case(name, resumed(*keys, value=1e9, harmless=True), finished("update 10/10"))
        for name, keys in HARMLESS.items()
    ),
    *(Case(f"random changes to {name}", mutated(*reader), finished()) for name, reader in READERS.items()),
]
