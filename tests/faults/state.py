"""What a resumed checkpoint and an experiment's folder hold: all of it is checked before use."""

import copy
import json
import random
import shutil

import torch

from tests.faults.table import MUTATIONS, SEED, Case, Outcome, finished, refused, same_checkpoint
from tests.helpers.stages import checkpoint

CHECKPOINT = "/ckpts/last.ckpt"
OTHER_GROUPS = "its optimiser has other groups of parameters than these models"
ODD_STATE = "the optimiser's state of its parameter 3 is missing, or of another shape or type"
COUNTERS = "its counters (loops) are not those of its update 8"
RANDOM_STATE = "its random_state is none of torch's"
RECORD = "the record of what it was made with is damaged"


def resumed(change):
    """Goes on from the checkpoint of update 8, with its content changed."""

    def do(world):
        content = copy.deepcopy(world.content("previous.ckpt"))
        change(content)
        (world.tmp / "exp" / "ckpts").mkdir(parents=True)
        torch.save(content, world.tmp / "exp" / "ckpts" / "last.ckpt")
        return world.call("distill", *world.distill())

    return do


def harmless(change):
    """The same where the change must not matter: the run ends with the unbroken run's weights."""

    def do(world):
        outcome = resumed(change)(world)
        same_checkpoint(world.tmp / "exp" / "ckpts" / "last.ckpt", world.stages / "ckpts" / "last.ckpt")
        return outcome

    return do


def put(value, *keys):
    """Sets the entry that ``keys`` lead to."""

    def change(content):
        *path, last = keys
        for key in path:
            content = content[key]
        content[last] = value

    return change


def drop(*keys):
    def change(content):
        *path, last = keys
        for key in path:
            content = content[key]
        del content[last]

    return change


def moment(**values):
    """Changes the optimiser's state of one parameter."""
    return lambda content: content["optimizer_states"][0]["state"][3].update(values)


def every_step(value):
    def change(content):
        for state in content["optimizer_states"][0]["state"].values():
            state["step"] = torch.tensor(value)

    return change


def at_update(value):
    def change(content):
        content["global_step"] = content["SpeechDataModule"]["update"] = value

    return change


def negative(content):
    content["optimizer_states"][0]["state"][3]["exp_avg_sq"].neg_().sub_(1)


OPTIMIZER = ("optimizer_states", 0)
FIT = ("loops", "fit_loop")
BATCHES = (*FIT, "epoch_loop.batch_progress")

RESUMED = [
    ("no optimiser", put([], "optimizer_states"), OTHER_GROUPS),
    ("two optimisers", lambda c: c["optimizer_states"].append(c["optimizer_states"][0]), OTHER_GROUPS),
    ("an optimiser that is a number", put(3, *OPTIMIZER), OTHER_GROUPS),
    ("no groups of parameters", put([], *OPTIMIZER, "param_groups"), OTHER_GROUPS),
    ("groups that are numbers", put([1, 2, 3], *OPTIMIZER, "param_groups"), OTHER_GROUPS),
    ("a group of other parameters", put([0], *OPTIMIZER, "param_groups", 0, "params"), OTHER_GROUPS),
    ("a group of another name", put(["x"], *OPTIMIZER, "param_groups", 0, "name"), OTHER_GROUPS),
    ("states that are a list", put([], *OPTIMIZER, "state"), OTHER_GROUPS),
    ("no states", put({}, *OPTIMIZER, "state"), "state of its parameter 0 is missing"),
    ("a missing state", drop(*OPTIMIZER, "state", 3), ODD_STATE),
    ("a state too many", put({}, *OPTIMIZER, "state", 500), "states of more parameters than there are"),
    ("a state that is a text", put("x", *OPTIMIZER, "state", 3), ODD_STATE),
    ("an empty state", put({}, *OPTIMIZER, "state", 3), ODD_STATE),
    ("a first moment of another shape", moment(exp_avg=torch.zeros(2)), ODD_STATE),
    ("a second moment of another shape", moment(exp_avg_sq=torch.zeros(1)), ODD_STATE),
    ("a moment of a larger shape", moment(exp_avg=torch.zeros(999, 999)), ODD_STATE),
    ("a moment in float64", moment(exp_avg=torch.zeros(16, 16, 3, dtype=torch.float64)), ODD_STATE),
    ("a moment in int64", moment(exp_avg=torch.zeros(16, 16, 3, dtype=torch.int64)), ODD_STATE),
    ("a moment that is a list", moment(exp_avg=[0.0]), ODD_STATE),
    ("a moment too many", moment(max_exp_avg_sq=torch.zeros(16, 16, 3)), ODD_STATE),
    ("a negative second moment", negative, "state of its parameter 3 is damaged"),
    ("a moment that is NaN", moment(exp_avg=torch.full((16, 16, 3), torch.nan)), "is not finite"),
    ("a step of several numbers", moment(step=torch.ones(2)), "state of its parameter 3 is damaged"),
    ("a step that is an integer", moment(step=8), "state of its parameter 3 is damaged"),
    ("a negative step", moment(step=torch.tensor(-5.0)), "its optimiser has made -5 of 8 updates"),
    ("a step of 10**9", moment(step=torch.tensor(1e9)), "its optimiser has made 1e+09 of 8 updates"),
    ("a step that is NaN", moment(step=torch.tensor(torch.nan)), "is not finite"),
    ("one step that lags", moment(step=torch.tensor(3.0)), "its optimiser has made 3 of 8 updates"),
    ("steps that all lag", every_step(3.0), "its optimiser has made 3 of 8 updates"),
    ("steps that are all 0", every_step(0.0), "its optimiser has made 0 of 8 updates"),
    ("a negative update", put(-1, "global_step"), "its update (global_step) is -1"),
    ("update 0", at_update(0), "its update (global_step) is 0"),
    ("an update of 10**9", at_update(10**9), "which a run of 10 updates cannot have"),
    ("an update of 10**30", at_update(10**30), "cannot have"),
    ("an update that is True", put(True, "global_step"), "its update (global_step) is True"),
    ("an update that is 8.0", put(8.0, "global_step"), "has no global_step"),
    ("no update", drop("global_step"), "has no global_step"),
    ("update 9 of a checkpoint of update 8", at_update(9), "rates is not at its update 9"),
    ("another place in the data", put(4, "SpeechDataModule", "update"), "that of its data (SpeechData"),
    ("a place in the data of 10**9", put(10**9, "SpeechDataModule", "update"), "that of its data"),
    ("a place in the data that is a text", put("8", "SpeechDataModule", "update"), "that of its data"),
    (
        "a place in the data that is a tensor",
        put(torch.tensor(8), "SpeechDataModule", "update"),
        "of its data",
    ),
    ("no place in the data", put({}, "SpeechDataModule"), "that of its data"),
    ("no counters", put({}, "loops"), COUNTERS),
    ("counters that are a number", put(3, *FIT), COUNTERS),
    ("a counter that is missing", drop(*FIT, "epoch_progress"), COUNTERS),
    ("10**9 batches done", put(10**9, *BATCHES, "total", "ready"), COUNTERS),
    ("10**9 batches done in the epoch", put(10**9, *BATCHES, "current", "ready"), COUNTERS),
    ("fewer batches done", put(3, *BATCHES, "current", "completed"), COUNTERS),
    ("-1 batches done", put(-1, *BATCHES, "current", "ready"), COUNTERS),
    ("a counter that is a text", put("8", *BATCHES, "total", "ready"), COUNTERS),
    ("a counter that is a tensor", put(torch.ones(2), *BATCHES, "total", "ready"), COUNTERS),
    ("a counter that is None", put(None, *FIT, "epoch_loop.scheduler_progress"), COUNTERS),
    ("updates that are a list", put([], *FIT, "epoch_loop.automatic_optimization.optim_progress"), COUNTERS),
    ("callbacks that are a list", put([1], "callbacks"), "has no callbacks"),
    ("no schedule", put([], "lr_schedulers"), "its schedule of learning rates is not at its update 8"),
    ("a schedule that is a number", put([3], "lr_schedulers"), "its schedule of learning rates"),
    ("a schedule at -10**9", put(-(10**9), "lr_schedulers", 0, "last_epoch"), "its schedule of learning"),
    ("a schedule that is ahead", put(9, "lr_schedulers", 0, "last_epoch"), "its schedule of learning"),
    ("no random state", put([], "random_state"), "its random_state is empty"),
    ("an empty random state", put([{}], "random_state"), RANDOM_STATE),
    ("a random state of zeros", put(torch.zeros(5056).byte(), "random_state", 0, "cpu"), RANDOM_STATE),
    ("a short random state", put(torch.zeros(3).byte(), "random_state", 0, "cpu"), RANDOM_STATE),
    ("a random state of floats", put(torch.zeros(5056), "random_state", 0, "cpu"), RANDOM_STATE),
    ("a random state that is a number", put([3], "random_state"), RANDOM_STATE),
    ("a record without flags", put(3, "run", "flags"), RECORD),
    ("a record without inputs", drop("run", "inputs"), RECORD),
    ("a record of an input that is a number", put(3, "run", "inputs", "teacher_ckpt"), RECORD),
    ("a record of no stage", put(None, "run", "stage"), RECORD),
    ("a record with lists in lists", put([[1] * 99] * 99, "run", "flags", "cos_type"), "cos_type was [["),
    (
        "a record with line breaks",
        put("a\nb\x1b[2J", "run", "flags", "cos_type"),
        r"'a\nb\x1b[2J' and is raw",
    ),
    ("a missing weight", drop("state_dict", "lambda1"), "lambda1 is missing, unexpected or"),
    ("a weight of another shape", put(torch.zeros(2), "state_dict", "lambda1"), "lambda1 is missing, unexp"),
    ("a weight of whole numbers", put(torch.tensor(1), "state_dict", "lambda1"), "lambda1 is missing, unexp"),
    ("a weight that is a text", put("x", "state_dict", "lambda1"), "lambda1 is missing, unexpected or"),
    ("a weight without a name", put(torch.zeros(1), "state_dict", 5), "5 is missing, unexpected or"),
    (
        "a loss scale of 0",
        put({"scale": 0.0}, "MixedPrecision"),
        "its loss scale (MixedPrecision) is damaged",
    ),
]

HARMLESS = [
    ("a learning rate of 10**9", put(1e9, *OPTIMIZER, "param_groups", 0, "lr")),
    ("an AdamW of other settings", put((5.0, "x"), *OPTIMIZER, "param_groups", 0, "betas")),
    ("counters of validation that are a text", put("x", *FIT, "epoch_loop.val_loop.batch_progress")),
    ("an unknown callback's state", put({"x": 1}, "callbacks", "x")),
    ("another Lightning's version", put("x", "pytorch-lightning_version")),
    ("an epoch that is a text", put("x", "epoch")),
]


def run_json(text):
    """Prunes in a finished run whose run.json has another content."""

    def do(world):
        exp = world.copy_of_stages()
        (exp / "run.json").write_text(text, encoding="utf-8")
        last = exp / "ckpts" / "last.ckpt"
        return world.call("prune", "--distilled_ckpt", last, "--original_ckpt", world.teacher)

    return do


def entry(**changes):
    """The same, with the entry of the pruned file changed."""

    def do(world):
        exp = world.copy_of_stages()
        content = json.loads((exp / "run.json").read_text())
        content["prune"] |= changes
        (exp / "run.json").write_text(json.dumps(content))
        last = exp / "ckpts" / "last.ckpt"
        return world.call("prune", "--distilled_ckpt", last, "--original_ckpt", world.teacher)

    return do


def mutated(world):
    """Random changes to the bytes of a checkpoint: each is one sentence, or nothing has changed."""
    from training.resume import read_training_checkpoint
    from utils.files import UserError

    good = (world.stages / "ckpts" / "last.ckpt").read_bytes()
    expected, generator = world.content("last.ckpt")["state_dict"], random.Random(SEED)
    path = world.tmp / "last.ckpt"
    for _ in range(MUTATIONS):
        changed = bytearray(good)
        for _ in range(generator.choice([1, 1, 3, 20])):
            # Every other change is in the end of the file, where its structure is.
            start = generator.choice([0, len(changed) - 20_000])
            changed[generator.randrange(start, len(changed))] = generator.randrange(256)
        if generator.random() < 0.2:
            del changed[generator.randrange(len(changed)) :]
        path.write_bytes(changed)
        try:
            found = read_training_checkpoint(path)["state_dict"]
        except UserError as error:
            assert "\n" not in str(error)
        else:
            assert all(torch.equal(found[key], value) for key, value in expected.items())
    return Outcome(0, "")


def with_other_devices(world):
    """Begun on two processes, gone on with on one that accumulates two batches instead."""
    from tests.faults.kills import unbroken

    exp = world.tmp / "exp"
    shutil.copytree(unbroken(world, "distill", "two ranks")[1], exp)
    (exp / "ckpts" / "previous.ckpt").replace(exp / "ckpts" / "last.ckpt")
    outcome = world.call("distill", *world.distill(exp, accum_grad=2))
    content = checkpoint(exp)
    assert content["global_step"] == 10 and content["SpeechDataModule"] == {"update": 10}
    return outcome


def moved(world):
    """A finished run that was copied and touched is finished, and another one's date does not make it so."""
    exp = world.copy_of_stages()
    for path in sorted(exp.rglob("*")):
        path.touch()
    return world.call("distill", *world.distill(exp))


CASES = [
    *(Case(name, resumed(change), refused(CHECKPOINT, words)) for name, change, words in RESUMED),
    *(Case(name, harmless(change), finished("update 10/10")) for name, change in HARMLESS),
    Case("run.json of lists", run_json("[1]"), refused("run.json is damaged")),
    Case("run.json cut off", run_json('{"prune": {'), refused("run.json is damaged")),
    Case("run.json nested 100,000 deep", run_json("[" * 10**5), refused("run.json is damaged")),
    Case("run.json with numbers for entries", run_json('{"prune": 3}'), refused("run.json is damaged")),
    Case("run.json with an empty entry", run_json('{"prune": {}}'), finished("wrote ")),
    Case("run.json whose output is a text", entry(output="x"), finished("wrote ")),
    Case("run.json whose sessions are a text", entry(sessions="x"), finished("this stage is finished")),
    Case("run.json whose flags are a list", entry(flags=[1]), refused("run.json: ", RECORD)),
    Case("run.json whose inputs are numbers", entry(inputs={"original_ckpt": 3}), refused(RECORD)),
    Case("a finished run that was touched", moved, finished("this stage is finished")),
    Case("a run that goes on with other devices", with_other_devices, finished("update 10/10"), slow=True),
    Case("random changes to a file", mutated, finished(), slow=True),
]
