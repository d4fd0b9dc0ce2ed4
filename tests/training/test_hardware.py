"""What --gpus comes to on a machine and under SLURM, and what failing hardware is said to be."""

from types import SimpleNamespace

import pytest
import torch
from pytorch_lightning.plugins.environments import LightningEnvironment

from training import errors, hardware
from training.callbacks import StopOnSignal
from utils.files import UserError
from utils.processes import is_first

FLAGS = SimpleNamespace(gpus=4, num_nodes=1, compile=False, exp_dir="exp")


def test_too_many_gpus_are_an_error_and_none_is_a_warning(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="--gpus 4: this machine has 2"):
        hardware.trainer_devices(FLAGS)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert hardware.trainer_devices(FLAGS)["accelerator"] == "cpu"
    assert "warning: no GPU is found" in capsys.readouterr().err


def test_tasks_that_slurm_binds_to_a_gpu_take_the_one_they_see(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    slurm = {"PROCID": 3, "LOCALID": 3, "NODEID": 0, "STEP_NUM_TASKS": 4, "STEP_NUM_NODES": 1}
    slurm |= {"STEP_TASKS_PER_NODE": 4, "STEP_NODELIST": "node1"}
    slurm |= {"NTASKS": 8, "NTASKS_PER_NODE": 8}  # the job's
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    monkeypatch.setenv("SLURM_JOB_NAME", "interactive")
    assert hardware.devices_per_node(FLAGS) == ("gpu", 4)
    assert hardware.trainer_devices(FLAGS)["devices"] == 1
    [environment] = hardware.cluster(FLAGS)
    assert (environment.local_rank(), environment.global_rank(), environment.world_size()) == (0, 3, 4)
    environment.validate_settings(num_devices=1, num_nodes=1)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "2")
    with pytest.raises(UserError, match="started 2 tasks per node; give srun --ntasks-per-node=4"):
        hardware.devices_per_node(FLAGS)


def test_a_jobs_script_is_no_step_whatever_its_header_says(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, value in {"PROCID": 0, "LOCALID": 0, "NTASKS": 4, "NTASKS_PER_NODE": 4, "JOB_ID": 7}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert hardware.devices_per_node(FLAGS) == ("cpu", 1) and not is_first()
    [environment] = hardware.cluster(FLAGS)
    assert isinstance(environment, LightningEnvironment)


def test_srun_has_to_start_as_many_tasks_on_each_node(monkeypatch):
    step = {"NUM_TASKS": 4, "NUM_NODES": 2, "TASKS_PER_NODE": "2(x2)"}
    for name, value in step.items():
        monkeypatch.setenv(f"SLURM_STEP_{name}", str(value))
    two = SimpleNamespace(gpus=0, num_nodes=2)
    assert hardware.devices_per_node(two) == ("cpu", 2)
    with pytest.raises(UserError, match="--num_nodes 1: SLURM has started 4 tasks on 2 nodes; give srun"):
        hardware.devices_per_node(FLAGS)
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "3,1")
    with pytest.raises(UserError, match="--num_nodes 2: SLURM has started 4 tasks on 2 nodes"):
        hardware.devices_per_node(two)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            torch.distributed.DistBackendError("[a.cpp:1] NCCL error. Advice"),
            r"does not answer \(NCCL error\)",
        ),
        (RuntimeError("[a.cc:2] Connection closed by peer"), r"answer \(Connection closed by peer\)"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal"), "reads audio was killed"),
        (ConnectionResetError(104, "reset"), "reads audio was killed"),
        (OSError(28, "No space left on device"), "cannot write the logs in exp/logs: No space left"),
    ],
)
def test_failing_hardware_is_one_sentence(error, words):
    with pytest.raises(UserError, match=words), errors.errors_as_sentences(FLAGS, StopOnSignal()):
        raise error


def test_a_mistake_in_the_program_stays_what_it_is():
    for error in (RuntimeError("shapes"), FileNotFoundError(2, "No such file", "a.wav")):
        with pytest.raises(type(error)), errors.errors_as_sentences(FLAGS, StopOnSignal()):
            raise error


def test_a_rank_lost_to_a_signal_that_this_one_got_is_no_error(capsys):
    stopper = StopOnSignal()
    stopper.received = 15
    with errors.errors_as_sentences(FLAGS, stopper):
        raise RuntimeError("[a.cc:2] Connection closed by peer")
    assert stopper.signal == 15 and "stopped by SIGTERM before the update was over" in capsys.readouterr().err
