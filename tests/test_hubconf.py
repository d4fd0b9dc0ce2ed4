"""``torch.hub.load`` from this folder."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"

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


@pytest.fixture
def student(tmp_path):
    golden = torch.load(GOLDEN / "prune_wavlm.pt", weights_only=True)
    torch.save(
        {"config": golden["pruned_config"], "state_dict": golden["pruned_state_dict"]},
        tmp_path / "student.pth",
    )
    return golden


def test_a_compressed_model_is_one_line_and_in_evaluation_mode(student, tmp_path):
    model = torch.hub.load(str(ROOT), "compressed", str(tmp_path / "student.pth"), source="local")
    assert not any(module.training for module in model.modules())
    with torch.no_grad():
        states, _ = model.extract_features(student["waveforms"])
    torch.testing.assert_close(states, student["hidden_states_pruned"], rtol=1e-5, atol=1e-5)
    assert sum(parameter.numel() for parameter in model.parameters()) == student["pruned_params"]


def test_it_loads_from_another_folder_in_a_process_of_its_own(student, tmp_path):
    code = f"import torch; m = torch.hub.load({str(ROOT)!r}, 'compressed', 'student.pth', source='local'); "
    code += "print(m.training, sum(p.numel() for p in m.parameters()))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert (done.stdout, done.stderr) == (f"False {student['pruned_params']}\n", "")


def test_the_entries_are_the_compressed_model_and_the_known_architectures():
    found = runpy.run_path(str(ROOT / "hubconf.py"))
    listed = [name for name, value in found.items() if callable(value) and not name.startswith("_")]
    assert sorted(listed) == sorted(found["__all__"]) == sorted(["compressed", *ENTRIES])


@pytest.mark.parametrize("entry", ENTRIES)
def test_an_architectures_entry_has_its_size_and_takes_overrides(entry):
    with torch.device("meta"):
        model = torch.hub.load(str(ROOT), entry, source="local")
        assert sum(parameter.numel() for parameter in model.parameters()) == ENTRIES[entry]
        assert (
            torch.hub.load(str(ROOT), entry, source="local", encoder_dropout=0.25).config["encoder_dropout"]
            == 0.25
        )


def test_a_file_that_is_no_checkpoint_is_named_in_one_sentence(tmp_path):
    (tmp_path / "text.pth").write_text("nothing to see here\n")
    for name in ("text.pth", "missing.pth"):
        with pytest.raises(ValueError, match=name) as error:
            torch.hub.load(str(ROOT), "compressed", str(tmp_path / name), source="local")
        assert "\n" not in str(error.value)
