"""The plain computation that the benchmarks compare with gives what the product gives, here in float64."""

import copy
import sys

import pytest
import torch
from torch.testing import assert_close

from tests.helpers.models import FAMILIES, pruned, randomly_gated, tiny_config, ungated
from tests.helpers.stages import ROOT
from wav2vec2 import wav2vec2_model

sys.path.insert(0, str(ROOT / "benchmarks"))

from baseline import make_plain


def states_and_gradients(model, lengths):
    torch.manual_seed(0)
    states, lengths = model.extract_features(torch.randn(2, 4000, dtype=torch.float64), lengths)
    sum((state * torch.sin(torch.arange(state.numel()).view_as(state))).mean() for state in states).backward()
    return states, lengths, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_alike(model, lengths=None):
    plain = make_plain(copy.deepcopy(model.double()))
    states, frames, gradients = states_and_gradients(model, lengths)
    plain_states, plain_frames, plain_gradients = states_and_gradients(plain, lengths)
    assert_close(plain_states, states, rtol=1e-8, atol=1e-10)
    assert frames is plain_frames is None or frames.tolist() == plain_frames.tolist()
    assert plain_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert_close(plain_gradients[name], gradient, rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.parametrize("lengths", [None, [4000, 3100]], ids=["whole", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_gated_model_computes_what_the_product_does(family, lengths, monkeypatch):
    model = randomly_gated(family, 1)
    # Whatever order gates are drawn in, their masks differ by log_alpha alone.
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda self, *_, **__: self.fill_(0.5))
    assert any((gate() == 0).any() for gate in model.gates())
    assert_alike(model, None if lengths is None else torch.tensor(lengths))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_pruned_model_computes_what_the_product_does(family):
    assert_alike(pruned(family).train())


def test_a_plain_teacher_computes_up_to_any_layer():
    torch.manual_seed(0)
    model = ungated("wavlm_base").eval()
    plain, waveforms = make_plain(copy.deepcopy(model)), torch.randn(2, 6000)
    with torch.no_grad():
        for num_layers in (None, 0, 2):
            expected, _ = model.extract_features(waveforms, None, num_layers)
            actual, _ = plain.extract_features(waveforms, None, num_layers)
            assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_dropout_acts_in_a_plain_model():
    model = make_plain(wav2vec2_model(**tiny_config()))
    waveforms = torch.randn(1, 4000)
    first, second = (model.extract_features(waveforms)[0] for _ in range(2))
    assert not torch.equal(first[0], second[0]) and not torch.equal(first[-1], second[-1])
