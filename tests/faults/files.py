"""Files that are damaged or hostile, or hold odd values: one sentence, and no code is run."""

import os
import random

import torch

from tests.faults.table import MUTATIONS, SEED, Case, Outcome, finished, refused
from tests.helpers.stages import ROOT

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


def calls(function, argument):
    """Exports a model whose file calls a function that would leave a mark."""

    def do(world):
        mark = world.tmp / "ran"
        outcome = model(lambda content: content.update(extra=Call(function, argument.format(mark))))(world)
        assert not mark.exists()
        return outcome

    return do


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


def stage_1(change):
    """Prunes what stage 1 has left, changed."""

    def do(world):
        path, content = world.tmp / "last.ckpt", world.content("last.ckpt")
        change(content)
        torch.save(content, path)
        return world.call("prune", "--distilled_ckpt", path, "--original_ckpt", world.teacher)

    return do


def projections(value):
    """Starts stage 3 from a pruned file that has other projections."""

    def do(world):
        path, content = world.tmp / "pruned.pth", world.content("pruned_hubert_base.pth")
        content["distill_linear_projs"] = value
        torch.save(content, path)
        return world.call("final_distill", *world.final_distill(student_ckpt=path))

    return do


def mutated(read, good, count=MUTATIONS):
    """Random changes to a file: each is refused in one sentence, or the file is read."""

    def do(world):
        from utils.files import UserError

        content, generator = good(world).read_bytes(), random.Random(SEED)
        path = world.tmp / "file.pth"
        for _ in range(count):
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


def read_model(path):
    from utils.checkpoint import load_model

    load_model(path)


def read_training(path):
    from training.resume import read_training_checkpoint

    read_training_checkpoint(path)


def read_fairseq(path):
    from converters.fairseq import load_fairseq

    load_fairseq(str(path), "hubert")


def read_run_json(path):
    from utils.run_record import read_run

    path.rename(path.with_name("run.json"))
    read_run(path.parent)


ODD_CONFIG = {
    "extractor_mode": 5,
    "extractor_conv_layer_config": [(16, 3, 0)],
    "extractor_conv_bias": "x",
    "encoder_embed_dim": None,
    "encoder_num_layers": 0,
    "encoder_use_attention": [1, 2],
    "encoder_ff_interm_features": {},
    "encoder_dropout": "x",
    "encoder_num_heads": 1.5,
    "normalize_waveform": None,
}

CASES = [
    *(Case(f"{key} {value}", config(key, value), refused("odd.pth")) for key, value in ODD_CONFIG.items()),
    Case("a state dict that is a list", model(lambda c: c.update(state_dict=[1])), refused("odd.pth")),
    Case("a config that is a list", model(lambda c: c.update(config=[1])), refused("odd.pth")),
    Case("a file that is a tensor", model(lambda c: torch.ones(3)), refused("odd.pth")),
    Case("a weight that is a text", weight("x"), refused("odd.pth")),
    Case("a weight in a list", weight([torch.ones(32)]), refused("odd.pth")),
    Case("a sparse weight", weight(torch.ones(32).to_sparse()), refused("odd.pth")),
    Case("a weight of whole numbers", weight(torch.ones(32).long()), refused("odd.pth")),
    Case("a weight's name that is a number", weight(torch.ones(1), key=5), refused("odd.pth")),
    Case(
        "a name that moves the cursor",
        weight(torch.ones(1), "a\nb\x1b]0;x\x07"),
        refused(r"a\nb\x1b]0;x\x07"),
    ),
    Case("a call of os.system", calls(os.system, "touch {}"), refused("odd.pth")),
    Case("a call of eval", calls(eval, "open('{}', 'w')"), refused("odd.pth")),
    Case("a weight that is NaN", weight(torch.full((32,), torch.nan)), refused("odd.pth")),
    Case("weights of 3e38", trained(huge), refused("update 1: the loss is ")),
    Case("weights in int8", as_type(torch.int8), refused("teacher.pth")),
    Case("weights in float8", as_type(torch.float8_e4m3fn), refused("teacher.pth")),
    Case("weights in float16", as_type(torch.float16), finished("update 10/10")),
    Case("weights in bfloat16", as_type(torch.bfloat16), finished("update 10/10")),
    Case("weights in float64", as_type(torch.float64), finished("update 10/10")),
    Case(
        "stage 1's settings a list", stage_1(lambda c: c.update(hyper_parameters=[1])), refused("last.ckpt")
    ),
    Case("stage 1's weights a list", stage_1(lambda c: c.update(state_dict=[1])), refused("last.ckpt")),
    Case("stage 1's record a list", stage_1(lambda c: c.update(run=[1])), refused("last.ckpt")),
    Case("stage 1's record empty", stage_1(lambda c: c.update(run={})), refused("last.ckpt")),
    Case("a projection that is a text", projections({"0.weight": "x"}), refused("pruned.pth")),
    Case("random changes to a model", mutated(read_model, lambda world: world.teacher), finished()),
    Case("100 random changes to a model", mutated(read_model, lambda world: world.teacher, 100), finished()),
    Case(
        "random changes to a checkpoint of training",
        mutated(read_training, lambda world: world.stages / "ckpts" / "last.ckpt"),
        finished(),
    ),
    Case(
        "random changes to fairseq's file",
        mutated(read_fairseq, lambda world: ROOT / "tests" / "golden" / "fairseq_hubert_base.pt"),
        finished(),
    ),
    Case(
        "random changes to run.json",
        mutated(read_run_json, lambda world: world.stages / "run.json"),
        finished(),
    ),
]
