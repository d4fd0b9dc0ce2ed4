"""A model as an ExecuTorch program: lowering to XNNPACK, quantising, and comparing with PyTorch."""

import contextlib
import copy
import io
import logging
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from exports.common import check_near, samples_of
from utils.cli import needs_extra
from utils.compare import relative_error
from utils.files import UserError, atomic_write
from wav2vec2 import Wav2Vec2Model

with needs_extra("executorch"):
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    from executorch.backends.xnnpack.partition import xnnpack_partitioner
    from executorch.backends.xnnpack.quantizer import xnnpack_quantizer
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e


class Features(nn.Module):
    """What goes into the file: a copy of the model that returns its output alone."""

    def __init__(self, model: Wav2Vec2Model) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).eval().fold_weight_norm().requires_grad_(False)
        # Lowering takes weights from parameters and from persistent buffers.
        conv = self.model.encoder.transformer.pos_conv_embed.conv
        conv.register_buffer("folded_weight", conv.folded_weight)

    def forward(self, waveforms: Tensor) -> Tensor:
        """(1, time) -> (1, frame, feature)."""
        return self.model(waveforms)[0]


def export(model: Wav2Vec2Model, out: Path, int8: bool = False, max_seconds: float = 20.0) -> float:
    """Writes ``model`` to the file ``out``, whole and checked or not at all.

    Args:
        model: without gates.
        int8: quantise the linear layers' matrices, and what they are multiplied with at run time.
        max_seconds: the longest waveform that the program takes; it reserves the memory for it.
    Returns:
        The norm of the difference of the output from PyTorch's, over the norm of PyTorch's, on noise.
    Raises:
        UserError: ExecuTorch cannot lower the model, or its runtime does not compute what PyTorch does.
    """
    features = Features(model)
    generator = torch.Generator().manual_seed(0)
    noise = 0.1 * torch.randn(1, round(max_seconds * 16_000), generator=generator)
    if noise.size(1) < (shortest := samples_of(model, 4)):
        raise UserError(f"--max_seconds {max_seconds}: the longest waveform has at least {shortest} samples")
    try:
        program = _lower(features, noise, int8)
    except Exception as error:  # The packages raise many kinds.
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{out}: not written, because ExecuTorch cannot lower this model ({type(error).__name__}: "
            f"{reason}); please report it with the versions of torch and executorch"
        ) from error
    with atomic_write(out) as path:
        path.write_bytes(program)
        method = Runtime.get().load_program(path).load_method("forward")
        for frames in (1, 4, 1 + noise.size(1) // 1000, None):
            waveforms = noise if frames is None else noise[:, : samples_of(model, frames) + 3]
            (actual,), expected = method.execute([waveforms]), features(waveforms)
            what = f"the features of {waveforms.size(1)} samples in ExecuTorch"
            check_near(out, what, actual, expected, int8)
    return relative_error([actual], [expected])


def _lower(features: Features, longest: Tensor, int8: bool) -> bytes:
    """The program of a model for waveforms (1, time) up to ``longest``."""
    time = torch.export.Dim.AUTO(min=samples_of(features.model, 2), max=longest.size(1))
    shapes = {"waveforms": {1: time}}
    partitioners = [xnnpack_partitioner.XnnpackPartitioner()]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.export.export(features, (longest,), dynamic_shapes=shapes, strict=False)
        if int8:
            config = xnnpack_quantizer.get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)
            quantizer = LinearQuantizer().set_module_type(nn.Linear, config)
            prepared = prepare_pt2e(program.module(), quantizer)
            prepared(longest)
            quantized = convert_pt2e(prepared)
            program = torch.export.export(quantized, (longest,), dynamic_shapes=shapes, strict=False)
            partitioners.insert(0, xnnpack_partitioner.XnnpackDynamicallyQuantizedPartitioner())
        program = program.run_decompositions(
            {torch.ops.aten.scaled_dot_product_attention.default: _attention}
        )
        return to_edge_transform_and_lower(program, partitioner=partitioners).to_executorch().buffer


class LinearQuantizer(xnnpack_quantizer.XNNPACKQuantizer):
    """A quantiser that leaves all but linear layers alone, also the indices of WavLM's position bias, which
    the original would turn into floating point."""

    def transform_for_annotation(self, model: torch.fx.GraphModule) -> torch.fx.GraphModule:
        return model


def _attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, dropout: float = 0.0, causal: bool = False
) -> Tensor:
    """Scaled dot-product attention as XNNPACK has it, whole. Torch's own form also looks for rows in which
    everything is masked, which never happens here, and which takes half of the time for 10 s of audio."""
    logits = q @ k.transpose(-2, -1) * q.size(-1) ** -0.5
    return (logits if bias is None else logits + bias).softmax(-1) @ v
