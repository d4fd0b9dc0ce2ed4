"""Gates: what they draw, what they cost, and that computing with the open units alone changes nothing."""

import copy

import pytest
import torch
from conftest import tiny_config
from torch.testing import assert_close

import wav2vec2.components
import wav2vec2.hardconcrete
import wav2vec2.onednn
from wav2vec2 import HardConcrete, PruningError, wav2vec2_model
from wav2vec2.pruning_utils import PRUNING_UNITS, count_parameters

ALL_GATES = dict.fromkeys(PRUNING_UNITS.values(), True)
LARGE = {
    "extractor_mode": "layer_norm",
    "extractor_conv_bias": True,
    "encoder_layer_norm_first": True,
    "normalize_waveform": True,
}


def without_dropout(**changes):
    config = tiny_config(**changes)
    return {**config, **{key: 0.0 for key in config if key.endswith("dropout") or key.endswith("layer_drop")}}


def config_of(family):
    changes = LARGE if "large" in family else {}
    config = without_dropout(**ALL_GATES, **changes)
    if "wavlm" in family:
        del config["encoder_num_heads"], config["encoder_head_dim"]
        config |= {
            "encoder_total_num_heads": [4] * 3,
            "encoder_remaining_heads": [[0, 1, 2, 3] for _ in range(3)],
            "encoder_num_buckets": 32,
            "encoder_max_distance": 64,
        }
    return config


FAMILIES = ["hubert_base", "hubert_large", "wavlm_base", "wavlm_large"]


def randomly_gated(family, seed, closed=0.6):
    """A model whose gates' samples are closed, soft and open in turn."""
    torch.manual_seed(seed)
    model = wav2vec2_model(**config_of(family))
    for gate in model.gates():
        gate.log_alpha.data = torch.where(torch.rand(gate.n_in) < closed, -4.0, 1.0) + torch.randn(gate.n_in)
        if gate.n_in == 1:
            gate.log_alpha.data.fill_(4.0 if torch.rand(()) < 0.7 else -9.0)
    return model


def outputs_and_gradients(model, skip, multiple, waveforms, lengths):
    model = copy.deepcopy(model)
    model.skip_closed_gates, model.width_multiple = skip, multiple
    torch.manual_seed(7)
    states, _ = model.extract_features(waveforms, lengths)
    loss = sum((state * torch.sin(torch.arange(state.numel()).view_as(state))).mean() for state in states)
    loss.backward()
    return states, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("family", FAMILIES)
def test_open_units_alone_give_the_masked_outputs_and_gradients(family, seed, multiple):
    model = randomly_gated(family, seed)
    waveforms = torch.randn(2, 4000)
    lengths = torch.tensor([4000, 3100]) if seed else None
    masked, expected = outputs_and_gradients(model, False, 1, waveforms, lengths)
    skipped, actual = outputs_and_gradients(model, True, multiple, waveforms, lengths)
    assert_close(skipped, masked, rtol=1e-5, atol=1e-5)
    unused = {name for name, gradient in expected.items() if gradient is None}
    assert unused <= {"encoder.transformer.layer_norm.weight", "encoder.transformer.layer_norm.bias"}
    for name, gradient in expected.items():
        if gradient is not None:
            assert_close(actual[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_open_units_alone_are_what_is_computed_with(family, monkeypatch):
    model = randomly_gated(family, 0)
    widths = []
    linear = wav2vec2.onednn.linear
    monkeypatch.setattr(
        "wav2vec2.components.linear", lambda x, w, b=None: widths.append(w.numel()) or linear(x, w, b)
    )
    model.width_multiple = 1
    model.extract_features(torch.randn(1, 4000))
    skipped = sum(widths)
    widths.clear()
    model.skip_closed_gates = False
    model.extract_features(torch.randn(1, 4000))
    assert skipped < 0.7 * sum(widths)


def test_a_closed_head_leaves_the_next_update_free_to_open_it():
    torch.manual_seed(0)
    model = wav2vec2_model(**config_of("hubert_base"))
    gate = model.encoder.transformer.layers[1].attention.hard_concrete_for_heads
    gate.log_alpha.data.fill_(-9.0)
    model.get_num_params().backward()
    assert (gate.log_alpha.grad > 0).all()


def test_the_evaluation_mask_is_made_anew_after_training():
    model = wav2vec2_model(**config_of("hubert_base"))
    gate = model.gates()[0]
    model.eval()
    before = gate()
    assert gate() is before
    gate.training = True
    optimizer = torch.optim.AdamW([gate.log_alpha], lr=1.0, fused=True)
    gate.log_alpha.grad = torch.linspace(-1, 1, gate.n_in)
    for _ in range(5):
        optimizer.step()
    model.eval()
    assert not torch.equal(gate(), before)
    assert (gate() == 0).sum() == round(gate.n_in - gate.l0_norm().item())


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


def test_all_gates_are_drawn_from_one_call(monkeypatch):
    model = wav2vec2_model(**config_of("wavlm_base"))
    calls = []
    sample = HardConcrete.sample
    monkeypatch.setattr(
        wav2vec2.hardconcrete.HardConcrete,
        "sample",
        lambda self, x: calls.append(x.numel()) or sample(self, x),
    )
    model.extract_features(torch.randn(1, 4000))
    assert calls == [sum(gate.n_in for gate in model.gates())]


@pytest.mark.parametrize("family", FAMILIES)
def test_expected_size_is_the_true_count_with_gates_open_and_the_pruned_count_with_gates_decided(family):
    torch.manual_seed(0)
    model = wav2vec2_model(**config_of(family))
    for gate in model.gates():
        gate.log_alpha.data.fill_(40.0)
    assert model.get_num_params().item() == pytest.approx(count_parameters(model), abs=1e-3)
    for gate in model.gates():
        gate.log_alpha.data = torch.where(torch.rand(gate.n_in) < 0.5, -40.0, 40.0)
        gate.log_alpha.data[0] = 40.0
    expected = model.get_num_params().item()
    model.prune()
    assert expected == pytest.approx(count_parameters(model), abs=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pruned_model_is_right_at_once_and_may_be_gated_and_pruned_again(family):
    from wav2vec2.utils.checkpoint import build_model

    waveforms = torch.randn(1, 8000)
    model = randomly_gated(family, 3, closed=0.3).eval()
    model.prune()
    first = model.config
    again = build_model({**first, **ALL_GATES}, model.state_dict(), "the pruned model", new_gates=True).eval()
    for gate in again.gates():
        gate.log_alpha.data.fill_(40.0)
    with torch.no_grad():
        assert_close(
            again.extract_features(waveforms)[0], model.extract_features(waveforms)[0], rtol=1e-4, atol=1e-4
        )
    for gate in again.gates():
        gate.log_alpha.data[: gate.n_in // 2] = -40.0
    again.prune()
    rebuilt = build_model(again.config, again.state_dict(), "the model pruned twice").eval()
    with torch.no_grad():
        assert_close(rebuilt.extract_features(waveforms)[0], again.extract_features(waveforms)[0])
    for before, after in zip(
        first["encoder_use_attention"], again.config["encoder_use_attention"], strict=True
    ):
        assert before or not after
    if "wavlm" in family:
        remaining = zip(
            first["encoder_remaining_heads"], again.config["encoder_remaining_heads"], strict=True
        )
        for present, (before, after) in zip(first["encoder_use_attention"], remaining, strict=True):
            assert after == (before[len(before) // 2 :] if present else before)
    assert count_parameters(again) < count_parameters(model)


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


def test_a_conv_layer_pruned_to_nothing_is_named_and_nothing_is_cut():
    model = wav2vec2_model(**config_of("hubert_base"))
    model.feature_extractor.conv_layers[4].hard_concrete.log_alpha.data.fill_(-40.0)
    before = count_parameters(model)
    with pytest.raises(PruningError, match=r"conv layer 4 .* lower --target_sparsity"):
        model.prune()
    assert count_parameters(model) == before and model.gates()


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


def test_folding_the_weight_norm_changes_nothing_but_where_it_is_computed():
    torch.manual_seed(0)
    model = wav2vec2_model(**without_dropout()).eval()
    waveforms = torch.randn(1, 8000)
    with torch.no_grad():
        expected, _ = model.extract_features(waveforms)
        names = model.state_dict().keys()
        assert_close(model.fold_weight_norm().extract_features(waveforms)[0], expected)
        assert model.state_dict().keys() == names
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


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_has_no_influence_on_what_is_valid(family):
    torch.manual_seed(0)
    model = wav2vec2_model(
        **{**config_of(family), **dict.fromkeys(ALL_GATES, False), "extractor_mode": "layer_norm"}
    )
    model.eval()
    short = torch.randn(1, 5000)
    padded = torch.cat([short, torch.randn(1, 3000)], dim=1)
    batch = torch.cat([padded, torch.randn(1, 8000)])
    with torch.no_grad():
        alone, _ = model.extract_features(short)
        together, lengths = model.extract_features(batch, torch.tensor([5000, 8000]))
    frames = int(lengths[0])
    assert frames == alone[0].size(1)
    for expected, actual in zip(alone, together, strict=True):
        assert_close(actual[:1, :frames], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(3, 24), (2, 5, 24), (2, 0, 24)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_linear_layers_by_onednn_equal_torchs(shape, with_bias):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(shape), torch.randn(17, 24), torch.randn(17) if with_bias else None
    results = []
    for function in (torch.nn.functional.linear, wav2vec2.onednn.linear):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias) if t is not None]
        y = function(*leaves)
        results.append([y, *torch.autograd.grad(y.sin().sum(), leaves)])
    assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)
    strided = torch.randn(24, 4, 6).transpose(0, 2)
    expected = torch.nn.functional.linear(strided, weight, bias)
    assert_close(wav2vec2.onednn.linear(strided, weight, bias), expected, rtol=1e-5, atol=1e-5)
    assert wav2vec2.onednn.linear(x.double(), weight.double()).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert wav2vec2.onednn.linear(x, weight).dtype == torch.bfloat16


@pytest.mark.parametrize("family", FAMILIES)
def test_what_validation_caches_serves_training(family):
    torch.manual_seed(0)
    model = wav2vec2_model(**config_of(family))
    waveforms = torch.randn(1, 4160)
    wav2vec2.components.relative_buckets.cache_clear()
    with torch.inference_mode():
        model.eval().extract_features(waveforms)
        model.get_num_params()
    states, _ = model.train().extract_features(waveforms)
    (states[-1].sum() + model.get_num_params()).backward()
    assert all(gate.log_alpha.grad is not None for gate in model.gates())


def test_the_expected_size_moves_with_the_model_also_under_inference_mode():
    model = wav2vec2_model(**config_of("hubert_base"))
    model.get_num_params()
    model.to("meta")
    with torch.inference_mode():
        model.get_num_params()
    model.get_num_params().backward()
