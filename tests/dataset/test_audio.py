"""The reader of audio, on odd files as other programs leave them."""

import builtins
import os
import socket

import numpy as np
import pytest
import soxr

from dataset import AudioError, open_audio, read_recording
from tests.helpers.audio import BROKEN, SAMPLES, VOICE, WHOLE, encoded


@pytest.mark.parametrize("kind", WHOLE)
def test_all_of_a_file_is_read_whatever_its_header_says(tmp_path, kind):
    WHOLE[kind](tmp_path / "a")
    samples = read_recording(tmp_path / "a")
    assert samples.dtype == np.float32
    assert SAMPLES <= len(samples) <= SAMPLES + (2_304 if kind.startswith("mp3 ") else 0)
    # An MP3 file without its header begins with what its encoder has put before the audio.
    agreement = np.correlate(samples, VOICE, "valid").max() / np.linalg.norm(samples) / np.linalg.norm(VOICE)
    assert agreement > 0.98


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_one_sentence_that_names_it(tmp_path, kind):
    make, reason = BROKEN[kind]
    make(tmp_path / "a")
    with pytest.raises(AudioError, match=f"{tmp_path}/a.*{reason}") as error:
        read_recording(tmp_path / "a")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "kind", ["flac", "mp3", "gsm", "flac of unknown length", "wav of 0 bytes", "mp3 without a header"]
)
def test_a_crop_is_what_the_whole_file_has_there(tmp_path, kind):
    WHOLE[kind](tmp_path / "a")
    whole = read_recording(tmp_path / "a")
    for start in (0, 1_000, len(whole) - 500):
        with open_audio(tmp_path / "a") as audio:
            crop = audio.read_from(start, 1_000)
        assert np.allclose(crop, whole[start : start + 1_000], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("rate", "channels"), [(8_000, 1), (44_100, 2), (48_000, 6)])
def test_blocks_are_resampled_as_the_whole_is(monkeypatch, tmp_path, rate, channels):
    monkeypatch.setattr("dataset.audio.BLOCK", 1_000)
    encoded(rate, channels, format="WAV", subtype="FLOAT")(tmp_path / "a")
    expected = soxr.resample(VOICE, rate, 16_000)
    samples = read_recording(tmp_path / "a")
    assert len(samples) == len(expected) == round(SAMPLES * 16_000 / rate)
    assert np.abs(samples - expected).max() < 1e-5


def test_pipes_sockets_folders_and_closed_files_are_named(monkeypatch, tmp_path):
    os.mkfifo(tmp_path / "pipe.wav")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket.wav"))
    (tmp_path / "folder.wav").mkdir()
    (tmp_path / "device.wav").symlink_to("/dev/zero")
    for path in tmp_path.iterdir():
        with pytest.raises(AudioError, match=f"cannot read {path}: not a file"):
            read_recording(path)
    encoded(format="WAV")(tmp_path / "closed.wav")

    def refuse(path, *args, **kwargs):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(builtins, "open", refuse)
    with pytest.raises(AudioError, match=r"closed\.wav: Permission denied"):
        read_recording(tmp_path / "closed.wav")
