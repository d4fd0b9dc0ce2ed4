"""The files of models, and the one place that reads what torch.save wrote. A checkpoint is
``{"config": dict, "state_dict": dict[, "distill_linear_projs": dict]}``, plain values and CPU tensors only.
"""

import hashlib
import os
import pickle
import shutil
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from utils.cli import abbreviate, some
from utils.files import UserError, atomic_write
from utils.processes import is_first
from wav2vec2.model import Wav2Vec2Model, wav2vec2_model

_files: dict[tuple[str, int, int], tuple[str, BinaryIO]] = {}
"""Files that have a fingerprint, by path, size and time: the fingerprint, and the open file."""


def fingerprint(path: str | Path) -> str:
    """The SHA-256 of what torch.save wrote into a file, 64 hexadecimal digits, the same for equal contents
    under other names. :func:`read_file` reads the file that was checked here, without checking it again.

    Raises:
        UserError: there is no such file, or it is damaged.
    """
    return _checked(Path(path), keep=True)[0]


def _checked(path: Path, keep: bool = False) -> tuple[str, BinaryIO]:
    """A file's fingerprint and the file itself, whose checksums have been compared in the same pass."""
    if path.is_dir():
        raise _refused(path, ": is a folder; give the file in it")
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; check the path, or make the file with the step before this one, which "
            "for a model of a hub is convert_*_from_hf.py"
        )
    status = path.stat()
    key = os.path.realpath(path), status.st_size, status.st_mtime_ns
    if key in _files:
        return _files[key]
    try:
        file = open(path, "rb")  # noqa: SIM115
        checked = _sha256(file), file
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:
        # zipfile raises many things over a damaged file.
        raise _damaged(path) from error
    if keep:
        _files[key] = checked
    return checked


def _sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    with zipfile.ZipFile(file) as archive:
        for member in sorted(archive.infolist(), key=lambda member: member.filename):
            if member.compress_type != zipfile.ZIP_STORED:
                # torch.save does not compress; a small file could fill the memory in this way.
                raise zipfile.BadZipFile("compressed")
            name = member.filename.partition("/")[2]
            # torch derives this entry from the file's name, so equal contents would differ in it.
            counts = name != ".data/serialization_id"
            if counts:
                digest.update(name.encode())
            with archive.open(member) as part:  # which compares the checksum at its end
                while block := part.read(2**22):
                    if counts:
                        digest.update(block)
    return digest.hexdigest()


def _damaged(path: Path) -> UserError:
    return _refused(path, " is damaged, or is not a checkpoint: make it or copy it again")


def _refused(path: Path, reason: str) -> UserError:
    """The error for what is no checkpoint, which names the converter that takes it, or gives the reason."""
    from converters.recognise import remedy  # which imports this module

    found = remedy(path)
    return UserError(f"{path}: {found}" if found else f"{path}{reason}")


def read_file(path: str | Path) -> dict:
    """Reads a file that ``torch.save`` wrote, of plain values and finite tensors; nothing in it is run.

    Raises:
        UserError: there is no such file, it is damaged, it holds anything else, or a tensor in it has a value
            that is not finite.
    """
    path = Path(path)
    _, file = _checked(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            file.seek(0)
            content = torch.load(file, map_location="cpu", weights_only=True)
        name = not_finite(content)
    except pickle.UnpicklingError as error:
        # torch's own message goes on to advise loading the file in a way that would run what is in it.
        reason = ": holds more than plain values and tensors, or is damaged; make or copy it again"
        raise _refused(path, reason) from error
    except Exception as error:
        raise _damaged(path) from error
    if not isinstance(content, dict):
        raise _damaged(path)
    if name is not None:
        raise UserError(
            f"{path}: the tensor {name.removeprefix('state_dict.')} has a value that is not finite (NaN or "
            "infinity), so training had gone wrong when it was written; go back to an earlier checkpoint"
        )
    return content


def not_finite(value: object, name: str = "") -> str | None:
    """The name of a tensor with a NaN or an infinity, somewhere in nested dicts and lists; None without one.

    Raises:
        ValueError: not all values of a tensor are in memory.
    """
    if isinstance(value, Tensor):
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ValueError(f"{name} repeats its values")
        return None if value.isfinite().all() else name
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    else:
        return None
    found = (not_finite(item, f"{name}.{abbreviate(key)}".lstrip(".")) for key, item in items)
    return next(filter(None, found), None)


def read_checkpoint(path: str | Path) -> dict:
    """Reads a model's checkpoint.

    Returns:
        A dict with ``config`` and ``state_dict``, and ``distill_linear_projs`` where the file has it.
    Raises:
        UserError: it cannot be read or lacks one of the two.
    """
    content = read_file(path)
    if not all(isinstance(content.get(key), dict) for key in ("config", "state_dict")):
        hint = "; convert it with one of the convert_*.py scripts first" if "model" in content else ""
        reason = f': has no "config" and "state_dict", so it is not a checkpoint of this project{hint}'
        raise _refused(Path(path), reason)
    return content


def build_model(config: Mapping, state_dict: Mapping[str, Tensor], source: str | Path) -> Wav2Vec2Model:
    """A model of ``config`` that holds the very tensors of ``state_dict`` (no copy is made of float32 ones).

    Args:
        config: keyword arguments of :func:`wav2vec2.wav2vec2_model`.
        state_dict: its tensors, under either spelling of the weight norm's names.
        source: what the two come from, named in errors.
    Raises:
        UserError: a config key is missing or unknown, or a tensor is missing, unexpected or of another shape.
    """
    if not all(isinstance(tensor, Tensor) and tensor.is_floating_point() for tensor in state_dict.values()):
        raise UserError(f"{source}: its state dict holds more than tensors of floating-point numbers")
    try:
        with torch.device("meta"):
            model = wav2vec2_model(**config)
    except (TypeError, ValueError, RuntimeError) as error:
        # torch raises a RuntimeError where a size cannot be.
        raise UserError(f"{source}: {error}") from error
    try:
        model.load_state_dict({key: tensor.float() for key, tensor in state_dict.items()}, assign=True)
    except RuntimeError as error:
        # torch lists below the first line what is missing, unexpected or of another shape.
        reasons = some(line.strip().rstrip(".") for line in str(error).splitlines()[1:])
        raise UserError(f"{source}: the state dict does not belong to its config: {reasons}") from error
    return model


def load_model(path: str | Path) -> Wav2Vec2Model:
    """The model of a checkpoint file, in training mode as torch builds it.

    Raises:
        UserError: it cannot be read, or its tensors do not belong to its config.
    """
    checkpoint = read_checkpoint(path)
    return build_model(checkpoint["config"], checkpoint["state_dict"], path)


def save_checkpoint(path: str | Path, model: Wav2Vec2Model, verify: bool = False, **extra: dict) -> None:
    """Writes ``model``, whole or not at all.

    Args:
        path: the file; its folder is made where it is missing.
        model: its config and tensors are written.
        verify: load what was written and compare an output with ``model``'s before it gets its name.
        extra: further entries of the file, ``distill_linear_projs`` say.
    Raises:
        UserError: there is no room for the file, or the loaded model does not compute what ``model`` does.
    """
    content = {"config": model.config, "state_dict": _on_cpu(model.state_dict()), **extra}
    with writing(path, content) as temporary:
        if verify:
            from utils.compare import relative_difference

            waveforms = torch.randn(1, 32_000, generator=torch.Generator().manual_seed(0)) * 0.1
            with torch.no_grad():
                written, _ = load_model(temporary).eval().extract_features(waveforms)
                expected, _ = model.eval().extract_features(waveforms)
            error = relative_difference([torch.stack(written)], [torch.stack(expected)])
            if not error <= 1e-5:
                raise UserError(
                    f"{path}: loaded again, its output differs by {error:.1e} from the model in memory"
                )


@contextmanager
def writing(path: str | Path, content: dict) -> Iterator[Path]:
    """Writes ``content`` by :func:`atomic_write`, for :func:`read_file`; the block may look at it."""
    with atomic_write(path) as temporary:
        # torch's own writer would not say why a file cannot be written, and go on to hold it.
        with open(temporary, "wb") as file:
            torch.save(content, file)
        yield temporary


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Detached, contiguous CPU tensors that share memory with nothing larger than themselves."""
    result = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    whole = {key: t.untyped_storage().nbytes() == t.numel() * t.element_size() for key, t in result.items()}
    return {key: tensor if whole[key] else tensor.clone() for key, tensor in result.items()}


def vocabulary_path(checkpoint: str | Path) -> Path:
    """Where the vocabulary of a model's file lies, or would (utils.vocabulary)."""
    return Path(checkpoint).with_suffix(".vocab.json")


def copy_vocabulary(source: str | Path, checkpoint: str | Path) -> None:
    """Copies the vocabulary that lies beside one model's file, where there is one, to beside another's; the
    first process of a run does so."""
    there, here = vocabulary_path(source), vocabulary_path(checkpoint)
    if is_first() and there.is_file() and there.absolute() != here.absolute():
        with atomic_write(here) as temporary:
            shutil.copyfile(there, temporary)
