"""Values of other types than they should be, in every file that is read and every flag."""

import torch

from tests.faults.table import Case, finished, refused

KEY = "encoder.transformer.layer_norm.weight"
NO_TENSOR = " in its state dict is no tensor of floating-point numbers"
ODD = [None, True, -1, 0, 1.5, 10**5000, "x", "", [], [1, 2], [[1]], {}, {"a": 1}, b"x", torch.zeros(2)]
"""Values of all types that a file can hold. One in three of those lines is for `make test`."""


def shown(value) -> str:
    text = "10**5000" if type(value) is int and value > 2**64 else repr(value)
    return text.replace("[", "(").replace("]", ")")


def model(change):
    """Exports a model whose file is changed."""

    def do(world):
        content = torch.load(world.teacher, weights_only=True)
        path = world.tmp / "odd.pth"
        changed = change(content)
        torch.save(content if changed is None else changed, path)
        return world.call("export_to_hf", "--ckpt", path, "--out", world.tmp / "new")

    return do


def entry(part, key, value):
    return model(lambda content: content[part].update({key: value}))


def stage_1(change):
    """Prunes what stage 1 has left, changed."""

    def do(world):
        content = world.content("last.ckpt")
        change(content)
        path = world.tmp / "last.ckpt"
        torch.save(content, path)
        return world.call("prune", "--distilled_ckpt", path, "--original_ckpt", world.teacher)

    return do


def stage_2(change):
    """Starts stage 3 from a pruned file that is changed."""

    def do(world):
        content = world.content("pruned_hubert_base.pth")
        change(content)
        path = world.tmp / "pruned.pth"
        torch.save(content, path)
        return world.call("final_distill", *world.final_distill(student_ckpt=path))

    return do


def flag(name, value):
    return lambda world: world.call("distill", *world.distill(**{name: value}))


CONFIG = [
    "extractor_mode",
    "extractor_conv_layer_config",
    "extractor_conv_bias",
    "encoder_embed_dim",
    "encoder_num_layers",
    "encoder_use_attention",
    "encoder_ff_interm_features",
    "encoder_dropout",
    "encoder_num_heads",
    "normalize_waveform",
]


SETTINGS = ("distill_layers", "distill_mode", "max_updates", "sparsity_of", "target_sparsity", "teacher_cost")

CASES = [
    *(
        Case(f"{key} {shown(value)}", entry("config", key, value), refused("odd.pth: "), place % 3 > 0)
        for key in CONFIG
        for place, value in enumerate(ODD)
        if not (isinstance(value, bool) and key in ("extractor_conv_bias", "normalize_waveform"))
        and not (type(value) is int and value == 0 and key == "encoder_dropout")
    ),
    *(
        Case(f"a weight {shown(value)}", entry("state_dict", KEY, value), refused("odd.pth: "), place % 3 > 0)
        for place, value in enumerate(ODD)
    ),
    Case(
        "a state dict that is a list",
        model(lambda c: c.update(state_dict=[1])),
        refused('has no "state_dict"'),
    ),
    Case("a config that is a list", model(lambda c: c.update(config=[1])), refused('has no "config"')),
    Case("a file that is a list", model(lambda c: [1]), refused("holds a list, not")),
    Case("a file that is a tensor", model(lambda c: torch.ones(3)), refused("holds a Tensor, not")),
    Case("a file that is a text", model(lambda c: "text"), refused("holds a str, not")),
    Case("a weight's name that is a number", entry("state_dict", 5, torch.ones(1)), refused("5" + NO_TENSOR)),
    Case("a weight's name that is a tuple", entry("state_dict", (1, 2), torch.ones(1)), refused(NO_TENSOR)),
    Case("a config key that is a number", entry("config", 5, 1), refused("odd.pth: ")),
    Case(
        "a sparse weight",
        entry("state_dict", KEY, torch.ones(32).to_sparse()),
        refused(f"{KEY} is not a plain"),
    ),
    Case("a weight in a list", entry("state_dict", KEY, [torch.ones(32)]), refused(KEY + NO_TENSOR)),
    Case(
        "a weight of whole numbers", entry("state_dict", KEY, torch.ones(32).long()), refused(KEY + NO_TENSOR)
    ),
    *(
        Case(
            f"stage 1's {name} {shown(value)}",
            stage_1(lambda c, name=name, value=value: c["hyper_parameters"].update({name: value})),
            refused("last.ckpt: "),
            place % 3 > 0,
        )
        for name in SETTINGS
        for place, value in enumerate(ODD)
        if not (name == "distill_layers" and value in ([], [1, 2]) and isinstance(value, list))
        and not (name == "distill_mode" and isinstance(value, str))
        and not (name == "target_sparsity" and (value is None or (type(value) is int and value == 0)))
    ),
    Case(
        "stage 1's hyper-parameters a list",
        stage_1(lambda c: c.update(hyper_parameters=[1])),
        refused("hyper_par"),
    ),
    Case(
        "stage 1's weights a list",
        stage_1(lambda c: c.update(state_dict=[1])),
        refused("its state_dict is damaged"),
    ),
    Case(
        "stage 1's weights numbered", stage_1(lambda c: c["state_dict"].update({5: 1})), refused("is damaged")
    ),
    Case("stage 1's record a list", stage_1(lambda c: c.update(run=[1])), refused("its run is damaged")),
    Case(
        "stage 1's record empty",
        stage_1(lambda c: c.update(run={})),
        refused("the record of what it was made"),
    ),
    Case(
        "stage 1's record without inputs", stage_1(lambda c: c["run"].update(inputs={})), finished("wrote ")
    ),
    Case(
        "no projections",
        stage_2(lambda c: c.pop("distill_linear_projs")),
        refused("its projections are not those"),
    ),
    *(
        Case(
            f"projections {shown(value)}",
            stage_2(lambda c, value=value: c.update(distill_linear_projs=value)),
            refused("pruned.pth: "),
            place % 3 > 0,
        )
        for place, value in enumerate(ODD)
    ),
    Case(
        "a projection that is a text",
        stage_2(lambda c: c["distill_linear_projs"].update({"0.weight": "x"})),
        refused("its projections are not those"),
    ),
    Case(
        "a projection that is numbered",
        stage_2(lambda c: c["distill_linear_projs"].update({5: torch.ones(1)})),
        refused("pruned.pth: "),
    ),
    *(
        Case(f"--distill_layers {value!r}", flag("distill_layers", value), refused("--distill_layers"))
        for value in ("", ".", ",", "0.", "0..3", "x", "-1", "0.99", "1e1", "0 3", "0x1", "9" * 5000)
    ),
    *(
        Case(f"--pruning_units {value!r}", flag("pruning_units", value), refused("--pruning_units"))
        for value in ("", ",", "x", "conv;head", "Conv")
    ),
    *(
        Case(f"--train_subset {value!r}", flag("train_subset", value), refused(".tsv"))
        for value in ("", "x", "../train100x", "train100.tsv", "a" * 300)
    ),
    *(
        Case(f"--{name} that is a folder", flag(name, "/tmp"), refused("/tmp"))
        for name in ("teacher_ckpt", "student_ckpt", "resume_checkpoint")
    ),
    *(
        Case(f"--{name} of nothing", flag(name, ""), refused(f"--{name}"))
        for name in ("teacher_ckpt", "student_ckpt", "exp_dir", "tsv_dir", "precision", "gpus", "num_nodes")
    ),
]
