"""Checkpoints of fairseq and Microsoft's release, converted: against recordings, and what is refused."""

import argparse
import enum
import json
import pickle
import sys
import types
import typing
import zipfile
from collections import defaultdict

import pytest
import torch

from converters import fairseq
from tests.helpers.convert import (
    GOLDEN,
    RECORDED,
    assert_layers_equal,
    converted,
    load,
    refused,
    run_with_torch_alone,
    save_changed,
)
from tests.helpers.stages import ROOT
from utils.files import UserError


@pytest.mark.parametrize("name", RECORDED)
def test_every_layer_equals_the_recording(name, tmp_path):
    out = converted(RECORDED[name], GOLDEN / f"{name}.pt", tmp_path)
    assert_layers_equal(out, name)
    assert load(out).normalize_waveform is name.endswith("large")


@pytest.mark.parametrize("name", ["fairseq_wav2vec2_base_namespace", "unilm_wavlm_large"])
def test_files_from_before_torch_1_6_are_read(name, tmp_path):
    path = save_changed(tmp_path / "old.pt", name, _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(path)
    assert_layers_equal(converted(RECORDED[name], path, tmp_path), name)


TOKENS = ["<s>", "<pad>", "</s>", "<unk>", "|"]


def fine_tune(content):
    weights = {f"w2v_encoder.w2v_model.{key}": value for key, value in content["model"].items()}
    content["model"] = weights | {
        "w2v_encoder.proj.weight": torch.arange(160.0).view(5, 32),
        "w2v_encoder.proj.bias": torch.arange(5.0),
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


def state_of_task(content, patch, tokens):
    """Pickles fairseq's dictionary as its tasks do."""
    module = types.ModuleType("fairseq.data.dictionary")
    module.Dictionary = type("Dictionary", (), {"__module__": module.__name__})
    for name in ("fairseq", "fairseq.data", module.__name__):
        patch.setitem(sys.modules, name, module)
    dictionary = module.Dictionary()
    dictionary.symbols, dictionary.indices = tokens, {token: i for i, token in enumerate(tokens)}
    content["task_state"] = {"target_dictionary": dictionary}


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (TOKENS, ["<pad>", "<s>", "</s>", "<unk>", "|"]),
        ([*TOKENS[:4], "<ctc_blank>"], ["<s>", "<ctc_blank>", "</s>", "<unk>", "<pad>"]),
    ],
)
@pytest.mark.parametrize("name", ["fairseq_hubert_large", "fairseq_wav2vec2_base_namespace"])
def test_a_kept_head_has_the_blank_that_fairseq_has(name, tokens, expected, tmp_path, monkeypatch):
    """fairseq's blank is <s>, the first token, unless its dictionary names one."""
    (tmp_path / "dict.ltr.txt").write_text(f"{tokens[4]} 94802\n")
    with monkeypatch.context() as patch:
        whole = save_changed(
            tmp_path / "whole.pt",
            name,
            lambda content: (fine_tune(content), state_of_task(content, patch, tokens)),
        )
    bare = save_changed(tmp_path / "bare.pt", name, fine_tune)
    for path, flags in ((whole, []), (bare, ["--vocab", tmp_path / "dict.ltr.txt"])):
        out = converted(RECORDED[name], path, tmp_path, "--keep_head", *flags)
        assert_layers_equal(out, name)
        assert torch.equal(load(out).aux.weight, torch.arange(160.0).view(5, 32))
        assert list(json.loads(out.with_name("out.vocab.json").read_text())) == expected
    assert "has no dictionary for its CTC head; give --vocab" in refused(
        RECORDED[name], bare, tmp_path / "b", "--keep_head"
    )
    for text, word in (
        ("a 1\nb 2\n", "has 6 tokens, and the head 5 outputs"),
        ("a\n", "is no dictionary"),
        ("<s> 1\n", "is no dictionary"),
    ):
        (tmp_path / "dict.ltr.txt").write_text(text)
        assert word in refused(RECORDED[name], bare, tmp_path / "b", "--keep_head", *flags)


def test_a_model_without_a_head_has_none_to_keep(tmp_path):
    assert "has no CTC head (w2v_encoder.proj)" in refused(
        RECORDED[HUBERT], GOLDEN / f"{HUBERT}.pt", tmp_path, "--keep_head"
    )


def test_configs_of_omegaconf_are_read_without_it(tmp_path, monkeypatch):
    """The layout of omegaconf 2.0, which names parts of typing and of the standard library beside its own."""
    module = types.ModuleType("omegaconf")
    for name in ("AnyNode", "DictConfig", "Metadata"):
        setattr(module, name, type(name, (), {"__module__": "omegaconf"}))
    module.Mode = enum.Enum("Mode", {"default": "default", "layer_norm": "layer_norm"}, module="omegaconf")

    def wrap(value):
        wrapped = module.DictConfig() if isinstance(value, dict) else module.AnyNode()
        wrapped._metadata = module.Metadata()
        wrapped._metadata.ref_type, wrapped._metadata.object_type = typing.Any, dict
        wrapped._metadata.resolver_cache = defaultdict(dict, {"env": {}})
        if isinstance(value, dict):
            wrapped._content = {key: wrap(item) for key, item in value.items()}
        else:
            wrapped._val = value
        return wrapped

    def change(content):
        content["cfg"]["model"]["extractor_mode"] = module.Mode(content["cfg"]["model"]["extractor_mode"])
        content["cfg"] = wrap(content["cfg"])

    name = "fairseq_hubert_large"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "omegaconf", module)
        path = save_changed(tmp_path / "wrapped.pt", name, change)
    assert_layers_equal(converted(RECORDED[name], path, tmp_path), name)


def set_option(**options):
    return lambda content: (content["cfg"].get("model") or content["cfg"]).update(options)


def set_tensor(name, tensor):
    return lambda content: content["model"].update({name: tensor})


def drop_tensor(name):
    return lambda content: content["model"].pop(name)


HUBERT, WAV2VEC2, WAVLM = "fairseq_hubert_base", "fairseq_wav2vec2_base", "unilm_wavlm_base"


@pytest.mark.parametrize(
    ("name", "change", "word"),
    [
        (HUBERT, set_tensor("extra", torch.zeros(1)), "no place for its tensor extra"),
        (HUBERT, set_tensor("layer_norm.bias", torch.zeros(16).int()), "floating-point"),
        (HUBERT, drop_tensor("encoder.layers.1.fc1.bias"), "feed_forward.intermediate_dense"),
        (HUBERT, drop_tensor("layer_norm.weight"), "feature_projection.layer_norm.weight"),
        (HUBERT, set_option(encoder_ffn_embed_dim=48), "the shape in current model is torch.Size([48])"),
        (HUBERT, set_option(encoder_layers=None), "encoder_layers of its config is None"),
        (HUBERT, set_option(dropout=7.0), "encoder_dropout is 7.0"),
        (HUBERT, set_option(conv_pos_batch_norm=True), "conv_pos_batch_norm is True"),
        (HUBERT, set_option(conv_feature_layers="[(512,10)]"), "layer_config is [(512, 10)]"),
        (HUBERT, set_option(_name="data2vec_audio"), "a model of the type data2vec"),
        (HUBERT, set_option(_name="wav2vec2"), "convert_wav2vec2_from_fairseq.py"),
        (HUBERT, set_option(relative_position_embedding=True), "convert_wavlm_from_unilm.py"),
        (HUBERT, lambda content: content.update(cfg=None), 'no options under "cfg" or "args"'),
        (HUBERT, lambda content: content.update(model=[1]), "no weights under"),
        (WAV2VEC2, set_option(layer_type="conformer"), "layer_type is 'conformer'"),
        (WAV2VEC2, set_option(quantize_input=True), "quantize_input is True"),
        (WAVLM, set_option(gru_rel_pos=False), "gru_rel_pos is False"),
        (WAVLM, drop_tensor("encoder.layers.0.self_attn.grep_a"), "gru_rel_pos_const"),
    ],
)
def test_what_cannot_be_converted_is_refused_by_name(name, change, word, tmp_path):
    path = save_changed(tmp_path / "file.pt", name, change)
    sentence = refused(RECORDED[name], path, tmp_path)
    assert word in sentence and str(path) in sentence


def test_conv_layers_are_parsed_and_never_evaluated(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parse = fairseq.parse_conv_layers
    base = [(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512, 2, 2)] * 2
    assert parse("[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2", "x") == base
    assert parse(" [(512, 10, 5)] + 4 * [(512, 3, 2)] + [(512,2,2)] + [(512,2,2)]", "x") == base
    assert parse([[16, 10, 5], (16, 3, 8)], "x") == [(16, 10, 5), (16, 3, 8)]
    attack = "__import__('os').system('touch ran')"
    for bad in ("", attack, "[x for x in ()]", "2 + 2", None, "[(1,1,1)] * 999999999", "(" * 5000):
        with pytest.raises(UserError, match=r"^x: conv_feature_layers is"):
            parse(bad, "x")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_is_not_whole_is_refused(zipped, tmp_path):
    path = save_changed(tmp_path / "file.pt", HUBERT, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[:-1000])
    assert str(path) in refused(RECORDED[HUBERT], path, tmp_path)


@pytest.mark.parametrize("content", [b"nothing to see here\n", pickle.dumps({"model": {}}), None])
def test_a_file_that_is_no_checkpoint_is_refused(content, tmp_path):
    if content is not None:
        (tmp_path / "file.pt").write_bytes(content)
    assert "file.pt" in refused(RECORDED[HUBERT], tmp_path / "file.pt", tmp_path)


def test_the_script_needs_torch_alone_and_writes_to_pretrained(tmp_path):
    done = run_with_torch_alone(tmp_path, ROOT / RECORDED[HUBERT], "--ckpt", GOLDEN / f"{HUBERT}.pt")
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.count("\n") == 1
    assert_layers_equal(tmp_path / "pretrained" / f"{HUBERT}.fairseq.pth", HUBERT)
