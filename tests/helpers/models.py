"""Tiny models of every family, gated at random, and recordings of the original."""

from pathlib import Path

import torch
from torch.testing import assert_close

from wav2vec2 import wav2vec2_model
from wav2vec2.config import NO_GATES, PRUNING_UNITS, base_config

GOLDEN = Path(__file__).parents[1] / "golden"
ALL_UNITS = ",".join(PRUNING_UNITS)
ALL_GATES = dict.fromkeys(PRUNING_UNITS.values(), True)
FAMILIES = ["hubert_base", "hubert_large", "wavlm_base", "wavlm_large"]
LARGE = {
    "extractor_mode": "layer_norm",
    "extractor_conv_bias": True,
    "encoder_layer_norm_first": True,
    "normalize_waveform": True,
}


def recorded(name):
    return torch.load(GOLDEN / f"{name}.pt", weights_only=True)


def build(config, state_dict):
    model = wav2vec2_model(**config)
    model.load_state_dict(state_dict, strict=True)
    return model.eval()


def close(actual, expected):
    assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def states_and_gradients(model, waveforms, lengths=None):
    """The hidden states, and the gradients of a loss in which each of their values has a part of its own."""
    states, _ = model.extract_features(waveforms, lengths)
    sum((state * torch.sin(torch.arange(state.numel()).view_as(state))).mean() for state in states).backward()
    return states, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def tiny_config(**changes):
    """The config of a HuBERT of 3 layers with dropout."""
    config = base_config(num_layers=3, num_heads=4, embed_dim=32, ff_interm_features=64)
    small = {
        "extractor_conv_layer_config": [(16, k, s) for _, k, s in config["extractor_conv_layer_config"]],
        "encoder_pos_conv_kernel": 16,
        "encoder_pos_conv_groups": 4,
    }
    return {**config, **small, **changes}


def without_dropout(**changes):
    config = tiny_config(**changes)
    return {**config, **{key: 0.0 for key in config if key.endswith("dropout") or key.endswith("layer_drop")}}


def config_of(family, **changes):
    """The config of a tiny model of ``family`` without dropout and with all five kinds of gates."""
    config = without_dropout(**ALL_GATES, **(LARGE if "large" in family else {}))
    if "wavlm" in family:
        del config["encoder_num_heads"], config["encoder_head_dim"]
        config |= {
            "encoder_total_num_heads": [4] * 3,
            "encoder_remaining_heads": [[0, 1, 2, 3] for _ in range(3)],
            "encoder_num_buckets": 32,
            "encoder_max_distance": 64,
        }
    return config | changes


def ungated(family, **changes):
    """A tiny model of ``family`` without gates, with ``changes`` of its config."""
    return wav2vec2_model(**config_of(family, **NO_GATES, **changes))


def randomly_gated(family, seed, closed=0.6, ff_interm_features=64):
    """A model whose gates' samples are closed, soft and open in turn."""
    torch.manual_seed(seed)
    model = wav2vec2_model(**config_of(family, encoder_ff_interm_features=[ff_interm_features] * 3))
    for gate in model.gates():
        gate.log_alpha.data = torch.where(torch.rand(gate.n_in) < closed, -4.0, 1.0) + torch.randn(gate.n_in)
        if gate.n_in == 1:
            gate.log_alpha.data.fill_(4.0 if torch.rand(()) < 0.7 else -9.0)
    return model


def pruned(family, seed=2):
    """A model of ``family`` cut by random gates, in evaluation mode; it still has all kinds of branches."""
    model = randomly_gated(family, seed, closed=0.4).eval()
    for gate in model.gates():
        if gate.n_in == 1:
            gate.log_alpha.data.fill_(4.0)
    model.prune()
    return model


def with_absent_branches(family):
    """A pruned model without attention in its second layer and without a feed-forward in its third; in
    WavLM's first layer the attention has no heads left, and stays for its position bias."""
    model = randomly_gated(family, seed=2, closed=0.4).eval()
    layers = model.encoder.transformer.layers
    for gate in model.gates():
        if gate.n_in == 1:
            gate.log_alpha.data.fill_(4.0)
    closed = [layers[1].attention.hard_concrete_for_layer, layers[2].feed_forward.hard_concrete_for_layer]
    if "wavlm" in family:
        closed.append(layers[0].attention.hard_concrete_for_heads)
    for gate in closed:
        gate.log_alpha.data.fill_(-20.0)
    model.prune()
    assert layers[1].attention is None and layers[2].feed_forward is None
    return model
