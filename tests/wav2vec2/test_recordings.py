"""The model against recordings of the original: hidden states, sizes, gates and pruning."""

import pytest
import torch

from tests.helpers.models import build, close, recorded

TINY = ["hubert_base_tiny", "hubert_large_tiny", "wavlm_base_tiny", "wavlm_large_tiny"]
PRUNED = ["prune_hubert", "prune_hubert_large", "prune_wavlm"]


@pytest.mark.parametrize("name", TINY)
def test_size_and_hidden_states_equal_the_recording(name):
    golden = recorded(name)
    model = build(golden["config"], golden["state_dict"])
    assert model.get_num_params() == golden["total_params"] == sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        states, lengths = model.extract_features(golden["waveforms"])
        assert lengths is None
        close(states, golden["hidden_states"])
        states, lengths = model.extract_features(golden["waveforms"], golden["lengths"])
        close(states, golden["hidden_states_with_lengths"])
        assert lengths.tolist() == golden["output_lengths"].tolist()
        close(model(golden["waveforms"])[0], golden["output"])
        close(model(golden["waveforms"], golden["lengths"])[0], golden["output_with_lengths"])


@pytest.mark.parametrize("name", TINY)
def test_num_layers_gives_the_first_hidden_states(name):
    golden = recorded(name)
    model = build(golden["config"], golden["state_dict"])
    with torch.no_grad():
        for n in range(4):
            states, _ = model.extract_features(golden["waveforms"], num_layers=n)
            close(states, golden["hidden_states"][: n + 1])
    with pytest.raises(ValueError, match="between 0 and 3, not 4"):
        model.extract_features(golden["waveforms"], num_layers=4)


@pytest.mark.parametrize("name", PRUNED)
def test_gates_and_gated_outputs_equal_the_recording(name):
    golden = recorded(name)
    model = build(golden["config"], golden["state_dict"])
    assert model.config == golden["config"]
    gates = dict(model.named_modules())
    for gate, norm in golden["l0_norm"].items():
        assert gates[gate].l0_norm().item() == pytest.approx(norm, rel=1e-5)
    for gate, mask in golden["eval_masks"].items():
        close(gates[gate](), mask)
    with torch.no_grad():
        close(model.extract_features(golden["waveforms"])[0], golden["hidden_states_gated"])
    expected = golden["expected_num_params"]
    if name == "prune_wavlm":
        per_layer = 8 * 8 + 8 + 4
        for i in (1, 2):
            gate = f"encoder.transformer.layers.{i}.attention.hard_concrete_for_layer"
            expected += golden["l0_norm"][gate] * per_layer
        expected += per_layer + 32 * 4
    assert model.get_num_params().item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", PRUNED)
def test_pruning_equals_the_recording(name):
    golden = recorded(name)
    model = build(golden["config"], golden["state_dict"])
    conv, use_attention, use_feed_forward, num_heads, remaining, widths = model.prune()
    config = golden["pruned_config"]
    assert conv == config["extractor_conv_layer_config"]
    assert use_attention == config["encoder_use_attention"]
    assert use_feed_forward == config["encoder_use_feed_forward"]
    assert widths == config["encoder_ff_interm_features"]
    if "encoder_remaining_heads" in config:
        assert remaining == config["encoder_remaining_heads"]
    else:
        assert num_heads == config["encoder_num_heads"]
    assert model.config == config
    state_dict = model.state_dict()
    assert state_dict.keys() == golden["pruned_state_dict"].keys()
    for key, value in golden["pruned_state_dict"].items():
        close(state_dict[key], value)
    assert model.get_num_params() == sum(p.numel() for p in model.parameters()) == golden["pruned_params"]
    again = build(config, state_dict)
    with torch.no_grad():
        close(model.extract_features(golden["waveforms"])[0], golden["hidden_states_pruned"])
        close(again.extract_features(golden["waveforms"])[0], golden["hidden_states_pruned"])
