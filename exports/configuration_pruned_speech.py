"""The config of an exported model, as transformers reads and writes it.

export_to_hf.py copies this file beside the project's own modules, where its relative import resolves.
"""

from __future__ import annotations

from dataclasses import fields

from transformers import PretrainedConfig

from .config import NO_GATES, Wav2Vec2Config, base_config

CTC = {
    "vocab_size": 32,
    "final_dropout": 0.0,
    "ctc_loss_reduction": "sum",
    "ctc_zero_infinity": False,
    "initializer_range": 0.02,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


class PrunedSpeechConfig(PretrainedConfig):
    """A pruned or whole wav2vec 2.0, HuBERT or WavLM.

    Args:
        vocab_size: outputs of the CTC head.
        final_dropout: dropout before the CTC head.
        ctc_loss_reduction: "sum" or "mean" over the batch's utterances.
        ctc_zero_infinity: an utterance too short for its labels has the loss 0 instead of an infinite one.
        initializer_range: standard deviation of the weights of a new CTC head.
        pad_token_id: the blank of CTC.
        kwargs: what every config of transformers takes, and the keys of ``Wav2Vec2Config`` in config.py, by
            default those of HuBERT Base or WavLM Base. ``normalize_waveform`` is what the feature extractor
            does; the model reads what it is given.
    """

    model_type = "pruned_speech"
    attribute_map = {
        "hidden_size": "encoder_embed_dim",
        "num_hidden_layers": "encoder_num_layers",
        "hidden_dropout": "encoder_dropout",
        "attention_dropout": "encoder_attention_dropout",
        "activation_dropout": "encoder_ff_interm_dropout",
        "feat_proj_dropout": "encoder_projection_dropout",
        "layerdrop": "encoder_layer_drop",
    }

    def __init__(self, **kwargs) -> None:
        defaults = base_config(wavlm=kwargs.get("encoder_remaining_heads") is not None)
        for key in ("aux_num_out", *NO_GATES):  # a CTC head of its own stands for the first
            del defaults[key]
        super().__init__(**{**CTC, **defaults, **kwargs})

    def architecture(self) -> Wav2Vec2Config:
        """What the model is built from.

        Raises:
            ValueError: a value is impossible, or two do not go together; the sentence names the key.
        """
        given = {
            key.name: getattr(self, key.name) for key in fields(Wav2Vec2Config) if hasattr(self, key.name)
        }
        return Wav2Vec2Config.from_dict({**given, "aux_num_out": None})


# save_pretrained writes the code of a registered class beside the config.
PrunedSpeechConfig.register_for_auto_class()
