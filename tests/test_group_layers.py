"""Which layers are alike: the measure, the groups that follow, and what the command prints."""

import re

import pytest
import torch

from group_layers import linear_cka, neighbours
from tests.helpers.stages import call


def test_linear_cka_is_that_of_the_gram_matrices():
    torch.manual_seed(0)
    x = torch.randn(3, 50, 4)
    x[1] = 3 * x[0] @ torch.linalg.qr(torch.randn(4, 4))[0] + 7  # turned, scaled and moved: the same to CKA
    centring = torch.eye(50) - 1 / 50
    grams = [centring @ (layer @ layer.T) @ centring for layer in x]
    expected = [[(a * b).sum() / (a.norm() * b.norm()) for b in grams] for a in grams]
    similar = linear_cka(x)
    torch.testing.assert_close(similar, torch.tensor(expected).double(), rtol=1e-4, atol=1e-4)
    assert similar[0, 1] == pytest.approx(1) and similar[0, 2] < 0.3


def test_only_neighbours_are_joined():
    similar = torch.full((6, 6), 0.2)
    for group in ([0, 5], [1, 2, 3], [4, 5]):  # 0 is like 5, but not beside it
        for i in group:
            similar[i, group] = 0.9
    similar.fill_diagonal_(1)
    assert neighbours(similar, 3) == [[0], [1, 2, 3], [4, 5]]
    assert neighbours(similar, 1) == [[*range(6)]] and neighbours(similar, 6) == [[i] for i in range(6)]


def test_distill_takes_the_flags_that_are_printed(manifests, teacher, tmp_path, monkeypatch, capsys, fails):
    common = ["--teacher_ckpt", teacher, "--tsv_dir", manifests]
    call(monkeypatch, "group_layers", *common, "--groups", 2, "--picture", tmp_path / "alike.png")
    printed = capsys.readouterr().out
    assert (tmp_path / "alike.png").stat().st_size > 1000
    chosen = re.search("--distill_mode group_mean --distill_layers (.*)", printed)[1]
    assert chosen.replace(".", ",") == "0,1,2,3" and chosen.count(".") == 1
    flags = ["--exp_dir", tmp_path / "exp", "--gpus", 0, "--max_updates", 2, "--warmup_updates", 1]
    flags += ["--student_ckpt", teacher, "--distill_mode", "group_mean", "--distill_layers", chosen]
    call(monkeypatch, "distill", *common, *flags, "--seconds_per_batch", 8, "--num_workers", 0)
    capsys.readouterr()
    assert "--groups 9: the teacher has 4 layers" in fails("group_layers", *common, "--groups", 9)
