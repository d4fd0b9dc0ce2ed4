"""What a model costs, in parameters and in multiply-accumulates.

Both costs are sums over the tensors of a model in which a gated dimension counts with the units that it has:
the same polynomial in the gates' widths, with two sets of coefficients. Training to a budget of
multiply-accumulates follows HJ-Pruning (Peng et al. 2023b, https://arxiv.org/abs/2302.14132, section 3).
"""

from __future__ import annotations

from torch import nn

from .components import FeatureExtractor, WavLMSelfAttention, WeightNormConv1d
from .gating import Count, Layout, Term
from .hardconcrete import HardConcrete

SAMPLE_RATE = 16_000
UTTERANCE_SECONDS = 10
"""Length in seconds of the utterance whose multiply-accumulates are counted: attention's share grows with it,
and utterances of LibriSpeech are some 12 s long."""


def count_parameters(model: nn.Module) -> int:
    """The true number of parameters of ``model``, gates not counted."""
    return sum(p.numel() for name, p in model.named_parameters() if not name.endswith("log_alpha"))


def parameter_count(model: nn.Module) -> Count:
    """The number of parameters, each tensor once (DPHuBERT, Peng et al. 2023, section 3.2)."""
    layout = Layout(model, pruning=True)
    return Count(layout, _terms(model, layout, lambda module, name: 1))


def mac_count(model: nn.Module, seconds: float = UTTERANCE_SECONDS) -> Count:
    """The multiply-accumulates of convolutions, linear layers and attention for one utterance.

    A weight is used once for every frame that its layer computes; attention multiplies queries with keys and
    weights with values, for every pair of frames.

    Args:
        model: gated or not.
        seconds: length of the utterance.
    """
    layout = Layout(model, pruning=True)
    uses: dict[tuple[nn.Module, str], int] = {}
    frames = int(SAMPLE_RATE * seconds)
    [extractor] = [module for module in model.modules() if isinstance(module, FeatureExtractor)]
    for block in extractor.conv_layers:
        frames = (frames - block.kernel_size) // block.stride + 1
        uses[block.conv, "weight"] = frames
    gated_positions = {m.gru_rel_pos_linear for m in model.modules() if isinstance(m, WavLMSelfAttention)}
    for module in model.modules():
        if isinstance(module, WeightNormConv1d):
            # An even kernel computes one frame more, which is then removed.
            uses[module, "weight_v"] = frames + 1 - module.kernel_size[0] % 2
        elif isinstance(module, nn.Linear) and module not in gated_positions:
            uses[module, "weight"] = frames
    terms = _terms(model, layout, lambda module, name: uses.get((module, name), 0))
    for attention, heads in layout.heads.items():
        per_head = 2 * frames**2 * attention.head_dim
        if isinstance(attention, WavLMSelfAttention):
            per_head += frames * attention.gru_rel_pos_linear.weight.numel()
        if heads is None:
            terms.append(Term(per_head * attention.num_heads))
        else:
            terms.append(Term(per_head, (heads,), heads))
    return Count(layout, terms)


COUNTS = {"params": parameter_count, "macs": mac_count}
"""What --sparsity_of may count."""


def multiply_accumulates(model: nn.Module, seconds: float = UTTERANCE_SECONDS) -> float:
    """Multiply-accumulates a second of 16 kHz audio, in an utterance of ``seconds``, with every gate open."""
    return mac_count(model, seconds).total() / seconds


def _terms(model: nn.Module, layout: Layout, uses) -> list[Term]:
    slicings = {(slicing.module, slicing.name): slicing for slicing in layout.slicings}
    terms = []
    for module in model.modules():
        if isinstance(module, HardConcrete):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if not (times := uses(module, name)):
                continue
            slicing, count, axes, inside = slicings.get((module, name)), parameter.numel() * times, (), None
            if slicing is not None:
                axes, inside = tuple(slicing.axes.values()), slicing.inside
                for axis in axes:
                    count //= axis.n
            terms.append(Term(count, axes, inside))
    return terms
