"""What an update does on a GPU, counted without one, by a stand-in for the CUDA runtime."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.stages import ROOT
from training.hardware import prepare_gpu

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


@pytest.mark.slow
def test_updates_wait_once_and_mix_no_devices_or_dtypes(library, tmp_path):
    cases = ["hubert_base,1,bf16", "wavlm_large,1,16", "hubert_large,3,16", "wavlm_base,3,bf16"]
    printed = under_the_stand_in(library, tmp_path, "updates.py", *cases).splitlines()
    found = {case["case"]: case for case in map(json.loads, printed)}
    assert list(found) == cases
    for case, counted in found.items():
        _, stage, precision = case.split(",")
        half, single, gated = [HALF[precision]], ["torch.float32"], stage == "1"
        assert counted["devices"] == ["cuda"] and counted["optimiser"] == single
        expected = {"conv block": half, "attention": half, "residual stream": single}
        assert counted["dtypes"] == expected, case
        assert counted["waits"] == gated, "for which gates are open, and nothing else"
        assert counted["copies_to_device"] == 1 + gated, "the batch, and the open units"
        assert not counted["cuDNN attention"]
        if gated:
            assert set(counted["conv widths"]) <= {64, 128}, "few shapes for cuDNN to prepare for"
    assert found["hubert_base,1,bf16"]["kernels"] <= 1500


@pytest.mark.slow
def test_the_code_of_gpu_check_runs(library, tmp_path):
    pytest.importorskip("triton", reason="no Triton to compile with")
    printed = under_the_stand_in(library, tmp_path, "gpu_check_dry.py")
    kernels = [int(line.split(": ")[1]) for line in printed.splitlines() if "kernels of an update" in line]
    assert kernels[1] < 0.9 * kernels[0], "compiled, an update launches fewer"
    for variant in ("product+bf16", "product+bf16+compile"):
        assert f"pass waits of an update, {variant}: 1" in printed
    assert "peak GiB, bf16, 64 x 10 s" in printed and "\nstatus " in printed


@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", None])
def test_memory_grows_in_segments_unless_the_user_has_chosen(name, monkeypatch):
    chosen = {name: "max_split_size_mb:64"} if name else {}
    monkeypatch.setattr(os, "environ", chosen)
    prepare_gpu(tf32=False)
    own = {name: "max_split_size_mb:64"} if name else {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    assert chosen == own
