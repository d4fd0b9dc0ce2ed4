"""The one place that opens audio files."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import soundfile

from utils.files import UserError


class LoaderError(UserError):
    """What keeps a loader's process from giving a batch, in one sentence."""

    def __init__(self, message: str):
        # A DataLoader raises a worker's error again with the whole traceback as its message, ours at the end.
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())


class AudioError(LoaderError):
    """An audio file that is missing, broken, or not what its manifest says, in one sentence that names it."""


@contextmanager
def open_audio(path: str | Path) -> Iterator[soundfile.SoundFile]:
    """An open audio file for the length of a block, whose errors of reading are this one's.

    Raises:
        AudioError: ``cannot read PATH: REASON``, with no full stop at its end.
    """
    try:
        with soundfile.SoundFile(path) as audio:
            yield audio
    except (soundfile.SoundFileError, OSError, TypeError) as error:
        if not os.path.exists(path):
            reason = "no such file"
        else:
            reason = (
                "it is empty" if os.path.getsize(path) == 0 else getattr(error, "error_string", str(error))
            )
        raise AudioError(f"cannot read {path}: {reason.rstrip('.')}") from error
