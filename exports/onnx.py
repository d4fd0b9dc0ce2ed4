"""A model as an ONNX file: tracing, quantising, and comparing what onnxruntime computes with PyTorch."""

from __future__ import annotations

import logging
import math
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from exports.common import folder_beside, samples_of
from utils.cli import needs_extra
from utils.compare import relative_difference
from utils.files import UserError, atomic_write
from wav2vec2 import Wav2Vec2Model

with needs_extra("export"):
    import onnx
    import onnxruntime
    import onnxscript  # noqa: F401
    from onnxruntime.quantization import QuantType, quantize_dynamic

SIZE_LIMIT = 2**31
"""The most bytes of one ONNX file, protobuf's limit."""

TOLERANCE = 1e-4
"""The largest accepted difference of a float32 output from PyTorch's, relative to its largest value; 1e-6 is
usual."""


class Exported(nn.Module):
    """What goes into the file: the model, returning its output, its frames and all its hidden states."""

    def __init__(self, model: Wav2Vec2Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, waveforms: Tensor, lengths: Tensor | None = None) -> dict[str, Tensor]:
        """(batch, time) and (batch,) or None -> the outputs by name."""
        states, frames = self.model.extract_features(waveforms, lengths)
        named = {} if frames is None else {"frames": frames}
        hidden = {f"hidden_state_{i}": state for i, state in enumerate(states)}
        return {"features": self.model.output(states[-1]), **named, **hidden}


def export(
    model: Wav2Vec2Model,
    out: Path,
    int8: bool = False,
    all_hidden_states: bool = False,
    with_lengths: bool = False,
    audio: Tensor | None = None,
) -> dict[str, float]:
    """Writes ``model`` to the file ``out``, whole and checked or not at all.

    Args:
        model: without gates; it is put in evaluation mode, and its weight norm is folded.
        out: the file.
        int8: quantise the linear layers' matrices, and what they are multiplied with at run time.
        all_hidden_states: the file returns the hidden states too.
        with_lengths: the file takes the lengths of padded waveforms.
        audio: (time,) of 16 kHz to measure the error on; noise without it.
    Returns:
        The :func:`relative_error` of each output against PyTorch's.
    Raises:
        UserError: onnxruntime does not compute what PyTorch does, or the model is too large.
    """
    size = 4 * sum(parameter.numel() for parameter in model.parameters())
    if size >= SIZE_LIMIT:
        raise UserError(f"{out}: an ONNX file holds at most 2 GiB, this model has {size / 2**30:.1f}")
    # torch chooses attention's kernel, and with it the strides of its output, by whether gradients are
    # wanted; the exporter would trace once with and once without.
    exported = Exported(model.eval().fold_weight_norm().requires_grad_(False)).eval()
    if audio is None:
        audio = torch.randn(48_000, generator=torch.Generator().manual_seed(0)) * 0.1
    with folder_beside(out) as folder:
        path = folder / "model.onnx"
        _trace(exported, with_lengths).save(path)
        if int8:
            path = _quantise(path)
        outputs = _compute(exported, path, audio.unsqueeze(0), with_lengths)
        errors = {name: relative_error(*pair) for name, pair in outputs.items() if name != "frames"}
        content = onnx.load(path)
    _tidy(content, all_hidden_states)
    with atomic_write(out) as temporary:
        onnx.save(content, temporary)
        _check(exported, temporary, out, with_lengths, int8)
    return errors


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The norm of the difference over the norm of what is expected."""
    return ((actual - expected).norm() / expected.norm()).item()


def _trace(exported: Exported, with_lengths: bool) -> torch.onnx.ONNXProgram:
    """The ONNX program of a model, with any batch size and number of samples."""
    batch, shortest = torch.export.Dim("batch", min=1, max=65_536), samples_of(exported.model, 2)
    shapes = {"waveforms": {0: batch, 1: torch.export.Dim("time", min=shortest, max=2**31 - 1)}}
    inputs = {"waveforms": torch.zeros(3, 10 * shortest)}
    if with_lengths:
        shapes["lengths"] = {0: batch}
        inputs["lengths"] = torch.tensor([10, 8, 6]) * shortest
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it says that torchvision is missing
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.onnx.export(
            exported,
            kwargs=inputs,
            input_names=list(inputs),
            output_names=list(exported(**inputs)),
            dynamic_shapes=shapes,
            dynamo=True,
            verbose=False,
        )


def _quantise(path: Path) -> Path:
    """Writes the quantised model beside the file at ``path``; returns its path."""
    quantised = path.with_name("int8.onnx")
    # onnxruntime recommends steps before quantising that this graph has behind it.
    logging.getLogger().setLevel(logging.ERROR)
    quantize_dynamic(
        path,
        quantised,
        op_types_to_quantize=["MatMul", "Gemm"],
        per_channel=True,
        reduce_range=True,  # with seven bits, pairs of products fit the 16-bit sums of CPUs without VNNI
        weight_type=QuantType.QInt8,
    )
    return quantised


def _tidy(content: onnx.ModelProto, all_hidden_states: bool) -> None:
    """Drops the outputs that are not wanted and the traces of this machine, and names the outputs' axes."""
    kept = [output for output in content.graph.output if all_hidden_states or "hidden" not in output.name]
    del content.graph.output[:], content.graph.value_info[:]
    content.graph.output.extend(kept)
    for node in content.graph.node:  # where in whose code each came from
        del node.metadata_props[:]
    for output in content.graph.output:
        if output.name != "frames":
            output.type.tensor_type.shape.dim[1].dim_param = "frame"


def _compute(
    exported: Exported, path: Path, waveforms: Tensor, with_lengths: bool
) -> dict[str, tuple[Tensor, Tensor]]:
    """Each output of the file at ``path`` by onnxruntime and by PyTorch, from waveforms (batch, time)."""
    count, samples = waveforms.shape
    inputs = {"waveforms": waveforms}
    if with_lengths:
        least = samples_of(exported.model, 1)
        inputs["lengths"] = torch.linspace(samples, (samples + least) // 2, count).long()
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    actual = session.run(names, {name: tensor.numpy() for name, tensor in inputs.items()})
    pairs = zip(names, map(torch.from_numpy, actual), strict=True)
    with torch.inference_mode():
        expected = exported(**inputs)
    return {name: (value, expected[name]) for name, value in pairs}


def _check(exported: Exported, path: Path, out: Path, with_lengths: bool, int8: bool) -> None:
    """Compares PyTorch and onnxruntime at batch sizes and lengths that the export has not seen."""
    generator = torch.Generator().manual_seed(1)
    for count, frames in ((1, 1), (1, 60), (3, 2), (3, 131)):
        samples = samples_of(exported.model, frames) + 7 * (frames - 1)
        waveforms = torch.randn(count, samples, generator=generator) * 0.1
        for name, (actual, expected) in _compute(exported, path, waveforms, with_lengths).items():
            same_shape = actual.shape == expected.shape
            error = relative_difference([actual], [expected]) if same_shape else math.inf
            # Eight bits may cost much, but no shape and no finite number.
            if not error < (math.inf if int8 else TOLERANCE):
                raise UserError(
                    f"{out}: not written, because {name} in onnxruntime at {count} x {samples} samples "
                    f"differs by {error:.1e} from PyTorch's"
                )
