"""Signals, from the start of a run to its end: what is done is saved, and nobody is left behind."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from stage_helpers import (
    ENVIRONMENT,
    RECIPE,
    ROOT,
    checkpoint,
    flags,
    start,
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_all_processes_of_a_resumed_run_saves(number, manifests, teacher, tmp_path):
    """As a terminal, preemption and SLURM send it: the loader's workers get it as well, and have to go on."""
    arguments = flags(manifests, teacher, tmp_path, num_workers=2, save_interval=1000, max_updates=200)
    process = start("distill.py", *arguments, start_new_session=True)
    wait_for(process, "update 3/200")
    os.kill(process.pid, number)
    status, output = ended(process)
    assert status == 128 + number, output
    first = checkpoint(tmp_path)["global_step"]
    assert 3 <= first < 200 and "run the same command again" in output

    process = start("distill.py", *arguments, start_new_session=True)
    wait_for(process, f"update {first + 2}/200")
    os.killpg(process.pid, number)
    status, output = ended(process, process.pid)
    assert status == 128 + number, output
    assert first + 2 <= checkpoint(tmp_path)["global_step"] < 200


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
    slurm = {
        "JOB_ID": 7,
        "JOB_NAME": "interactive",
        "NTASKS": 1,
        "NTASKS_PER_NODE": 1,
        "PROCID": 0,
        "LOCALID": 0,
    }
    slurm |= {"NODEID": 0, "NODELIST": "localhost", "STEP_NUM_TASKS": 1, "SUBMIT_DIR": tmp_path}
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
