"""Checkpoints of fairseq and Microsoft's release, converted: against recordings, and what is refused."""

import argparse
import pickle
import sys
import types
import zipfile

import pytest
import torch

from converters import fairseq
from tests.helpers.convert import (
    GOLDEN,
    RECORDED,
    assert_layers_equal,
    compressed_checkpoint,
    converted,
    load,
    recorded,
    refused,
    refused_in_little_memory,
    save_changed,
)
from utils.files import UserError


@pytest.mark.parametrize("name", RECORDED)
def test_every_layer_equals_the_recording_of_fairseq_and_unilm(name, tmp_path):
    out = converted(RECORDED[name], GOLDEN / f"{name}.pt", tmp_path)
    assert_layers_equal(out, name)
    assert load(out).normalize_waveform is name.endswith("large")


@pytest.mark.parametrize(
    "name", ["fairseq_hubert_base", "fairseq_wav2vec2_base_namespace", "unilm_wavlm_large"]
)
def test_files_from_before_torch_1_6_are_read(name, tmp_path):
    path = save_changed(tmp_path / "old.pt", name, _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(path)
    assert_layers_equal(converted(RECORDED[name], path, tmp_path), name)


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
def test_the_encoder_of_a_fine_tuned_file_is_converted(name, tmp_path):
    path = save_changed(tmp_path / "tuned.pt", name, fine_tune)
    assert_layers_equal(converted(RECORDED[name], path, tmp_path), name)


def test_configs_of_omegaconf_are_read_without_it(tmp_path, monkeypatch):
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

    name = "fairseq_hubert_large"
    path = save_changed(tmp_path / "wrapped.pt", name, lambda old: old.update(cfg=wrap(old["cfg"])))
    monkeypatch.delitem(sys.modules, "omegaconf.dictconfig")
    assert_layers_equal(converted(RECORDED[name], path, tmp_path), name)


def test_half_precision_weights_become_float32(tmp_path):
    def halve(content):
        content["model"] = {key: value.half() for key, value in content["model"].items()}

    path = save_changed(tmp_path / "half.pt", "fairseq_hubert_base", halve)
    out = converted("convert_hubert_from_fairseq.py", path, tmp_path)
    state_dict = torch.load(out, weights_only=True)["state_dict"]
    assert {tensor.dtype for tensor in state_dict.values()} == {torch.float32}
    assert torch.equal(
        state_dict["encoder.transformer.layer_norm.weight"],
        recorded("fairseq_hubert_base")["model"]["encoder.layer_norm.weight"].half().float(),
    )


def set_option(**options):
    return lambda content: (content["cfg"].get("model") or content["cfg"]).update(options)


def set_tensor(**tensors):
    return lambda content: content["model"].update(tensors)


def drop_tensor(name):
    return lambda content: content["model"].pop(name)


def nested(depth):
    """Lists that hold one another twice: 2 ** depth values in a few bytes."""
    value = ["x"]
    for _ in range(depth):
        value = [value, value]
    return value


def endless():
    value = []
    value.append(value)
    return value


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
        ("fairseq_hubert_base", set_option(conv_feature_layers="[(9,9,1)]"), "into 1 to 400 frames"),
        ("fairseq_hubert_base", set_option(encoder_layers=20_000), "encoder_layers of its config is 20000"),
        ("fairseq_hubert_base", set_option(encoder_layers=10**5000), "encoder_layers of its config is a"),
        ("fairseq_hubert_base", set_option(dropout=torch.zeros(3)), "dropout of its config is tensor"),
        ("fairseq_hubert_base", set_option(layer_type=torch.zeros(3)), "layer_type is tensor"),
        ("fairseq_hubert_base", set_option(extractor_mode=nested(60)), "extractor_mode is [["),
        ("fairseq_hubert_base", set_option(extractor_mode=endless()), "its options contain themselves"),
        ("fairseq_hubert_base", set_tensor(**{"layer_norm.bias": torch.zeros(16).int()}), "torch.int32"),
        (
            "fairseq_hubert_base",
            set_tensor(**{"w2v_model.layer_norm.bias": torch.zeros(16)}),
            "two tensors for layer_norm.bias",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_converted_is_refused_by_name(name, change, word, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = save_changed(tmp_path / "file.pt", name, change)
    sentence = refused(RECORDED[name], path, tmp_path)
    assert word in sentence and str(path) in sentence
    assert not (tmp_path / "ran").exists()


def test_a_wavlm_is_sent_to_its_own_script(tmp_path):
    sentence = refused("convert_hubert_from_fairseq.py", GOLDEN / "unilm_wavlm_base.pt", tmp_path)
    assert "convert_wavlm_from_unilm.py" in sentence


def test_conv_layers_are_parsed_and_never_evaluated():
    parse = fairseq.parse_conv_layers
    base = [(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512, 2, 2)] * 2
    assert parse("[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2", "x") == base
    assert parse(" [(512, 10, 5)] + 4 * [(512, 3, 2)] + [(512,2,2)] + [(512,2,2)]", "x") == base
    assert parse([[16, 10, 5], (16, 3, 8)], "x") == [(16, 10, 5), (16, 3, 8)]
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
        save_changed(path, "fairseq_hubert_base", _use_new_zipfile_serialization=False)
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
def test_a_file_that_is_no_checkpoint_gives_one_sentence_and_no_file(kind, tmp_path):
    path = damaged(kind, tmp_path)
    for script in ("convert_hubert_from_fairseq.py", "convert_wavlm_from_unilm.py"):
        assert str(path) in refused(script, path, tmp_path)


# --- Files that claim more than they hold


def stride_0(content):
    content["cfg"]["model"]["encoder_ffn_embed_dim"] = 10**6
    for layer in range(3):
        for name, shape in (("fc1.weight", (10**6, 32)), ("fc1.bias", (10**6,)), ("fc2.weight", (32, 10**6))):
            content["model"][f"encoder.layers.{layer}.{name}"] = torch.zeros(1).expand(shape)


def test_a_small_file_that_claims_huge_tensors_is_refused_before_memory_is_taken(tmp_path):
    zeros = {"model": {"a": torch.zeros(5 * 10**7)}}
    name = "fairseq_hubert_base"
    files = [
        compressed_checkpoint(tmp_path / "compressed.pt", zeros),
        save_changed(tmp_path / "stride.pt", name, stride_0),
        save_changed(tmp_path / "legacy.pt", name, stride_0, _use_new_zipfile_serialization=False),
        save_changed(tmp_path / "conv.pt", name, set_option(conv_feature_layers="[(1,1,1)]" + "*99" * 4)),
    ]
    assert all(file.stat().st_size < 10**6 for file in files)
    sentences = refused_in_little_memory("convert_hubert_from_fairseq.py", files, tmp_path)
    assert "refused, because it is compressed" in sentences[0]
    assert "its tensors are larger than the file" in sentences[1]
    assert "its tensors are larger than the file" in sentences[2]
    assert "conv_feature_layers is '[(1,1,1)]*99*99*99*99'" in sentences[3]
