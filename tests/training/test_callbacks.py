"""Numbers that are not finite end a run and never become its checkpoint; ranks ask each other for signals."""

from types import SimpleNamespace

import pytest
import torch

from tests.helpers.stages import checkpoint
from training.callbacks import StopOnNonFinite
from training.resume import RunCheckpointIO
from utils.files import UserError


def test_a_diverging_run_names_update_utterances_and_remedy(refused, corpus, tmp_path):
    changes = {"max_updates": 40, "save_interval": 1, "learning_rate": 1e18, "clip_norm": 0}
    changes |= {"warmup_updates": 1, "distill_mode": "predlayer"}
    sentence = refused("exp", **changes)
    assert "the loss is nan" in sentence or "the loss is inf" in sentence
    assert f"{corpus}/train-clean-100/" in sentence and "lower --learning_rate" in sentence
    assert f"{tmp_path}/exp/ckpts/last.ckpt is left as it was" in sentence
    good = checkpoint(tmp_path / "exp")
    assert f"update {good['global_step'] + 1}: " in sentence
    assert all(torch.isfinite(tensor).all() for tensor in good["state_dict"].values())
    # Run again, it stops at the same place and not later.
    assert f"update {good['global_step'] + 1}: " in refused("exp", **changes)


def updates(callback, precision, norms, loss=1.0):
    """Gives a callback updates with these norms of the gradients."""
    trainer = SimpleNamespace(precision=precision, world_size=1, global_step=0, datamodule=None)
    module = SimpleNamespace(device=torch.device("cpu"))
    for norm in norms:
        trainer.global_step += 1
        module.gradient_norm = torch.tensor(norm)
        callback.on_train_batch_end(trainer, module, {"loss": torch.tensor(loss)}, None, 0)


def test_float16_may_overflow_while_its_scale_can_be_halved(tmp_path):
    overflow = float("inf")
    updates(StopOnNonFinite(tmp_path), "16-mixed", [1.0, *[overflow] * 24, 1.0, *[overflow] * 24])
    with pytest.raises(UserError, match=r"update 26: .* as in the 24 before"):
        updates(StopOnNonFinite(tmp_path), "16-mixed", [1.0, *[overflow] * 25])
    for precision in ("32-true", "bf16-mixed"):
        with pytest.raises(UserError, match="update 2: "):
            updates(StopOnNonFinite(tmp_path), precision, [1.0, overflow])
        with pytest.raises(UserError, match="update 1: the loss is nan"):
            updates(StopOnNonFinite(tmp_path), precision, [1.0], loss=float("nan"))


@pytest.mark.parametrize("name", ["state_dict.student_model.weight", "optimizer_states.0.state.0.exp_avg"])
def test_a_checkpoint_that_is_not_finite_replaces_none(name, tmp_path):
    path, weight, moment = tmp_path / "last.ckpt", torch.ones(3), torch.ones(3)
    content = {
        "global_step": 7,
        "state_dict": {"student_model.weight": weight},
        "optimizer_states": [{"state": {0: {"exp_avg": moment}}}],
    }
    RunCheckpointIO().save_checkpoint(content, path)
    good = path.read_bytes()
    (weight if name.endswith("weight") else moment)[1] = float("inf")
    with pytest.raises(UserError, match=f"{name} is not finite at update 7"):
        RunCheckpointIO().save_checkpoint(content, path)
    assert path.read_bytes() == good and [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]
