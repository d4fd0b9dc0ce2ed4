"""A model as an ONNX file: tracing, quantising, and comparing what onnxruntime computes with PyTorch."""

import copy
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
from wav2vec2.model import normalize

with needs_extra("export"):
    import onnx
    import onnxruntime
    import onnxscript  # noqa: F401
    from onnxruntime.quantization import QuantType, quantize_dynamic

OPSETS = (17, 18, 19, 20)
"""The versions of ONNX's operators that a file may ask for; Gelu is an operator of its own from 20 on."""

IR_VERSION = 9
"""The version of the file format in which opset 20 came; onnxruntime 1.17 and its like read no later one."""


class Exported(nn.Module):
    """What goes into the file: a copy of the model that returns its output, its frames and all its hidden
    states. It computes in ``dtype``, but inputs, their normalisation and outputs are float32."""

    def __init__(self, model: Wav2Vec2Model, with_lengths: bool, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        # torch chooses attention's kernel, and with it the strides of its output, by whether gradients are
        # wanted; the exporter would trace once with and once without.
        self.model = copy.deepcopy(model).eval().fold_weight_norm().requires_grad_(False).to(dtype)
        self.model.normalize_waveform, self.normalizes = False, model.normalize_waveform
        self.with_lengths, self.dtype = with_lengths, dtype

    def forward(self, waveforms: Tensor, lengths: Tensor | None = None) -> dict[str, Tensor]:
        """(batch, time) and (batch,) or None -> the outputs by name."""
        if self.normalizes:
            waveforms = normalize(waveforms, lengths)
        states, frames = self.model.extract_features(waveforms.to(self.dtype), lengths)
        output = "features" if self.model.aux is None else "logits"
        named = {} if frames is None else {"frames": frames}
        hidden = {f"hidden_state_{i}": state.float() for i, state in enumerate(states)}
        return {output: self.model.output(states[-1]).float(), **named, **hidden}

    def inputs(self, waveforms: Tensor) -> dict[str, Tensor]:
        """The inputs by name; lengths fall from that of the waveforms (batch, time) to half of it."""
        if not self.with_lengths:
            return {"waveforms": waveforms}
        count, samples = waveforms.shape
        least = (samples + samples_of(self.model, 1)) // 2
        return {"waveforms": waveforms, "lengths": torch.linspace(samples, least, count).long()}


def export(
    model: Wav2Vec2Model,
    out: Path,
    int8: bool = False,
    all_hidden_states: bool = False,
    lengths: bool = False,
    audio: Tensor | None = None,
    half: bool = False,
    opset: int = OPSETS[-1],
) -> dict[str, float]:
    """Writes ``model`` to the file ``out``, whole and checked or not at all.

    Args:
        model: without gates.
        int8: quantise the linear layers' matrices, and what they are multiplied with at run time.
        all_hidden_states: the file returns the hidden states too.
        lengths: the file takes the lengths of padded waveforms.
        audio: (time,) of 16 kHz to measure the error on; noise without it.
        half: weights and what is computed are float16, and inputs and outputs float32.
        opset: the version of ONNX's operators, one of :data:`OPSETS`.
    Returns:
        For each output the norm of its difference from PyTorch's, over the norm of PyTorch's.
    Raises:
        UserError: onnxruntime does not compute what PyTorch does, or the model is too large.
    """
    size = (2 if half else 4) * sum(parameter.numel() for parameter in model.parameters())
    if size >= 2**31:
        raise UserError(f"{out}: an ONNX file holds at most 2 GiB, this model has {size / 2**30:.1f}")
    exported = Exported(model, lengths).eval()
    if audio is None:
        audio = torch.randn(48_000, generator=torch.Generator().manual_seed(0)) * 0.1
    with atomic_write(out) as path:
        traced = Exported(model, lengths, torch.float16).eval() if half else exported
        content = _trace(traced, opset).model_proto
        if opset < 18:  # The exporter's converter leaves an attribute that Split has from 18 on.
            for node in content.graph.node:
                if node.op_type == "Split":
                    del node.attribute[:]
                    node.attribute.append(onnx.helper.make_attribute("axis", -1))
        onnx.save(content, path)
        if int8:
            # onnxruntime recommends steps before quantising that this graph has behind it.
            logging.getLogger().setLevel(logging.ERROR)
            quantize_dynamic(
                path,
                path,
                op_types_to_quantize=["MatMul", "Gemm"],
                per_channel=True,
                reduce_range=True,  # pairs of products fit the 16-bit sums of CPUs without VNNI
                weight_type=QuantType.QInt8,
            )
        outputs = _compute(exported, path, audio.unsqueeze(0))
        outputs.pop("frames", None)
        errors = {name: relative_error([x], [right]) for name, (x, right) in outputs.items()}
        _tidy(path, all_hidden_states)
        # Batch sizes and lengths that the export has not seen.
        generator = torch.Generator().manual_seed(1)
        for count, frames in ((1, 1), (1, 60), (3, 2), (3, 131)):
            samples = samples_of(model, frames) + 7 * (frames - 1)
            waveforms = torch.randn(count, samples, generator=generator) * 0.1
            for name, both in _compute(exported, path, waveforms).items():
                what = f"the {name} of {count} x {samples} samples in onnxruntime"
                check_near(out, what, *both, fewer_bits=int8 or half)
    return errors


def _trace(exported: Exported, opset: int) -> torch.onnx.ONNXProgram:
    """The ONNX program of a model, with any batch size and number of samples."""
    batch, shortest = torch.export.Dim("batch", min=1, max=65_536), samples_of(exported.model, 2)
    time = torch.export.Dim("time", min=shortest, max=2**31 - 1)
    shapes = {"waveforms": {0: batch, 1: time}, "lengths": {0: batch}}
    inputs = exported.inputs(torch.zeros(3, 10 * shortest))
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # says that torchvision is missing
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.onnx.export(
            exported,
            kwargs=inputs,
            input_names=list(inputs),
            output_names=list(exported(**inputs)),
            dynamic_shapes={name: shapes[name] for name in inputs},
            opset_version=opset,
            dynamo=True,
            verbose=False,
        )


def _tidy(path: Path, all_hidden_states: bool) -> None:
    """Drops the outputs that are not wanted and the traces of this machine, and names the outputs' axes."""
    content = onnx.load(path)
    kept = [output for output in content.graph.output if all_hidden_states or "hidden" not in output.name]
    content.ir_version = IR_VERSION
    del content.graph.output[:], content.graph.value_info[:]
    content.graph.output.extend(kept)
    for node in content.graph.node:  # where in whose code each came from
        del node.metadata_props[:]
    for output in content.graph.output:
        if output.name != "frames":
            output.type.tensor_type.shape.dim[1].dim_param = "frame"
    onnx.save(content, path)


def _compute(exported: Exported, path: Path, waveforms: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Each output of the file at ``path`` by onnxruntime and by PyTorch, from waveforms (batch, time)."""
    inputs = exported.inputs(waveforms)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    actual = session.run(names, {name: tensor.numpy() for name, tensor in inputs.items()})
    with torch.inference_mode():
        expected = exported(**inputs)
    return {
        name: (torch.from_numpy(value), expected[name]) for name, value in zip(names, actual, strict=True)
    }
