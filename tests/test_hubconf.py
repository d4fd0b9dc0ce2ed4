"""``torch.hub.load`` from this folder."""

import runpy
import subprocess
import sys

import pytest
import torch

from tests.helpers.models import GOLDEN, close, recorded, tiny_config
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


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A file with the recorded model after pruning."""
    golden = recorded("prune_wavlm")
    path = tmp_path_factory.mktemp("student") / "student.pth"
    torch.save({"config": golden["pruned_config"], "state_dict": golden["pruned_state_dict"]}, path)
    return path


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


def test_a_program_with_a_utils_of_its_own_loads_a_model(student, tmp_path):
    for name in ("dataset", "exports", "training", "utils"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "program.py", ROOT, student, GOLDEN / "prune_wavlm.pt"]
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


def test_a_file_that_is_no_checkpoint_is_named_in_one_sentence(student, tmp_path):
    (tmp_path / "text.pth").write_text("nothing to see here\n")
    content = torch.load(student, weights_only=True)
    content["state_dict"].popitem()
    torch.save(content, tmp_path / "incomplete.pth")
    for name in ("text.pth", "missing.pth", "incomplete.pth"):
        with pytest.raises(ValueError, match=name) as error:
            torch.hub.load(str(ROOT), "compressed", str(tmp_path / name), source="local")
        assert "\n" not in str(error.value)


def upstream_of(folder, **changes):
    """The upstream of a tiny model, loaded as s3prl loads one."""
    torch.manual_seed(0)
    save_checkpoint(folder / "model.pth", wav2vec2_model(**tiny_config(**changes)))
    load = runpy.run_path(str(ROOT / "hubconf.py"))["s3prl_upstream"]
    upstream = load(ckpt=str(folder / "model.pth"), model_config=None, refresh=False)
    assert not upstream.training and upstream.get_downsample_rates("hidden_states") == 320
    return upstream


def test_the_upstream_gives_every_layer_and_can_be_trained(tmp_path):
    upstream, waveforms = upstream_of(tmp_path), 0.1 * torch.randn(2, 16_000)
    result = upstream([*waveforms])
    assert set(result) == {"hidden_states"}
    assert [tuple(state.shape) for state in result["hidden_states"]] == 4 * [(2, 49, 32)]
    close(result["hidden_states"], upstream.model.extract_features(waveforms)[0])
    torch.stack(result["hidden_states"]).square().mean().backward()
    layers = upstream.model.encoder.transformer.layers
    assert all(layer.feed_forward.output_dense.weight.grad.abs().sum() > 0 for layer in layers)


@torch.no_grad()
def test_the_upstreams_batch_gives_what_waveforms_give_alone(tmp_path):
    """With layer norms; a group norm over time sees the padding."""
    upstream = upstream_of(tmp_path, extractor_mode="layer_norm", normalize_waveform=True)
    waveforms = [0.1 * torch.randn(length) for length in (16_000, 9_000, 4_321)]
    together = upstream(waveforms)["hidden_states"]
    for place, waveform in enumerate(waveforms):
        for batched, alone in zip(together, upstream([waveform])["hidden_states"], strict=True):
            torch.testing.assert_close(batched[place, : alone.size(1)], alone[0], rtol=1e-4, atol=1e-5)
