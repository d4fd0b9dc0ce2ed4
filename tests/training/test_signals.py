"""Signals, from the start of a run to its end: what is done is saved, and nobody is left behind."""

import os
import signal
import time
from pathlib import Path

import pytest

from tests.helpers.stages import checkpoint, ended, flags, start, wait_for

WORKER = "tests/helpers/ddp_worker.py"


@pytest.fixture
def train(manifests, teacher, tmp_path):
    """Starts stage 1 in the folder ``exp`` of ``tmp_path``."""

    def train(script="distill.py", ranks=1, environment=(), **changes):
        changes = {"num_workers": 2, "save_interval": 1000, "max_updates": 10_000, **changes}
        arguments = flags(manifests, teacher, tmp_path / "exp", **changes)
        return start(script, *arguments, ranks=ranks, NOTES=tmp_path, **dict(environment))

    return train


def test_a_signal_to_all_processes_saves_and_ends_the_run(train, tmp_path):
    """As preemption sends it: the processes that read audio get it as well, and have to go on."""
    process = train()
    wait_for(process, "update 3/")
    os.killpg(process.pid, signal.SIGTERM)
    status, output = ended(process)
    assert status == 128 + signal.SIGTERM, output
    assert checkpoint(tmp_path / "exp")["global_step"] >= 3 and "run the same command again" in output


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_to_a_resumed_run_saves(number, train, tmp_path):
    """First to one process, as SLURM sends it, then to all, as a terminal does."""
    done = 1
    for send in (os.kill, os.killpg):
        process = train()
        wait_for(process, f"update {done + 2}/")
        send(process.pid, number)
        status, output = ended(process)
        assert status == 128 + number and "exited unexpectedly" not in output, output
        assert checkpoint(tmp_path / "exp")["global_step"] >= done + 2
        done = checkpoint(tmp_path / "exp")["global_step"]


@pytest.mark.slow
@pytest.mark.parametrize("number, moment", [(signal.SIGINT, "imports"), (signal.SIGUSR1, "validation")])
def test_a_signal_during_start_up_is_one_sentence(number, moment, train):
    process = train()
    if moment == "imports":
        # Once the process has torch's library open, it is past its first lines.
        while "libtorch_cpu" not in Path(f"/proc/{process.pid}/maps").read_text():
            time.sleep(0.05)
    else:
        wait_for(process, "warning: --gpus 0")
    os.killpg(process.pid, number)
    status, output = ended(process)
    assert status == 128 + number
    name = signal.Signals(number).name
    assert output.splitlines()[-1] == (f"distill.py: stopped by {name} with nothing to save; run it again")
    assert "Traceback" not in output and "Error" not in output


@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once(train):
    """Also where the update that the first one waits for is hours away."""
    process = train(accum_grad=10**6)
    wait_for(process, "update 0: valid")
    time.sleep(3)
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    status, output = ended(process)
    assert status == 128 + signal.SIGINT and "Traceback" not in output


@pytest.mark.slow
def test_a_killed_loader_worker_is_one_sentence(train):
    process = train()
    wait_for(process, "update 3/")
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        os.kill(int(child), signal.SIGKILL)
    status, output = ended(process)
    assert status == 2
    assert "a process that reads audio was killed" in output.splitlines()[-1] and "Traceback" not in output


@pytest.mark.slow
def test_a_second_run_in_a_folder_is_refused(train, tmp_path):
    first = train()
    wait_for(first, "update 2/")
    status, output = ended(train())
    assert status == 2
    assert f"{tmp_path}/exp: another run trains there (process {first.pid} on " in output.splitlines()[-1]
    wait_for(first, "update 5/")
    first.kill()
    third = train()
    assert "another run" not in wait_for(third, "update ")
    third.kill()


@pytest.mark.slow
@pytest.mark.parametrize("launcher, killed", [("torchrun", 1), ("lightning", 0), ("lightning", 1)])
def test_of_two_ranks_none_outlives_the_other(launcher, killed, train, tmp_path):
    # As with several GPUs and neither torchrun nor SLURM: Lightning's first process starts the others.
    ranks, environment = (2, {}) if launcher == "torchrun" else (1, {"LOCAL_WORLD_SIZE": 2})
    process = train(WORKER, ranks, environment, num_workers=1)
    wait_for(process, "update 3/")
    os.kill(int((tmp_path / f"rank{killed}.pid").read_text()), signal.SIGKILL)
    status, output = ended(process)
    assert status != 0 and "gloo" not in output and "raise RuntimeError" not in output
    if launcher == "torchrun":
        # The survivor says so itself, unless torchrun sees it first and ends the survivor.
        assert "has ended or does not answer" in output or "Signal 9 (SIGKILL) received" in output


@pytest.mark.slow
def test_nodes_that_do_not_come_are_given_up(train):
    status, output = ended(train(WORKER, environment={"PATIENCE": 5}, num_workers=0, num_nodes=2))
    assert status == 2, output
    assert "waiting for the other nodes for up to 5 s" in output
    assert "have come together within 5 s (--num_nodes 2" in output.splitlines()[-1]
    assert "Traceback" not in output
