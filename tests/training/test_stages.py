"""The recipe as a user runs it, and what its training stages make of two ranks."""

import os

import pytest
import torch

from tests.helpers.stages import RECIPE, assert_equal_to_the_bit, ended, flags, run, start
from wav2vec2 import wav2vec2_model


@pytest.fixture(scope="module")
def recipe(manifests, teacher, tmp_path_factory):
    """Runs run.sh in the folder ``recipe.exp``."""
    exp = tmp_path_factory.mktemp("recipe") / "exp"
    variables = {**RECIPE, "tsv_dir": manifests, "teacher_ckpt": teacher}
    variables |= {"root_dir": exp, "final_dir": exp / "final"}

    def recipe(**changes):
        return run("run.sh", check=False, **{**variables, **changes})

    recipe.exp = exp
    return recipe


@pytest.fixture(scope="module")
def first(recipe):
    process = recipe()
    assert process.returncode == 0, process.stdout + process.stderr
    return process


def test_run_sh_makes_a_model_that_the_readme_snippet_loads(first, recipe, teacher):
    ckpt = torch.load(recipe.exp / "final" / "ckpts" / "pruned_hubert_base.pth", weights_only=True)
    model = wav2vec2_model(**ckpt["config"])
    result = model.load_state_dict(ckpt["state_dict"], strict=False)
    assert not result.missing_keys and not result.unexpected_keys
    states, _ = model.eval().extract_features(torch.randn(1, 16_000))
    assert len(states) == 4 and states[-1].shape == (1, 49, 32)
    pruned = torch.load(recipe.exp / "ckpts" / "pruned_hubert_base.pth", weights_only=True)
    assert ckpt["config"] == pruned["config"]
    assert "distill_linear_projs" in pruned and "distill_linear_projs" not in ckpt
    before = sum(p.numel() for p in torch.load(teacher, weights_only=True)["state_dict"].values())
    assert model.get_num_params() < before
    assert "layer 0 heads" in first.stdout and "MACs a second of audio" in first.stdout
    assert (recipe.exp / "final" / "report").exists()


def test_run_sh_hands_its_variables_to_both_trainings(tmp_path):
    given = {"student_layers": "0.1,2", "predlayer_activation": "none", "head_weight": "0.5"}
    printed = run("run.sh", python="echo", final_dir=tmp_path / "final", **given).stdout
    for flag, value in given.items():
        assert printed.count(f" --{flag} {value}") == 2
    assert "_layer2layernone0.4,8,12of0.1,2_" in printed, "a folder of its own"
    assert "heads_seed7/" in run("run.sh", python="echo", pruning_units="heads", seed=7).stdout


@pytest.mark.slow
def test_run_sh_knows_what_is_done_by_its_content(first, recipe):
    final = recipe.exp / "final" / "ckpts" / "pruned_hubert_base.pth"
    for file in recipe.exp.rglob("*.*"):
        os.utime(file, (file.stat().st_size, 2_000_000_000 - file.stat().st_size))
    written = final.stat().st_mtime_ns
    again = recipe()
    assert again.returncode == 0
    assert all("is finished" in line for line in again.stdout.splitlines()[:4])
    assert final.stat().st_mtime_ns == written
    other = recipe(final_lr="0.1", cos_type="log_sig")
    assert other.returncode == 2
    assert "cos_type was raw and is log_sig" in other.stdout


@pytest.mark.slow
def test_run_sh_stops_at_the_stage_that_fails(recipe, tmp_path):
    broken = recipe(student_ckpt="no.pth", root_dir=tmp_path / "exp", final_dir=tmp_path / "exp" / "final")
    assert broken.returncode == 2
    assert "no.pth: no such file" in broken.stdout
    assert "distill.py is not finished: status 2" in broken.stderr
    assert not list(tmp_path.rglob("*.pth"))


@pytest.mark.slow
def test_two_ranks_have_equal_weights_and_share_each_epoch(manifests, teacher, tmp_path):
    arguments = flags(manifests, teacher, tmp_path / "exp", num_workers=0)
    status, output = ended(start("tests/helpers/ddp_worker.py", *arguments, ranks=2, NOTES=tmp_path))
    assert status == 0, output
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert_equal_to_the_bit(first["weights"], second["weights"])
    # Beside the gradients, an update asks the ranks for signals and for numbers that are not finite.
    assert not first["broadcasts"], "Lightning asks for SIGTERM before every batch"
    batches = first["batches_an_epoch"]
    assert batches == second["batches_an_epoch"] >= 2
    for epoch in range(10 // batches):
        place = slice(epoch * batches, (epoch + 1) * batches)
        seen = [index for batch in first["batches"][place] + second["batches"][place] for index in batch]
        assert sorted(seen) == list(range(12))
