"""Opening audio files, and errors of reading them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import soundfile

from utils.files import UserError


class LoaderError(UserError):
    """A process that reads audio cannot give its batch."""

    def __init__(self, message: str):
        # A DataLoader raises a worker's error again, with a traceback in front of its message.
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())


class AudioError(LoaderError):
    """An audio file is missing, broken, or not what its manifest says."""


@contextmanager
def open_audio(path: str | Path) -> Iterator[soundfile.SoundFile]:
    """Opens an audio file for a block.

    Raises:
        AudioError: the file cannot be opened, or not be read in the block: ``cannot read PATH: REASON``.
    """
    if not os.path.isfile(path):  # A pipe, for one, would be waited for.
        raise AudioError(f"cannot read {path}: {'not a file' if os.path.exists(path) else 'no such file'}")
    if os.path.getsize(path) == 0:
        raise AudioError(f"cannot read {path}: it is empty")
    try:
        with soundfile.SoundFile(path) as audio:
            yield audio
    except (soundfile.SoundFileError, OSError, TypeError) as error:
        reason = getattr(error, "error_string", str(error)).rstrip(".")
        raise AudioError(f"cannot read {path}: {reason}") from error
