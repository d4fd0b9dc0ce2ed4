"""A config's keys and values: each is documented, and what is wrong is refused."""

import math
from dataclasses import fields

import pytest
import torch

from tests.helpers.models import config_of, tiny_config
from wav2vec2 import wav2vec2_model
from wav2vec2.config import Wav2Vec2Config

WRONG = {
    "encoder_embed_dim": ["x", None, -1, 0, 1.5, True, math.nan, [768]],
    "encoder_dropout": ["0.1", None, -0.1, 2, math.nan, torch.ones(2)],
    "encoder_layer_norm_first": ["True", None, 1],
    "encoder_use_attention": [None, True, [1, 1, 1], [True] * 2, "TTT"],
    "encoder_ff_interm_features": [64, [64.0] * 3, [-1] * 3, [64] * 4, {}],
    "aux_num_out": [0, "32", 1.5],
    "extractor_mode": ["x", None, 1],
    "extractor_conv_layer_config": [None, [], [(16, 3)], [(16, 0, 2)], [(16, 3, 2.0)], [16, 3, 2]],
    "encoder_remaining_heads": [[[0, 0]] * 3, [[4]] * 3, [["0"]] * 3, [0, 1, 2], [[0]] * 2],
    "encoder_total_num_heads": [[5] * 3, [0] * 3, 4],
    "encoder_num_buckets": [2, None, "32"],
    "encoder_max_distance": [8, None],
}
CASES = [(key, value) for key, values in WRONG.items() for value in values]


@pytest.mark.parametrize("key, value", CASES, ids=[f"{key}={value}"[:60] for key, value in CASES])
def test_a_wrong_value_is_one_sentence_with_its_key(key, value):
    with pytest.raises((TypeError, ValueError)) as error:
        wav2vec2_model(**{**config_of("wavlm_base"), key: value})
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
    for key in fields(Wav2Vec2Config):
        assert f"        {key.name}: " in Wav2Vec2Config.__doc__
