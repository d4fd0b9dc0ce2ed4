"""Hugging Face's models, converted: against transformers, and what is refused."""

import json
import shutil
import subprocess
import sys
import types

import huggingface_hub
import pytest
import safetensors.torch
import torch
import transformers

from converters import huggingface
from tests.helpers.convert import (
    BASE,
    CLASSES,
    TOKENS,
    converted,
    hf_model,
    load,
    refused,
    save_recogniser,
)
from tests.helpers.stages import ENVIRONMENT, ROOT
from utils.compare import relative_difference
from utils.files import UserError
from wav2vec2.model import normalize

SCRIPT = "convert_hubert_from_hf.py"
DENSE = "encoder.transformer.layers.2.feed_forward.output_dense.weight"

transformers.utils.logging.disable_progress_bar()
pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")  # its WavLM


@pytest.fixture
def folder(tmp_path):
    """A whole model."""
    hf_model("hubert").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def speech():
    return 0.3 + torch.randn(2, 12_000, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("head", ["Model", "ForCTC"])
@pytest.mark.parametrize("norm", ["base", "large"])
@pytest.mark.parametrize("family", CLASSES)
def test_a_converted_file_computes_what_transformers_computes(family, norm, head, tmp_path):
    original = hf_model(family, norm, head)
    original.save_pretrained(tmp_path / "model")
    extractor = transformers.Wav2Vec2FeatureExtractor(
        do_normalize=norm == "large", return_attention_mask=True
    )
    extractor.save_pretrained(tmp_path / "model")
    model = load(converted(f"convert_{family}_from_hf.py", tmp_path / "model", tmp_path))
    assert model.aux is None
    for lengths in ([12_000, 12_000], [12_000, 9_000]):
        parts = [waveform[:n] for waveform, n in zip(speech(), lengths, strict=True)]
        arrays = [part.numpy() for part in parts]
        inputs = extractor(arrays, sampling_rate=16_000, padding=True, return_tensors="pt")
        waveforms = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
        with torch.no_grad():
            expected = original.base_model(**inputs, output_hidden_states=True)
            states, frames = model.extract_features(waveforms, torch.tensor(lengths))
            output, _ = model(waveforms, torch.tensor(lengths))
        ours = [*states[1:-1], output]
        theirs = [*expected.hidden_states[1:-1], expected.last_hidden_state]
        for i, n in enumerate(frames.tolist()):
            assert relative_difference([x[i, :n] for x in ours], [x[i, :n] for x in theirs]) < 1e-4


def empty_model(family, **options):
    """A model of transformers of the published sizes, without values."""
    with torch.device("meta"):
        config = getattr(transformers, f"{CLASSES[family]}Config")(**options)
        return getattr(transformers, f"{CLASSES[family]}Model")(config)


OPTIONS = {
    "hidden_dropout": ("encoder_dropout", 0.11),
    "activation_dropout": ("encoder_ff_interm_dropout", 0.12),
    "attention_dropout": ("encoder_attention_dropout", 0.13),
    "feat_proj_dropout": ("encoder_projection_dropout", 0.14),
    "layerdrop": ("encoder_layer_drop", 0.15),
    "conv_bias": ("extractor_conv_bias", True),
    "num_conv_pos_embeddings": ("encoder_pos_conv_kernel", 8),
    "num_conv_pos_embedding_groups": ("encoder_pos_conv_groups", 4),
    "num_buckets": ("encoder_num_buckets", 40),
    "max_bucket_distance": ("encoder_max_distance", 90),
}


@pytest.mark.parametrize("family", CLASSES)
def test_the_config_is_read_from_the_checkpoint(family):
    options = {name: given for name, given in OPTIONS.items() if family == "wavlm" or "bucket" not in name}
    conv = {"conv_dim": [16, 16, 24], "conv_kernel": [10, 3, 2], "conv_stride": [5, 2, 4]}
    given = {name: value for name, (_, value) in options.items()}
    original = empty_model(family, hidden_act="gelu_python", **conv, **given)
    config = huggingface.import_huggingface_model(original, True).config
    assert config["normalize_waveform"] is True
    assert config["extractor_conv_layer_config"] == [(16, 10, 5), (16, 3, 2), (24, 2, 4)]
    assert {key: config[key] for key, _ in options.values()} == dict(options.values())


@pytest.mark.parametrize(
    ("norm", "file", "options", "expected"),
    [
        ("base", "preprocessor_config.json", {"do_normalize": True}, True),
        ("large", "preprocessor_config.json", {"do_normalize": False}, False),
        ("base", "processor_config.json", {"feature_extractor": {"do_normalize": True}}, True),
        ("base", "processor_config.json", {}, False),
        ("large", "processor_config.json", {}, True),
    ],
)
def test_normalised_input_follows_the_feature_extractor(norm, file, options, expected, tmp_path):
    hf_model("hubert", norm).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / file).write_text(json.dumps(options))
    assert load(converted(SCRIPT, tmp_path / "model", tmp_path)).normalize_waveform is expected


def old_names(original, folder):
    original.config.save_pretrained(folder)
    weights = original.state_dict()
    for new, old in (("0", "weight_g"), ("1", "weight_v")):
        name = "hubert.encoder.pos_conv_embed.conv."
        weights[name + old] = weights.pop(f"{name}parametrizations.weight.original{new}")
    torch.save(weights, folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    "save",
    [
        lambda original, folder: original.half().save_pretrained(folder),
        lambda original, folder: original.save_pretrained(folder, max_shard_size="50KB"),
        old_names,
    ],
)
def test_half_precision_parts_and_old_names_convert(save, tmp_path):
    original = hf_model("hubert", head="ForCTC")
    save(original, tmp_path / "model")
    out = converted(SCRIPT, tmp_path / "model", tmp_path)
    state_dict = torch.load(out, weights_only=True)["state_dict"]
    assert {tensor.dtype for tensor in state_dict.values()} == {torch.float32}
    encoder = original.hubert.encoder
    v = encoder.pos_conv_embed.conv.parametrizations.weight.original1
    assert torch.equal(state_dict["encoder.transformer.pos_conv_embed.conv.weight_v"], v.float())
    assert torch.equal(state_dict[DENSE], encoder.layers[2].feed_forward.output_dense.weight.float())


def test_a_name_that_is_no_folder_is_a_hubs(folder, tmp_path, monkeypatch):
    """Without a network the hub's client takes what it has fetched before."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    repository = tmp_path / "cache" / "models--somebody--hubert"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.move(folder, repository / "snapshots" / ("0" * 40))
    assert load(converted(SCRIPT, "somebody/hubert", tmp_path)).get_num_params() > 0
    shutil.rmtree(tmp_path / "new")
    for name in ("somebody/else", "a/path/that/is/not/there"):
        assert f"{name}: no such folder, and no hub has it" in refused(SCRIPT, name, tmp_path)


@pytest.mark.parametrize(
    ("family", "name", "value"),
    [
        ("hubert", "hidden_act", "relu"),
        ("wav2vec2", "feat_extract_activation", "relu"),
        ("hubert", "layer_norm_eps", 1e-12),
        ("hubert", "conv_pos_batch_norm", True),
        ("hubert", "feat_proj_layer_norm", False),
        ("wav2vec2", "adapter_attn_dim", 16),
        ("wavlm", "add_adapter", True),
    ],
)
def test_an_option_that_cannot_be_computed_is_refused(family, name, value):
    with pytest.raises(UserError, match=f"{name} is {value!r}, which the model here cannot compute"):
        huggingface.import_huggingface_model(empty_model(family, **{name: value}), False)


def set_option(**changes):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return change


def set_file(name, content):
    return lambda folder: (folder / name).write_text(content)


def truncate(folder):
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])


def lose_a_part(folder):
    (folder / "model.safetensors").unlink()
    hf_model("hubert").save_pretrained(folder, max_shard_size="50KB")
    sorted(folder.glob("model-*"))[1].unlink()


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (set_option(model_type="data2vec-audio"), "a model of the type data2vec-audio; only HuBERT"),
        (set_option(model_type="wavlm"), "convert it with convert_wavlm_from_hf.py"),
        (set_option(intermediate_size=48), "size mismatch for encoder.layers.0.feed_forward"),
        (set_option(num_hidden_layers=2), 'Unexpected key(s) in state_dict: "encoder.layers.2.'),
        (set_option(conv_stride=[5, 2]), "transformers cannot build it from its config and weights"),
        (lose_a_part, "Missing key(s) in state_dict: "),
        (truncate, "model.safetensors is damaged"),
        (set_file("config.json", '{"model_type": "hubert", '), "config.json is damaged"),
        (set_file("preprocessor_config.json", '{"do_normalize": "a"}'), "normalize_waveform is 'a'"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no model.safetensors or pytorch"),
    ],
)
def test_a_model_that_is_not_whole_is_refused(change, word, folder, tmp_path):
    change(folder)
    sentence = refused(SCRIPT, folder, tmp_path)
    assert word in sentence and str(folder) in sentence


@pytest.mark.parametrize(
    ("kind", "script", "norm", "outputs"),
    [
        ("Hubert", SCRIPT, "large", 12),
        ("Wav2Vec2", "convert_wav2vec2_from_hf.py", "base", 14),
        ("WavLM", "convert_wavlm_from_hf.py", "base", 12),
        ("UniSpeech", "convert_wav2vec2_from_hf.py", "large", 12),
        ("UniSpeechSat", SCRIPT, "base", 12),
    ],
)
@torch.no_grad()
def test_a_kept_head_has_the_logits_and_the_tokens(kind, script, norm, outputs, tmp_path):
    """The tokenizer has 14 tokens, of which a head of 12 outputs knows all but <s> and </s>."""
    original = save_recogniser(tmp_path / "model", kind, norm, outputs)
    out = converted(script, tmp_path / "model", tmp_path, "--keep_head")
    model, lengths = load(out), torch.tensor([12_000, 9_000])
    mask = (torch.arange(12_000) < lengths.unsqueeze(-1)).long()
    waveforms = normalize(speech(), lengths) if norm == "large" else speech()
    expected = original(waveforms, attention_mask=mask).logits
    logits, frames = model(speech(), lengths)
    for i, n in enumerate(frames.tolist()):
        assert relative_difference([logits[i, :n]], [expected[i, :n]]) < 1e-4
    numbers = json.loads(out.with_name("out.vocab.json").read_text())
    tokens = [*TOKENS[:11], "<pad>", "<s>", "</s>"][:outputs]
    assert numbers == {token: number for number, token in enumerate(tokens)}


def without_tokenizer(folder):
    for file in [*folder.glob("*token*"), folder / "vocab.json"]:
        file.unlink()


NOT_12 = "has 2 tokens, and the head 12 outputs"


@pytest.mark.parametrize(
    ("change", "flags", "word"),
    [
        (lambda folder: hf_model("hubert").save_pretrained(folder), [], "has no CTC head (lm_head)"),
        (without_tokenizer, [], "(there is none); add its files"),
        (set_file("vocab.json", '{"eng": {"<pad>": 0}}'), [], "a tokenizer of one language from it"),
        (set_file("vocab.json", "{"), [], "or give --vocab FILE"),
        (lambda folder: save_recogniser(folder, outputs=10), [], "has 14 tokens, and the head 10 outputs"),
        (lambda folder: save_recogniser(folder, outputs=15), [], "has 14 tokens, and the head 15 outputs"),
        (set_option(pad_token_id=3), [], "CTC's blank is its number 11, and the model's 3"),
        (set_file("v.json", '{"<pad>": 0, "a": 1}'), ["--vocab", "v.json"], NOT_12),
        (set_file("v.json", '{"<pad>": 0, "a": 2}'), ["--vocab", "v.json"], "v.json: is no vocabulary"),
        (set_option(), ["--vocab", "v.json"], "v.json: cannot be read"),
        (set_option(adapter_attn_dim=16), [], "adapter_attn_dim is 16, which the model here cannot"),
    ],
)
def test_a_head_that_cannot_be_kept_is_refused(change, flags, word, tmp_path):
    folder = tmp_path / "model"
    save_recogniser(folder, "Wav2Vec2")
    change(folder)
    flags = [str(folder / flag) if flag == "v.json" else flag for flag in flags]
    script = SCRIPT if "Hubert" in (folder / "config.json").read_text() else "convert_wav2vec2_from_hf.py"
    sentence = refused(script, folder, tmp_path, "--keep_head", *flags)
    assert word in sentence and str(folder) in sentence


def test_vocab_stands_for_a_tokenizer_that_is_missing(tmp_path):
    save_recogniser(tmp_path / "model", pad_token_id=0)
    (tmp_path / "model" / "tokenizer_config.json").unlink()
    tokens = ["<pad>", "|", *"ABCDEFGHIJ"]
    (tmp_path / "v.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    vocab = ["--vocab", tmp_path / "v.json"]
    out = converted(SCRIPT, tmp_path / "model", tmp_path, "--keep_head", *vocab)
    assert list(json.loads(out.with_name("out.vocab.json").read_text())) == tokens
    assert "--vocab belongs to --keep_head" in refused(SCRIPT, tmp_path / "model", tmp_path / "b", *vocab)


def test_the_comparison_sees_one_changed_weight():
    original = hf_model("wavlm")
    model = huggingface.import_huggingface_model(original, False)
    assert huggingface.largest_difference(model, original) < 1e-5
    bias = model.encoder.transformer.layers[2].final_layer_norm.bias
    bias.data = bias.data + 0.01 * torch.eye(1, 32)[0]
    assert huggingface.largest_difference(model, original) > 1e-4
    bias.data = bias.data * float("nan")
    assert huggingface.largest_difference(model, original) == float("inf")


def test_a_model_that_differs_from_its_source_is_not_written(folder, tmp_path, monkeypatch):
    swapped = {
        r"encoder\.layers\.0\.(.*)": r"encoder.transformer.layers.1.\1",
        r"encoder\.layers\.1\.(.*)": r"encoder.transformer.layers.0.\1",
    }
    monkeypatch.setattr(huggingface, "TENSORS", swapped | huggingface.TENSORS)
    assert "differs from transformers'" in refused(SCRIPT, folder, tmp_path)


def contentvec(config):
    model = transformers.HubertModel(config)
    model.final_proj = torch.nn.Linear(32, 8)
    return model


@pytest.mark.parametrize(
    ("kind", "make", "family", "left_out"),
    [
        ("Hubert", contentvec, "hubert", "final_proj"),
        ("WavLM", "ForXVector", "wavlm", "classifier, feature_extractor"),
        ("WavLM", "ForAudioFrameClassification", "wavlm", "classifier"),
        ("Hubert", "ForSequenceClassification", "hubert", "projector"),
        ("Wav2Vec2", "ForPreTraining", "wav2vec2", "quantizer"),
        ("UniSpeech", "ForPreTraining", "wav2vec2", "ctc_proj"),
        ("UniSpeechSat", "ForXVector", "hubert", "tdnn"),
        ("Hubert", "ForCTC", "hubert", "lm_head"),
    ],
)
@pytest.mark.parametrize("parallel", [False, True])
def test_an_encoder_is_taken_out_of_any_model(kind, make, family, left_out, parallel, tmp_path):
    make = make if callable(make) else getattr(transformers, kind + make)
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**BASE, tdnn_dim=[16, 16, 16, 16, 24])
    original = make(config)
    config.save_pretrained(tmp_path)
    weights = (torch.nn.DataParallel(original) if parallel else original).state_dict()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    model, remark = huggingface.load_huggingface(str(tmp_path), family)
    assert torch.equal(
        model.state_dict()[DENSE], original.base_model.encoder.layers[2].feed_forward.output_dense.weight
    )
    assert left_out in remark.partition("left out: ")[2] and "module" not in remark
    assert ("(--keep_head keeps lm_head)" in remark) == (left_out == "lm_head")


def test_a_file_with_two_encoders_is_refused(folder, tmp_path):
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    twice = {f"{name}.{key}": tensor.clone() for key, tensor in weights.items() for name in ("ema", "model")}
    safetensors.torch.save_file(twice, folder / "model.safetensors")
    assert "holds several encoders (ema., model.)" in refused(SCRIPT, folder, tmp_path)


def test_a_conversion_shares_the_memory_of_the_weights():
    original = hf_model("hubert")
    model = huggingface.import_huggingface_model(original, False)
    theirs = {parameter.data_ptr() for parameter in original.parameters()}
    own = [name for name, p in model.named_parameters() if p.data_ptr() not in theirs]
    assert own == ["feature_extractor.dummy_weight"]


def test_a_transformers_that_torchaudio_breaks_is_one_sentence(tmp_path, monkeypatch):
    class Broken(types.ModuleType):
        def __getattr__(self, name):
            raise RuntimeError("PyTorch and TorchAudio were compiled with different CUDA versions.")

    monkeypatch.setitem(sys.modules, "transformers", Broken("transformers"))
    sentence = refused(SCRIPT, tmp_path, tmp_path)
    assert "different CUDA versions" in sentence and "or uninstall it" in sentence


def test_code_in_a_folder_is_never_run(folder, tmp_path, monkeypatch):
    """``trust_remote_code`` would import what ``auto_map`` names, also from a folder."""
    mark = tmp_path / "ran"
    auto_map = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}
    set_option(auto_map=auto_map, _attn_implementation="evil/kernel")(folder)
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nimport transformers\nConfig = Model = None\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    assert load(converted(SCRIPT, folder, tmp_path)).get_num_params() > 0
    assert not mark.exists()


@pytest.mark.slow
def test_the_script_writes_to_pretrained_and_prints_one_line(folder, tmp_path):
    command = [sys.executable, ROOT / SCRIPT, "--model", "model"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("model -> pretrained/model.hf.pth: ") and done.stdout.count("\n") == 1
    assert load(tmp_path / "pretrained" / "model.hf.pth").get_num_params() > 0
