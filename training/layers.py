"""Compilation and activation checkpoints, put on a model's layers from outside.

Both are put on by class: a gated model computes with replicas of its layers, which have the classes of the
layers, while a function on an instance would compute with the whole weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning import DistillModule
from wav2vec2 import Wav2Vec2Model


def checkpoint_activations(model: Wav2Vec2Model) -> None:
    """Lets the transformer layers of ``model`` compute again in the backward pass, in place, which saves the
    memory of their activations (Chen et al. 2016, https://arxiv.org/abs/1604.06174)."""

    def checkpointing(forward: Callable) -> Callable:
        def compute(layer: nn.Module, *inputs: Tensor | None) -> Tensor:
            if not torch.is_grad_enabled():
                return forward(layer, *inputs)
            return checkpoint(forward, layer, *inputs, use_reentrant=False)

        return compute

    _replace(model.encoder.transformer.layers, "forward", checkpointing)


def compile_layers(module: DistillModule) -> None:
    """Compiles in place what is not a convolution: transformer layers, norms of conv blocks, and the losses.

    Widths are variables in the compiled graphs, since a gated student's change with every update and a pruned
    one's from layer to layer. Convolutions are left out, as a graph with one is good for a single length.
    """
    config = torch._dynamo.config
    config.optimize_ddp = False  # it would split graphs that hold a layer each
    config.recompile_limit = max(64, config.recompile_limit)
    config.force_parameter_static_shapes = config.force_nn_module_property_static_shapes = False
    if module.distill_loss is not None:
        module.distill_loss.compile(dynamic=True)
    if module.hparams.use_reg:
        module.student_cost.compile()

    def compiled(method: Callable) -> Callable:
        return torch.compile(method, dynamic=True)

    for model in filter(None, (module.teacher_model, module.student_model)):
        normed = [block for block in model.feature_extractor.conv_layers if block.layer_norm is not None]
        _replace(normed, "finish", compiled)
        _replace(model.encoder.transformer.layers, "forward", compiled)


def _replace(modules: Iterable[nn.Module], method: str, change: Callable[[Callable], Callable]) -> None:
    """Replaces ``method`` by ``change(method)``, in a subclass that is made of each class of ``modules``."""
    subclasses: dict[type, type] = {}
    for module in modules:
        own = type(module)
        if own not in subclasses:
            subclasses[own] = type(own.__name__, (own,), {method: change(getattr(own, method))})
        module.__class__ = subclasses[own]
