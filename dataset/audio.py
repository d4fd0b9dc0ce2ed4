"""The one reader of audio files. What a header says of a file's length is a claim, and not taken for more."""

import io
import math
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import soundfile
import soxr

from utils.files import UserError

SAMPLE_RATE = 16_000

SUFFIXES = {f".{name.lower()}" for name in soundfile.available_formats()} - {".raw", ".mat4", ".mat5"}
SUFFIXES |= {".aif", ".aifc", ".oga", ".opus", ".snd", ".sph"}
SUFFIXES |= {".aac", ".amr", ".m4a", ".mp4", ".webm", ".wma"}
"""Ends of the names of audio files; soundfile does not read the last six, which are to be named then."""

BLOCK = 2**18
"""Numbers that are decoded at once, of all channels together."""

SAMPLES_A_BYTE = 10_000
"""More samples than this in a byte are believed of no file; a silent FLAC has 4,700 of them."""


class LoaderError(UserError):
    """A process that reads audio cannot give its batch."""

    def __init__(self, message: str):
        # A DataLoader raises a worker's error again, with a traceback in front of its message.
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())


class AudioError(LoaderError):
    """An audio file is missing, broken, or not what its manifest says."""


class MendedFile(io.FileIO):
    """A file, open for reading, as if it had other bytes at a place, or no end where there are none."""

    def __init__(self, path: str | Path, place: int, new: bytes) -> None:
        super().__init__(path)
        self._place, self._new, self._beyond = place, new, 0

    def readinto(self, buffer) -> int:
        first = super().tell()
        count = super().readinto(buffer)
        for place, byte in enumerate(self._new, self._place - first):
            if 0 <= place < count:
                buffer[place : place + 1] = bytes([byte])
        return count

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._beyond = 2**40 if whence == os.SEEK_END and not self._new else 0
        return super().seek(offset, whence) + self._beyond

    def tell(self) -> int:
        return super().tell() + self._beyond


class Audio(soundfile.SoundFile):
    """An open audio file.

    Attributes:
        claimed: the number of samples, in each channel, that the header gives; None where it gives none that
            is possible.
    """

    def __init__(self, path: str | Path, file: io.FileIO) -> None:
        super().__init__(file if isinstance(file, MendedFile) else file.fileno(), closefd=False)
        self.path, self._source = path, file
        self.size = os.fstat(file.fileno()).st_size
        self.claimed = self.frames if self.frames <= self.size * SAMPLES_A_BYTE else None

    def seekable(self) -> bool:
        # soundfile would seek after every read, which fails at the end of a file of unknown length.
        return False

    def read_from(self, start: int, length: int) -> np.ndarray:
        """Reads samples (time,) of a mono file, fewer than ``length`` where it ends."""
        if super().seekable():
            self.seek(start)
        else:  # GSM, for one
            while start and len(skipped := self.read(min(start, BLOCK), dtype="float32")):
                start -= len(skipped)
        return self.read(length, dtype="float32")

    def decode(self) -> Iterator[np.ndarray]:
        """Decodes the whole file in blocks (time, channel).

        Raises:
            AudioError: it breaks off, goes on after the end that its header gives, or holds no audio.
        """
        most, done = max(1, BLOCK // self.channels), 0
        end = math.inf if self.claimed is None else self.claimed
        while len(block := self.read(min(most, end - done), dtype="float32", always_2d=True)):
            if complaint := samples_complaint(block):
                raise AudioError(f"{self.path}: {complaint}")
            done += len(block)
            yield block
        if done < end != math.inf:
            raise AudioError(f"{self.path}: breaks off (at sample {done} of {end})")
        # Where a file is shorter than the chunk with the samples, libsndfile notes it in its log alone.
        chunks = re.findall(r"^ ?(?:data|SSND|riff) : (\d+) \(should be (\d+)\)", self.extra_info, re.M)
        for claimed, there in chunks:
            if int(there) < int(claimed) < 0x7F00_0000:  # Programs that write to a pipe give more.
                raise AudioError(f"{self.path}: breaks off (at byte {there} of {claimed} of its samples)")
        # Tags may follow in the others. An Ogg page that is cut is not read.
        tolerated = {"MP3": self.size // 10, "FLAC": self.size // 10, "OGG": 256}
        if (behind := self._behind()) > tolerated.get(self.format, behind):
            bytes_ = f"{behind} of its {self.size} bytes lie behind it"
            raise AudioError(f"{self.path}: does not end where its header says ({bytes_})")

    def mended(self, whole: bool) -> MendedFile | None:
        """This file as it has to be read so that all of it is; None where it is to be read as it is."""
        if self.format == "WAV" and (place := self._data_size()):
            return MendedFile(self.path, place, b"\xff" * 4)
        if self.format == "MP3":
            place = self._mp3_count()
            if place is None:
                return MendedFile(self.path, 0, b"")
            if whole and self._ends_early():
                return MendedFile(self.path, place, b"\x7f\xff\xff\xff")
        return None

    def _head(self, place: int, length: int) -> bytes:
        # pread leaves the place alone that libsndfile reads at.
        return os.pread(self._source.fileno(), length, place)

    def _data_size(self) -> int | None:
        """Where a WAV file has the number of bytes of its samples, if more samples follow than it says: it is
        0 where a program has died, and too small above 4 GiB."""
        place = 12
        while len(head := self._head(place, 8)) == 8:
            size = int.from_bytes(head[4:], "little")
            end = place + 8 + size + size % 2
            if head[:4] == b"data":
                is_chunk = self._head(end, 4).strip().isalnum()
                return place + 4 if self.size - end > size and not is_chunk else None
            place = end
        return None

    def _mp3_count(self) -> int | None:
        """Where an MP3 file has the number of its frames, if it has one."""
        start, tag = 0, self._head(0, 10)
        if tag[:3] == b"ID3":
            start = 10 + (tag[6] << 21 | tag[7] << 14 | tag[8] << 7 | tag[9])
        flags = rb"[\x01\x03\x05\x07\x09\x0b\x0d\x0f]"
        found = re.search(rb"(?:Xing|Info)..." + flags, self._head(start, 2048), re.S)
        return None if found is None else start + found.end()

    def _ends_early(self) -> bool:
        """Whether much of the file lies behind the end that its header gives."""
        try:
            self.read_from(max(0, self.frames - 1), 1)
            return self._behind() > self.size // 10
        except soundfile.SoundFileError:
            return False
        finally:
            self.seek(0)

    def _behind(self) -> int:
        """The number of bytes behind the place that libsndfile has read to."""
        return self.size - os.lseek(self._source.fileno(), 0, os.SEEK_CUR)


@contextmanager
def open_audio(path: str | Path, whole: bool = False) -> Iterator[Audio]:
    """Opens an audio file for a block.

    Args:
        path: the file.
        whole: read an MP3 file to its end also where its header says that it ends earlier.
    Raises:
        AudioError: the file cannot be opened, or not be read in the block: ``cannot read PATH: REASON``.
    """
    if not os.path.isfile(path):  # A pipe, for one, would be waited for.
        raise AudioError(f"cannot read {path}: {'not a file' if os.path.exists(path) else 'no such file'}")
    try:
        with ExitStack() as stack:
            file = stack.enter_context(open(path, "rb", buffering=0))
            if os.fstat(file.fileno()).st_size == 0:
                raise AudioError(f"cannot read {path}: it is empty")
            audio = stack.enter_context(Audio(path, file))
            if mended := audio.mended(whole):
                audio = stack.enter_context(Audio(path, stack.enter_context(mended)))
            yield audio
    except (soundfile.SoundFileError, OSError, TypeError) as error:
        reason = getattr(error, "error_string", None) or getattr(error, "strerror", None) or str(error)
        raise AudioError(f"cannot read {path}: {reason.rstrip('.')}") from error


def read_recording(path: str | Path) -> np.ndarray:
    """Reads a file of any format, rate and number of channels as (time,), 16 kHz mono.

    Raises:
        AudioError: it cannot be decoded to its end, or has less than a frame of the models, 25 ms.
    """
    samples = np.concatenate([np.zeros(0, dtype=np.float32), *recording_blocks(path)])
    if len(samples) < 0.025 * SAMPLE_RATE:
        raise AudioError(f"{path}: shorter than 25 ms")
    return samples


def recording_blocks(path: str | Path) -> Iterator[np.ndarray]:
    """Decodes a file of any format, rate and number of channels into blocks (time,), 16 kHz mono.

    Raises:
        AudioError: it cannot be decoded to its end.
    """
    with open_audio(path, whole=True) as audio:
        rate = audio.samplerate
        if not 1_000 <= rate <= 1_000_000:
            raise AudioError(f"{path}: has no recording's rate ({rate} samples a second)")
        stream = soxr.ResampleStream(rate, SAMPLE_RATE, 1)
        for block in audio.decode():
            mono = block.mean(axis=1)
            yield mono if rate == SAMPLE_RATE else stream.resample_chunk(mono)
        if rate != SAMPLE_RATE:
            yield stream.resample_chunk(np.zeros(0, dtype=np.float32), last=True)


def format_complaint(audio: soundfile.SoundFile) -> str | None:
    """Says why the models cannot take an open audio file, or returns None where they can."""
    if audio.samplerate != SAMPLE_RATE:
        return f"not 16 kHz ({audio.samplerate} Hz)"
    if audio.channels != 1:
        return f"not mono ({audio.channels} channels)"
    return None


def samples_complaint(samples: np.ndarray) -> str | None:
    """Says why samples cannot be audio in [-1, 1], or returns None."""
    largest = np.abs(samples).max(initial=0)
    if not np.isfinite(largest):
        return "holds samples that are not finite"
    if largest > 100:  # Values a little above 1 are common and do no harm.
        return f"holds samples of {largest:.3g}, where audio lies between -1 and 1"
    return None
