"""The recipe as a user runs it, and what its training stages make of two ranks."""

import os
import subprocess

import pytest
import torch

from tests.helpers.stages import ENVIRONMENT, RECIPE, ROOT, assert_equal_to_the_bit, flags, two_ranks
from wav2vec2 import wav2vec2_model


@pytest.fixture(scope="module")
def recipe(manifests, teacher, tmp_path_factory):
    """Runs run.sh in a folder ``exp`` of the folder ``recipe.root``."""
    root = tmp_path_factory.mktemp("recipe")
    variables = {**RECIPE, "tsv_dir": manifests, "teacher_ckpt": teacher}
    variables |= {"root_dir": root / "exp", "final_dir": root / "exp" / "final"}

    def recipe(**changes):
        environment = {
            **ENVIRONMENT,
            **{name: str(value) for name, value in {**variables, **changes}.items()},
        }
        command = ["bash", str(ROOT / "run.sh")]
        return subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=300)

    recipe.root = root
    return recipe


@pytest.fixture(scope="module")
def first(recipe):
    process = recipe()
    assert process.returncode == 0, process.stdout + process.stderr
    return process


def test_run_sh_makes_a_model_that_the_readme_snippet_loads(first, recipe, teacher):
    exp = recipe.root / "exp"
    ckpt = torch.load(exp / "final" / "ckpts" / "pruned_hubert_base.pth", weights_only=True)
    model = wav2vec2_model(**ckpt["config"])
    result = model.load_state_dict(ckpt["state_dict"], strict=False)
    assert not result.missing_keys and not result.unexpected_keys
    states, _ = model.eval().extract_features(torch.randn(1, 16_000))
    assert len(states) == 4 and states[-1].shape == (1, 49, 32)
    pruned = torch.load(exp / "ckpts" / "pruned_hubert_base.pth", weights_only=True)
    assert ckpt["config"] == pruned["config"]
    assert "distill_linear_projs" in pruned and "distill_linear_projs" not in ckpt
    before = sum(p.numel() for p in torch.load(teacher, weights_only=True)["state_dict"].values())
    assert model.get_num_params() < before
    assert "layer 0 heads" in first.stdout and "MACs a second of audio" in first.stdout
    assert (exp / "final" / "report").exists()


@pytest.mark.slow
def test_run_sh_knows_what_is_done_by_its_content(first, recipe):
    final = recipe.root / "exp" / "final" / "ckpts" / "pruned_hubert_base.pth"
    for file in (recipe.root / "exp").rglob("*.*"):
        os.utime(file, (file.stat().st_size, 2_000_000_000 - file.stat().st_size))
    written = final.stat().st_mtime_ns
    again = recipe()
    assert again.returncode == 0
    assert all("is finished" in line for line in again.stdout.splitlines()[:4])
    assert again.stdout.count("is finished") == 4
    assert final.stat().st_mtime_ns == written
    other = recipe(final_lr="0.1", cos_type="log_sig")
    assert other.returncode == 2
    assert "cos_type was raw and is log_sig" in other.stdout


@pytest.mark.slow
def test_run_sh_stops_at_the_stage_that_fails(recipe, tmp_path):
    broken = recipe(student_ckpt="no.pth", root_dir=tmp_path / "exp", final_dir=tmp_path / "exp" / "final")
    assert broken.returncode == 2
    assert "no.pth: no such file" in broken.stdout
    assert "distill.py failed with status 2" in broken.stderr
    assert not list(tmp_path.rglob("*.pth"))


@pytest.mark.slow
def test_two_ranks_have_equal_weights_and_share_each_epoch(manifests, teacher, tmp_path):
    arguments = flags(manifests, teacher, tmp_path / "exp", num_workers=0)
    command = two_ranks("tests/helpers/ddp_worker.py", *arguments)
    environment = {**ENVIRONMENT, "NOTES": str(tmp_path)}
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=300)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert_equal_to_the_bit(first["weights"], second["weights"])
    # Beside the gradients, an update asks the ranks for signals and for numbers that are not finite.
    assert not first["broadcasts"], "Lightning asks for SIGTERM before every batch"
    batches = first["batches_an_epoch"]
    assert batches == second["batches_an_epoch"] >= 2
    epochs = 10 // batches
    assert epochs >= 1
    for epoch in range(epochs):
        seen = []
        for rank in (first, second):
            for batch in rank["batches"][epoch * batches : (epoch + 1) * batches]:
                seen += batch
        assert sorted(seen) == list(range(12))
