"""ExecuTorch programs: what its runtime computes with them, and what is refused."""

import pytest
import torch
from torch.testing import assert_close

from tests.helpers.models import with_absent_branches
from tests.helpers.stages import call
from utils.checkpoint import save_checkpoint

runtime = pytest.importorskip("executorch.runtime")
pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("family", "flags"), [("hubert_large", []), ("hubert_large", ["--int8"])])
@torch.no_grad()
def test_the_runtime_computes_what_pytorch_does(family, flags, monkeypatch, capsys, tmp_path):
    model = with_absent_branches(family)
    save_checkpoint(tmp_path / "model.pth", model)
    given = ("--ckpt", tmp_path / "model.pth", "--out", tmp_path / "model.pte", "--max_seconds", 2)
    call(monkeypatch, "export_to_executorch", *given, *flags)
    assert "at most 32,000 samples (2 s)" in capsys.readouterr().out
    method = runtime.Runtime.get().load_program(tmp_path / "model.pte").load_method("forward")
    tolerance = {"rtol": 0, "atol": 0.1} if flags else {"rtol": 1e-4, "atol": 1e-5}
    for samples in (400, 7001, 32_000):
        waveforms = torch.randn(1, samples)
        assert_close(method.execute([waveforms])[0], model(waveforms)[0], **tolerance)


def test_too_short_a_longest_waveform_is_one_sentence(fails, teacher, tmp_path):
    flags = ("--ckpt", teacher, "--out", tmp_path / "model.pte", "--max_seconds", "0.01")
    assert "--max_seconds 0.01: the longest waveform has" in fails("export_to_executorch", *flags)
    assert not list(tmp_path.iterdir())
