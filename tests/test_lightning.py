"""Thirty recorded updates of the original's stage 1 in float64, every gate's u fixed at 0.5."""

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from lightning import DistillLoss, DistillModule, distill_projections
from tests.helpers.models import recorded
from wav2vec2 import wav2vec2_model

TRAJECTORIES = ["trajectory_hubert", "trajectory_wavlm"]


def module_of(golden):
    teacher = wav2vec2_model(**golden["config"])
    teacher.load_state_dict(golden["teacher_state_dict"])
    student = wav2vec2_model(**golden["student_config"])
    student.load_state_dict(golden["student_state_dict"])
    dim = golden["config"]["encoder_embed_dim"]
    return DistillModule(
        teacher_model=teacher,
        student_model=student,
        distill_linear_projs=distill_projections("layer2layer", golden["distill_layer_groups"], dim, dim),
        distill_loss=DistillLoss(**golden["loss"]),
        **golden["hyper_parameters"],
    ).double()


class Record(pl.Callback):
    """Notes what each update logged, and its learning rates."""

    def __init__(self):
        self.updates = []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.rates = [group["lr"] for group in optimizer.param_groups]

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        logged = {key: float(value) for key, value in trainer.callback_metrics.items()}
        self.updates.append({**logged, "lr": self.rates})


def train(module, golden, tmp_path):
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
    batches = [batch.double() for batch in golden["batches"]]
    trainer.fit(module, train_dataloaders=DataLoader(batches, batch_size=None))
    return record.updates


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_thirty_updates_equal_the_recording(name, monkeypatch, tmp_path):
    golden = recorded(name)
    noise = golden["gate_noise"]
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda self, *_, **__: self.fill_(noise))
    module = module_of(golden)
    updates = train(module, golden, tmp_path)
    assert len(updates) == len(golden["log"]) == 30
    for update, expected in zip(updates, golden["log"], strict=True):
        for key in expected.keys() - {"step"}:
            assert update[key] == pytest.approx(expected[key], rel=1e-9, abs=1e-11), (expected["step"], key)
    final = module.student_model.state_dict()
    for key, expected in golden["final_student_state_dict"].items():
        assert (final[key] - expected).abs().max() < 1e-10, key
    projections = module.distill_linear_projs.state_dict()
    for key, expected in golden["final_projections"].items():
        assert (projections[key] - expected).abs().max() < 1e-10, key
    gate = "feature_extractor.conv_layers.0.hard_concrete.log_alpha"
    assert (final[gate] - golden["student_state_dict"][gate]).abs().min() > 0.2


def test_group_mean_compares_the_means_of_groups(tmp_path):
    golden = recorded("trajectory_hubert")
    golden["hyper_parameters"]["distill_mode"] = "group_mean"
    module = module_of(golden)
    groups, waveforms = golden["distill_layer_groups"], golden["batches"][0].double()
    module.student_model.eval().prune()
    with torch.no_grad():
        for projection in module.distill_linear_projs:
            projection.weight.normal_()
        learnt, taught = module(waveforms)
        states = [
            model.extract_features(waveforms)[0] for model in (module.student_model, module.teacher_model)
        ]
    firsts = [sum(len(group) for group in groups[:i]) for i in range(len(groups))]
    for i, (group, first) in enumerate(zip(groups, firsts, strict=True)):
        student, teacher = (sum(layers[layer] for layer in group) / len(group) for layers in states)
        torch.testing.assert_close(learnt[:, i], module.distill_linear_projs[first](student))
        torch.testing.assert_close(taught[:, i], teacher)
    assert learnt.size(1) == len(groups)
