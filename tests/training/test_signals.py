"""Signals, from the start of a run to its end: what is done is saved, and nobody is left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.stages import (
    ENVIRONMENT,
    RECIPE,
    ROOT,
    checkpoint,
    flags,
    run,
    start,
    two_ranks,
    wait_for,
)


def members(group):
    """The processes of a process group that are still there, zombies not counted."""
    found = []
    for folder in os.listdir("/proc"):
        try:
            fields = Path(f"/proc/{folder}/stat").read_text().rpartition(")")[2].split()
        except (OSError, NotADirectoryError):
            continue
        if len(fields) > 2 and fields[2] == str(group) and fields[0] != "Z":
            found.append(int(folder))
    return found


def ended(process, group=None, seconds=60):
    """Waits for a process and, for a time, for all of its group; returns its status and what it said."""
    output = process.stdout.read()
    status = process.wait(seconds)
    end = time.monotonic() + seconds
    while group is not None and members(group) and time.monotonic() < end:
        time.sleep(0.1)
    assert group is None or not members(group)
    return status, output


def test_a_signal_to_all_processes_saves_and_ends_the_run(manifests, teacher, tmp_path):
    """As preemption sends it: the processes that read audio get it as well, and have to go on."""
    arguments = flags(manifests, teacher, tmp_path, num_workers=2, save_interval=1000, max_updates=200)
    process = start("distill.py", *arguments, start_new_session=True)
    wait_for(process, "update 3/200")
    os.killpg(process.pid, signal.SIGTERM)
    status, output = ended(process, process.pid)
    assert status == 128 + signal.SIGTERM, output
    assert 3 <= checkpoint(tmp_path)["global_step"] < 200 and "run the same command again" in output


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_a_resumed_run_saves(number, manifests, teacher, tmp_path):
    """First to one process, as SLURM sends it, then to all, as a terminal does."""
    arguments = flags(manifests, teacher, tmp_path, num_workers=2, save_interval=1000, max_updates=200)
    process = start("distill.py", *arguments, start_new_session=True)
    wait_for(process, "update 3/200")
    os.kill(process.pid, number)
    status, output = ended(process)
    assert status == 128 + number, output
    first = checkpoint(tmp_path)["global_step"]
    assert 3 <= first < 200

    process = start("distill.py", *arguments, start_new_session=True)
    wait_for(process, f"update {first + 2}/200")
    os.killpg(process.pid, number)
    status, output = ended(process, process.pid)
    assert status == 128 + number, output
    assert first + 2 <= checkpoint(tmp_path)["global_step"] < 200


@pytest.mark.slow
def test_slurms_signal_saves_and_requeues_the_job(manifests, teacher, tmp_path):
    """With stand-ins for srun and scontrol, in a job as salloc names it: SLURM signals the step alone."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "srun").write_text(
        f'#!/bin/bash\necho "$1 $2 $3" > {tmp_path}/srun\necho $$ > {tmp_path}/step\nexec "${{@:4}}"\n'
    )
    (tools / "scontrol").write_text(f'#!/bin/bash\necho "$@" > {tmp_path}/scontrol\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    slurm = {"JOB_ID": 7, "JOB_NAME": "interactive", "NTASKS": 1, "NTASKS_PER_NODE": 1, "PROCID": 0}
    slurm |= {"LOCALID": 0, "NODEID": 0, "NODELIST": "localhost", "STEP_NUM_TASKS": 1, "SUBMIT_DIR": tmp_path}
    variables = {**RECIPE, "tsv_dir": manifests, "teacher_ckpt": teacher, "root_dir": tmp_path / "exp"}
    variables |= {"max": 1000}
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
    wait_for(job, "update 2/1000")
    # Passed on to srun, these would kill its tasks unsaved.
    job.send_signal(signal.SIGTERM)
    job.send_signal(signal.SIGINT)
    wait_for(job, "update 4/1000")
    os.kill(int((tmp_path / "step").read_text()), signal.SIGUSR1)
    output = job.stdout.read()
    assert job.wait() == 128 + signal.SIGUSR1, output
    assert (tmp_path / "srun").read_text() == "--kill-on-bad-exit=1 --nodes=1 --ntasks-per-node=1\n"
    assert (tmp_path / "scontrol").read_text() == "requeue 7\n"
    assert checkpoint(tmp_path / "exp")["global_step"] >= 4


@pytest.mark.slow
@pytest.mark.parametrize(
    "number, moment",
    [(signal.SIGINT, "imports"), (signal.SIGINT, "validation"), (signal.SIGUSR1, "validation")],
)
def test_a_signal_during_start_up_is_one_sentence(number, moment, manifests, teacher, tmp_path):
    arguments = flags(manifests, teacher, tmp_path, num_workers=2)
    process = start("distill.py", *arguments, start_new_session=True)
    if moment == "imports":
        # Once the process has torch's library open, it is past its first lines.
        while "libtorch_cpu" not in Path(f"/proc/{process.pid}/maps").read_text():
            time.sleep(0.05)
    else:
        wait_for(process, "warning: --gpus 0")
    os.killpg(process.pid, number)
    status, output = ended(process, process.pid)
    assert status == 128 + number
    name = signal.Signals(number).name
    assert output.splitlines()[-1] == (
        f"distill.py: stopped by {name} with nothing to save; run it again to go on"
    )
    assert "Traceback" not in output and "Error" not in output


@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once(manifests, teacher, tmp_path):
    """Also where the update that the first one waits for is hours away."""
    arguments = flags(manifests, teacher, tmp_path, num_workers=1, accum_grad=10**6)
    process = start("distill.py", *arguments, start_new_session=True)
    wait_for(process, "update 0: valid")
    time.sleep(3)
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    status, output = ended(process, process.pid)
    assert status == 128 + signal.SIGINT and "Traceback" not in output


@pytest.mark.slow
def test_a_killed_loader_worker_is_one_sentence(manifests, teacher, tmp_path):
    arguments = flags(manifests, teacher, tmp_path, num_workers=2, max_updates=10_000)
    process = start("distill.py", *arguments, start_new_session=True)
    wait_for(process, "update 3/")
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        os.kill(int(child), signal.SIGKILL)
    status, output = ended(process, process.pid)
    assert status == 2
    assert "a process that reads audio was killed" in output.splitlines()[-1] and "Traceback" not in output


@pytest.mark.slow
def test_a_second_run_in_a_folder_is_refused_until_the_first_is_gone(manifests, teacher, tmp_path):
    arguments = flags(manifests, teacher, tmp_path, num_workers=1, max_updates=10_000)
    first = start("distill.py", *arguments)
    wait_for(first, "update 2/")
    second = run("distill.py", *arguments, check=False)
    assert second.returncode == 2
    assert f"{tmp_path}: another run trains there (process {first.pid} on " in second.stderr.splitlines()[-1]
    wait_for(first, "update 5/")
    first.kill()
    first.wait()
    third = start("distill.py", *arguments)
    assert "another run" not in wait_for(third, "update ")
    third.kill()
    third.wait()


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher, killed", [("torchrun", 0), ("torchrun", 1), ("lightning", 0), ("lightning", 1)]
)
def test_of_two_ranks_none_outlives_the_other(launcher, killed, manifests, teacher, tmp_path):
    arguments = flags(manifests, teacher, tmp_path / "exp", num_workers=1, max_updates=10_000)
    command = two_ranks("tests/helpers/ddp_worker.py", *arguments)
    environment = {**ENVIRONMENT, "NOTES": str(tmp_path)}
    if launcher == "lightning":
        # As with several GPUs and neither torchrun nor SLURM: the first process starts the others.
        command = [sys.executable, str(ROOT / "tests" / "helpers" / "ddp_worker.py"), *arguments]
        environment["LOCAL_WORLD_SIZE"] = "2"
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    wait_for(process, "update 3/")
    os.kill(int((tmp_path / f"rank{killed}.pid").read_text()), signal.SIGKILL)
    status, output = ended(process, process.pid)
    assert status != 0 and "gloo" not in output and "raise RuntimeError" not in output
    if launcher == "torchrun":
        # The survivor says so itself, unless torchrun sees it first and ends the survivor.
        assert "has ended or does not answer" in output or "Signal 9 (SIGKILL) received" in output


@pytest.mark.slow
def test_nodes_that_do_not_come_are_given_up(manifests, teacher, tmp_path):
    arguments = flags(manifests, teacher, tmp_path / "exp", num_workers=0, num_nodes=2)
    worker = "tests/helpers/ddp_worker.py"
    process = run(worker, *arguments, check=False, NOTES=str(tmp_path), PATIENCE="5")
    assert process.returncode == 2, process.stderr
    assert "waiting for the other nodes for up to 5 s" in process.stderr
    assert "have come together within 5 s (--num_nodes 2" in process.stderr.splitlines()[-1]
    assert "Traceback" not in process.stderr
