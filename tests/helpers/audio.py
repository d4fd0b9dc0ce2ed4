"""Audio files that count, and odd ones as other programs leave them, made with soundfile and byte by byte."""

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile

from dataset import write_manifests

SAMPLES = 48_000
VOICE = (
    0.3 * np.sin(2 * np.pi * 220 * np.arange(SAMPLES) / 16_000)
    + 0.02 * np.random.default_rng(0).standard_normal(SAMPLES)
).astype(np.float32)


def write_counting(folder: Path, lengths: list[int], texts: list[str] | None = None) -> Path:
    """Files in which sample i is i modulo 30,000; ``train.tsv`` has them all and ``valid.tsv`` the first
    three. Returns the folder."""
    rows = []
    for number, length in enumerate(lengths):
        soundfile.write(folder / f"{number}.flac", (np.arange(length) % 30_000).astype(np.int16), 16_000)
        rows.append((f"{number}.flac", length, *([] if texts is None else [texts[number]])))
    write_manifests(folder, str(folder), {"train": rows, "valid": rows[:3]})
    return folder


def encoded(rate: int = 16_000, channels: int = 1, **form) -> Callable[[Path], None]:
    """Writes ``VOICE`` in a format of soundfile's."""
    samples = VOICE if channels == 1 else np.stack([VOICE] * channels, axis=1)
    return lambda path: soundfile.write(path, samples, rate, **form)


def changed(write: Callable[[Path], None], change: Callable[[bytearray], bytes]) -> Callable[[Path], None]:
    """Changes the bytes of what ``write`` writes."""

    def make(path: Path) -> None:
        write(path)
        path.write_bytes(change(bytearray(path.read_bytes())))

    return make


def flac_length(length: int) -> Callable[[bytearray], bytes]:
    """A FLAC file's header says that it has this many samples; 0 is unknown."""

    def change(content: bytearray) -> bytes:
        content[21:26] = bytes([content[21] & 0xF0 | length >> 32]) + struct.pack(">I", length & 0xFFFFFFFF)
        return content

    return change


def wav_size(size: int) -> Callable[[bytearray], bytes]:
    """A WAV file's header says that its samples take this many bytes."""
    return lambda content: content.replace(b"data" + content[40:44], b"data" + struct.pack("<I", size), 1)


def mp3_frames(count: int | None) -> Callable[[bytearray], bytes]:
    """An MP3 file's header says that it has this many frames, or is none."""

    def change(content: bytearray) -> bytes:
        place = max(content.find(b"Xing"), content.find(b"Info"))
        if count is None:
            content[place : place + 4] = bytes(4)
        else:
            content[place + 8 : place + 12] = struct.pack(">I", count)
        return content

    return change


def cut(content: bytearray) -> bytes:
    return content[: len(content) * 6 // 10 + 1]


FLAC, WAV, MP3 = encoded(format="FLAC"), encoded(format="WAV"), encoded(format="MP3")
OGG, OPUS = encoded(format="OGG"), encoded(format="OGG", subtype="OPUS")
GSM = encoded(format="WAV", subtype="GSM610")

WHOLE = {
    **{"flac": FLAC, "wav": WAV, "mp3": MP3, "vorbis": OGG, "opus": OPUS, "gsm": GSM},
    **{name: encoded(format="WAV", subtype=name.upper()) for name in ("alaw", "ulaw", "pcm_24", "float")},
    "aiff": encoded(format="AIFF"),
    "stereo": encoded(channels=2, format="WAV"),
    "six channels": encoded(channels=6, format="FLAC"),
    "flac of unknown length": changed(FLAC, flac_length(0)),
    "flac of 256 GiB": changed(FLAC, flac_length(2**36 - 1)),
    "wav of 0 bytes": changed(WAV, wav_size(0)),
    "wav of too few bytes": changed(WAV, wav_size(5_000)),
    "wav to a pipe": changed(WAV, wav_size(0xFFFFFFFF)),
    "wav named mp3": WAV,
    "flac with a tag behind it": changed(FLAC, lambda content: content + b"TAG" + bytes(125)),
    "mp3 of too many frames": changed(MP3, mp3_frames(10**6)),
    "mp3 of too few frames": changed(MP3, mp3_frames(10)),
    "mp3 without a header": changed(MP3, mp3_frames(None)),
    "mp3 with a tag": changed(MP3, lambda content: b"ID3\3\0\0\0\0\x10\0" + bytes(2048) + content),
}
"""What has all of ``VOICE``; MP3 files whose header is wrong have up to 2,304 samples more."""

BROKEN = {
    "cut flac": (changed(FLAC, cut), "lost sync"),
    "cut flac of unknown length": (changed(FLAC, lambda content: cut(flac_length(0)(content))), "lost sync"),
    "flac of too many": (changed(FLAC, flac_length(99_000)), r"breaks off \(at sample 48000 of 99000\)"),
    "flac of too few": (changed(FLAC, flac_length(24_000)), "does not end where its header says"),
    "cut wav": (changed(WAV, cut), r"breaks off \(at byte 57583 of 96000 of its samples\)"),
    "cut gsm": (changed(GSM, cut), "breaks off"),
    "cut aiff": (changed(encoded(format="AIFF"), cut), "breaks off"),
    "cut mp3": (changed(MP3, cut), r"breaks off \(at sample \d+ of 48000\)"),
    "cut vorbis": (changed(OGG, cut), "does not end where its header says"),
    "cut opus": (changed(OPUS, cut), "does not end where its header says"),
    "two vorbis files as one": (changed(OGG, lambda content: content * 2), "does not end where"),
    "text": (lambda path: path.write_text("no audio at all " * 99), "Format not recognised"),
    "noise": (lambda path: path.write_bytes(np.random.default_rng(0).bytes(20_000)), "Format not recog"),
    "nothing": (Path.touch, "it is empty"),
    "no samples": (changed(WAV, lambda content: wav_size(0)(content)[:44]), "shorter than 25 ms"),
    "a rate of 1 Hz": (encoded(rate=1, format="WAV"), "has no recording's rate"),
}
"""What cannot be decoded to its end, and the reason."""
