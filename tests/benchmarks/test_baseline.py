"""The plain computation that the benchmarks compare with gives what the product gives.

tests/wav2vec2/test_gating.py holds gated models to it.
"""

import copy

import pytest
import torch
from torch.testing import assert_close

from benchmarks.baseline import make_plain
from tests.helpers.models import FAMILIES, pruned, states_and_gradients, tiny_config
from wav2vec2 import wav2vec2_model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_pruned_model_computes_what_the_product_does(family):
    model = pruned(family).double().train()
    waveforms, lengths = torch.randn(2, 4000, dtype=torch.float64), torch.tensor([4000, 3100])
    found = []
    for computed in (make_plain(copy.deepcopy(model)), model):
        states, gradients = states_and_gradients(computed, waveforms, lengths)
        few, frames = computed.extract_features(waveforms, lengths, 2)
        found.append((states, frames.long(), gradients, few))
    assert_close(*found, rtol=1e-6, atol=1e-9)


def test_dropout_acts_in_a_plain_model():
    model = make_plain(wav2vec2_model(**tiny_config()))
    waveforms = torch.randn(1, 4000)
    first, second = (model.extract_features(waveforms)[0] for _ in range(2))
    assert not torch.equal(first[0], second[0]) and not torch.equal(first[-1], second[-1])
