"""Fine-tuning without a run: a task's loss over what is valid, and the vocabulary of a head."""

import argparse

import pytest
import torch
from torch.nn import functional as F

from evaluation.heads import error_rates
from lightning import DistillLoss, distill_projections, head_loss
from tests.helpers.models import config_of, ungated, without_dropout
from training.finetuning import FinetuneModule, put_head, vocabulary_of
from utils.checkpoint import vocabulary_path
from utils.files import UserError
from utils.vocabulary import Vocabulary, of_characters
from wav2vec2 import wav2vec2_model


def module_of(student, teacher=None, task="ctc", vocabulary=None):
    taught = {"distill_layers": [], "distill_linear_projs": torch.nn.ModuleList(), "distill_loss": None}
    if teacher is not None:
        projections = distill_projections("layer2layer", [[0], [3]], 32, 32)
        loss = DistillLoss(0, 1, 1, "raw")
        taught = {"distill_layers": [0, 3], "distill_linear_projs": projections, "distill_loss": loss}
    return FinetuneModule(
        task=task,
        vocabulary=vocabulary or of_characters(["abc"]),
        teacher_model=teacher,
        student_model=student,
        distill_mode="layer2layer",
        learning_rate=1e-3,
        weight_decay=0.0,
        warmup_updates=1,
        max_updates=4,
        use_reg=False,
        **taught,
    )


@pytest.mark.parametrize("family", ["hubert_base", "hubert_large", "wavlm_base"])
def test_padding_is_left_out_of_every_loss(family):
    torch.manual_seed(0)
    vocabulary = of_characters(["abc"])
    student = wav2vec2_model(**config_of(family, aux_num_out=len(vocabulary)))
    module = module_of(student, ungated(family)).eval()
    waveforms, lengths = torch.randn(2, 9_000), torch.tensor([9_000, 5_000])
    targets = [torch.tensor([2, 3, 3]), torch.tensor([4])]
    together = module._losses(waveforms, lengths, torch.cat(targets), torch.tensor([3, 1]))
    alone = [
        module._losses(waveforms[i : i + 1, :length], None, targets[i], torch.tensor([len(targets[i])]))
        for i, length in enumerate([9_000, 5_000])
    ]
    assert together["loss_task"].item() == pytest.approx(
        sum(each["loss_task"] for each in alone).item() / 2, rel=1e-4
    )
    for name in ("loss_l1", "loss_cos"):
        expected = (27 * alone[0][name] + 15 * alone[1][name]) / 42  # frames
        assert together[name].item() == pytest.approx(expected.item(), rel=1e-4), name
    assert together["loss"].item() == pytest.approx((together["loss_task"] + together["loss_distill"]).item())


def test_classes_are_judged_by_the_mean_of_valid_frames():
    torch.manual_seed(0)
    student = wav2vec2_model(**config_of("hubert_base", aux_num_out=3))
    module = module_of(student, task="classify", vocabulary=Vocabulary(["a", "b", "c"])).eval()
    waveforms, lengths = torch.randn(2, 9_000), torch.tensor([9_000, 5_000])
    loss = module._losses(waveforms, lengths, torch.tensor([2, 0]), torch.ones(2, dtype=torch.long))["loss"]
    scores = [student(waveforms[:1])[0].mean(1), student(waveforms[1:, :5_000])[0].mean(1)]
    assert loss.item() == pytest.approx(
        F.cross_entropy(torch.cat(scores), torch.tensor([2, 0])).item(), rel=1e-4
    )


def test_head_loss_is_the_divergence_of_valid_frames():
    student, teacher = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    p, q = teacher.softmax(-1), student.softmax(-1)
    divergence = (p * (p / q).log()).sum(-1)
    assert head_loss(student, teacher).item() == pytest.approx(divergence.mean().item(), rel=1e-5)
    valid = torch.cat([divergence[0], divergence[1, :1]])
    assert head_loss(student, teacher, torch.tensor([3, 1])).item() == pytest.approx(
        valid.mean().item(), rel=1e-5
    )


def test_a_head_stays_beside_a_tokenizers_further_special_tokens(tmp_path):
    """Tokenizers of transformers add <s> and </s> beyond the outputs that a head has."""
    model, file = wav2vec2_model(**without_dropout(aux_num_out=3)), tmp_path / "model.pth"
    args, head = argparse.Namespace(model=file, vocab=None, task="ctc"), model.aux
    Vocabulary(["<pad>", "|", "a", "<s>", "</s>"]).write(vocabulary_path(file))
    vocabulary = vocabulary_of(args, model)
    put_head(args, model, vocabulary)
    assert vocabulary.tokens == ["<pad>", "|", "a"] and model.aux is head
    with pytest.raises(UserError, match="has 2 tokens, and the head 3 outputs"):
        error_rates(model, Vocabulary(["<pad>", "a"]), tmp_path, "valid", 10)
