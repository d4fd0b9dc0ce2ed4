"""The recipe as a user runs it, and what its training stages make of batches and ranks."""

import os
import subprocess

import pytest
import torch

from tests.helpers.stages import (
    ENVIRONMENT,
    RECIPE,
    ROOT,
    assert_equal_to_the_bit,
    checkpoint,
    flags,
    run,
    two_ranks,
)
from wav2vec2 import wav2vec2_model


def test_run_sh_makes_a_model_that_the_readme_snippet_loads(manifests, teacher, tmp_path):
    variables = {
        **RECIPE,
        "tsv_dir": manifests,
        "teacher_ckpt": teacher,
        "root_dir": tmp_path / "exp",
        "final_dir": tmp_path / "exp" / "final",
    }
    environment = {**ENVIRONMENT, **{name: str(value) for name, value in variables.items()}}

    def recipe(**changes):
        command = ["bash", str(ROOT / "run.sh")]
        environment_now = environment | changes
        return subprocess.run(
            command, env=environment_now, cwd=tmp_path, capture_output=True, text=True, timeout=300
        )

    broken = recipe(student_ckpt=str(tmp_path / "no.pth"))
    assert broken.returncode == 2
    assert "no.pth: no such file" in broken.stdout
    assert "distill.py failed with status 2" in broken.stderr
    assert not list((tmp_path / "exp").rglob("*.pth"))

    first = recipe()
    assert first.returncode == 0, first.stdout + first.stderr
    final = tmp_path / "exp" / "final" / "ckpts" / "pruned_hubert_base.pth"
    ckpt = torch.load(final, weights_only=True)
    model = wav2vec2_model(**ckpt["config"])
    result = model.load_state_dict(ckpt["state_dict"], strict=False)
    assert not result.missing_keys and not result.unexpected_keys
    states, _ = model.eval().extract_features(torch.randn(1, 16_000))
    assert len(states) == 4 and states[-1].shape == (1, 49, 32)
    pruned = torch.load(tmp_path / "exp" / "ckpts" / "pruned_hubert_base.pth", weights_only=True)
    assert ckpt["config"] == pruned["config"]
    assert "distill_linear_projs" in pruned and "distill_linear_projs" not in ckpt
    before = sum(p.numel() for p in torch.load(teacher, weights_only=True)["state_dict"].values())
    assert model.get_num_params() < before
    assert "layer 0 heads" in first.stdout and "MACs a second of audio" in first.stdout

    # What is done is known by its content, whatever the dates say.
    for file in (tmp_path / "exp").rglob("*.*"):
        os.utime(file, (file.stat().st_size, 2_000_000_000 - file.stat().st_size))
    written = final.stat().st_mtime_ns
    again = recipe()
    assert again.returncode == 0
    stages, report = again.stdout.splitlines()[:4], again.stdout.splitlines()[4:]
    assert all("is finished" in line for line in stages) and "teacher" in report[0]
    assert again.stdout.count("is finished") == 4
    assert final.stat().st_mtime_ns == written
    other = recipe(final_lr="0.1", cos_type="log_sig")
    assert other.returncode == 2
    assert "cos_type was raw and is log_sig" in other.stdout


def test_two_ranks_end_with_equal_weights_and_see_every_utterance_once_an_epoch(manifests, teacher, tmp_path):
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


def test_gradients_are_accumulated_over_batches_and_across_epochs(manifests, teacher, tmp_path):
    arguments = flags(manifests, teacher, tmp_path, accum_grad=3, max_updates=3, num_workers=0)
    run("tests/helpers/ddp_worker.py", *arguments, NOTES=str(tmp_path))
    assert checkpoint(tmp_path)["global_step"] == 3
    trained = torch.load(tmp_path / "rank0.pt", weights_only=True)
    epoch = trained["batches_an_epoch"]
    assert len(trained["batches"]) == 9 > epoch
    assert sorted(index for batch in trained["batches"][:epoch] for index in batch) == list(range(12))


def test_a_resumed_schedule_keeps_its_place_and_takes_its_shape_from_the_flags():
    from lightning import LinearDecayLRScheduler

    def scheduled(max_updates, rate):
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=rate)
        return optimizer, LinearDecayLRScheduler(optimizer, 3, max_updates)

    first, schedule = scheduled(4, 1.0)
    for _ in range(4):
        first.step()
        schedule.step()
    assert first.param_groups[0]["lr"] == 0
    second, longer = scheduled(8, 2.0)
    second.load_state_dict(first.state_dict())
    longer.load_state_dict(schedule.state_dict())
    second.step()
    longer.step()
    assert second.param_groups[0]["lr"] == pytest.approx(2.0 * (8 - 6) / (8 - 3))
