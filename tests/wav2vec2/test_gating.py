"""Gates: what they draw and expect, and that a narrowed pass changes nothing but the work."""

import copy

import pytest
import torch
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.baseline import make_plain
from tests.helpers.models import (
    ALL_UNITS,
    FAMILIES,
    config_of,
    randomly_gated,
    states_and_gradients,
    ungated,
)
from utils.checkpoint import build_model
from wav2vec2 import HardConcrete, wav2vec2_model
from wav2vec2.cost import count_parameters
from wav2vec2.gating import Layout, narrowed


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("family", FAMILIES)
def test_a_narrowed_pass_is_the_masked_one(family, seed, monkeypatch):
    """The plain implementation of the benchmarks computes every unit and multiplies it by its mask."""
    model = randomly_gated(family, seed).double()
    # Whatever order gates are drawn in, their masks differ by log_alpha alone.
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda self, *_, **__: self.fill_(0.5))
    assert any((gate() == 0).any() for gate in model.gates())
    masked, waveforms = make_plain(copy.deepcopy(model)), torch.randn(2, 4000, dtype=torch.float64)
    lengths = torch.tensor([4000, 3100]) if seed else None
    expected, expected_gradients = states_and_gradients(masked, waveforms, lengths)
    states, gradients = states_and_gradients(model, waveforms, lengths)
    assert_close(states, expected, rtol=1e-8, atol=1e-10)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        assert_close(gradient, expected_gradients[name], rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_closed_units_are_not_computed(family):
    work = []
    for closed in (0.0, 0.9):
        model = randomly_gated(family, 0, closed, ff_interm_features=256)
        with FlopCounterMode(display=False) as counter:
            model.extract_features(torch.randn(1, 4000))
        work.append(counter.get_total_flops())
    assert work[1] < 0.7 * work[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_replica_leaves_the_model_as_it_was(family):
    model = randomly_gated(family, 1)
    parameters, modules, config = dict(model.named_parameters()), list(model.modules()), dict(model.config)
    plain = narrowed(model)
    plain.extract_features(torch.randn(1, 4000))[0][-1].sum().backward()
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert all(module is other for module, other in zip(model.modules(), modules, strict=True))
    assert model.config == config and model.is_gated and model.gates()
    assert not plain.is_gated and not plain.gates() and narrowed(plain) is plain
    layer, own = plain.encoder.transformer.layers[0], model.encoder.transformer.layers[0]
    assert type(layer) is type(own) and layer.layer_norm is own.layer_norm and layer is not own


def test_hooks_fire_on_the_layers_of_a_replica():
    model, seen = randomly_gated("hubert_base", 1, ff_interm_features=256), []
    dense = model.encoder.transformer.layers[1].feed_forward.intermediate_dense
    dense.register_forward_hook(lambda module, args, output: seen.append(output.size(-1)))
    model.extract_features(torch.randn(1, 4000))
    assert len(seen) == 1 and seen[0] < dense.out_features


@pytest.mark.parametrize("how", ["forward", "compile"])
def test_a_forward_put_on_an_instance_is_refused(how):
    model = randomly_gated("hubert_base", 1)
    layer = model.encoder.transformer.layers[1]
    if how == "forward":
        layer.forward = layer.forward
    else:
        layer.compile()
    with pytest.raises(RuntimeError, match="put on an instance of EncoderLayer"):
        model.extract_features(torch.randn(1, 4000))
    model.prune()  # a plain model runs whatever is put on it


def test_a_closed_head_leaves_the_next_update_free_to_open_it():
    torch.manual_seed(0)
    model = wav2vec2_model(**config_of("hubert_base"))
    gate = model.encoder.transformer.layers[1].attention.hard_concrete_for_heads
    gate.log_alpha.data.fill_(-9.0)
    model.get_num_params().backward()
    assert (gate.log_alpha.grad > 0).all()


def test_samples_follow_the_hard_concrete_distribution():
    torch.manual_seed(0)
    gate = HardConcrete(20_000, init_mean=0.5, init_std=0.0)
    gate.log_alpha.data.fill_(0.5)
    mask = gate()
    is_open = gate.l0_norm().item() / gate.n_in
    assert (mask > 0).float().mean().item() == pytest.approx(is_open, abs=0.01)
    # s > (1 - l) / (r - l) = 11 / 12 is clamped to 1: P = sigmoid(log_alpha - b log 11)
    is_whole = torch.sigmoid(torch.tensor(0.5) - 2 / 3 * torch.log(torch.tensor(11.0))).item()
    assert (mask == 1).float().mean().item() == pytest.approx(is_whole, abs=0.01)
    assert mask.min() == 0 and mask.max() == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pruned_model_may_be_gated_and_pruned_again(family):
    waveforms = torch.randn(1, 8000)
    model = randomly_gated(family, 3, closed=0.3).eval()
    model.prune()
    first, before = model.config, count_parameters(model)
    with torch.no_grad():
        expected, _ = model.extract_features(waveforms)
    model.add_gates(ALL_UNITS)
    for gate in model.eval().gates():
        gate.log_alpha.data.fill_(40.0)
    with torch.no_grad():
        assert_close(model.extract_features(waveforms)[0], expected, rtol=1e-4, atol=1e-4)
    for gate in model.gates():
        gate.log_alpha.data[: gate.n_in // 2] = -40.0
    model.prune()
    assert model.get_num_params() == count_parameters(model) < before
    rebuilt = build_model(model.config, model.state_dict(), "the model pruned twice").eval()
    with torch.no_grad():
        assert_close(rebuilt.extract_features(waveforms)[0], model.extract_features(waveforms)[0])
    had, has = first["encoder_use_attention"], model.config["encoder_use_attention"]
    assert all(present or not still for present, still in zip(had, has, strict=True))
    if "wavlm" in family:  # heads are counted as in the first model
        remaining = zip(
            had, first["encoder_remaining_heads"], model.config["encoder_remaining_heads"], strict=True
        )
        for present, heads, left in remaining:
            assert left == (heads[len(heads) // 2 :] if present else heads)


def test_only_computing_rounds_conv_channels_up_for_a_gpu():
    model = randomly_gated("hubert_base", 1)
    multiples = [{axis.gpu_multiple for axis in Layout(model, pruning).axes} for pruning in (False, True)]
    assert multiples == [{1, 64}, {1}]


def test_gates_are_added_once_and_by_known_names():
    model = ungated("hubert_base")
    for units, words in (("conv,heads", "heads is none of conv"), (" ,", "no unit is named")):
        with pytest.raises(ValueError, match=words):
            model.add_gates(units)
    assert not model.is_gated
    model.add_gates("head, interm")
    assert len(model.gates()) == 6 and model.config["encoder_prune_attention_heads"]
    assert wav2vec2_model(**model.config).state_dict().keys() == model.state_dict().keys()
    with pytest.raises(ValueError, match="has gates already"):
        model.add_gates("conv")


def test_wavlm_keeps_the_attention_that_makes_the_position_bias():
    model = wav2vec2_model(**config_of("wavlm_base")).eval()
    for gate in model.gates():
        gate.log_alpha.data.fill_(40.0)
    attention = model.encoder.transformer.layers[0].attention
    attention.hard_concrete_for_heads.log_alpha.data.fill_(-40.0)
    waveforms = torch.randn(1, 8000)
    with torch.no_grad():
        gated, _ = model.extract_features(waveforms)
        _, use_attention, _, _, remaining, _ = model.prune()
        assert use_attention == [True] * 3 and remaining[0] == [] and len(remaining[1]) == 4
        assert_close(model.extract_features(waveforms)[0], gated, rtol=1e-4, atol=1e-4)
        again = wav2vec2_model(**model.config).eval()
        again.load_state_dict(model.state_dict())
        assert_close(again.extract_features(waveforms)[0], gated, rtol=1e-4, atol=1e-4)
    assert model.get_num_params() == count_parameters(model) == count_parameters(again)


def test_round_to_rounds_widths_up():
    model = randomly_gated("hubert_base", 1).eval()
    for layer in model.encoder.transformer.layers:
        layer.feed_forward.hard_concrete_for_layer.log_alpha.data.fill_(9.0)
    exact = copy.deepcopy(model).prune()
    rounded = model.prune(round_to=8)
    for (channels, *_), (rounded_channels, *_) in zip(exact[0], rounded[0], strict=True):
        assert rounded_channels == min(16, -(-channels // 8) * 8)
    assert rounded[5] == [-(-width // 8) * 8 for width in exact[5]]
    assert exact[3] == rounded[3]


@pytest.mark.parametrize("family", FAMILIES)
def test_evaluation_under_inference_mode_leaves_training_free(family):
    torch.manual_seed(0)
    model = wav2vec2_model(**config_of(family))
    waveforms = torch.randn(1, 4160)
    with torch.inference_mode():
        model.eval().extract_features(waveforms)
        model.get_num_params()
    states, _ = model.train().extract_features(waveforms)
    (states[-1].sum() + model.get_num_params()).backward()
    assert all(gate.log_alpha.grad is not None for gate in model.gates())
