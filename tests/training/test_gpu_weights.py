"""Weights narrowed and cast together for a GPU, against the plain computation; run on the CPU."""

import copy

import pytest
import torch
from torch.testing import assert_close

from tests.helpers.models import FAMILIES, randomly_gated, ungated
from training.gpu_weights import cast_frozen_weights, narrowed_together
from wav2vec2.gating import narrowed


def states_and_gradients(model, narrow, dtype=torch.float64):
    model = copy.deepcopy(model).to(dtype)
    torch.manual_seed(3)
    plain = narrow(model)
    states, _ = plain.extract_features(torch.randn(2, 4000, dtype=dtype))
    sum(state.sin().sum() for state in states).backward()
    return states, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, plain


@pytest.mark.parametrize("layers", [1, 2, 12])
@pytest.mark.parametrize("family", FAMILIES)
def test_joined_narrowing_equals_the_plain_one(family, layers):
    model = randomly_gated(family, 1)
    expected, gradients, _ = states_and_gradients(model, narrowed)
    states, found, _ = states_and_gradients(model, lambda model: narrowed_together(model, layers))
    assert_close(states, expected, rtol=1e-12, atol=1e-12)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert_close(found[name], gradient, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize(
    "make", [randomly_gated, lambda family, seed: ungated(family)], ids=["gated", "ungated"]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_joined_casts_compute_what_autocast_does(family, make):
    model = make(family, 1)
    with torch.autocast("cpu", torch.bfloat16):
        expected, gradients, _ = states_and_gradients(model, narrowed, torch.float32)
        states, found, plain = states_and_gradients(model, narrowed_together, torch.float32)
    dense = plain.encoder.transformer.layers[0].feed_forward.intermediate_dense
    assert dense.weight.dtype == torch.bfloat16
    assert found.keys() == gradients.keys()
    for state, right in zip(states, expected, strict=True):
        assert (state.float() - right.float()).norm() < 1e-2 * right.float().norm()
    total = sum(gradient.square().sum() for gradient in gradients.values()).sqrt()
    assert sum((found[n] - g).square().sum() for n, g in gradients.items()).sqrt() < 0.05 * total


@pytest.mark.parametrize("family", FAMILIES)
def test_a_teacher_in_half_computes_what_autocast_does(family):
    plain = ungated(family).eval()
    held = copy.deepcopy(plain)
    cast_frozen_weights(held, torch.bfloat16)
    attention = held.encoder.transformer.layers[0].attention
    assert attention.q_proj.weight.dtype == torch.bfloat16
    waveforms, lengths = torch.randn(2, 4000), torch.tensor([4000, 3100])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected, _ = plain.extract_features(waveforms, lengths)
        states, _ = held.extract_features(waveforms, lengths)
    for state, right in zip(states, expected, strict=True):
        assert (state - right).norm() < 5e-3 * right.norm()
