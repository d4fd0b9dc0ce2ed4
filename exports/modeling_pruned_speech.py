"""A config and models in transformers' conventions; the model itself is in model.py and components.py.

export_to_hf.py copies this file beside the project's own modules, where its relative imports resolve.
"""

import math
from collections.abc import Mapping
from dataclasses import fields
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from transformers import AutoFeatureExtractor, PretrainedConfig, PreTrainedModel, Wav2Vec2FeatureExtractor
from transformers import Wav2Vec2Model as TransformersModel
from transformers.modeling_outputs import (
    BaseModelOutput,
    CausalLMOutput,
    ModelOutput,
    SequenceClassifierOutput,
)

from .components import EncoderLayer, WavLMSelfAttention, valid_frames, without_padding
from .config import NO_GATES, Wav2Vec2Config, base_config
from .constraint import SizeConstraint  # noqa: F401
from .cost import count_parameters  # noqa: F401
from .gating import narrowed
from .hardconcrete import HardConcrete
from .model import Prunable, Wav2Vec2Model
from .pruning import PruningError  # noqa: F401

# transformers 4.48 fetches only what this file itself imports.

OPTIONS = {
    "masked_group_norm": False,  # whether a group norm leaves the padding out, so that nothing depends on it
    "apply_spec_augment": True,  # whether training masks spans (SpecAugment), as the next six say
    "mask_time_prob": 0.0,  # share of the frames that start a masked span, times the span's length
    "mask_time_length": 10,  # frames of a span
    "mask_time_min_masks": 2,  # the fewest spans of an utterance
    "mask_feature_prob": 0.0,  # the same over features
    "mask_feature_length": 10,
    "mask_feature_min_masks": 0,
    "use_weighted_layer_sum": False,  # whether a classifier reads a weighted sum of all layers, not the last
    "classifier_proj_size": 256,  # features between the encoder and a classifier
    "vocab_size": 32,  # outputs of the CTC head
    "final_dropout": 0.0,  # dropout before the CTC head
    "ctc_loss_reduction": "sum",  # or "mean", over the batch's utterances
    "ctc_zero_infinity": False,  # whether an utterance too short for its labels has the loss 0, not infinity
    "initializer_range": 0.02,  # standard deviation of the weights of a new head
    "pad_token_id": 0,  # the blank of CTC
}


class PrunedSpeechConfig(PretrainedConfig):
    """A pruned or whole wav2vec 2.0, HuBERT or WavLM.

    Args:
        kwargs: the keys of ``OPTIONS`` above, those of ``Wav2Vec2Config`` in config.py, by default HuBERT
            Base's or WavLM Base's, and what every config of transformers takes. ``normalize_waveform`` is
            what the feature extractor does; the model reads what it is given.
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
        super().__init__(**{**OPTIONS, **defaults, **kwargs})

    @property
    def inputs_to_logits_ratio(self) -> int:
        """Samples from one frame to the next, by which transformers' pipelines cut and time their text."""
        return math.prod(stride for _, _, stride in self.extractor_conv_layer_config)


def frozen_to_buffers(model: nn.Module) -> None:
    """Makes buffers of the parameters that are not trained: transformers would train all that it loads."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.requires_grad:
                delattr(module, name)
                module.register_buffer(name, parameter.detach())


class CheckpointedLayer(EncoderLayer):
    """A layer that the backward pass computes again where gradient checkpointing is on, to save memory."""

    gradient_checkpointing = False  # transformers sets it, and _gradient_checkpointing_func with it

    def forward(self, *args: Tensor | None) -> Tensor:
        if not (self.gradient_checkpointing and self.training):
            return super().forward(*args)
        # Reentrant checkpoints, the default of transformers 4.48, lose the gradients of a layer whose input
        # needs none.
        return self._gradient_checkpointing_func(super().forward, *args, use_reentrant=False)


class PrunedSpeechPreTrainedModel(PreTrainedModel):
    config_class = PrunedSpeechConfig
    base_model_prefix = "pruned_speech"
    main_input_name = "input_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["CheckpointedLayer"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialises what the loaded file has no tensors for: a new head, or the vector of masked frames."""
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            nn.init.zeros_(module.bias)
        elif hasattr(module, "layer_weights"):
            nn.init.zeros_(module.layer_weights)  # their softmax counts
        elif getattr(module, "masked_spec_embed", None) is not None:
            nn.init.zeros_(module.masked_spec_embed)
        elif isinstance(module, HardConcrete):
            module.reset_parameters()

    def _get_feat_extract_output_lengths(self, input_lengths: Tensor | int) -> Tensor | int:
        """Samples -> frames."""
        for _, kernel_size, stride in self.config.extractor_conv_layer_config:
            input_lengths = (input_lengths - kernel_size) // stride + 1
        return input_lengths

    def freeze_feature_encoder(self) -> None:
        """Takes the convolutions out of training, as is usual in fine-tuning."""
        self.base_model.feature_extractor.requires_grad_(False)

    def freeze_base_model(self) -> None:
        """Takes all but the head out of training."""
        self.base_model.requires_grad_(False)

    def _output(self, output: ModelOutput, return_dict: bool | None) -> ModelOutput | tuple:
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()


class PrunedSpeechModel(PrunedSpeechPreTrainedModel, Prunable):
    """The encoder; ``AutoModel`` loads it. ``add_gates()`` and ``prune()`` are those of Wav2Vec2Model."""

    def __init__(self, config: PrunedSpeechConfig) -> None:
        super().__init__(config)
        given = {key.name: getattr(config, key.name, key.default) for key in fields(Wav2Vec2Config)}
        model = Wav2Vec2Model(Wav2Vec2Config.from_dict({**given, "aux_num_out": None}))
        self.feature_extractor = model.feature_extractor
        self.encoder = model.encoder
        self.is_gated = model.is_gated
        masks_frames = config.apply_spec_augment and config.mask_time_prob > 0
        # What frames under a mask are replaced by, which is learnt; no checkpoint of this project has it.
        self.masked_spec_embed = nn.Parameter(torch.zeros(config.encoder_embed_dim)) if masks_frames else None
        # transformers renames weight_g and weight_v to what torch's own parametrisation calls them.
        position = self.encoder.transformer.pos_conv_embed
        options = ("in_channels", "out_channels", "kernel_size", "padding", "groups")
        conv = nn.Conv1d(**{option: getattr(position.conv, option) for option in options})
        position.conv = weight_norm(conv, dim=2)
        frozen_to_buffers(self)
        for layer in self.encoder.transformer.layers:
            layer.__class__ = CheckpointedLayer  # which differs in its forward alone
            if isinstance(layer.attention, WavLMSelfAttention):
                # transformers does not keep the values of buffers that are not in the file.
                layer.attention.register_buffer("remaining_heads", layer.attention.remaining_heads)
        self.post_init()

    def config_dict(self) -> dict:
        return self.config.to_dict()

    def change_config(self, changes: Mapping) -> None:
        self.config.update(changes)

    def forward(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutput | tuple:
        """
        Args:
            input_values: (batch, time), 16 kHz, as the feature extractor gives them.
            attention_mask: (batch, time), 1 up to the end of each utterance and then 0, or None.
            output_attentions: cannot be had, as the fused attention does not compute them.
            output_hidden_states: also return the input of the first layer and the output of every layer, of
                the last one after the final layer norm where norms come first.
            return_dict: False for a tuple.
        Returns:
            ``last_hidden_state`` (batch, frame, feature), and ``hidden_states``.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        states = self.compute_states(input_values, attention_mask, output_attentions)
        if self.encoder.transformer.layer_norm_first:
            states[-1] = self.encoder.transformer.layer_norm(states[-1])
        hidden_states = tuple(states) if output_hidden_states else None
        output = BaseModelOutput(last_hidden_state=states[-1], hidden_states=hidden_states)
        return self._output(output, return_dict)

    def compute_states(
        self, input_values: Tensor, attention_mask: Tensor | None, output_attentions: bool | None
    ) -> list[Tensor]:
        """The input of the first layer and the output of every layer, each (batch, frame, feature); the
        arguments are those of :meth:`forward`."""
        if self.config.output_attentions if output_attentions is None else output_attentions:
            raise ValueError("output_attentions is not supported: the attention weights are not computed")
        model = narrowed(self)
        lengths = None if attention_mask is None else attention_mask.sum(-1)
        waveforms, masked_norm = input_values.to(self.dtype), self.config.masked_group_norm
        features, frames = model.feature_extractor(waveforms, lengths, masked_norm)
        x = model.encoder.feature_projection(features)
        if self.training:
            x = self._spec_augment(x, frames)
        transformer = model.encoder.transformer
        layer_drop = transformer.layer_drop if self.training else 0.0
        return transformer(*without_padding(x, frames), layer_drop=layer_drop)

    def _spec_augment(self, x: Tensor, frames: Tensor | None) -> Tensor:
        """Masks spans of frames and of features of (batch, frame, feature) at random, by the code of
        transformers' own models (SpecAugment, Park et al. 2019, section 2)."""
        valid = None if frames is None else valid_frames(frames, x.size(1))
        vector = x.new_zeros(x.size(-1)) if self.masked_spec_embed is None else self.masked_spec_embed
        masked = SimpleNamespace(config=self.config, training=True, masked_spec_embed=vector)
        return TransformersModel._mask_hidden_states(masked, x, attention_mask=valid)


class PrunedSpeechHead(PrunedSpeechPreTrainedModel):
    """The encoder with what makes logits of its output."""

    def __init__(self, config: PrunedSpeechConfig) -> None:
        super().__init__(config)
        self.pruned_speech = PrunedSpeechModel(config)

    def forward(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        labels: Tensor | None = None,
    ) -> CausalLMOutput | SequenceClassifierOutput | tuple:
        """
        Args:
            input_values to return_dict: as for :class:`PrunedSpeechModel`.
            labels: (batch, token), negative where padded, for CTC, or the classes (batch,); with them there
                is a loss.
        Returns:
            ``loss``, ``logits`` (batch, frame, token) or (batch, class), and ``hidden_states``.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        given = input_values, attention_mask, output_attentions
        if hasattr(self, "layer_weights"):
            states = self.pruned_speech.compute_states(*given)
            weights = self.layer_weights.softmax(-1)
            x = sum(weight * state for weight, state in zip(weights, states, strict=True))
        else:
            output = self.pruned_speech(*given, output_hidden_states, return_dict=True)
            x, states = output.last_hidden_state, output.hidden_states
        logits = self._logits(x, attention_mask)
        loss = None if labels is None else self._loss(logits, labels, attention_mask)
        hidden_states = tuple(states) if output_hidden_states else None
        return self._output(self.output_type(loss, logits, hidden_states), return_dict)


class PrunedSpeechForCTC(PrunedSpeechHead):
    """The encoder with a linear layer for CTC; ``AutoModelForCTC`` loads it."""

    output_type = CausalLMOutput

    def __init__(self, config: PrunedSpeechConfig) -> None:
        super().__init__(config)
        self.dropout = nn.Dropout(config.final_dropout)
        self.lm_head = nn.Linear(config.encoder_embed_dim, config.vocab_size)
        self.post_init()

    def _logits(self, x: Tensor, attention_mask: Tensor | None) -> Tensor:
        return self.lm_head(self.dropout(x))

    def _loss(self, logits: Tensor, labels: Tensor, attention_mask: Tensor | None) -> Tensor:
        if labels.max() >= self.config.vocab_size:
            raise ValueError(f"label {labels.max()} is not below vocab_size {self.config.vocab_size}")
        frames = torch.full(logits.shape[:1], logits.size(1), device=logits.device)
        if attention_mask is not None:
            frames = self._get_feat_extract_output_lengths(attention_mask.sum(-1)).clamp(min=0)
        valid = labels >= 0
        # cuDNN's CTC has more restrictions than torch's own, and its results vary from run to run.
        with torch.backends.cudnn.flags(enabled=False):
            return F.ctc_loss(
                F.log_softmax(logits, dim=-1, dtype=torch.float32).transpose(0, 1),
                labels.masked_select(valid),
                frames,
                valid.sum(-1),
                blank=self.config.pad_token_id,
                reduction=self.config.ctc_loss_reduction,
                zero_infinity=self.config.ctc_zero_infinity,
            )


class PrunedSpeechForSequenceClassification(PrunedSpeechHead):
    """The encoder with a classifier of whole utterances; ``AutoModelForAudioClassification`` loads it."""

    output_type = SequenceClassifierOutput

    def __init__(self, config: PrunedSpeechConfig) -> None:
        super().__init__(config)
        if config.use_weighted_layer_sum:
            self.layer_weights = nn.Parameter(torch.zeros(config.encoder_num_layers + 1))
            if config.encoder_layer_norm_first:  # The sum leaves the norm after the last layer out.
                self.pruned_speech.encoder.transformer.layer_norm.requires_grad_(False)
                frozen_to_buffers(self)
        self.projector = nn.Linear(config.encoder_embed_dim, config.classifier_proj_size)
        self.classifier = nn.Linear(config.classifier_proj_size, config.num_labels)
        self.post_init()

    def _logits(self, x: Tensor, attention_mask: Tensor | None) -> Tensor:
        x = self.projector(x)
        if attention_mask is None:
            return self.classifier(x.mean(1))
        frames = self._get_feat_extract_output_lengths(attention_mask.sum(-1)).clamp(min=1)
        x = x.masked_fill(~valid_frames(frames, x.size(1)).unsqueeze(-1), 0.0)
        return self.classifier(x.sum(1) / frames.unsqueeze(-1))

    def _loss(self, logits: Tensor, labels: Tensor, attention_mask: Tensor | None) -> Tensor:
        return F.cross_entropy(logits.float(), labels.view(-1))


# save_pretrained writes the code of a registered class beside its config and weights.
PrunedSpeechConfig.register_for_auto_class()
PrunedSpeechModel.register_for_auto_class("AutoModel")
PrunedSpeechForCTC.register_for_auto_class("AutoModelForCTC")
PrunedSpeechForSequenceClassification.register_for_auto_class("AutoModelForAudioClassification")
# Pipelines of transformers 4.48 load a feature extractor only for the types of models that are listed so.
AutoFeatureExtractor.register(PrunedSpeechConfig, Wav2Vec2FeatureExtractor, exist_ok=True)
