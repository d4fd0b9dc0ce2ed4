"""Stages 2 and 4 keep the head that the trained student has, and the vocabulary of its outputs."""

import shutil

import pytest
import torch

from tests.helpers.convert import load
from tests.helpers.stages import call, checkpoint, flags
from utils.checkpoint import save_checkpoint
from wav2vec2 import wav2vec2_model

TRAINED, STARTED = '{"<pad>": 0, "a": 1, "b": 2}', '{"x": 0, "y": 1, "<pad>": 2}'


@pytest.mark.parametrize("beside_trained", [True, False])
@pytest.mark.parametrize("stage", ["prune", "save_final_ckpt"])
def test_the_trained_head_and_its_vocabulary_are_kept(stage, beside_trained, stages, teacher, tmp_path):
    """The file that the student started from has no head."""
    exp = stages if stage == "prune" else stages / "final"
    started = teacher if stage == "prune" else stages / "ckpts" / "pruned_hubert_base.pth"
    content, head = checkpoint(exp), torch.arange(96.0).view(3, 32)
    content["state_dict"] |= {"student_model.aux.weight": head, "student_model.aux.bias": torch.zeros(3)}
    torch.save(content, tmp_path / "last.ckpt")
    shutil.copy(started, tmp_path / "started.pth")
    (tmp_path / "started.vocab.json").write_text(STARTED)
    if beside_trained:
        (tmp_path / "last.vocab.json").write_text(TRAINED)
    names = {"prune": ("distilled_ckpt", "original_ckpt")}.get(
        stage, ("ckpt_after_final_distill", "config_path")
    )
    files = [f"--{names[0]}", tmp_path / "last.ckpt", f"--{names[1]}", tmp_path / "started.pth"]
    with pytest.MonkeyPatch.context() as monkeypatch:
        call(monkeypatch, stage, *files, "--out", tmp_path / "out.pth")
    assert torch.equal(load(tmp_path / "out.pth").aux.weight, head)
    assert (tmp_path / "out.vocab.json").read_text() == (TRAINED if beside_trained else STARTED)


def test_a_model_without_a_head_gets_no_vocabulary(stages, teacher, monkeypatch, tmp_path):
    shutil.copy(teacher, tmp_path / "started.pth")
    (tmp_path / "started.vocab.json").write_text(STARTED)
    files = ["--distilled_ckpt", stages / "ckpts" / "last.ckpt", "--original_ckpt", tmp_path / "started.pth"]
    call(monkeypatch, "prune", *files, "--out", tmp_path / "out.pth")
    assert not (tmp_path / "out.vocab.json").exists()


def test_a_training_stage_copies_the_vocabulary(manifests, teacher, monkeypatch, tmp_path):
    student = wav2vec2_model(**{**torch.load(teacher)["config"], "aux_num_out": 3})
    save_checkpoint(tmp_path / "student.pth", student)
    (tmp_path / "student.vocab.json").write_text(TRAINED)
    changes = {"student_ckpt": tmp_path / "student.pth", "max_updates": 1, "num_workers": 0}
    call(monkeypatch, "distill", *flags(manifests, teacher, tmp_path / "exp", **changes))
    assert (tmp_path / "exp" / "ckpts" / "last.vocab.json").read_text() == TRAINED
    assert "student_model.aux.weight" in checkpoint(tmp_path / "exp")["state_dict"]
