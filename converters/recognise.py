"""What a file or folder is that was given in place of a checkpoint, and which script converts it."""

from pathlib import Path

from utils.cli import abbreviate
from utils.files import UserError

from . import fairseq, huggingface
from .common import CONVERTED, FAMILIES


def remedy(path: Path) -> str | None:
    """What another project's model is and what to do with it, for an error about ``path``; None for anything
    else. Nothing in it is run."""
    try:
        if path.is_dir() or path.suffix in (".safetensors", ".bin"):
            source = path if path.is_dir() else path.parent
            values = huggingface.read_json(source / "config.json")
            if "model_type" not in values:
                return None
            family, flag, origin = huggingface.family_of(values), "model", "hf"
        else:
            family, source, flag = fairseq.family_of(fairseq.read_fairseq(str(path))[1]), path, "ckpt"
            origin = "unilm" if family == "wavlm" else "fairseq"
    except UserError:
        return None
    if family not in FAMILIES:
        return f"a model of the type {abbreviate(family)}; {CONVERTED}"
    script = f"convert_{family}_from_{origin}.py"
    return f"not yet a checkpoint of this project; convert it with {script} --{flag} {source}"
