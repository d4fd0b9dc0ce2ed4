"""A model of this project is an ordinary PyTorch module."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from tests.helpers.models import (
    FAMILIES,
    pruned,
    randomly_gated,
    states_and_gradients,
    ungated,
    with_absent_branches,
    without_dropout,
)
from training.layers import checkpoint_activations
from wav2vec2 import wav2vec2_model
from wav2vec2.components import EncoderLayer

KINDS = {"ungated": ungated, "pruned": pruned}


@pytest.fixture(params=[f"{kind} {family}" for kind in KINDS for family in FAMILIES])
def model(request):
    kind, family = request.param.split()
    torch.manual_seed(0)
    return KINDS[kind](family).eval()


def test_forward_hooks_fire_on_every_linear_and_conv(model):
    layers = [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv1d))]
    fired = set()
    for layer in layers:
        layer.register_forward_hook(lambda module, args, output: fired.add(module))
    model(torch.randn(1, 4000))
    assert len(layers) > 20 and fired == set(layers)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
def test_quantize_dynamic_swaps_every_linear(model):
    quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, torch.qint8)
    assert not any(type(module) is nn.Linear for module in quantized.modules())
    dynamic = [m for m in quantized.modules() if isinstance(m, torch.ao.nn.quantized.dynamic.Linear)]
    assert len(dynamic) == sum(type(module) is nn.Linear for module in model.modules())
    waveforms = torch.randn(1, 4000)
    with torch.no_grad():
        expected, actual = model(waveforms)[0], quantized(waveforms)[0]
    assert 0 < (actual - expected).abs().mean() < 0.1 * expected.abs().mean()


def test_a_lora_adapter_changes_the_output_and_is_trained(model):
    peft = pytest.importorskip("peft")
    waveforms = torch.randn(1, 4000)
    before = model(waveforms)[0].detach()
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    assert_close(adapted(waveforms)[0], before)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    after = adapted(waveforms)[0]
    assert (after - before).abs().max() > 1e-3
    after.square().sum().backward()
    lora = {name: p.grad for name, p in adapted.named_parameters() if "lora_" in name}
    assert lora and all(gradient is not None and gradient.abs().max() > 0 for gradient in lora.values())


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=pytest.mark.slow if "large" in f else ()) for f in FAMILIES]
)
@pytest.mark.parametrize("kind, with_lengths", [(ungated, False), (pruned, True)], ids=["whole", "padded"])
def test_torch_export_gives_the_same_at_other_sizes(family, kind, with_lengths):
    model = kind(family).eval()
    batch, time = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("time", min=720, max=1_000_000)
    shapes = {"waveforms": {0: batch, 1: time}, "lengths": {0: batch} if with_lengths else None}
    lengths = torch.tensor([6000, 5000, 4000]) if with_lengths else None
    program = torch.export.export(model, (torch.randn(3, 6000), lengths), dynamic_shapes=shapes, strict=False)
    for count, samples in ((2, 9001), (5, 4000)):
        waveforms = torch.randn(count, samples)
        lengths = torch.arange(samples, samples - count * 500, -500) if with_lengths else None
        with torch.no_grad():
            expected, actual = model(waveforms, lengths), program.module()(waveforms, lengths)
        assert_close(actual[0], expected[0], rtol=1e-4, atol=1e-4)
        assert actual[1] is expected[1] is None or actual[1].tolist() == expected[1].tolist()


def gradients(model, waveforms):
    model.zero_grad()
    torch.manual_seed(5)
    return states_and_gradients(model.train(), waveforms)[1]


def checkpoint_by_forward(model):
    for layer in model.encoder.transformer.layers:
        forward = layer.forward
        layer.forward = lambda *args, forward=forward: checkpoint(forward, *args, use_reentrant=False)


def checkpoint_by_wrapper(model):
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, EncoderLayer))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "make, put_on",
    [
        (randomly_gated, checkpoint_activations),
        (randomly_gated, checkpoint_by_wrapper),
        (pruned, checkpoint_activations),
        (pruned, checkpoint_by_wrapper),
        (pruned, checkpoint_by_forward),
    ],
)
def test_checkpointed_layers_give_the_same_gradients(family, make, put_on):
    model = make(family, 1)
    waveforms = torch.randn(2, 4000)
    expected = gradients(model, waveforms)
    computed = []
    dense = model.encoder.transformer.layers[0].feed_forward.intermediate_dense
    dense.register_forward_hook(lambda *_: computed.append(1))
    put_on(model)
    actual = gradients(model, waveforms)
    assert len(computed) == 2, "the layer was not computed again"
    actual = {name.replace("_checkpoint_wrapped_module.", ""): value for name, value in actual.items()}
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(actual[name], gradient), name


@pytest.mark.parametrize("family", ["hubert_large", "wavlm_large", "hubert_base"])
def test_the_residual_stream_is_float32_under_autocast(family):
    model = ungated(family).eval()
    inputs = []
    for layer in model.encoder.transformer.layers:
        layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        states, _ = model.extract_features(torch.randn(1, 4000))
    assert inputs == [torch.float32] * 3
    assert {state.dtype for state in states[1:]} == {torch.float32}


def test_folding_the_weight_norm_changes_no_output():
    torch.manual_seed(0)
    model = wav2vec2_model(**without_dropout()).eval()
    waveforms = torch.randn(1, 8000)
    with torch.no_grad():
        expected, _ = model.extract_features(waveforms)
        names = model.state_dict().keys()
        assert_close(model.fold_weight_norm().extract_features(waveforms)[0], expected)
        assert model.state_dict().keys() == names
        model.load_state_dict({}, strict=False)  # as a resumed run loads a module around it
        model.encoder.transformer.pos_conv_embed.conv.weight_g.mul_(2)
        assert_close(model.extract_features(waveforms)[0], expected)
        model.train().eval()
        assert not torch.allclose(model.extract_features(waveforms)[0][-1], expected[-1])


def test_layer_drop_acts_in_forward_alone():
    torch.manual_seed(0)
    model = wav2vec2_model(**{**without_dropout(), "encoder_layer_drop": 1.0})
    waveforms = torch.randn(1, 8000)
    states, _ = model.extract_features(waveforms)
    assert not torch.equal(states[1], states[3])
    dropped, _ = model(waveforms)
    assert not torch.allclose(dropped, states[3])
    assert torch.allclose(model.eval()(waveforms)[0], states[3])


@pytest.mark.parametrize("layer_drop", [0.0, 1.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_ddp_waits_for_no_parameter_in_vain(family, layer_drop):
    """Neither for those of a dropped layer, nor for a norm whose branch was pruned away."""
    model = with_absent_branches(family).train()
    model.encoder.transformer.layer_drop = layer_drop
    model(torch.randn(1, 4000))[0].square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert model.encoder.transformer.layers[2].final_layer_norm.weight.requires_grad == ("base" in family)


@pytest.mark.parametrize("norm", ["layer", "masked group"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_has_no_influence_on_what_is_valid(family, norm):
    torch.manual_seed(0)
    mode = {"extractor_mode": "layer_norm"} if norm == "layer" else {}
    model = ungated(family, **mode).eval()
    model.masked_group_norm = norm == "masked group"
    short = torch.randn(1, 5000)
    padded = torch.cat([short, torch.randn(1, 3000)], dim=1)
    batch = torch.cat([padded, torch.randn(1, 8000)])
    with torch.no_grad():
        alone, _ = model.extract_features(short)
        together, lengths = model.extract_features(batch, torch.tensor([5000, 8000]))
    frames = int(lengths[0])
    assert frames == alone[0].size(1)
    for expected, actual in zip(alone, together, strict=True):
        assert_close(actual[:1, :frames], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("lengths", "words"),
    [
        ([0.5, 1.0], "whole numbers of samples, not torch.float32: multiply relative ones"),
        ([5_000.0, 8_000.0], "whole numbers of samples"),
        ([[True] * 8_000] * 2, "whole numbers of samples, not torch.bool"),
        ([5_000, 8_001], "0 to 8000 samples for waveforms of 8000, not 5000 to 8001"),
        ([-1, 8_000], "not -1 to 8000"),
        ([5_000], r"of 2 waveforms, not \(1,\)"),
    ],
)
def test_lengths_that_cannot_be_right_are_one_sentence(lengths, words):
    model = ungated("hubert_base")
    for call in (model, model.extract_features):
        with pytest.raises(ValueError, match=words):
            call(torch.zeros(2, 8_000), torch.tensor(lengths))
