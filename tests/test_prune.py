"""Stage 2 cuts to the size that was asked for, in parameters or in multiply-accumulates."""

import pytest
import torch

from tests.helpers.models import config_of
from tests.helpers.stages import call, checkpoint, distill_module, flags
from utils.checkpoint import load_model, save_checkpoint
from wav2vec2 import wav2vec2_model
from wav2vec2.cost import COUNTS


@pytest.fixture(scope="module", params=COUNTS)
def stage_1(request, manifests, teacher, tmp_path_factory):
    """What stage 1 counted, and the folder that it left."""
    exp_dir = tmp_path_factory.mktemp(f"stage 1 {request.param}")
    arguments = flags(manifests, teacher, exp_dir, max_updates=3, sparsity_of=request.param, num_workers=0)
    with pytest.MonkeyPatch.context() as monkeypatch:
        call(monkeypatch, "distill", *arguments)
    return request.param, exp_dir


def cost(path, what):
    return COUNTS[what](load_model(path)).total()


def test_the_checkpoint_knows_the_target_and_what_was_counted(stage_1, teacher):
    what, exp_dir = stage_1
    content = checkpoint(exp_dir)
    assert content["run"]["flags"]["sparsity_of"] == what
    assert content["hyper_parameters"]["target_sparsity"] == 0.75
    assert content["hyper_parameters"]["teacher_cost"] == cost(teacher, what)


@pytest.mark.parametrize("round_to", [1, 8])
def test_the_target_is_met_to_the_last_unit(round_to, stage_1, teacher, monkeypatch, capsys, tmp_path):
    what, exp_dir = stage_1
    arguments = ["--distilled_ckpt", exp_dir / "ckpts" / "last.ckpt", "--original_ckpt", teacher]
    arguments += ["--round_to", round_to]
    sizes = []
    for sparsity in (0.4, 0.5):
        out = tmp_path / f"{sparsity}.pth"
        call(monkeypatch, "prune", *arguments, "--target_sparsity", sparsity, "--out", out)
        budget = (1 - sparsity) * cost(teacher, what)
        sizes.append(cost(out, what))
        feature = 2 * 32 + 1 if what == "params" else 2 * 32 * 499
        assert 0 <= budget - sizes[-1] < round_to * feature
    assert sizes[1] < sizes[0]
    printed = capsys.readouterr().out
    assert f"sparsity {1 - sizes[1] / cost(teacher, what):.4f} of the teacher's" in printed
    assert "run prune.py again" not in printed


def test_a_missed_target_is_said_and_nothing_else_changes(stage_1, teacher, monkeypatch, capsys, tmp_path):
    what, exp_dir = stage_1
    out = tmp_path / "as the gates are.pth"
    arguments = ["--distilled_ckpt", exp_dir / "ckpts" / "last.ckpt", "--original_ckpt", teacher]
    call(monkeypatch, "prune", *arguments, "--out", out)
    printed = capsys.readouterr().out
    assert "stage 1 was asked for a sparsity of 0.75" in printed and "--target_sparsity 0.75" in printed
    assert cost(out, what) > 0.5 * cost(teacher, what)


@pytest.mark.parametrize("closed", [("heads",), ("heads", "intermediate")])
def test_a_wavlm_without_heads_trains_on(closed, tmp_path):
    """Stage 3 of a model whose first layer only computes the position bias, which nobody uses."""
    torch.manual_seed(0)
    model = wav2vec2_model(**config_of("wavlm_base")).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("log_alpha"):
            parameter.data.fill_(-40.0 if any(unit in name for unit in closed) else 40.0)
    model.prune()
    save_checkpoint(tmp_path / "pruned.pth", model, verify=True)
    student = load_model(tmp_path / "pruned.pth")
    module = distill_module("wavlm_base", student, groups=((0,), (3,)), use_reg=False)
    (optimizer,), _ = module.configure_optimizers()
    losses = []
    for _ in range(3):
        loss, *_ = module.distill_loss(*module(torch.ones(1, 4000).cumsum(1).sin()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(p.grad is not None for p in module.parameters() if p.requires_grad)
