"""The stages as a user runs them: real processes on real files."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ENVIRONMENT, ROOT, run, start

from wav2vec2 import wav2vec2_model

SETTINGS = {
    "max": 12,
    "warmup": 3,
    "sparsity_warmup": 4,
    "final_max": 4,
    "final_warmup": 2,
    "distill_layers": "0.1,3",
    "seconds_per_batch": 8,
    "gpus": 0,
    "num_workers": 1,
    "precision": 32,
    "log_interval": 1,
    "reg_lr": 0.1,
}


def flags(manifests, teacher, exp_dir, **changes):
    values = {
        "tsv_dir": manifests,
        "teacher_ckpt": teacher,
        "student_ckpt": teacher,
        "exp_dir": exp_dir,
        "gpus": 0,
        "max_updates": 10,
        "warmup_updates": 3,
        "sparsity_warmup_updates": 4,
        "distill_layers": "0.1,3",
        "seconds_per_batch": 8,
        "save_interval": 4,
        "log_interval": 1,
        **changes,
    }
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def weights(exp_dir):
    return torch.load(exp_dir / "ckpts" / "last.ckpt", weights_only=True)["state_dict"]


def assert_equal_to_the_bit(first, second):
    assert first.keys() == second.keys()
    for key in first:
        assert torch.equal(first[key], second[key]), key


def test_run_sh_makes_a_model_that_the_readme_snippet_loads(manifests, teacher, tmp_path):
    variables = {
        **SETTINGS,
        "tsv_dir": manifests,
        "train_subset": "train100",
        "teacher_ckpt": teacher,
        "root_dir": tmp_path / "exp",
        "final_dir": tmp_path / "exp" / "final",
        "python": sys.executable,
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
    assert "failed with status 2" in broken.stderr
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

    written = final.stat().st_mtime_ns
    again = recipe()
    assert again.returncode == 0
    assert [line for line in again.stdout.splitlines() if "is finished" in line] == again.stdout.splitlines()
    assert again.stdout.count("is finished") == 4
    assert final.stat().st_mtime_ns == written


@pytest.fixture(scope="module")
def unbroken(manifests, teacher, tmp_path_factory):
    exp_dir = tmp_path_factory.mktemp("unbroken")
    run("distill.py", *flags(manifests, teacher, exp_dir))
    return weights(exp_dir)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_run_goes_on_to_the_weights_of_an_unbroken_one(
    workers, unbroken, manifests, teacher, tmp_path
):
    arguments = flags(manifests, teacher, tmp_path, num_workers=workers)
    process = start("distill.py", *arguments)
    for line in process.stdout:
        if line.startswith("update 6/10"):
            process.kill()
            break
    process.wait()
    last = tmp_path / "ckpts" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 4
    resumed = run("distill.py", *arguments, "--resume_checkpoint", last)
    assert "update 5/10" in resumed.stderr and "update 4/10" not in resumed.stderr
    assert_equal_to_the_bit(weights(tmp_path), unbroken)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_saves_at_the_next_update(number, unbroken, manifests, teacher, tmp_path):
    arguments = flags(manifests, teacher, tmp_path, accum_grad=1, save_interval=1000)
    process = start("distill.py", *arguments)
    for line in process.stdout:
        if line.startswith("update 3/10"):
            os.kill(process.pid, number)
            break
    output = process.stdout.read()
    assert process.wait() == 128 + number, output
    last = tmp_path / "ckpts" / "last.ckpt"
    assert f"--resume_checkpoint {last}" in output
    assert 3 <= torch.load(last, weights_only=True)["global_step"] < 10
    if number == signal.SIGUSR1:
        run("distill.py", *arguments, "--resume_checkpoint", last)
        assert_equal_to_the_bit(weights(tmp_path), unbroken)


def test_two_ranks_end_with_equal_weights_and_see_every_utterance_once_an_epoch(manifests, teacher, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(ROOT / "tests" / "ddp_worker.py"), str(tmp_path)]
    command += flags(manifests, teacher, tmp_path / "exp", num_workers=0)
    subprocess.run(command, env=ENVIRONMENT, check=True, capture_output=True, timeout=300)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert_equal_to_the_bit(first["weights"], second["weights"])
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
    run("tests/ddp_worker.py", tmp_path, *arguments)
    assert torch.load(tmp_path / "ckpts" / "last.ckpt", weights_only=True)["global_step"] == 3
    trained = torch.load(tmp_path / "rank0.pt", weights_only=True)
    epoch = trained["batches_an_epoch"]
    assert len(trained["batches"]) == 9 > epoch
    assert sorted(index for batch in trained["batches"][:epoch] for index in batch) == list(range(12))


def test_slurms_signal_saves_and_requeues_the_job(manifests, teacher, tmp_path):
    """With stand-ins for srun and scontrol: run.sh sees a job, and the job's last minutes."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "srun").write_text(f'#!/bin/bash\necho "$1 $2" > {tmp_path}/srun\nexec "${{@:3}}"\n')
    (tools / "scontrol").write_text(f'#!/bin/bash\necho "$@" > {tmp_path}/scontrol\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    slurm = {"JOB_ID": 7, "JOB_NAME": "job", "NTASKS": 1, "NTASKS_PER_NODE": 1, "PROCID": 0, "LOCALID": 0}
    slurm |= {"NODEID": 0, "NODELIST": "localhost", "STEP_NUM_TASKS": 1, "SUBMIT_DIR": tmp_path}
    variables = {**SETTINGS, "tsv_dir": manifests, "train_subset": "train100", "teacher_ckpt": teacher}
    variables |= {"root_dir": tmp_path / "exp", "python": sys.executable, "max": 1000}
    variables |= {f"SLURM_{name}": value for name, value in slurm.items()}
    environment = {**ENVIRONMENT, **{name: str(value) for name, value in variables.items()}}
    environment["PATH"] = f"{tools}:{environment['PATH']}"
    job = subprocess.Popen(
        ["bash", str(ROOT / "run.sh")],
        env=environment,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for line in job.stdout:
        if line.startswith("update 2/1000"):
            job.send_signal(signal.SIGUSR1)
            break
    output = job.stdout.read()
    assert job.wait() == 128 + signal.SIGUSR1, output
    assert (tmp_path / "srun").read_text() == "--nodes=1 --ntasks-per-node=1\n"
    assert (tmp_path / "scontrol").read_text() == "requeue 7\n"
    assert torch.load(tmp_path / "exp" / "ckpts" / "last.ckpt", weights_only=True)["global_step"] >= 2


def test_a_signal_to_all_processes_of_a_run_saves_too(manifests, teacher, tmp_path):
    """As SLURM sends it: the loader's workers get it as well, and have to go on."""
    arguments = flags(manifests, teacher, tmp_path, num_workers=2, save_interval=1000, max_updates=200)
    process = start("distill.py", *arguments, start_new_session=True)
    for line in process.stdout:
        if line.startswith("update 3/200"):
            os.killpg(process.pid, signal.SIGUSR1)
            break
    output = process.stdout.read()
    assert process.wait() == 128 + signal.SIGUSR1, output
    assert torch.load(tmp_path / "ckpts" / "last.ckpt", weights_only=True)["global_step"] >= 3


def test_a_longer_run_goes_on_along_its_own_schedule(manifests, teacher, tmp_path):
    arguments = flags(manifests, teacher, tmp_path, max_updates=4, num_workers=0)
    run("distill.py", *arguments)
    last = tmp_path / "ckpts" / "last.ckpt"
    arguments = flags(manifests, teacher, tmp_path, max_updates=8, num_workers=0, learning_rate=0.001)
    refused = run("distill.py", *arguments, "--accum_grad", 2, "--resume_checkpoint", last, check=False)
    assert refused.returncode == 2
    assert (
        "made with 1 batches an update (--accum_grad 1 on 1 processes), not 2"
        in refused.stderr.splitlines()[-1]
    )
    run("distill.py", *arguments, "--resume_checkpoint", last)
    checkpoint = torch.load(last, weights_only=True)
    assert checkpoint["global_step"] == 8 and (tmp_path / "finished").read_text() == "8\n"


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
