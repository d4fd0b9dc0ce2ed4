"""Every wrong value of a config is one sentence that names its key."""

import math

import pytest
import torch

from tests.helpers.models import config_of, tiny_config
from wav2vec2 import hubert_base, wav2vec2_model
from wav2vec2.config import Wav2Vec2Config

NOT_A_NUMBER = [None, "x", "", math.nan, math.inf, -1, 10**12, [], [1], {}, {1: 2}, torch.ones(2), b"1"]
NOT_A_LIST = [None, "x", 3, math.nan, {}, {1: 2}, torch.ones(3), 10**12]
NOT_A_FLAG = [None, "x", 1, 0, math.nan, [], {}, torch.ones(1), "True"]
NOT_PER_LAYER = [[0.5], [None] * 3, ["x"] * 3, [{}] * 3, [-1] * 3, [10**12] * 3, [1] * 2]
SPECIAL = {
    "aux_num_out": [value for value in NOT_A_NUMBER if value is not None],
    "extractor_mode": [None, "x", 1, [], {}, math.nan, torch.ones(2)],
    "extractor_conv_layer_config": [
        *([], [(16, 3)], [(16, 0, 2)], [(16, 3, -2)], [(16, 3, 2.0)], [[16, 3, 2, 1]], [16, 3, 2], [None]),
        *([(10**12, 3, 2)], [(16, 3, 2)] * 10**4),
    ],
    "encoder_remaining_heads": [[[0, 0]] * 3, [[4]] * 3, [["0"]] * 3, [0, 1, 2], [[0]] * 2],
}


def impossible(key, value):
    """Values that ``key``, whose ``value`` is possible, may not have."""
    if isinstance(value, bool):
        return NOT_A_FLAG
    if isinstance(value, list):
        return NOT_A_LIST + SPECIAL.get(key, NOT_PER_LAYER)
    return SPECIAL.get(key, NOT_A_NUMBER)


CASES = [
    (family, key, value)
    for family in ("hubert_base", "wavlm_base")
    for key, valid in config_of(family).items()
    for value in impossible(key, valid)
    # No remaining heads at all is what makes a config that of a HuBERT.
    if not (key == "encoder_remaining_heads" and value is None)
]
IDS = [f"{family}-{key}-{number}" for number, (family, key, _) in enumerate(CASES)]


@pytest.mark.parametrize("family, key, value", CASES, ids=IDS)
def test_a_wrong_value_is_one_sentence_that_names_its_key(family, key, value):
    with pytest.raises((TypeError, ValueError)) as error:
        wav2vec2_model(**{**config_of(family), key: value})
    sentence = str(error.value)
    assert key in sentence, sentence
    assert "\n" not in sentence and len(sentence) < 300


def test_missing_and_unknown_keys_are_all_named():
    config = tiny_config()
    del config["encoder_embed_dim"], config["aux_num_out"]
    with pytest.raises(
        TypeError, match=r"missing config key aux_num_out, encoder_embed_dim of a wav2vec 2\.0"
    ):
        wav2vec2_model(**config)
    with pytest.raises(TypeError, match="unknown config key gates, layers: drop it"):
        wav2vec2_model(**tiny_config(), layers=3, gates=True)
    config = config_of("wavlm_base")
    del config["encoder_num_buckets"]
    with pytest.raises(TypeError, match="missing config key encoder_num_buckets of a WavLM"):
        wav2vec2_model(**config)


@pytest.mark.parametrize(
    "family, changes, words",
    [
        (
            "hubert_base",
            {"encoder_num_buckets": 32},
            "encoder_num_buckets does not belong to the config of a HuBERT",
        ),
        ("wavlm_base", {"encoder_head_dim": 8}, "encoder_head_dim does not belong to the config of a WavLM"),
        ("wavlm_base", {"encoder_use_attention": [False, True, True]}, "it must be True there"),
        ("wavlm_base", {"encoder_total_num_heads": [5] * 3}, "5, which does not divide encoder_embed_dim 32"),
        ("hubert_base", {"encoder_pos_conv_groups": 5}, "does not divide encoder_embed_dim 32"),
        ("hubert_base", {"encoder_num_layers": 4}, "has 3 entries for 4 layers"),
    ],
)
def test_values_that_do_not_go_together_are_named(family, changes, words):
    with pytest.raises(ValueError, match=words):
        wav2vec2_model(**{**config_of(family), **changes})


def test_every_key_is_documented():
    from dataclasses import fields

    assert all(len(key.metadata["doc"]) > 10 for key in fields(Wav2Vec2Config))


@pytest.mark.parametrize("family", ["hubert_base", "wavlm_base"])
def test_a_models_config_is_the_one_it_was_built_from(family):
    config = config_of(family)
    model = wav2vec2_model(**config)
    assert model.config == config
    assert wav2vec2_model(**model.config).state_dict().keys() == model.state_dict().keys()


def test_a_factory_takes_config_keys():
    with torch.device("meta"):
        model = hubert_base(encoder_layer_drop=0.0, aux_num_out=32)
    assert model.config["encoder_layer_drop"] == 0.0 and model.aux.out_features == 32
    assert sum(p.numel() for p in hubert_base_parameters(model)) == 94_371_456


def hubert_base_parameters(model):
    return (p for name, p in model.named_parameters() if not name.startswith("aux."))
