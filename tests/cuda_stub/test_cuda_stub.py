"""What an update does on a GPU, counted without one, by a stand-in for the CUDA runtime."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.models import FAMILIES
from tests.helpers.stages import ROOT

FOLDER = Path(__file__).parent
HALF = {"16": "torch.float16", "bf16": "torch.bfloat16"}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The stand-in, compiled."""
    if torch.version.cuda is None or sys.platform != "linux":
        pytest.skip("the stand-in is for torch's CUDA build on Linux")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: run `make gpu-check`")
    if shutil.which("gcc") is None or shutil.which("nm") is None:
        pytest.skip("no gcc or nm to compile the stand-in with")
    out = tmp_path_factory.mktemp("cuda_stub")
    subprocess.run([FOLDER / "build.sh", sys.executable, out], check=True)
    return out / "libstub.so"


def under_the_stand_in(library, tmp_path, script, *arguments):
    """What a script of this folder prints."""
    environment = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"),
        "TRITON_CACHE_DIR": str(tmp_path / "triton"),
        "LD_PRELOAD": str(library),
        "LD_LIBRARY_PATH": str(library.parent),
        "OMP_NUM_THREADS": "1",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False",  # the stand-in has no virtual memory
    }
    command = [sys.executable, FOLDER / script, *arguments]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT, timeout=900)
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout


def updates(library, tmp_path, *cases):
    printed = under_the_stand_in(library, tmp_path, "updates.py", *cases)
    return [json.loads(line) for line in printed.splitlines() if line.startswith("{")]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_updates_wait_once_and_mix_no_devices_or_dtypes(library, tmp_path, stage):
    cases = [f"{family},{stage},{precision}" for family in FAMILIES for precision in HALF]
    for found in updates(library, tmp_path, *cases):
        half, single = [HALF[found["case"].split(",")[2]]], ["torch.float32"]
        assert found["devices"] == ["cuda"] and found["optimiser"] == single
        for name, dtypes in found["dtypes"].items():
            assert dtypes == (single if "residual" in name else half), (found["case"], name)
        assert found["waits"] == (1 if stage == 1 else 0), "for which gates are open, and nothing else"
        assert found["copies_to_device"] == (2 if stage == 1 else 1), "the batch, and the open units"
        assert not found["cuDNN attention"]
        if stage == 1:
            assert set(found["conv widths"]) <= {64, 128}, "few shapes for cuDNN to prepare for"
        if found["case"].startswith("hubert_base,"):
            assert found["kernels"] <= 1500


@pytest.mark.slow
def test_a_compiled_update_launches_fewer_kernels_and_waits_once(library, tmp_path):
    pytest.importorskip("triton", reason="no Triton to compile with")
    plain, compiled = updates(library, tmp_path, "hubert_base,1,bf16", "hubert_base,1,bf16,compile")
    assert compiled["kernels"] < 0.9 * plain["kernels"]
    assert compiled["waits"] == 1


@pytest.mark.slow
def test_the_code_of_gpu_check_runs(library, tmp_path):
    pytest.importorskip("triton", reason="no Triton to compile with")
    printed = under_the_stand_in(library, tmp_path, "gpu_check_dry.py")
    assert "pass waits of an update: 1" in printed
    assert "stage 3, product+bf16+compile: audio seconds per second" in printed and "\nstatus " in printed


def test_memory_grows_in_segments_unless_the_user_has_chosen(monkeypatch):
    from training import hardware

    monkeypatch.setattr(os, "environ", chosen := {})
    hardware.prepare_gpu(tf32=False)
    assert chosen == {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.setattr(os, "environ", chosen := {name: "max_split_size_mb:64"})
        hardware.prepare_gpu(tf32=False)
        assert chosen == {name: "max_split_size_mb:64"}
