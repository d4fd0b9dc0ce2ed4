"""A prunable wav2vec 2.0, HuBERT and WavLM, after DPHuBERT (Peng et al. 2023)."""

from .constraint import SizeConstraint  # noqa: F401
from .hardconcrete import HardConcrete  # noqa: F401
from .model import (  # noqa: F401
    Wav2Vec2Model,
    hubert_base,
    hubert_large,
    hubert_xlarge,
    wav2vec2_base,
    wav2vec2_large,
    wav2vec2_large_lv60k,
    wav2vec2_model,
    wavlm_base,
    wavlm_large,
)


def __getattr__(name: str):
    """Pruning is imported when it is asked for, since training does without it."""
    if name in ("PruningError", "prune_to"):
        from . import pruning

        return getattr(pruning, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
