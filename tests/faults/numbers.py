"""Numbers that are none, too large, too small or too many."""

import torch

from tests.faults.table import Case, finished, refused


def flag(name, value, stage="distill"):
    return lambda world: world.call(stage, *getattr(world, stage)(**{name: value}))


NOT_ABOVE_0 = "is not a number above 0"
NOT_WHOLE = "is not a whole number above 0 (and below 2^31)"
NOT_NATURAL = "is not a whole number, 0 or above"
NOT_0_OR_ABOVE = "is not a number, 0 or above"
NOT_A_SHARE = "is not a number from 0 to below 1"

FLAGS = [
    ("learning_rate", ("nan", "inf", "-1", "0", "1e400", "x", ""), NOT_ABOVE_0),
    ("reg_learning_rate", ("nan", "inf", "0"), NOT_ABOVE_0),
    ("seconds_per_batch", ("nan", "inf", "0", "-5"), NOT_ABOVE_0),
    ("weight_decay", ("nan", "inf", "-1"), NOT_0_OR_ABOVE),
    ("clip_norm", ("nan", "inf", "-1"), NOT_0_OR_ABOVE),
    ("l1_weight", ("nan", "inf", "-1"), NOT_0_OR_ABOVE),
    ("target_sparsity", ("nan", "1", "-0.1", "inf"), NOT_A_SHARE),
    ("max_updates", ("0", "-1", "1.5", "1e3", "nan", "2147483648"), NOT_WHOLE),
    ("accum_grad", ("0", "-1", str(10**19)), NOT_WHOLE),
    ("save_interval", ("0", "-1"), NOT_WHOLE),
    ("warmup_updates", ("-1", "0.5", str(10**19)), NOT_NATURAL),
    ("num_workers", ("-1", "x"), NOT_NATURAL),
    ("seed", ("-1", str(2**64)), NOT_NATURAL),
]


def with_weights(change):
    """Trains with a teacher whose weights are changed."""

    def do(world):
        content = torch.load(world.teacher, weights_only=True)
        change(content["state_dict"])
        path = world.tmp / "teacher.pth"
        torch.save(content, path)
        return world.call("distill", *world.distill(teacher_ckpt=path))

    return do


BIAS = "encoder.transformer.layers.1.attention.q_proj.bias"


def one(value, dtype=torch.float32):
    def change(tensors):
        tensors[BIAS] = tensors[BIAS].to(dtype)
        tensors[BIAS][3] = value

    return change


def huge(tensors):
    for key in tensors:
        if key.endswith("output_dense.weight"):
            tensors[key] = torch.full_like(tensors[key], 3e38)


def as_type(dtype):
    return lambda tensors: tensors.update({key: value.to(dtype) for key, value in tensors.items()})


CASES = [
    *(
        Case(f"--{name} {value or 'of nothing'}", flag(name, value), refused(f"--{name}: ", words))
        for name, values, words in FLAGS
        for value in values
    ),
    Case(
        "a weight that is NaN",
        with_weights(one(torch.nan)),
        refused(f"{BIAS} has a value that is not finite"),
    ),
    Case(
        "a weight that is infinite", with_weights(one(-torch.inf)), refused(f"{BIAS} has a value that is not")
    ),
    Case(
        "a NaN in float64", with_weights(one(torch.nan, torch.float64)), refused(f"{BIAS} has a value that")
    ),
    Case(
        "a float64 beyond float32",
        with_weights(one(1e300, torch.float64)),
        refused("that float32 cannot hold"),
    ),
    Case("weights of 3e38", with_weights(huge), refused("update 1: the loss is ")),
    Case("weights in float16", with_weights(as_type(torch.float16)), finished("update 10/10"), slow=True),
    Case("weights in bfloat16", with_weights(as_type(torch.bfloat16)), finished("update 10/10"), slow=True),
    Case("weights in float64", with_weights(as_type(torch.float64)), finished("update 10/10"), slow=True),
    Case(
        "weights in int8", with_weights(as_type(torch.int8)), refused("no tensor of floating-point numbers")
    ),
    Case(
        "weights in complex64", with_weights(as_type(torch.complex64)), refused("no tensor of floating-point")
    ),
    Case("weights in float8", with_weights(as_type(torch.float8_e4m3fn)), refused("is not a plain one")),
    Case("more warm-up than updates", flag("warmup_updates", "1000000"), finished("update 10/10"), slow=True),
    Case("an epoch of one batch", flag("seconds_per_batch", "100000"), finished("update 10/10"), slow=True),
    Case(
        "a batch for every utterance", flag("seconds_per_batch", "0.001"), finished("update 10/10"), slow=True
    ),
    Case("a sparsity of 0", flag("target_sparsity", "0"), finished("update 10/10"), slow=True),
]
