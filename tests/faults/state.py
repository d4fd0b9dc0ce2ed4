"""Checkpoints to resume and folders of experiments that hold other things than they should."""

import copy
import json
import shutil

import torch

from tests.faults.table import Case, finished, refused, same_checkpoint
from tests.helpers.stages import checkpoint

CHECKPOINT = "/ckpts/last.ckpt"


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
    """Removes the entry that ``keys`` lead to."""

    def change(content):
        *path, last = keys
        for key in path:
            content = content[key]
        del content[last]

    return change


REFUSED = {
    "no optimiser": drop("optimizer_states"),
    "no update": drop("global_step"),
    "no weights": drop("state_dict"),
    "no record": drop("run"),
    "a record without flags": put(3, "run", "flags"),
    "a record without inputs": drop("run", "inputs"),
    "a record with line breaks": put("a\nb\x1b[2J", "run", "flags", "cos_type"),
    "a missing weight": drop("state_dict", "lambda1"),
    "a weight of another shape": put(torch.zeros(2), "state_dict", "lambda1"),
}


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
        content = json.loads((world.stages / "run.json").read_text())
        content["prune"] |= changes
        return run_json(json.dumps(content))(world)

    return do


def with_other_devices(world):
    """Begun on two processes, gone on with on one that accumulates two batches instead."""
    from tests.faults.kills import unbroken

    exp = world.tmp / "exp"
    shutil.copytree(unbroken(world, "distill", "two ranks")[1], exp)
    (exp / "ckpts" / "previous.ckpt").replace(exp / "ckpts" / "last.ckpt")
    outcome = world.call("distill", *world.distill(exp, accum_grad=2))
    assert checkpoint(exp)["global_step"] == 10
    return outcome


def moved(world):
    """A finished run that was copied and touched is finished."""
    exp = world.copy_of_stages()
    for path in sorted(exp.rglob("*")):
        path.touch()
    return world.call("distill", *world.distill(exp))


OPTIMIZER = ("optimizer_states", 0, "param_groups", 0)

CASES = [
    *(Case(name, resumed(change), refused(CHECKPOINT)) for name, change in REFUSED.items()),
    Case(
        "a learning rate of 10**9",
        harmless(put(1e9, *OPTIMIZER, "lr")),
        finished("update 10/10"),
    ),
    Case("an unknown callback's state", harmless(put({"x": 1}, "callbacks", "x")), finished("update 10/10")),
    Case("run.json of lists", run_json("[1]"), refused("run.json")),
    Case("run.json cut off", run_json('{"prune": {'), refused("run.json")),
    Case("run.json with numbers for entries", run_json('{"prune": 3}'), refused("run.json")),
    Case("run.json whose flags are a list", entry(flags=[1]), refused("run.json")),
    Case("run.json whose inputs are numbers", entry(inputs={"original_ckpt": 3}), refused("run.json")),
    Case("a finished run that was touched", moved, finished("this stage is finished")),
    Case("a run that goes on with other devices", with_other_devices, finished("update 10/10")),
]
