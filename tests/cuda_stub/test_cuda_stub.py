"""What an update does on a GPU, counted without one, by a stand-in for the CUDA runtime (tests/cuda_stub)."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.stages import ROOT

FOLDER = Path(__file__).parent
HALF = {"16": "torch.float16", "bf16": "torch.bfloat16"}
KERNELS = {
    "hubert_base": (1160, 950),
    "wavlm_base": (1900, 1720),
    "hubert_large": (1900, 1640),
    "wavlm_large": (3400, 3150),
}
"""The most kernels of an update in stages 1 and 3: a little above what was counted with half of the units."""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The stand-in, compiled."""
    if torch.version.cuda is None or sys.platform != "linux":
        pytest.skip("the stand-in is for torch's CUDA build on Linux")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: run `make gpu-check`")
    if shutil.which("gcc") is None:
        pytest.skip("no gcc to compile the stand-in with")
    out = tmp_path_factory.mktemp("cuda_stub")
    built = subprocess.run([FOLDER / "build.sh", sys.executable, out], capture_output=True, text=True)
    if built.returncode:
        pytest.skip(f"the stand-in does not compile: {built.stderr.strip().splitlines()[-1]}")
    return out / "libstub.so"


def under_the_stand_in(library, tmp_path, script, *arguments, timeout=300):
    """What a script of its folder prints."""
    environment = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"),
        "TRITON_CACHE_DIR": str(tmp_path / "triton"),
        "LD_PRELOAD": str(library),
        "LD_LIBRARY_PATH": str(library.parent),
        "OMP_NUM_THREADS": "1",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False",  # the stand-in has no virtual memory
    }
    process = subprocess.run(
        [sys.executable, FOLDER / script, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=timeout,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout


def updates(library, tmp_path, *arguments):
    """What updates.py reports of each case."""
    printed = under_the_stand_in(library, tmp_path, "updates.py", "--exp_dir", tmp_path, *arguments)
    return [json.loads(line) for line in printed.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("stage", [1, 3])
def test_an_update_waits_once_for_the_gpu_and_mixes_no_devices_or_dtypes(library, tmp_path, stage):
    cases = [f"{family},{stage},{precision}" for family in KERNELS for precision in HALF]
    for found in updates(library, tmp_path, *cases):
        family, _, precision = found["case"].split(",")
        half, single = [HALF[precision]], ["torch.float32"]
        assert found["devices"] == ["cuda"]
        assert found["optimiser"] == single and found["dtypes"].pop("gradient") == single
        for name, dtypes in found["dtypes"].items():
            assert dtypes == (single if "residual" in name else half), (found["case"], name)
        assert found["synchronisations"] == (1 if stage == 1 else 0), "which gates are open, and nothing else"
        assert found["copies to the device"] == (2 if stage == 1 else 1), "the batch, and the open units"
        assert not found["cuDNN attention"]
        if stage == 1:
            assert set(found["conv widths"]) <= {64, 128}, "few shapes for cuDNN to prepare for"
        assert found["kernels"] <= KERNELS[family][0 if stage == 1 else 1], found["case"]


@pytest.mark.parametrize("stage", [1, 3])
def test_a_compiled_update_launches_fewer_than_a_thousand_kernels(library, tmp_path, stage):
    pytest.importorskip("triton", reason="no Triton to compile with")
    [found] = updates(
        library, tmp_path, "--updates", "24", "--flags", " --compile", f"hubert_base,{stage},bf16"
    )
    assert found["kernels"] < (1000 if stage == 1 else 820)
    # That of the gates; and that of the signals, which are asked for every ten updates.
    assert found["synchronisations"] < (1.2 if stage == 1 else 0.2), "or it still compiles"


def test_activation_checkpointing_holds_less_memory(library, tmp_path):
    # All units open, so that no draw decides; in a model this narrow the conv blocks hold most of the memory.
    size = ("--share", "1", "--utterances", "16", "--seconds", "10", "hubert_large,3,bf16")
    [plain] = updates(library, tmp_path, *size)
    [checkpointed] = updates(library, tmp_path, "--flags", " --activation_checkpointing --tf32", *size)
    assert checkpointed["peak GiB"] < 0.9 * plain["peak GiB"]


@pytest.mark.slow
def test_what_gpu_check_runs_on_a_gpu_runs(library, tmp_path):
    pytest.importorskip("triton", reason="no Triton to compile with")
    printed = under_the_stand_in(library, tmp_path, "gpu_check_dry.py", timeout=1500)
    assert "pass synchronisations an update: 1" in printed
    assert "stage 3, skip+bf16+compile: audio seconds a second" in printed and "\nstatus " in printed


def test_memory_grows_in_segments_unless_the_user_has_chosen(monkeypatch):
    from training import hardware

    monkeypatch.setattr(os, "environ", chosen := {})
    hardware.prepare_gpu(tf32=False)
    assert chosen == {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.setattr(os, "environ", chosen := {name: "max_split_size_mb:64"})
        hardware.prepare_gpu(tf32=False)
        assert chosen == {name: "max_split_size_mb:64"}
