"""Checkpoints in the original's format, of DPHuBERT, DPWavLM and DiariZen, load where users load them."""

import pytest
import torch

from tests.helpers.models import ALL_UNITS, close, recorded
from utils.checkpoint import load_model
from wav2vec2 import wav2vec2_model

PRUNED = ["prune_hubert", "prune_hubert_large", "prune_wavlm"]
NEW_NAMES = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}


def published(name, path, conv=tuple, new_names=False, **extra):
    """Writes the pruned model ``name`` as the original would; returns its recording and its config."""
    golden = recorded(name)
    layers = [conv(layer) for layer in golden["pruned_config"]["extractor_conv_layer_config"]]
    config = golden["pruned_config"] | {"extractor_conv_layer_config": layers} | extra
    state_dict = golden["pruned_state_dict"]
    if new_names:
        for old, new in NEW_NAMES.items():
            state_dict = {key.replace(old, new): value for key, value in state_dict.items()}
    torch.save({"config": config, "state_dict": state_dict}, path)
    return golden, config


@pytest.mark.parametrize("new_names", [False, True])
@pytest.mark.parametrize("conv", [tuple, list])
@pytest.mark.parametrize("name", PRUNED)
def test_readmes_snippet_loads_every_spelling(name, conv, new_names, tmp_path):
    golden, _ = published(name, tmp_path / "student.pth", conv, new_names)
    ckpt = torch.load(tmp_path / "student.pth", weights_only=True)
    model = wav2vec2_model(**ckpt["config"])
    keys = model.load_state_dict(ckpt["state_dict"], strict=False)
    assert keys.missing_keys == keys.unexpected_keys == []
    with torch.no_grad():
        close(model.eval().extract_features(golden["waveforms"])[0], golden["hidden_states_pruned"])


@pytest.mark.parametrize("empty", [False, True], ids=["heads in the config", "no heads in the config"])
@pytest.mark.parametrize("layers", [(1,), (1, 2)])
def test_layers_without_attention_load_and_run(layers, empty, tmp_path):
    """A pruned WavLM whose ``layers`` have no attention."""
    golden = recorded("prune_wavlm")
    config, heads = golden["pruned_config"], golden["pruned_config"]["encoder_remaining_heads"]
    config["encoder_use_attention"] = [i not in layers for i in range(3)]
    if empty:
        config["encoder_remaining_heads"] = [[] if i in layers else h for i, h in enumerate(heads)]
    dropped = tuple(f"encoder.transformer.layers.{i}.attention." for i in layers)
    state_dict = {k: v for k, v in golden["pruned_state_dict"].items() if not k.startswith(dropped)}
    torch.save({"config": config, "state_dict": state_dict}, tmp_path / "student.pth")
    model = load_model(tmp_path / "student.pth").eval()
    assert [layer.attention is None for layer in model.encoder.transformer.layers] == [
        i in layers for i in range(3)
    ]
    assert model.state_dict().keys() == state_dict.keys()
    assert model.get_num_params() == sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        states, _ = model.extract_features(golden["waveforms"])
        for first in range(2):
            close(states[first], golden["hidden_states_pruned"][first])
        layer = model.encoder.transformer.layers[1]
        x = layer.layer_norm(states[1])
        fed = x if layer.feed_forward is None else x + layer.feed_forward(x)
        close(states[2], layer.final_layer_norm(fed))
    model.train().add_gates(ALL_UNITS)
    assert model.encoder.transformer.layers[1].attention is None
    model(golden["waveforms"])[0].sum().backward()


def test_none_in_place_of_the_other_familys_keys_loads(tmp_path):
    """The original writes a HuBERT's config without WavLM's keys; None in their place must do as well."""
    golden, config = published(
        "prune_hubert", tmp_path / "student.pth", encoder_remaining_heads=None, encoder_num_buckets=None
    )
    assert "encoder_remaining_heads" in config
    model = load_model(tmp_path / "student.pth").eval()
    assert model.get_num_params() == golden["pruned_params"]
