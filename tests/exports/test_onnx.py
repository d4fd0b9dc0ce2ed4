"""A model goes into other programs: as an ONNX file, and as a program that torch.export saved."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from tests.helpers.models import pruned, randomly_gated
from utils.checkpoint import save_checkpoint
from utils.cli import run_script
from utils.files import UserError

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

import export_to_onnx  # noqa: E402


def with_absent_branches(family):
    """A pruned model without attention in its first layer (in WavLM's: without heads) and without a
    feed-forward in its second."""
    torch.manual_seed(3)
    model = randomly_gated(family, seed=2, closed=0.4).eval()
    layers = model.encoder.transformer.layers
    for gate in model.gates():
        if gate.n_in == 1:
            gate.log_alpha.data.fill_(4.0)
    layers[0].attention.hard_concrete_for_layer.log_alpha.data.fill_(-9.0)
    layers[1].feed_forward.hard_concrete_for_layer.log_alpha.data.fill_(-9.0)
    model.prune()
    assert layers[1].feed_forward is None
    assert layers[0].attention is None or layers[0].attention.num_heads == 0
    return model


def export(monkeypatch, tmp_path, model, *flags):
    """Runs the script in this process; returns the file's path."""
    save_checkpoint(tmp_path / "model.pth", model)
    out = tmp_path / "out" / "model.onnx"
    arguments = ["--ckpt", tmp_path / "model.pth", "--out", out, *flags]
    monkeypatch.setattr(sys, "argv", ["export_to_onnx.py", *map(str, arguments)])
    run_script(export_to_onnx.main)
    assert [path.name for path in out.parent.iterdir()] == ["model.onnx"]
    return out


def outputs(path, **inputs):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    values = session.run(names, {name: tensor.numpy() for name, tensor in inputs.items()})
    return {name: torch.from_numpy(value) for name, value in zip(names, values, strict=True)}


@pytest.mark.parametrize("family", ["hubert_large", "wavlm_base"])
def test_the_last_layer_at_any_size(family, monkeypatch, tmp_path):
    model = with_absent_branches(family)
    path = export(monkeypatch, tmp_path, model)
    for count, samples in ((1, 4321), (3, 16_003), (2, 400)):
        waveforms = torch.randn(count, samples)
        actual = outputs(path, waveforms=waveforms)
        assert actual.keys() == {"features"}
        with torch.no_grad():
            assert_close(actual["features"], model(waveforms)[0], rtol=1e-4, atol=1e-5)
    nodes = onnx.load(path).graph.node
    assert not any(node.metadata_props for node in nodes), "paths of the machine that exported it"
    assert sum(node.op_type == "ReduceL2" for node in nodes) == 0, "the weight norm is folded"


@pytest.mark.parametrize("family", ["hubert_base", "wavlm_large"])
def test_int8_with_all_hidden_states_of_padded_batches(family, monkeypatch, capsys, tmp_path):
    model = pruned(family)
    path = export(monkeypatch, tmp_path, model, "--all_hidden_states", "--lengths", "--int8")
    printed = {line.split()[0]: float(line.split()[1]) for line in capsys.readouterr().out.splitlines()[2:]}
    names = [f"hidden_state_{i}" for i in range(4)]
    assert list(printed) == ["features", *names]
    assert all(0 < error < 3 for error in printed.values())
    waveforms, lengths = torch.randn(3, 9000), torch.tensor([9000, 7000, 500])
    actual = outputs(path, waveforms=waveforms, lengths=lengths)
    with torch.no_grad():
        states, frames = model.extract_features(waveforms, lengths)
        expected = {"features": model(waveforms, lengths)[0], **dict(zip(names, states, strict=True))}
    assert actual.pop("frames").tolist() == frames.tolist()
    for name, value in expected.items():
        error = (actual[name] - value).norm() / value.norm()
        assert 1e-4 < error < 0.03, f"{name}: {error}"
    products = [node for node in onnx.load(path).graph.node if node.op_type == "MatMulInteger"]
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert len(products) == len(linear)


def fails(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["export_to_onnx.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as error:
        run_script(export_to_onnx.main)
    assert error.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_mistakes_are_one_sentence(monkeypatch, capsys, teacher, tmp_path):
    out = tmp_path / "model.onnx"
    flags = ("--out", out, "--ckpt")
    assert "no/such.pth: no such file" in fails(monkeypatch, capsys, *flags, "no/such.pth")
    save_checkpoint(tmp_path / "gated.pth", randomly_gated("hubert_base", 0))
    assert "still has gates; run prune.py" in fails(monkeypatch, capsys, *flags, tmp_path / "gated.pth")
    (tmp_path / "audio.wav").write_bytes(b"RIFF")
    sentence = fails(monkeypatch, capsys, *flags, teacher, "--int8", "--audio", tmp_path / "audio.wav")
    assert "audio.wav: soundfile cannot read it" in sentence
    assert not out.exists()


def test_a_file_that_computes_something_else_gets_no_name(monkeypatch, tmp_path):
    model = pruned("hubert_base")
    compute = export_to_onnx._compute

    def wrong_at_batches_of_3(exported, path, waveforms, with_lengths):
        pairs = compute(exported, path, waveforms, with_lengths)
        return {
            name: (actual * (1.001 if len(actual) == 3 else 1), expected)
            for name, (actual, expected) in pairs.items()
        }

    monkeypatch.setattr(export_to_onnx, "_compute", wrong_at_batches_of_3)
    out = tmp_path / "model.onnx"
    out.write_bytes(b"an earlier file")
    with pytest.raises(UserError, match=r"features in onnxruntime at 3 x \d+ samples differs by 1\.0e-03"):
        export_to_onnx.export(model, out)
    assert out.read_bytes() == b"an earlier file" and list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("family", ["hubert_base", "wavlm_large"])
def test_torch_export_saves_a_pruned_model_that_loads_without_this_project(family, tmp_path):
    model = with_absent_branches(family)
    sizes = {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("time", min=720, max=1_000_000)}
    program = torch.export.export(
        model.fold_weight_norm(), (torch.zeros(3, 8000),), dynamic_shapes={"waveforms": sizes}
    )
    torch.export.save(program, tmp_path / "model.pt2")
    waveforms = torch.randn(2, 9001)
    np.save(tmp_path / "waveforms.npy", waveforms.numpy())
    load = f"""if True:
        import sys, numpy, torch
        program = torch.export.load({str(tmp_path / "model.pt2")!r}).module()
        with torch.no_grad():
            features = program(torch.from_numpy(numpy.load({str(tmp_path / "waveforms.npy")!r})))[0]
        numpy.save({str(tmp_path / "features.npy")!r}, features.numpy())
        assert not any(name.startswith("wav2vec2") for name in sys.modules)
    """
    subprocess.run([sys.executable, "-c", load], cwd=tmp_path, check=True, timeout=120)
    with torch.no_grad():
        expected, _ = model(waveforms)
    assert_close(torch.from_numpy(np.load(tmp_path / "features.npy")), expected, rtol=1e-4, atol=1e-5)
