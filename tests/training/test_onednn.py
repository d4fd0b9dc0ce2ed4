"""Linear layers by oneDNN compute what torch's do, and only in a process that asks for them."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from training import onednn


@pytest.mark.parametrize("shape", [(3, 24), (2, 5, 24), (2, 0, 24)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_linear_layers_by_onednn_equal_torchs(shape, with_bias):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(shape), torch.randn(17, 24), torch.randn(17) if with_bias else None
    results = []
    for function in (F.linear, onednn.linear):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias) if t is not None]
        y = function(*leaves)
        results.append([y, *torch.autograd.grad(y.sin().sum(), leaves)])
    assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)
    strided = torch.randn(24, 4, 6).transpose(0, 2)
    expected = F.linear(strided, weight, bias)
    assert_close(onednn.linear(strided, weight, bias), expected, rtol=1e-5, atol=1e-5)
    assert onednn.linear(x.double(), weight.double()).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert onednn.linear(x, weight).dtype == torch.bfloat16


def test_enabling_reaches_every_linear_layer_until_disabled():
    torchs, layer, x = F.linear, torch.nn.Linear(24, 17), torch.randn(3, 24)
    expected = layer(x)
    onednn.enable()
    try:
        assert F.linear is onednn.linear
        y = layer(x)
        assert_close(y, expected)
        assert "OneDNN" in type(y.grad_fn).__name__
    finally:
        onednn.disable()
    assert F.linear is torchs and "OneDNN" not in type(layer(x).grad_fn).__name__
