"""The plain computation that the benchmarks compare with gives what the product gives, here in float64."""

import copy
import sys

import pytest
import torch
from torch.testing import assert_close

from tests.helpers.models import FAMILIES, randomly_gated, tiny_config, ungated, without_dropout
from tests.helpers.stages import ROOT
from wav2vec2 import wav2vec2_model

sys.path.insert(0, str(ROOT / "benchmarks"))

from baseline import make_plain


def states_size_and_gradients(model, waveforms, lengths):
    states, lengths = model.extract_features(waveforms, lengths)
    size = model.get_num_params()
    loss = sum((state * torch.sin(torch.arange(state.numel()).view_as(state))).mean() for state in states)
    (loss + size / 1e4).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return states, lengths, size.item(), gradients


def assert_alike(model, lengths):
    model, waveforms = model.double(), torch.randn(2, 4000, dtype=torch.float64)
    plain = make_plain(copy.deepcopy(model))
    assert plain.state_dict().keys() == model.state_dict().keys()
    states, frames, size, gradients = states_size_and_gradients(model, waveforms, lengths)
    plain_states, plain_frames, plain_size, plain_gradients = states_size_and_gradients(
        plain, waveforms, lengths
    )
    assert_close(plain_states, states, rtol=1e-8, atol=1e-10)
    assert frames is plain_frames is None or frames.tolist() == plain_frames.tolist()
    assert plain_size == pytest.approx(size, rel=1e-9)
    assert plain_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert_close(plain_gradients[name], gradient, rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.parametrize("lengths", [None, [4000, 3100]], ids=["whole", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_plain_gated_model_is_the_product(family, lengths, monkeypatch):
    model = randomly_gated(family, 1)
    # Whatever order gates are drawn in, their masks differ by log_alpha alone.
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda self, *_, **__: self.fill_(0.5))
    assert any((gate() == 0).any() for gate in model.gates())
    assert_alike(model, None if lengths is None else torch.tensor(lengths))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_plain_pruned_model_is_the_product(family):
    model = randomly_gated(family, 2, closed=0.4).eval()
    model.prune()
    assert_alike(model.train(), None)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_plain_teacher_is_the_product_up_to_any_layer(family):
    torch.manual_seed(0)
    model = ungated(family).eval().double()
    plain = make_plain(copy.deepcopy(model))
    waveforms = torch.randn(2, 6000, dtype=torch.float64)
    with torch.no_grad():
        for num_layers in (None, 0, 2):
            expected, _ = model.extract_features(waveforms, None, num_layers)
            actual, _ = plain.extract_features(waveforms, None, num_layers)
            assert_close(actual, expected, rtol=1e-8, atol=1e-10)


def test_dropout_acts_in_the_plain_model_too():
    model = make_plain(wav2vec2_model(**tiny_config()))
    waveforms = torch.randn(1, 4000)
    first, second = (model.extract_features(waveforms)[0] for _ in range(2))
    assert not torch.equal(first[0], second[0]) and not torch.equal(first[-1], second[-1])
    attention_alone = {**without_dropout(), "encoder_attention_dropout": 0.5}
    model = make_plain(wav2vec2_model(**attention_alone))
    first, second = (model.extract_features(waveforms)[0] for _ in range(2))
    assert torch.equal(first[0], second[0]) and not torch.equal(first[1], second[1])
