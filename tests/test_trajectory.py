"""Thirty recorded updates of the original's stage 1, every gate's u fixed at 0.5."""

import pytest
import pytorch_lightning as pl
import torch
from test_golden import close, recorded
from torch.utils.data import DataLoader

from lightning import DistillLoss, DistillModule, distill_projections
from wav2vec2 import wav2vec2_model
from wav2vec2.utils.checkpoint import build_model


def module_of(golden, skip):
    teacher = build_model(golden["config"], golden["teacher_state_dict"], "teacher")
    student = wav2vec2_model(**golden["student_config"])
    student.load_state_dict(golden["student_state_dict"])
    student.skip_closed_gates = skip
    dim = golden["config"]["encoder_embed_dim"]
    projections = distill_projections("layer2layer", golden["distill_layer_groups"], dim, dim)
    return DistillModule(
        teacher_model=teacher,
        student_model=student,
        distill_linear_projs=projections,
        distill_loss=DistillLoss(**golden["loss"]),
        **golden["hyper_parameters"],
    )


class Record(pl.Callback):
    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.steps.append({key: float(value) for key, value in trainer.callback_metrics.items()})
        self.steps[-1]["lr"] = self.rates

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.rates = [group["lr"] for group in optimizer.param_groups]


@pytest.mark.parametrize("skip", [True, False], ids=["open units alone", "all units"])
def test_thirty_updates_follow_the_recording(skip, monkeypatch, tmp_path):
    golden = recorded("trajectory_hubert")
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda self, *_, **__: self.fill_(golden["gate_noise"]))
    module = module_of(golden, skip)
    record = Record()
    trainer = pl.Trainer(
        max_steps=len(golden["batches"]),
        gradient_clip_val=golden["clip_norm"],
        accelerator="cpu",
        callbacks=[record],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, train_dataloaders=DataLoader(golden["batches"], batch_size=None))
    assert len(record.steps) == 30
    for expected, actual in zip(golden["log"], record.steps, strict=True):
        for key in expected.keys() - {"step"}:
            assert actual[key] == pytest.approx(expected[key], rel=1e-5, abs=1e-5), (expected["step"], key)
    state_dict = module.student_model.state_dict()
    assert state_dict.keys() == golden["final_student_state_dict"].keys()
    for key, value in golden["final_student_state_dict"].items():
        close(state_dict[key], value)
    for key, value in golden["final_projections"].items():
        close(module.distill_linear_projs.state_dict()[key], value)


def test_the_recorded_trajectory_moves_when_a_layer_is_left_out(monkeypatch):
    golden = recorded("trajectory_hubert")
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda self, *_, **__: self.fill_(0.5))
    module = module_of(golden, skip=True)
    losses = module._losses(golden["batches"][0], None)
    assert float(losses["loss"]) == pytest.approx(golden["log"][0]["train_loss"], abs=1e-5)
    module.distill_layers[-1] = 2
    assert float(module._losses(golden["batches"][0], None)["loss"]) != pytest.approx(
        golden["log"][0]["train_loss"], abs=1e-3
    )
