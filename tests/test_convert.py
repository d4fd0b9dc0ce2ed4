"""Converters: against transformers, torchaudio and recordings of fairseq and unilm; and what they refuse."""

import argparse
import json
import os
import pickle
import runpy
import shutil
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pytest
import torch
import transformers
from torch.testing import assert_close

from wav2vec2 import hubert_base, wav2vec2_model, wavlm_base
from wav2vec2.utils import import_fairseq, import_huggingface, safe_pickle
from wav2vec2.utils.files import UserError

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"
transformers.utils.logging.disable_progress_bar()

CLASSES = {"hubert": "Hubert", "wav2vec2": "Wav2Vec2", "wavlm": "WavLM"}
FAMILIES = list(CLASSES)
pytestmark = pytest.mark.filterwarnings(
    "ignore:Support for mismatched key_padding_mask"
)  # transformers' WavLM
BASE = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "conv_dim": [16] * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "vocab_size": 12,
    "num_codevectors_per_group": 8,
    "codevector_dim": 16,
    "proj_codevector_dim": 16,
}
LARGE = BASE | {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}


def hf_config(family, norm="base", **changes):
    options = (LARGE if norm == "large" else BASE) | changes
    if family == "wavlm":
        options = {"num_buckets": 32, "max_bucket_distance": 80} | options
    return getattr(transformers, f"{CLASSES[family]}Config")(**options)


def hf_model(family, norm="base", head="Model", **changes):
    """A tiny model with random weights, norms and biases too."""
    torch.manual_seed(0)
    model = getattr(transformers, CLASSES[family] + head)(hf_config(family, norm, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a script in this process with the flags given; returns its exit status and what it printed."""

    def run(script, *flags):
        monkeypatch.setattr(sys, "argv", [script, *map(str, flags)])
        status = 0
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as exit:
            status = exit.code
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


@pytest.fixture
def converted(run, tmp_path):
    """Runs a converter that must succeed; returns the file that it wrote."""

    def converted(script, source):
        out = tmp_path / "new" / "folder" / "out.pth"
        status, said, errors = run(
            script, "--model" if "from_hf" in script else "--ckpt", source, "--out", out
        )
        assert (status, errors) == (0, "") and said.count("\n") == 1
        return out

    return converted


@pytest.fixture
def refused(run, tmp_path):
    """Runs a converter that must refuse, in one sentence and with no file; returns the sentence."""

    def refused(script, source):
        out = tmp_path / "new" / "folder" / "out.pth"
        status, said, errors = run(
            script, "--model" if "from_hf" in script else "--ckpt", source, "--out", out
        )
        assert (status, said) == (2, "") and not (tmp_path / "new").exists()
        assert errors.startswith(f"{script}: error: ") and errors.count("\n") == 1 and 50 < len(errors) < 900
        return errors

    return refused


def load(path):
    """README's snippet."""
    ckpt = torch.load(path, weights_only=True)
    model = wav2vec2_model(**ckpt["config"])
    model.load_state_dict(ckpt["state_dict"], strict=False)
    return model.eval()


def speech(batch=2, time=12_000):
    return torch.randn(batch, time, generator=torch.Generator().manual_seed(1)) * 0.1


def relative(actual, expected):
    return ((actual - expected).abs().max() / expected.abs().max()).item()


# --- From Hugging Face


@pytest.mark.parametrize("head", ["Model", "ForCTC"])
@pytest.mark.parametrize("norm", ["base", "large"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_converted_file_computes_what_transformers_computes(family, norm, head, converted, tmp_path):
    original = hf_model(family, norm, head)
    original.save_pretrained(tmp_path / "model")
    model = load(converted(f"convert_{family}_from_hf.py", tmp_path / "model"))
    assert model.normalize_waveform == (norm == "large")
    assert model.aux is None
    waveforms = speech()
    lengths = torch.tensor([12_000, 9_000])
    mask = (torch.arange(12_000) < lengths[:, None]).long()
    for given in (None, lengths):
        heard = waveforms
        if norm == "large":
            parts = [w[: 12_000 if given is None else n] for w, n in zip(waveforms, lengths, strict=True)]
            heard = torch.zeros(2, 12_000)
            for row, part in zip(heard, parts, strict=True):
                row[: len(part)] = (part - part.mean()) / torch.sqrt(part.var(unbiased=False) + 1e-5)
        with torch.no_grad():
            expected = original.base_model(
                heard, attention_mask=None if given is None else mask, output_hidden_states=True
            )
            states, frames = model.extract_features(waveforms, given)
            output, _ = model(waveforms, given)
        valid = [states[0].size(1)] * 2 if frames is None else frames.tolist()
        for i, n in enumerate(valid):
            assert relative(output[i, :n], expected.last_hidden_state[i, :n]) < 1e-4
            for ours, theirs in zip(states[1:-1], expected.hidden_states[1:-1], strict=True):
                assert relative(ours[i, :n], theirs[i, :n]) < 1e-4


@pytest.mark.parametrize("norm", ["base", "large"])
@pytest.mark.parametrize("family", FAMILIES)
def test_torchaudios_importer_agrees(family, norm):
    utils = pytest.importorskip("torchaudio.models.wav2vec2.utils", exc_type=(ImportError, OSError))
    original = hf_model(family, norm)
    second = utils.import_huggingface_model(original).eval()
    model = import_huggingface.import_huggingface_model(original, normalize_waveform=norm == "large")
    waveforms, lengths = speech(), torch.tensor([12_000, 9_000])
    heard = torch.nn.functional.layer_norm(waveforms, waveforms.shape[-1:]) if norm == "large" else waveforms
    with torch.no_grad():
        for ours, theirs in zip(
            model.extract_features(waveforms)[0][1:], second.extract_features(heard)[0], strict=True
        ):
            assert relative(ours, theirs) < 1e-4
        if family != "wavlm":  # torchaudio's WavLM takes no lengths
            states, frames = model.extract_features(waveforms, lengths)
            heard = import_huggingface.normalize(waveforms, lengths) if norm == "large" else waveforms
            theirs, their_frames = second.extract_features(heard, lengths)
            assert frames.tolist() == their_frames.tolist()
            for a, b in zip(states[1:], theirs, strict=True):
                assert relative(a[1, : frames[1]], b[1, : frames[1]]) < 1e-4
    ours = sum(parameter.numel() for parameter in model.parameters())
    assert ours == sum(parameter.numel() for parameter in second.parameters()) + 16


@pytest.mark.parametrize("family", FAMILIES)
def test_the_config_is_read_from_the_checkpoint(family):
    config = hf_config(
        family,
        hidden_dropout=0.11,
        activation_dropout=0.12,
        attention_dropout=0.13,
        feat_proj_dropout=0.14,
        layerdrop=0.15,
        conv_dim=[16, 16, 24],
        conv_kernel=[10, 3, 2],
        conv_stride=[5, 2, 4],
        conv_bias=True,
    )
    ours = import_huggingface.read_options(config, "tiny", False)
    assert ours["encoder_dropout"] == 0.11
    assert ours["encoder_ff_interm_dropout"] == 0.12
    assert ours["encoder_attention_dropout"] == 0.13
    assert ours["encoder_projection_dropout"] == 0.14
    assert ours["encoder_layer_drop"] == 0.15
    assert ours["extractor_conv_layer_config"] == [(16, 10, 5), (16, 3, 2), (24, 2, 4)]
    assert ours["extractor_conv_bias"] is True
    assert ours["encoder_pos_conv_kernel"] == 16 and ours["encoder_pos_conv_groups"] == 4
    if family == "wavlm":
        assert ours["encoder_num_buckets"] == 32 and ours["encoder_max_distance"] == 80
        assert ours["encoder_remaining_heads"] == [[0, 1, 2, 3]] * 3


XLARGE = {
    "hidden_size": 1280,
    "num_hidden_layers": 48,
    "num_attention_heads": 16,
    "intermediate_size": 5120,
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
    "conv_bias": True,
}


@pytest.mark.parametrize(
    ("family", "options", "parameters"),
    [
        ("hubert", {}, 94_371_456),
        ("wavlm", {}, 94_381_680),
        ("hubert", XLARGE, None),
        ("wav2vec2", XLARGE, None),
    ],
)
def test_published_architectures_have_their_size_and_every_tensor_its_place(family, options, parameters):
    config = getattr(transformers, f"{CLASSES[family]}Config")(**options)
    with torch.device("meta"):
        original = getattr(transformers, f"{CLASSES[family]}Model")(config)
        ours = wav2vec2_model(**import_huggingface.read_options(config, "real size", False))
    named = import_huggingface.rename(original.state_dict(), import_huggingface.TENSORS, "real size")
    named = {k.replace("parametrizations.weight.original0", "weight_g"): v for k, v in named.items()}
    named = {k.replace("parametrizations.weight.original1", "weight_v"): v for k, v in named.items()}
    shapes = {name: tensor.shape for name, tensor in named.items()}
    assert shapes == {
        name: tensor.shape for name, tensor in ours.state_dict().items() if not name.endswith("dummy_weight")
    }
    theirs = sum(parameter.numel() for parameter in original.parameters())
    assert ours.get_num_params() == theirs - config.hidden_size + 512
    assert parameters in (None, ours.get_num_params())


def test_the_factories_are_the_architectures_that_transformers_configs_name():
    with torch.device("meta"):
        for factory, config in (
            (hubert_base, transformers.HubertConfig()),
            (wavlm_base, transformers.WavLMConfig()),
        ):
            model = wav2vec2_model(**import_huggingface.read_options(config, "defaults", False))
            shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
            assert shapes == {name: tensor.shape for name, tensor in factory().state_dict().items()}


@pytest.mark.parametrize(
    ("norm", "given"), [("base", True), ("base", None), ("large", False), ("large", None)]
)
def test_normalised_input_follows_the_feature_extractor_or_else_the_architecture(
    norm, given, converted, tmp_path
):
    hf_model("hubert", norm).save_pretrained(tmp_path / "model")
    if given is not None:
        extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=given)
        extractor.save_pretrained(tmp_path / "model")
    model = load(converted("convert_hubert_from_hf.py", tmp_path / "model"))
    assert model.normalize_waveform is ((norm == "large") if given is None else given)


def test_our_normalised_input_is_the_feature_extractors():
    extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)
    waveforms, lengths = speech() + 0.03, torch.tensor([12_000, 9_000])
    parts = [waveform[:n].numpy() for waveform, n in zip(waveforms, lengths, strict=True)]
    expected = extractor(parts, sampling_rate=16_000, padding=True, return_tensors="pt").input_values
    assert_close(import_huggingface.normalize(waveforms, lengths), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("spelling", ["old names, .bin", "half precision"])
def test_other_files_of_the_same_model_convert(spelling, converted, tmp_path):
    original, folder = hf_model("hubert", head="ForCTC"), tmp_path / "model"
    if spelling == "half precision":
        original.half().save_pretrained(folder)
    else:
        original.config.save_pretrained(folder)
        state_dict = {
            name.replace("parametrizations.weight.original0", "weight_g").replace(
                "parametrizations.weight.original1", "weight_v"
            ): tensor
            for name, tensor in original.state_dict().items()
        }
        torch.save(state_dict, folder / "pytorch_model.bin")
    out = converted("convert_hubert_from_hf.py", folder)
    state_dict = torch.load(out, weights_only=True)["state_dict"]
    assert {tensor.dtype for tensor in state_dict.values()} == {torch.float32}
    v = original.hubert.encoder.pos_conv_embed.conv.parametrizations.weight.original1
    assert torch.equal(state_dict["encoder.transformer.pos_conv_embed.conv.weight_v"], v.float())


@pytest.mark.parametrize(
    ("family", "name", "value"),
    [
        ("hubert", "hidden_act", "relu"),
        ("wavlm", "hidden_act", "gelu_new"),
        ("wav2vec2", "feat_extract_activation", "relu"),
        ("hubert", "layer_norm_eps", 1e-12),
        ("hubert", "conv_pos_batch_norm", True),
        ("hubert", "feat_proj_layer_norm", False),
        ("hubert", "adapter_attn_dim", 16),
        ("wav2vec2", "adapter_attn_dim", 16),
        ("wav2vec2", "add_adapter", True),
        ("wavlm", "add_adapter", True),
    ],
)
def test_an_option_that_cannot_be_computed_is_refused_by_name(family, name, value):
    config = hf_config(family, **{name: value})
    with pytest.raises(UserError, match=f"^tiny: {name} is {value!r}, which the model here cannot compute"):
        import_huggingface.read_options(config, "tiny", False)


@pytest.mark.parametrize(
    ("family", "name", "value"),
    [
        ("hubert", "hidden_act", "gelu_python"),
        ("hubert", "add_adapter", True),
        ("wavlm", "output_hidden_size", 99),
    ],
)
def test_an_option_that_changes_no_computation_is_not_refused(family, name, value):
    assert import_huggingface.read_options(hf_config(family, **{name: value}), "tiny", False)


@pytest.mark.parametrize(
    ("family", "other"), [("hubert", "wavlm"), ("wavlm", "wav2vec2"), ("wav2vec2", "hubert")]
)
def test_another_familys_model_is_refused_with_the_script_that_takes_it(family, other, refused, tmp_path):
    hf_config(other).save_pretrained(tmp_path)
    sentence = refused(f"convert_{family}_from_hf.py", tmp_path)
    assert f"convert_{other}_from_hf.py" in sentence


def whisper(folder):
    config = transformers.WhisperConfig(
        vocab_size=20, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, pad_token_id=1, bos_token_id=2,
        eos_token_id=3, decoder_start_token_id=4, suppress_tokens=[], begin_suppress_tokens=[],
    )  # fmt: skip
    transformers.WhisperModel(config).save_pretrained(folder)


def change_width(folder):
    hf_model("hubert").save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))


def change_depth(folder):
    hf_model("hubert").save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))


def fewer_layers(folder):
    hf_model("hubert").save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))


def indivisible_heads(folder):
    hf_model("hubert").save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_attention_heads": 5}))


def truncate(folder):
    hf_model("hubert").save_pretrained(folder)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])


def truncate_bin(folder):
    original = hf_model("hubert")
    original.config.save_pretrained(folder)
    torch.save(original.state_dict(), folder / "pytorch_model.bin")
    weights = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(weights[: len(weights) // 2])


def text(folder):
    folder.write_text("nothing to see here\n")


def broken_config(folder):
    hf_model("hubert").save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "hubert", ')


def broken_preprocessor(folder):
    hf_model("hubert").save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text("{")


def no_weights(folder):
    hf_config("hubert").save_pretrained(folder)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (whisper, "'whisper'"),
        (change_width, "intermediate_dense.bias is (64,), by the config it should be (48,)"),
        (change_depth, "lacks the tensor encoder.layers.3."),
        (fewer_layers, "has the unexpected tensor encoder.layers.2."),
        (indivisible_heads, "hidden_size 32 is no multiple of num_attention_heads 5"),
        (truncate, "transformers cannot read it"),
        (truncate_bin, "transformers cannot read it"),
        (text, "transformers cannot read it"),
        (broken_config, "transformers cannot read it"),
        (broken_preprocessor, "preprocessor_config.json: not a JSON file"),
        (no_weights, "transformers cannot read it"),
    ],
)
def test_a_model_that_is_not_whole_gives_one_sentence_and_no_file(make, word, refused, tmp_path):
    make(tmp_path / "model")
    sentence = refused("convert_hubert_from_hf.py", tmp_path / "model")
    assert word in sentence and str(tmp_path / "model") in sentence


def test_the_comparison_sees_one_changed_weight():
    original = hf_model("wavlm")
    model = import_huggingface.import_huggingface_model(original, False)
    assert import_huggingface.largest_difference(model, original) < 1e-5
    bias = model.encoder.transformer.layers[2].final_layer_norm.bias
    bias.data = bias.data + 0.01 * torch.eye(1, 32)[0]
    assert import_huggingface.largest_difference(model, original) > 1e-4
    bias.data = bias.data * float("nan")
    assert import_huggingface.largest_difference(model, original) == float("inf")


def test_a_model_that_differs_from_its_source_is_not_written(refused, tmp_path, monkeypatch):
    hf_model("hubert").save_pretrained(tmp_path / "model")
    swapped = {
        r"encoder\.layers\.0\.(.*)": r"encoder.transformer.layers.1.\1",
        r"encoder\.layers\.1\.(.*)": r"encoder.transformer.layers.0.\1",
    }
    monkeypatch.setattr(import_huggingface, "TENSORS", swapped | import_huggingface.TENSORS)
    sentence = refused("convert_hubert_from_hf.py", tmp_path / "model")
    assert "differs from transformers'" in sentence


def test_the_converted_model_shares_the_memory_of_its_source():
    original = hf_model("hubert")
    model = import_huggingface.import_huggingface_model(original, False)
    theirs = {parameter.data_ptr() for parameter in original.parameters()}
    own = [name for name, p in model.named_parameters() if p.data_ptr() not in theirs]
    assert own == ["feature_extractor.dummy_weight"]


def test_an_existing_output_stays_until_a_whole_one_replaces_it(run, tmp_path):
    change_width(tmp_path / "wrong")
    hf_model("hubert").save_pretrained(tmp_path / "right")
    out = tmp_path / "out.pth"
    out.write_bytes(b"old")
    assert run("convert_hubert_from_hf.py", "--model", tmp_path / "wrong", "--out", out)[0] == 2
    assert out.read_bytes() == b"old"
    assert run("convert_hubert_from_hf.py", "--model", tmp_path / "right", "--out", out)[0] == 0
    assert load(out).get_num_params() > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.pth", "right", "wrong"]


def test_a_transformers_that_torchaudio_breaks_is_one_sentence(refused, tmp_path, monkeypatch):
    class Broken(types.ModuleType):
        def __getattr__(self, name):
            raise RuntimeError(
                "Detected that PyTorch and TorchAudio were compiled with different CUDA versions."
            )

    monkeypatch.setitem(sys.modules, "transformers", Broken("transformers"))
    sentence = refused("convert_hubert_from_hf.py", tmp_path)
    assert "different CUDA versions" in sentence and "or uninstall it" in sentence


# --- From fairseq and Microsoft's release

RECORDED = {
    "fairseq_hubert_base": "convert_hubert_from_fairseq.py",
    "fairseq_hubert_large": "convert_hubert_from_fairseq.py",
    "fairseq_wav2vec2_base": "convert_wav2vec2_from_fairseq.py",
    "fairseq_wav2vec2_base_namespace": "convert_wav2vec2_from_fairseq.py",
    "fairseq_wav2vec2_large": "convert_wav2vec2_from_fairseq.py",
    "unilm_wavlm_base": "convert_wavlm_from_unilm.py",
    "unilm_wavlm_large": "convert_wavlm_from_unilm.py",
}


def source(name):
    """The content of a recorded checkpoint, to change and save again."""
    return safe_pickle.read(GOLDEN / f"{name}.pt")


def saved(path, name, change=lambda content: None, **how):
    content = source(name)
    content.pop("task_state", None)
    if isinstance(content.get("args"), safe_pickle.StandIn):
        content["args"] = argparse.Namespace(**import_fairseq.plain(content["args"]))
    change(content)
    torch.save(content, path, **how)
    return path


def assert_layers_equal(path, name):
    expected = torch.load(GOLDEN / f"{name}.expected.pt", weights_only=True)
    model = load(path)
    with torch.no_grad():
        states, _ = model.extract_features(expected["waveforms"])
    outputs = list(expected["layer_outputs"])
    assert len(outputs) == (4 if name.startswith("unilm") else 3)
    for ours, theirs in zip(states[1:], outputs[-3:], strict=True):
        assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", RECORDED)
def test_every_layer_equals_the_recording_of_fairseq_and_unilm(name, converted, tmp_path):
    out = converted(RECORDED[name], GOLDEN / f"{name}.pt")
    assert_layers_equal(out, name)
    assert load(out).normalize_waveform is name.endswith("large")


@pytest.mark.parametrize(
    "name", ["fairseq_hubert_base", "fairseq_wav2vec2_base_namespace", "unilm_wavlm_large"]
)
def test_files_from_before_torch_1_6_are_read(name, converted, tmp_path):
    path = saved(tmp_path / "old.pt", name, _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(path)
    assert_layers_equal(converted(RECORDED[name], path), name)


def fine_tune(content):
    weights = {f"w2v_encoder.w2v_model.{key}": value for key, value in content["model"].items()}
    content["model"] = weights | {
        "w2v_encoder.proj.weight": torch.zeros(5, 32),
        "w2v_encoder.proj.bias": torch.zeros(5),
    }
    if content.get("args") is not None:
        content["args"] = argparse.Namespace(arch="wav2vec_ctc", normalize=False, w2v_args=content["args"])
    else:
        inner = {"model": content["cfg"]["model"], "task": content["cfg"]["task"]}
        name = "hubert_ctc" if inner["model"]["_name"] == "hubert" else "wav2vec_ctc"
        content["cfg"] = {
            "model": {"_name": name, "w2v_args": inner},
            "task": {"normalize": inner["task"]["normalize"]},
        }


@pytest.mark.parametrize(
    "name", ["fairseq_hubert_large", "fairseq_wav2vec2_base", "fairseq_wav2vec2_base_namespace"]
)
def test_the_encoder_of_a_fine_tuned_file_is_converted(name, converted, tmp_path):
    path = saved(tmp_path / "tuned.pt", name, fine_tune)
    assert_layers_equal(converted(RECORDED[name], path), name)


def test_configs_of_omegaconf_are_read_without_it(converted, tmp_path, monkeypatch):
    module = types.ModuleType("omegaconf.dictconfig")
    node = type("AnyNode", (), {"__module__": "omegaconf.dictconfig"})
    config = type("DictConfig", (), {"__module__": "omegaconf.dictconfig"})
    module.AnyNode, module.DictConfig = node, config
    monkeypatch.setitem(sys.modules, "omegaconf", types.ModuleType("omegaconf"))
    monkeypatch.setitem(sys.modules, "omegaconf.dictconfig", module)

    def wrap(value):
        wrapped = config() if isinstance(value, dict) else node()
        if isinstance(value, dict):
            wrapped._metadata, wrapped._content = None, {key: wrap(item) for key, item in value.items()}
        else:
            wrapped._val = value
        return wrapped

    path = saved(tmp_path / "wrapped.pt", "fairseq_hubert_large", lambda c: c.update(cfg=wrap(c["cfg"])))
    monkeypatch.delitem(sys.modules, "omegaconf.dictconfig")
    assert_layers_equal(converted(RECORDED["fairseq_hubert_large"], path), "fairseq_hubert_large")


def test_half_precision_weights_become_float32(converted, tmp_path):
    def halve(content):
        content["model"] = {key: value.half() for key, value in content["model"].items()}

    path = saved(tmp_path / "half.pt", "fairseq_hubert_base", halve)
    out = converted("convert_hubert_from_fairseq.py", path)
    state_dict = torch.load(out, weights_only=True)["state_dict"]
    assert {tensor.dtype for tensor in state_dict.values()} == {torch.float32}
    assert torch.equal(
        state_dict["encoder.transformer.layer_norm.weight"],
        source("fairseq_hubert_base")["model"]["encoder.layer_norm.weight"].half().float(),
    )


def set_option(**options):
    return lambda content: (content["cfg"].get("model") or content["cfg"]).update(options)


def set_tensor(**tensors):
    return lambda content: content["model"].update(tensors)


def drop_tensor(name):
    return lambda content: content["model"].pop(name)


ATTACK = "__import__('os').system('touch ran')"


@pytest.mark.parametrize(
    ("name", "change", "word"),
    [
        ("fairseq_hubert_base", set_tensor(extra=torch.zeros(1)), "no place for its tensor extra"),
        ("fairseq_hubert_base", drop_tensor("encoder.layers.1.fc1.bias"), "feed_forward.intermediate_dense"),
        ("fairseq_hubert_base", drop_tensor("post_extract_proj.weight"), "post_extract_proj"),
        ("fairseq_hubert_base", set_option(encoder_ffn_embed_dim=48), "by the config it should be (48,)"),
        ("fairseq_hubert_base", set_option(encoder_attention_heads=5), "encoder_embed_dim 32 is no multiple"),
        ("fairseq_hubert_base", set_option(encoder_layers=None), "encoder_layers of its config is missing"),
        ("fairseq_hubert_base", set_option(encoder_layers="3"), "encoder_layers of its config is '3'"),
        ("fairseq_hubert_base", set_option(dropout=7.0), "dropout of its config is 7.0"),
        ("fairseq_wav2vec2_base", set_option(layer_type="conformer"), "layer_type is 'conformer'"),
        ("fairseq_wav2vec2_base", set_option(activation_fn="relu"), "activation_fn is 'relu'"),
        ("fairseq_wav2vec2_base", set_option(quantize_input=True), "quantize_input is True"),
        ("fairseq_wav2vec2_base", set_option(pos_conv_depth=5), "pos_conv_depth is 5"),
        ("fairseq_hubert_base", set_option(conv_pos_batch_norm=True), "conv_pos_batch_norm is True"),
        ("fairseq_hubert_base", set_option(extractor_mode="other"), "extractor_mode is 'other'"),
        ("fairseq_hubert_base", set_option(_name="data2vec_audio"), "the architecture 'data2vec_audio'"),
        ("fairseq_hubert_base", set_option(_name="wav2vec2"), "convert_wav2vec2_from_fairseq.py"),
        ("fairseq_wav2vec2_base", set_option(_name="hubert"), "convert_hubert_from_fairseq.py"),
        ("unilm_wavlm_base", set_option(gru_rel_pos=False), "gru_rel_pos is False"),
        ("unilm_wavlm_base", set_option(relative_position_embedding=False), "position_embedding is False"),
        ("unilm_wavlm_base", drop_tensor("encoder.layers.0.self_attn.grep_a"), "gru_rel_pos_const"),
        ("fairseq_hubert_base", lambda content: content.update(cfg=None), 'no options under "cfg" or "args"'),
        ("fairseq_hubert_base", lambda content: content.update(model=[1]), "no weights under"),
        ("fairseq_hubert_base", set_option(conv_feature_layers=ATTACK), "conv_feature_layers is"),
        ("fairseq_hubert_base", set_option(conv_feature_layers="[(1,1,1)] * 999999999"), "feature_layers"),
        ("fairseq_hubert_base", set_option(conv_feature_layers="[(512,10)]"), "conv_feature_layers"),
    ],
)  # fmt: skip
def test_what_cannot_be_converted_is_refused_by_name(name, change, word, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = saved(tmp_path / "file.pt", name, change)
    sentence = refused(RECORDED[name], path)
    assert word in sentence and str(path) in sentence
    assert not (tmp_path / "ran").exists()


def test_a_wavlm_is_sent_to_its_own_script(refused, tmp_path):
    sentence = refused("convert_hubert_from_fairseq.py", GOLDEN / "unilm_wavlm_base.pt")
    assert "convert_wavlm_from_unilm.py" in sentence


def test_conv_layers_are_parsed_and_never_evaluated():
    parse = import_fairseq.parse_conv_layers
    base = [(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512, 2, 2)] * 2
    assert parse("[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2", "x") == base
    assert parse(" [(512, 10, 5)] + 4 * [(512, 3, 2)] + [(512,2,2)] + [(512,2,2)]", "x") == base
    assert parse([[16, 10, 5], (16, 3, 2)], "x") == [(16, 10, 5), (16, 3, 2)]
    for bad in (
        "",
        "[]",
        "[(1,2,-3)]",
        "[(1,2,True)]",
        "print(1)",
        "[x for x in ()]",
        "2 + 2",
        None,
        7,
        "(" * 5000,
    ):
        with pytest.raises(UserError, match="conv_feature_layers"):
            parse(bad, "x")


def damaged(kind, folder):
    path = folder / "file.pt"
    whole = (GOLDEN / "fairseq_hubert_base.pt").read_bytes()
    if kind == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "truncated legacy":
        saved(path, "fairseq_hubert_base", _use_new_zipfile_serialization=False)
        path.write_bytes(path.read_bytes()[:-1000])
    elif kind == "text":
        path.write_text("nothing to see here\n")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "zip of something else":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("hello/world", "!")
    elif kind == "plain pickle":
        path.write_bytes(pickle.dumps({"model": {}}))
    elif kind == "whisper":
        torch.save(
            {"dims": {"n_mels": 80}, "model_state_dict": {"encoder.conv1.weight": torch.zeros(2, 2, 3)}}, path
        )
    elif kind == "torchscript":
        torch.jit.script(torch.nn.Linear(2, 2)).save(path)
    elif kind == "folder":
        path.mkdir()
    return path


@pytest.mark.parametrize(
    "kind",
    [
        "truncated", "truncated legacy", "text", "empty", "zip of something else", "plain pickle", "whisper",
        "torchscript", "folder", "missing",
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_file_that_is_no_checkpoint_gives_one_sentence_and_no_file(kind, refused, tmp_path):
    path = damaged(kind, tmp_path)
    for script in ("convert_hubert_from_fairseq.py", "convert_wavlm_from_unilm.py"):
        assert str(path) in refused(script, path)


# --- Malicious files


class Call:
    """Pickles as a call of ``function``."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


EVIL = {
    "os.system": lambda mark: Call(os.system, f"touch {mark}"),
    "subprocess.Popen": lambda mark: Call(subprocess.Popen, ["touch", str(mark)]),
    "builtins.eval": lambda mark: Call(eval, f"open({str(mark)!r}, 'w')"),
    "builtins.exec": lambda mark: Call(exec, f"open({str(mark)!r}, 'w')"),
    "builtins.getattr": lambda mark: Call(getattr, mark, "touch"),
    "builtins.open": lambda mark: Call(open, str(mark), "w"),
    "shutil.copy": lambda mark: Call(shutil.copy, __file__, str(mark)),
    "runpy.run_path": lambda mark: Call(runpy.run_path, str(mark)),
    "torch.load": lambda mark: Call(torch.load, str(mark)),
    "torch.hub.load": lambda mark: Call(torch.hub.load, str(mark), "entry"),
    "torch.storage._load_from_bytes": lambda mark: Call(torch.storage._load_from_bytes, b""),
    "torch.save": lambda mark: Call(torch.save, 1, str(mark)),
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["cfg", "model", "top"])
@pytest.mark.parametrize("name", EVIL)
def test_a_malicious_pickle_is_refused_and_runs_nothing(name, place, zipped, refused, tmp_path):
    mark, path = tmp_path / "ran", tmp_path / "evil.pt"
    call = EVIL[name](mark)

    def plant(content):
        where = {"cfg": content["cfg"]["model"], "model": content["model"], "top": content}[place]
        where["encoder_layers"] = [{"deep": (call,)}]

    saved(path, "fairseq_hubert_base", plant, _use_new_zipfile_serialization=zipped)
    sentence = refused("convert_hubert_from_fairseq.py", path)
    assert "refused, because it asks for" in sentence and name.split(".")[-1] in sentence
    assert not mark.exists()


def zipped_pickle(path, data):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("evil/data.pkl", data)
        archive.writestr("evil/version", "3\n")
    return path


def stack_global(module, name):
    return b"\x80\x04" + b"".join(b"\x8c" + bytes([len(s)]) + s.encode() for s in (module, name)) + b"\x93"


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("posix", "system"),
        ("commands", "getoutput"),
        ("types", "FunctionType"),
        ("__builtin__", "eval"),
        ("builtins", "print.__self__.eval"),
        ("collections", "OrderedDict.__init__.__globals__"),
        ("collections", "_sys.modules"),
        ("torch", "os.system"),
        ("torch._utils", "_rebuild_tensor_v2.__globals__"),
        ("torch.nn.modules.module", "Module"),
        ("numpy", "load"),
        ("numpy.core.multiarray", "fromfile"),
        ("functools", "partial"),
        ("operator", "attrgetter"),
        ("copyreg", "_reconstructor.__globals__"),
        ("_codecs", "lookup"),
        ("argparse", "FileType"),
        ("pathlib", "os.system"),
    ],
)
def test_names_that_reach_into_modules_are_refused(module, name, tmp_path):
    path = zipped_pickle(tmp_path / "evil.pt", stack_global(module, name) + b"\x8c\x01x\x85R.")
    with pytest.raises(UserError, match="refused, because it asks for"):
        safe_pickle.read(path)


@pytest.mark.parametrize(
    ("module", "name"), [("fairseq.tasks", "os.system"), ("__main__", "Task"), ("evil.package", "run")]
)
def test_names_of_other_packages_are_inert(module, name, tmp_path):
    mark = tmp_path / "ran"
    touch = f"touch {mark}".encode()
    data = stack_global(module, name) + b"\x8c" + bytes([len(touch)]) + touch + b"\x85R}\x8c\x01a\x8c\x01bsb."
    made = safe_pickle.read(zipped_pickle(tmp_path / "file.pt", data))
    assert isinstance(made, safe_pickle.StandIn)
    assert made.arguments == (f"touch {mark}",) and made.a == "b"
    assert repr(made) == f"<stand-in for {module}.{name}>"
    assert not mark.exists()


def test_what_a_pickle_does_to_the_functions_that_it_is_given_does_not_outlive_it(tmp_path):
    attack = b"\x80\x02ctorch._utils\n_rebuild_parameter\nN}X\x0c\x00\x00\x00__defaults__Ns\x86b."
    safe_pickle.read(zipped_pickle(tmp_path / "file.pt", attack))
    for target in (b"ccollections\nOrderedDict\n", b"cbuiltins\ndict\n"):
        with pytest.raises(UserError, match="damaged"):
            change = b"\x80\x02" + target + b"N}X\x06\x00\x00\x00updateNs\x86b."
            safe_pickle.read(zipped_pickle(tmp_path / "file.pt", change))
    assert source("fairseq_hubert_base")["model"]


@pytest.mark.parametrize(
    ("offset", "shape", "stride"),
    [(0, (5,), (1,)), (3, (2,), (1,)), (0, (2, 2), (3, 1)), (-1, (1,), (1,)), (0, (2,), (-1,))],
)
def test_a_tensor_cannot_reach_beyond_its_storage(offset, shape, stride, tmp_path):
    path = tmp_path / "file.pt"
    real = torch._utils._rebuild_tensor_v2

    class Tensor:
        def __init__(self, storage):
            self.storage = storage

        def __reduce__(self):
            return real, (self.storage, offset, shape, stride, False, {})

    four = torch.storage.TypedStorage(
        wrap_storage=torch.arange(4.0).untyped_storage(), dtype=torch.float32, _internal=True
    )
    torch.save({"t": Tensor(four)}, path)
    with pytest.raises(UserError, match="tensor"):
        safe_pickle.read(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_of_all_kinds_are_read_as_they_were_saved(zipped, tmp_path):
    whole = torch.arange(24.0)
    content = {
        "view": whole[4:16].view(3, 4).t(),
        "same": whole,
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(2.5),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "plain": [1, 2.5, None, True, "x", {1, 2}, torch.Size([2, 3]), torch.float16, b"bytes", slice],
    }
    for dtype in (
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.uint8,
        torch.bool,
    ):
        content[str(dtype)] = torch.tensor([0, 1, 1]).to(dtype)
    content["plain"].pop()
    torch.save(content, tmp_path / "file.pt", _use_new_zipfile_serialization=zipped)
    read = safe_pickle.read(tmp_path / "file.pt")
    assert read["plain"] == [*content.pop("plain")]
    for key, tensor in content.items():
        assert read[key].dtype == tensor.dtype
        assert torch.equal(read[key], tensor.detach())
    assert read["view"].stride() == (1, 4)
    assert read["view"].untyped_storage().data_ptr() == read["same"].untyped_storage().data_ptr()


# --- As a user runs them


def process(script, *flags, folder, **environment):
    return subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, flags)],
        cwd=folder,
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=120,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_hf_scripts_convert_and_say_so_in_one_line(family, tmp_path):
    hf_model(family, head="ForCTC").save_pretrained(tmp_path / "my-model")
    done = process(f"convert_{family}_from_hf.py", "--model", "my-model", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("my-model -> pretrained/my-model.hf.pth: ") and done.stdout.count("\n") == 1
    assert load(tmp_path / "pretrained" / "my-model.hf.pth").get_num_params() > 0


@pytest.mark.parametrize("name", ["fairseq_hubert_base", "fairseq_wav2vec2_base", "unilm_wavlm_base"])
def test_fairseq_scripts_convert_without_transformers_or_fairseq(name, tmp_path):
    for package in ("transformers", "fairseq", "omegaconf", "torchaudio"):
        (tmp_path / "broken" / package).mkdir(parents=True)
        (tmp_path / "broken" / package / "__init__.py").write_text("raise RuntimeError('not needed')\n")
    flags = ["--ckpt", GOLDEN / f"{name}.pt"]
    done = process(RECORDED[name], *flags, folder=tmp_path, PYTHONPATH=str(tmp_path / "broken"))
    assert (done.returncode, done.stderr) == (0, "")
    kind = "unilm" if "unilm" in name else "fairseq"
    assert_layers_equal(tmp_path / "pretrained" / f"{name}.{kind}.pth", name)


def test_a_script_that_refuses_exits_with_2_one_line_and_no_traceback(tmp_path):
    change_width(tmp_path / "wrong")
    for script, flag in (
        ("convert_hubert_from_hf.py", "--model"),
        ("convert_hubert_from_fairseq.py", "--ckpt"),
    ):
        done = process(script, flag, "wrong", "--out", "out.pth", folder=tmp_path)
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith(f"{script}: error: wrong: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "out.pth").exists()
