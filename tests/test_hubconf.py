"""``torch.hub.load`` from this folder."""

import runpy
import subprocess
import sys

import pytest
import torch

from tests.helpers.models import GOLDEN, recorded, tiny_config
from tests.helpers.stages import ROOT, assert_equal_to_the_bit
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
assert sum(parameter.numel() for parameter in model.parameters()) == golden["pruned_params"]
"""


def test_a_program_with_a_utils_of_its_own_loads_a_model(student, tmp_path):
    for name in ("dataset", "exports", "training", "utils"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "program.py", ROOT, student, GOLDEN / "prune_wavlm.pt"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_both_spellings_of_the_weight_norm_load(student, tmp_path):
    content = torch.load(student, weights_only=True)
    tensors, prefix = content["state_dict"], "encoder.transformer.pos_conv_embed.conv."
    for ours, new in (("weight_g", "original0"), ("weight_v", "original1")):
        tensors[f"{prefix}parametrizations.weight.{new}"] = tensors.pop(prefix + ours)
    torch.save(content, tmp_path / "new.pth")
    models = [
        torch.hub.load(str(ROOT), "compressed", path, source="local")
        for path in (student, tmp_path / "new.pth")
    ]
    assert_equal_to_the_bit(models[0].state_dict(), models[1].state_dict())


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
    torch.save({"model": {}}, tmp_path / "foreign.pth")
    content = torch.load(student, weights_only=True)
    content["state_dict"].popitem()
    torch.save(content, tmp_path / "incomplete.pth")
    for name in ("text.pth", "missing.pth", "foreign.pth", "incomplete.pth"):
        with pytest.raises(ValueError, match=name) as error:
            torch.hub.load(str(ROOT), "compressed", str(tmp_path / name), source="local")
        assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def upstream_of(tmp_path_factory):
    """Gives the upstream of a tiny model with the changes to its config, loaded as s3prl loads one."""
    found = runpy.run_path(str(ROOT / "hubconf.py"))

    def load(**changes):
        torch.manual_seed(0)
        path = tmp_path_factory.mktemp("upstream") / "model.pth"
        save_checkpoint(path, wav2vec2_model(**tiny_config(**changes)))
        return found["s3prl_upstream"](ckpt=str(path), model_config=None, refresh=False)

    return load


def some_waveforms(*lengths):
    generator = torch.Generator().manual_seed(1)
    return [0.1 * torch.randn(length, generator=generator) for length in lengths]


def test_the_upstream_gives_every_layer_at_320_samples_a_frame(upstream_of):
    upstream = upstream_of()
    assert not upstream.training
    assert upstream.get_downsample_rates("hidden_states") == 320
    waveforms = some_waveforms(16_000, 16_000)
    with torch.no_grad():
        result = upstream(waveforms)
        expected, _ = upstream.model.extract_features(torch.stack(waveforms))
    assert set(result) == {"hidden_states"}
    assert [tuple(state.shape) for state in result["hidden_states"]] == 4 * [(2, 49, 32)]
    torch.testing.assert_close(result["hidden_states"], expected, rtol=1e-5, atol=1e-5)


def test_the_upstreams_batch_gives_what_waveforms_give_alone(upstream_of):
    """With layer norms; a group norm over time sees the padding."""
    upstream = upstream_of(extractor_mode="layer_norm", normalize_waveform=True)
    waveforms = some_waveforms(16_000, 9_000, 4_321)
    with torch.no_grad():
        together = upstream(waveforms)["hidden_states"]
        for place, waveform in enumerate(waveforms):
            for batched, alone in zip(together, upstream([waveform])["hidden_states"], strict=True):
                torch.testing.assert_close(batched[place, : alone.size(1)], alone[0], rtol=1e-4, atol=1e-5)


def test_the_upstream_can_be_fine_tuned(upstream_of):
    upstream = upstream_of()
    states = upstream.train()(some_waveforms(8_000, 6_000))["hidden_states"]
    torch.stack(states).square().mean().backward()
    layers = upstream.model.encoder.transformer.layers
    assert all(layer.feed_forward.output_dense.weight.grad.abs().sum() > 0 for layer in layers)
