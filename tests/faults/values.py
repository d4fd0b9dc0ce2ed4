"""Values of flags that are no numbers, too large or too small, or name nothing."""

from tests.faults.table import Case, finished, refused

ODD = {
    "learning_rate": ("nan", "inf", "0", ""),
    "weight_decay": ("-1",),
    "target_sparsity": ("nan", "1"),
    "max_updates": ("1e3",),
    "seed": (str(2**64),),
    "distill_layers": ("", "0..3", "9" * 5000),
    "pruning_units": ("", ","),
}


def flag(name, value):
    return lambda world: world.call("distill", *world.distill(**{name: value}))


CASES = [
    *(
        Case(f"--{name} {value[:20]!r}", flag(name, value), refused(f"--{name}"))
        for name, values in ODD.items()
        for value in values
    ),
    *(
        Case(f"--{name} that is a folder", flag(name, "/tmp"), refused("/tmp"))
        for name in ("teacher_ckpt", "student_ckpt", "resume_checkpoint")
    ),
    *(
        Case(f"--train_subset {value[:20]!r}", flag("train_subset", value), refused(".tsv"))
        for value in ("", "../train100x", "train100.tsv", "a" * 300)
    ),
    Case("more warm-up than updates", flag("warmup_updates", "1000000"), finished("update 10/10")),
    Case("an epoch of one batch", flag("seconds_per_batch", "100000"), finished("update 10/10")),
    Case("a batch for every utterance", flag("seconds_per_batch", "0.001"), finished("update 10/10")),
    Case("a sparsity of 0", flag("target_sparsity", "0"), finished("update 10/10")),
]
