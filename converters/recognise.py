"""What a file or folder that is not a checkpoint of this project is, and which script converts it."""

from pathlib import Path

from utils.files import UserError

from . import fairseq, huggingface, safe_pickle
from .common import FAMILIES


def remedy(path: str | Path) -> str | None:
    """What to do with another project's model, as the end of a sentence about ``path``; None where nothing
    is recognised. No code in it is run."""
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    try:
        if path.is_dir() or path.suffix in (".safetensors", ".bin"):
            family = huggingface.family_of(huggingface.read_json(folder / "config.json"))
            script, source = f"convert_{family}_from_hf.py", f"--model {folder}"
            project = "transformers"
        else:
            family = fairseq.family_of(safe_pickle.load(path), str(path))
            origin = "unilm" if family == "wavlm" else "fairseq"
            script, source = f"convert_{family}_from_{origin}.py", f"--ckpt {path}"
            project = origin
    except UserError:
        return None
    if family not in FAMILIES:
        return None
    return f"is a model of {project}; convert it with {script} {source}, and give what that writes"
