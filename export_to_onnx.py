#!/usr/bin/env python3
"""Writes a model as an ONNX file, for onnxruntime and every other program that reads the format.

    python export_to_onnx.py --ckpt pruned.pth --out model.onnx [--int8] [--all_hidden_states] [--lengths]

The file's input ``waveforms`` is (batch, time), 16 kHz, of any size; its output ``features`` is (batch,
frame, feature), what the model itself returns. The file gets its name only after onnxruntime has computed
from it what PyTorch computes from the checkpoint, at sizes that the export has not seen.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from utils import run_record
from utils.checkpoint import load_model
from utils.cli import needs_extra, run_script, writes
from utils.files import UserError, atomic_write
from wav2vec2 import Wav2Vec2Model

with needs_extra("export"):
    import numpy as np
    import onnx
    import onnxruntime
    import onnxscript  # noqa: F401
    import soundfile
    from onnxruntime.quantization import QuantType, quantize_dynamic

SIZE_LIMIT = 2**31
"""Bytes of one ONNX file: protobuf's limit."""

TOLERANCE = 1e-4
"""Of a float32 file's outputs against PyTorch's, relative to the largest; 1e-6 is usual."""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--ckpt", required=True, help="a checkpoint without gates: a teacher's or a student's"
    )
    parser.add_argument("--out", required=True, help="the file to write, model.onnx say")
    parser.add_argument(
        "--int8", action="store_true", help="quantise the linear layers, and print what that costs"
    )
    parser.add_argument(
        "--all_hidden_states",
        action="store_true",
        help="further outputs hidden_state_0, the projected features, to hidden_state_L, layer by layer",
    )
    parser.add_argument(
        "--lengths",
        action="store_true",
        help="a further input lengths (batch,), valid samples of each, and an output frames (batch,)",
    )
    parser.add_argument(
        "--audio", help="a 16 kHz recording to measure the error of --int8 on; noise without it"
    )
    return parser.parse_args()


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


def samples_of(model: Wav2Vec2Model, frames: int) -> int:
    """The fewest samples of which the model makes so many frames."""
    for _, kernel, stride in reversed(model.config["extractor_conv_layer_config"]):
        frames = (frames - 1) * stride + kernel
    return frames


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
        int8: quantise the products with constant matrices; their inputs at run time, by their own range.
        all_hidden_states: the file returns the hidden states too.
        with_lengths: it takes the lengths of padded waveforms.
        audio: (time,) of 16 kHz to measure the error on; noise without it.
    Returns:
        The error of each output against PyTorch's, the norm of the difference over the norm.
    Raises:
        UserError: onnxruntime does not compute what PyTorch does, or the model is too large.
    """
    size = 4 * sum(parameter.numel() for parameter in model.parameters())
    if size >= SIZE_LIMIT:
        raise UserError(f"{out}: an ONNX file holds at most 2 GiB, this model has {size / 2**30:.1f}")
    # torch chooses attention's kernel, and with it the strides of its output, by whether gradients are
    # wanted; the exporter would trace once with and once without.
    exported = Exported(model.eval().fold_weight_norm().requires_grad_(False)).eval()
    with folder_beside(out) as folder:
        path = folder / "model.onnx"
        _trace(exported, with_lengths).save(path)
        if int8:
            # onnxruntime recommends steps before quantising that this graph has behind it.
            logging.getLogger().setLevel(logging.ERROR)
            # With seven bits, pairs of products fit the 16-bit sums of processors without VNNI.
            quantised = folder / "int8.onnx"
            quantize_dynamic(
                path,
                quantised,
                op_types_to_quantize=["MatMul", "Gemm"],
                per_channel=True,
                reduce_range=True,
                weight_type=QuantType.QInt8,
            )
            path = quantised
        seconds = torch.randn(48_000, generator=torch.Generator().manual_seed(0)) * 0.1
        outputs = _compute(exported, path, (seconds if audio is None else audio).unsqueeze(0), with_lengths)
        errors = {name: relative_error(*pair) for name, pair in outputs.items() if name != "frames"}
        content = onnx.load(path)
    kept = [output for output in content.graph.output if all_hidden_states or "hidden" not in output.name]
    del content.graph.output[:], content.graph.value_info[:]
    content.graph.output.extend(kept)
    for node in content.graph.node:  # where in whose code each came from
        del node.metadata_props[:]
    for output in content.graph.output:
        if output.name != "frames":
            output.type.tensor_type.shape.dim[1].dim_param = "frame"
    with atomic_write(out) as temporary:
        onnx.save(content, temporary)
        _check(exported, temporary, out, with_lengths, int8)
    return errors


@contextmanager
def folder_beside(out: Path) -> Iterator[Path]:
    """A folder for the length of a block, where there is room for ``out`` and perhaps none elsewhere."""
    with writes(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent) as folder:
            yield Path(folder)


def _trace(exported: Exported, with_lengths: bool):
    """The ONNX program of a model, with any batch size and number of samples."""
    batch, shortest = torch.export.Dim("batch", min=1, max=65_536), samples_of(exported.model, 2)
    shapes = {"waveforms": {0: batch, 1: torch.export.Dim("time", min=shortest, max=2**31 - 1)}}
    inputs = {"waveforms": torch.zeros(3, 10 * shortest)}
    if with_lengths:
        shapes["lengths"] = {0: batch}
        inputs["lengths"] = torch.tensor([10, 8, 6]) * shortest
    layers = len(exported.model.encoder.transformer.layers)
    outputs = ["features", *(["frames"] if with_lengths else [])]
    outputs += [f"hidden_state_{i}" for i in range(layers + 1)]
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it says that torchvision is missing
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.onnx.export(
            exported,
            kwargs=inputs,
            input_names=list(inputs),
            output_names=outputs,
            dynamic_shapes=shapes,
            dynamo=True,
            verbose=False,
        )


def _compute(
    exported: Exported, path: Path, waveforms: Tensor, with_lengths: bool
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Each output of the file at ``path`` by onnxruntime and by PyTorch, from waveforms (batch, time)."""
    count, samples = waveforms.shape
    inputs = {"waveforms": waveforms}
    if with_lengths:
        least = samples_of(exported.model, 1)
        inputs["lengths"] = torch.linspace(samples, (samples + least) // 2, count).long()
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    actual = session.run(names, {name: tensor.numpy() for name, tensor in inputs.items()})
    with torch.inference_mode():
        expected = exported(**inputs)
    return {name: (value, expected[name].numpy()) for name, value in zip(names, actual, strict=True)}


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """The norm of the difference over the norm of what is expected."""
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def _check(exported: Exported, path: Path, out: Path, with_lengths: bool, int8: bool) -> None:
    """Compares PyTorch and onnxruntime at batch sizes and lengths that the export has not seen."""
    generator = torch.Generator().manual_seed(1)
    for count, frames in ((1, 1), (1, 60), (3, 2), (3, 131)):
        samples = samples_of(exported.model, frames) + 7 * (frames - 1)
        waveforms = torch.randn(count, samples, generator=generator) * 0.1
        for name, (actual, expected) in _compute(exported, path, waveforms, with_lengths).items():
            problem = None
            if actual.shape != expected.shape:
                problem = f"has the shape {actual.shape}, not {expected.shape}"
            elif not np.isfinite(actual).all():
                problem = "has numbers that are not finite"
            elif not int8 and (error := np.abs(actual - expected).max() / np.abs(expected).max()) > TOLERANCE:
                problem = f"differs by {error:.1e} from PyTorch's"
            if problem:
                at = f"{name} in onnxruntime at {count} x {samples} samples"
                raise UserError(f"{out}: not written, because {at} {problem}")


def _read_audio(path: str) -> Tensor:
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError) as error:
        raise UserError(f"--audio {path}: soundfile cannot read it; give a WAV or FLAC file") from error
    if rate != 16_000:
        raise UserError(f"--audio {path}: {rate} Hz; the models are for 16,000 Hz, so resample it first")
    return torch.from_numpy(samples[:, 0].copy())


def main() -> None:
    args = parse_args()
    out = Path(args.out)
    inputs = {"ckpt": args.ckpt, "audio": args.audio}
    run_record.refuse_overwriting(out, {name: path for name, path in inputs.items() if path is not None})
    model = load_model(args.ckpt)
    if model.gates():
        raise UserError(f"--ckpt {args.ckpt}: its model still has gates; run prune.py on it first")
    audio = None if args.audio is None else _read_audio(args.audio)
    errors = export(model, out, args.int8, args.all_hidden_states, args.lengths, audio)
    kind = "int8 linear layers" if args.int8 else "float32"
    print(f"{args.ckpt} -> {out}: {out.stat().st_size / 1e6:.1f} MB, {kind}, checked in onnxruntime")
    if args.int8:
        on = args.audio or "3 s of noise"
        print(f"Error against float32 PyTorch, norm of the difference over the norm, on {on}:")
        for name, error in errors.items():
            print(f"  {name:<16} {100 * error:6.2f} %")


if __name__ == "__main__":
    run_script(main)
