"""ONNX files: what onnxruntime computes with them, and what is refused."""

import numpy as np
import onnx
import onnxruntime
import pytest
import soundfile
import torch
from torch.testing import assert_close

from exports import huggingface as exports_huggingface
from exports import onnx as exports_onnx
from tests.helpers.models import pruned, randomly_gated, ungated, with_absent_branches
from tests.helpers.stages import call
from utils.checkpoint import save_checkpoint
from utils.files import UserError

SLOW = pytest.mark.slow


def export(monkeypatch, tmp_path, model, *flags):
    """Runs the command in this process; returns the file's path."""
    save_checkpoint(tmp_path / "model.pth", model)
    out = tmp_path / "out" / "model.onnx"
    call(monkeypatch, "export_to_onnx", "--ckpt", tmp_path / "model.pth", "--out", out, *flags)
    assert [path.name for path in out.parent.iterdir()] == ["model.onnx"]
    return out


def outputs(path, **inputs):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    values = session.run(names, {name: tensor.numpy() for name, tensor in inputs.items()})
    return {name: torch.from_numpy(value) for name, value in zip(names, values, strict=True)}


@pytest.mark.parametrize("family", [pytest.param("hubert_large", marks=SLOW), "wavlm_base"])
@torch.no_grad()
def test_the_last_layer_equals_pytorchs_at_any_size(family, monkeypatch, tmp_path):
    model = with_absent_branches(family)
    path = export(monkeypatch, tmp_path, model)
    for count, samples in ((1, 4321), (3, 16_003), (2, 400)):
        waveforms = torch.randn(count, samples)
        actual = outputs(path, waveforms=waveforms)
        assert actual.keys() == {"features"}
        assert_close(actual["features"], model(waveforms)[0], rtol=1e-4, atol=1e-5)
    graph = onnx.load(path).graph
    assert [axis.dim_param for axis in graph.output[0].type.tensor_type.shape.dim] == ["batch", "frame", ""]
    assert not any(node.metadata_props for node in graph.node), "paths of the machine that exported it"
    assert not any(node.op_type == "ReduceL2" for node in graph.node), "the weight norm is folded"


@SLOW
@pytest.mark.parametrize("opset", [17, 20])
@torch.no_grad()
def test_older_runtimes_get_the_opset_they_read(opset, monkeypatch, tmp_path):
    model = with_absent_branches("wavlm_base")
    path = export(monkeypatch, tmp_path, model, "--opset", opset)
    content = onnx.load(path)
    versions = {each.domain: each.version for each in content.opset_import}
    assert (content.ir_version, versions[""]) == (9, opset)
    gelu = {node.op_type for node in content.graph.node} & {"Gelu", "Erf"}
    assert gelu == ({"Erf"} if opset == 17 else {"Gelu"})
    waveforms = torch.randn(2, 9000)
    assert_close(outputs(path, waveforms=waveforms)["features"], model(waveforms)[0], rtol=1e-4, atol=1e-5)


@SLOW
@pytest.mark.parametrize("family", ["hubert_base", "wavlm_large"])
@torch.no_grad()
def test_int8_is_near_in_every_layer_of_a_padded_batch(family, monkeypatch, capsys, tmp_path):
    model = pruned(family)
    speech = 0.1 * np.random.default_rng(0).standard_normal((16_000, 2))
    soundfile.write(tmp_path / "speech.wav", speech, 16_000)
    flags = ("--all_hidden_states", "--lengths", "--int8", "--audio", tmp_path / "speech.wav")
    path = export(monkeypatch, tmp_path, model, *flags)
    printed = {line.split()[0]: float(line.split()[1]) for line in capsys.readouterr().out.splitlines()[2:]}
    names = [f"hidden_state_{i}" for i in range(4)]
    assert list(printed) == ["features", *names]
    assert all(0 < error < 3 for error in printed.values())
    waveforms, lengths = torch.randn(3, 9000), torch.tensor([9000, 7000, 500])
    actual = outputs(path, waveforms=waveforms, lengths=lengths)
    states, frames = model.extract_features(waveforms, lengths)
    assert actual.pop("frames").tolist() == frames.tolist()
    expected = {"features": model(waveforms, lengths)[0], **dict(zip(names, states, strict=True))}
    errors = {name: (actual[name] - value).norm() / value.norm() for name, value in expected.items()}
    assert all(1e-4 < error < 0.03 for error in errors.values()), errors
    products = [node for node in onnx.load(path).graph.node if node.op_type == "MatMulInteger"]
    assert len(products) == len([m for m in model.modules() if isinstance(m, torch.nn.Linear)])


@SLOW
@torch.no_grad()
def test_half_precision_gives_the_ctc_logits_of_a_folder(monkeypatch, capsys, tmp_path):
    model = ungated("hubert_large", aux_num_out=7).eval()
    exports_huggingface.export(model, tmp_path / "folder", {})
    out = tmp_path / "model.onnx"
    for flag, low, high in (("--half", 1e-5, 0.01), ("--int8", 1e-4, 0.1)):
        call(monkeypatch, "export_to_onnx", "--ckpt", tmp_path / "folder", "--out", out, flag)
        assert "\n  logits " in capsys.readouterr().out
        waveforms = torch.randn(2, 8000)
        actual, expected = outputs(out, waveforms=waveforms), model(waveforms)[0]
        assert actual.keys() == {"logits"} and actual["logits"].dtype == torch.float32
        assert low < (actual["logits"] - expected).norm() / expected.norm() < high
        whole = [t for t in onnx.load(out).graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
        assert any(len(tensor.dims) > 1 for tensor in whole) == (flag == "--int8")


@SLOW
@torch.no_grad()
def test_features_of_a_padded_file_are_those_of_one_alone(monkeypatch, tmp_path):
    path = export(monkeypatch, tmp_path, pruned("hubert_base"), "--lengths", "--masked_group_norm")
    waveforms, lengths = torch.randn(2, 9000), torch.tensor([9000, 5000])
    together = outputs(path, waveforms=waveforms, lengths=lengths)["features"]
    alone = outputs(path, waveforms=waveforms[1:, :5000], lengths=lengths[1:])["features"]
    assert_close(together[1:, : alone.size(1)], alone, rtol=1e-5, atol=1e-5)


def test_mistakes_are_one_sentence_and_nothing_is_written(fails, teacher, tmp_path):
    save_checkpoint(tmp_path / "gated.pth", randomly_gated("hubert_base", 0))
    (tmp_path / "text.wav").write_bytes(b"RIFF")
    soundfile.write(tmp_path / "8k.wav", np.zeros(100), 8_000)
    for flags, words in (
        (("--ckpt", tmp_path / "gated.pth"), "gated.pth: its model still has gates; run prune.py"),
        (("--ckpt", teacher, "--int8", "--audio", tmp_path / "text.wav"), "text.wav: "),
        (("--ckpt", teacher, "--int8", "--audio", tmp_path / "8k.wav"), "shorter than 25 ms"),
        (("--ckpt", teacher, "--audio", tmp_path / "8k.wav"), "--audio is for measuring the error"),
        (("--ckpt", teacher, "--masked_group_norm"), "which --lengths tells: give both"),
        (("--ckpt", tmp_path), "is a folder; give the file in it"),
    ):
        assert words in fails("export_to_onnx", "--out", tmp_path / "new", *flags)
    assert not (tmp_path / "new").exists() and not list(tmp_path.glob(".*"))


@SLOW
def test_a_file_that_computes_something_else_gets_no_name(tmp_path):
    model = pruned("hubert_base")
    model.encoder.transformer.layers[-1].register_forward_hook(
        lambda *call: call[-1] if torch.compiler.is_compiling() else 1.001 * call[-1]
    )
    out = tmp_path / "model.onnx"
    out.write_bytes(b"an earlier file")
    with pytest.raises(UserError, match=r"features of 1 x 400 samples in onnxruntime differ by 1\.0e-03"):
        exports_onnx.export(model, out)
    assert out.read_bytes() == b"an earlier file" and list(tmp_path.iterdir()) == [out]
