"""What a model costs: multiply-accumulates, counted without computing anything."""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..config import NO_GATES
from ..model import Wav2Vec2Model, wav2vec2_model


def multiply_accumulates(model: Wav2Vec2Model, seconds: float = 1.0) -> float:
    """Multiply-accumulates a second of 16 kHz audio of convolutions, linear layers and attention.

    Args:
        model: gates count as open.
        seconds: length of the utterance; attention's share grows with it.
    """
    with torch.device("meta"):
        shape = wav2vec2_model(**{**model.config, **NO_GATES}).eval()
        waveform = torch.empty(1, int(16_000 * seconds))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        shape.extract_features(waveform)
    return counter.get_total_flops() / 2 / seconds
