"""The demo: what it ships, and that it runs on one's own recordings."""

import sys

import numpy as np
import pytest
import soundfile

from converters.huggingface import load_huggingface
from tests.helpers.stages import ROOT, run


def test_what_is_shipped_is_small_speech_and_a_teacher():
    files = [path for path in (ROOT / "demo").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 13_000_000
    speech = [soundfile.info(path) for path in files if path.suffix == ".opus"]
    assert len(speech) == 42
    assert {(info.samplerate, info.channels, info.subtype) for info in speech} == {(16_000, 1, "OPUS")}
    for place in ("LICENSE", "README.md", "pyproject.toml", "demo/NOTICE.md"):
        words = (ROOT / place).read_text().replace(" ", "-")
        assert "CC-BY-SA-3.0" in words and "CC-BY-SA-4.0" in words, place
    model, _ = load_huggingface(str(ROOT / "demo" / "teacher"))
    assert model.get_num_params() == 5_298_624


@pytest.mark.slow
def test_it_takes_recordings_of_any_format_and_length(tmp_path):
    generator = np.random.default_rng(0)
    for name, rate, channels, seconds in (
        ("a.mp3", 44_100, 2, 5),
        ("b.wav", 8_000, 1, 4),
        ("c.ogg", 48_000, 1, 18),
    ):
        samples = 0.1 * generator.standard_normal((rate * seconds, channels))
        (tmp_path / "own").mkdir(exist_ok=True)
        soundfile.write(tmp_path / "own" / name, samples, rate)
    out = tmp_path / "out"
    printed = run(
        "demo/demo.sh", DATA=tmp_path / "own", out=out, max=4, final_max=2, python=sys.executable
    ).stdout
    assert "Features of the last layer" in printed and (out / "stage3" / "report" / "report.html").is_file()
    inside = run("demo/demo.sh", check=False, DATA=out / "audio", out=out)
    assert inside.returncode == 2 and "copy the recordings elsewhere" in inside.stderr
    assert (out / "stage3" / "report" / "report.html").is_file()
    assert (
        "there is no such folder" in run("demo/demo.sh", check=False, DATA=tmp_path / "none", out=out).stderr
    )
