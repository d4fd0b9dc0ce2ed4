"""``torch.hub.load`` from this folder."""

import runpy
import subprocess
import sys

import pytest
import torch

from tests.helpers.models import GOLDEN, recorded, tiny_config
from tests.helpers.stages import ROOT
from utils.checkpoint import save_checkpoint
from wav2vec2 import wav2vec2_model

# torchaudio's factories of the same names have 512 fewer, for want of dummy_weight.
ENTRIES = {
    "hubert_base": 94_371_456,
    "hubert_large": 315_434_624,
    "hubert_xlarge": 962_493_056,
    "wav2vec2_base": 94_371_456,
    "wav2vec2_large": 315_428_480,
    "wav2vec2_large_lv60k": 315_438_208,
    "wavlm_base": 94_381_680,
    "wavlm_large": 315_452_608,
}


PROGRAM = """
import sys
import dataset, exports, training, utils  # the program's own
import torch

repository, path, golden = sys.argv[1:]
golden = torch.load(golden, weights_only=True)
model = torch.hub.load(repository, "compressed", path, source="local")
assert not any(module.training for module in model.modules())
with torch.no_grad():
    states, _ = model.extract_features(golden["waveforms"])
torch.testing.assert_close(states, golden["hidden_states_pruned"], rtol=1e-5, atol=1e-5)
"""


def test_a_program_with_a_utils_of_its_own_loads_a_model(tmp_path):
    golden = recorded("prune_wavlm")
    student = {"config": golden["pruned_config"], "state_dict": golden["pruned_state_dict"]}
    torch.save(student, tmp_path / "student.pth")
    for name in ("dataset", "exports", "training", "utils"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "program.py", ROOT, "student.pth", GOLDEN / "prune_wavlm.pt"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_entries_are_models_and_nothing_else():
    found = runpy.run_path(str(ROOT / "hubconf.py"))
    entries = {name for name, value in found.items() if callable(value) and not name.startswith("_")}
    assert entries == {"compressed", "s3prl_upstream", *ENTRIES}


@pytest.mark.parametrize("entry", ENTRIES)
def test_an_architecture_has_its_size_and_takes_overrides(entry):
    with torch.device("meta"):
        model = torch.hub.load(str(ROOT), entry, source="local", encoder_dropout=0.25)
    assert sum(parameter.numel() for parameter in model.parameters()) == ENTRIES[entry]
    assert model.config["encoder_dropout"] == 0.25


def test_a_file_that_is_no_checkpoint_is_named_in_one_sentence(tmp_path):
    (tmp_path / "text.pth").write_text("nothing to see here\n")
    torch.save({"config": tiny_config(), "state_dict": {}}, tmp_path / "incomplete.pth")
    for name in ("text.pth", "missing.pth", "incomplete.pth"):
        with pytest.raises(ValueError, match=name) as error:
            torch.hub.load(str(ROOT), "compressed", str(tmp_path / name), source="local")
        assert "\n" not in str(error.value)


def test_the_upstream_gives_every_layer_of_each_waveform(tmp_path):
    """The model has layer norms; a group norm over time sees the padding."""
    torch.manual_seed(0)
    config = tiny_config(extractor_mode="layer_norm", normalize_waveform=True)
    save_checkpoint(tmp_path / "model.pth", wav2vec2_model(**config))
    load = runpy.run_path(str(ROOT / "hubconf.py"))["s3prl_upstream"]
    upstream = load(ckpt=str(tmp_path / "model.pth"), model_config=None, refresh=False)
    assert not upstream.training and upstream.get_downsample_rates("hidden_states") == 320
    waveforms = [0.1 * torch.randn(length) for length in (16_000, 9_000, 4_321)]
    states = upstream(waveforms)["hidden_states"]
    assert [tuple(state.shape) for state in states] == 4 * [(3, 49, 32)]
    for place, waveform in enumerate(waveforms):
        alone, _ = upstream.model.extract_features(waveform.unsqueeze(0))
        for batched, state in zip(states, alone, strict=True):
            torch.testing.assert_close(batched[place, : state.size(1)], state[0], rtol=1e-4, atol=1e-5)
    torch.stack(states).square().mean().backward()
    layers = upstream.model.encoder.transformer.layers
    assert all(layer.feed_forward.output_dense.weight.grad.abs().sum() > 0 for layer in layers)
