"""Numbers that are not finite end a run and never become its checkpoint; ranks ask each other for signals."""

from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

from dataset import AudioError, make_loader, write_manifests
from tests.helpers.stages import checkpoint
from training.callbacks import StopOnNonFinite, StopOnSignal
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


@pytest.mark.parametrize("where", ["weight", "moment"])
def test_a_checkpoint_that_is_not_finite_replaces_none(where, tmp_path):
    path = tmp_path / "last.ckpt"
    values = {"weight": torch.ones(3), "moment": torch.ones(3)}

    def content():
        return {
            "global_step": 7,
            "state_dict": {"student_model.weight": values["weight"]},
            "optimizer_states": [{"state": {0: {"exp_avg": values["moment"]}}}],
        }

    RunCheckpointIO(None).save_checkpoint(content(), path)
    good = path.read_bytes()
    values[where] = torch.tensor([1.0, float("inf"), 1.0])
    name = {"weight": "student_model.weight", "moment": "optimizer_states.0.state.0.exp_avg"}[where]
    with pytest.raises(UserError, match=f"{name} is not finite at update 7"):
        RunCheckpointIO(None).save_checkpoint(content(), path)
    assert path.read_bytes() == good and [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize(
    "value, reason",
    [(np.nan, "not finite"), (-np.inf, "not finite"), (1e30, "1e.30, where audio lies between")],
)
def test_audio_that_is_none_is_named(value, reason, tmp_path):
    samples = np.zeros(40_000, dtype=np.float32)
    samples[39_000] = value
    soundfile.write(tmp_path / "one.wav", samples, 16_000, subtype="FLOAT")
    write_manifests(tmp_path, str(tmp_path), {"train": [("one.wav", 40_000)]})
    with pytest.raises(AudioError, match=f"{tmp_path}/one.wav: holds samples .*{reason}"):
        next(iter(make_loader(tmp_path, "train", 87.5, 0, shuffle=True)))


@pytest.mark.parametrize(("device", "asked"), [("cuda", [10, 20, 30]), ("cpu", list(range(1, 31)))])
def test_gpus_are_asked_for_signals_in_every_tenth_update(device, asked):
    updates = []

    def reduce(value, reduce_op):
        updates.append(trainer.global_step)
        return value

    strategy = SimpleNamespace(root_device="cpu", reduce=reduce)
    trainer = SimpleNamespace(global_step=0, world_size=2, max_steps=100, strategy=strategy)
    callback, module = StopOnSignal(), SimpleNamespace(device=torch.device(device))
    for _ in range(30):
        trainer.global_step += 1
        callback.on_train_batch_end(trainer, module, None, None, 0)
    assert updates == asked
