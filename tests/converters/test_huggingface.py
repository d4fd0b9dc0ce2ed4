"""Hugging Face's models, converted: against transformers and torchaudio, and what is refused."""

import json
import shutil
import sys
import types

import pytest
import torch
import transformers
from torch.testing import assert_close

from converters import huggingface
from converters.common import rename
from tests.helpers.convert import CLASSES, converted, hf_config, hf_model, load, refused, run_here
from utils.compare import relative_difference
from utils.files import UserError
from wav2vec2 import hubert_base, wav2vec2_model, wavlm_base

transformers.utils.logging.disable_progress_bar()
pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")  # its WavLM


def speech(batch=2, time=12_000):
    return torch.randn(batch, time, generator=torch.Generator().manual_seed(1)) * 0.1


@pytest.mark.parametrize("head", ["Model", "ForCTC"])
@pytest.mark.parametrize("norm", ["base", "large"])
@pytest.mark.parametrize("family", CLASSES)
def test_a_converted_file_computes_what_transformers_computes(family, norm, head, tmp_path):
    original = hf_model(family, norm, head)
    original.save_pretrained(tmp_path / "model")
    model = load(converted(f"convert_{family}_from_hf.py", tmp_path / "model", tmp_path))
    assert model.normalize_waveform == (norm == "large")
    assert model.aux is None
    waveforms = speech()
    lengths = torch.tensor([12_000, 9_000])
    mask = (torch.arange(12_000) < lengths[:, None]).long()
    for given in (None, lengths):
        inputs = waveforms
        if norm == "large":
            parts = [w[: 12_000 if given is None else n] for w, n in zip(waveforms, lengths, strict=True)]
            inputs = torch.zeros(2, 12_000)
            for row, part in zip(inputs, parts, strict=True):
                row[: len(part)] = (part - part.mean()) / torch.sqrt(part.var(unbiased=False) + 1e-5)
        with torch.no_grad():
            expected = original.base_model(
                inputs, attention_mask=None if given is None else mask, output_hidden_states=True
            )
            states, frames = model.extract_features(waveforms, given)
            output, _ = model(waveforms, given)
        valid = [states[0].size(1)] * 2 if frames is None else frames.tolist()
        ours = [*states[1:-1], output]
        theirs = [*expected.hidden_states[1:-1], expected.last_hidden_state]
        for i, n in enumerate(valid):
            assert relative_difference([x[i, :n] for x in ours], [x[i, :n] for x in theirs]) < 1e-4


@pytest.mark.parametrize("norm", ["base", "large"])
@pytest.mark.parametrize("family", CLASSES)
def test_torchaudios_importer_agrees(family, norm):
    utils = pytest.importorskip("torchaudio.models.wav2vec2.utils", exc_type=(ImportError, OSError))
    original = hf_model(family, norm)
    second = utils.import_huggingface_model(original).eval()
    model = huggingface.import_huggingface_model(original, normalize_waveform=norm == "large")
    waveforms, lengths = speech(), torch.tensor([12_000, 9_000])
    inputs = torch.nn.functional.layer_norm(waveforms, waveforms.shape[-1:]) if norm == "large" else waveforms
    with torch.no_grad():
        ours, theirs = model.extract_features(waveforms)[0][1:], second.extract_features(inputs)[0]
        assert relative_difference(ours, theirs) < 1e-4
        if family != "wavlm":  # torchaudio's WavLM takes no lengths
            ours, frames = model.extract_features(waveforms, lengths)
            inputs = huggingface.normalize(waveforms, lengths) if norm == "large" else waveforms
            theirs, their_frames = second.extract_features(inputs, lengths)
            assert frames.tolist() == their_frames.tolist()
            short = [[state[1, : frames[1]] for state in states] for states in (ours[1:], theirs)]
            assert relative_difference(*short) < 1e-4
    ours = sum(parameter.numel() for parameter in model.parameters())
    assert ours == sum(parameter.numel() for parameter in second.parameters()) + 16


@pytest.mark.parametrize("family", CLASSES)
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
    ours = huggingface.config_from_options(config, "tiny", False)
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
def test_every_tensor_of_a_real_architecture_has_its_place(family, options, parameters):
    config = getattr(transformers, f"{CLASSES[family]}Config")(**options)
    with torch.device("meta"):
        original = getattr(transformers, f"{CLASSES[family]}Model")(config)
        ours = wav2vec2_model(**huggingface.config_from_options(config, "real size", False))
    named = rename(original.state_dict(), huggingface.TENSORS, "real size")
    named = {k.replace("parametrizations.weight.original0", "weight_g"): v for k, v in named.items()}
    named = {k.replace("parametrizations.weight.original1", "weight_v"): v for k, v in named.items()}
    shapes = {name: tensor.shape for name, tensor in named.items()}
    assert shapes == {
        name: tensor.shape for name, tensor in ours.state_dict().items() if not name.endswith("dummy_weight")
    }
    count, theirs = (sum(p.numel() for p in model.parameters()) for model in (ours, original))
    assert count == theirs - config.hidden_size + 512
    assert parameters in (None, count)


def test_the_factories_are_transformers_architectures():
    with torch.device("meta"):
        for factory, config in (
            (hubert_base, transformers.HubertConfig()),
            (wavlm_base, transformers.WavLMConfig()),
        ):
            model = wav2vec2_model(**huggingface.config_from_options(config, "defaults", False))
            shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
            assert shapes == {name: tensor.shape for name, tensor in factory().state_dict().items()}


@pytest.mark.parametrize(
    ("norm", "given"), [("base", True), ("base", None), ("large", False), ("large", None)]
)
def test_normalised_input_follows_the_feature_extractor(norm, given, tmp_path):
    hf_model("hubert", norm).save_pretrained(tmp_path / "model")
    if given is not None:
        extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=given)
        extractor.save_pretrained(tmp_path / "model")
    model = load(converted("convert_hubert_from_hf.py", tmp_path / "model", tmp_path))
    assert model.normalize_waveform is ((norm == "large") if given is None else given)


def test_normalised_input_follows_a_processors_extractor(tmp_path):
    hf_model("hubert").save_pretrained(tmp_path / "model")
    processor = {"feature_extractor": {"do_normalize": True}}
    (tmp_path / "model" / "processor_config.json").write_text(json.dumps(processor))
    model = load(converted("convert_hubert_from_hf.py", tmp_path / "model", tmp_path))
    assert model.normalize_waveform is True


def test_our_normalised_input_is_the_feature_extractors():
    extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)
    waveforms, lengths = speech() + 0.03, torch.tensor([12_000, 9_000])
    parts = [waveform[:n].numpy() for waveform, n in zip(waveforms, lengths, strict=True)]
    expected = extractor(parts, sampling_rate=16_000, padding=True, return_tensors="pt").input_values
    assert_close(huggingface.normalize(waveforms, lengths), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("spelling", ["old names, .bin", "half precision"])
def test_other_files_of_the_same_model_convert(spelling, tmp_path):
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
    out = converted("convert_hubert_from_hf.py", folder, tmp_path)
    state_dict = torch.load(out, weights_only=True)["state_dict"]
    assert {tensor.dtype for tensor in state_dict.values()} == {torch.float32}
    v = original.hubert.encoder.pos_conv_embed.conv.parametrizations.weight.original1
    assert torch.equal(state_dict["encoder.transformer.pos_conv_embed.conv.weight_v"], v.float())


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
    config = hf_config(family, **{name: value})
    with pytest.raises(UserError, match=f"^tiny: {name} is {value!r}, which the model here cannot compute"):
        huggingface.config_from_options(config, "tiny", False)


@pytest.mark.parametrize(
    ("family", "name", "value"),
    [("hubert", "hidden_act", "gelu_python"), ("wavlm", "output_hidden_size", 99)],
)
def test_an_option_that_changes_nothing_is_accepted(family, name, value):
    assert huggingface.config_from_options(hf_config(family, **{name: value}), "tiny", False)


@pytest.mark.parametrize(
    ("family", "other"), [("hubert", "wavlm"), ("wavlm", "wav2vec2"), ("wav2vec2", "hubert")]
)
def test_another_family_is_refused_with_its_script(family, other, tmp_path):
    hf_config(other).save_pretrained(tmp_path)
    sentence = refused(f"convert_{family}_from_hf.py", tmp_path, tmp_path)
    assert f"convert_{other}_from_hf.py" in sentence


def whisper(folder):
    config = transformers.WhisperConfig(
        vocab_size=20, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, pad_token_id=1, bos_token_id=2,
        eos_token_id=3, decoder_start_token_id=4, suppress_tokens=[], begin_suppress_tokens=[],
    )  # fmt: skip
    transformers.WhisperModel(config).save_pretrained(folder)


def changed_config(**changes):
    """Saves a whole model and changes options of its config.json."""

    def prepare(folder):
        hf_model("hubert").save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return prepare


def truncated(name):
    """Saves a whole model and cuts the file of its weights in half."""

    def prepare(folder):
        original = hf_model("hubert")
        original.save_pretrained(folder)
        if name == "pytorch_model.bin":
            (folder / "model.safetensors").unlink()
            torch.save(original.state_dict(), folder / name)
        weights = (folder / name).read_bytes()
        (folder / name).write_bytes(weights[: len(weights) // 2])

    return prepare


def text(folder):
    folder.write_text("nothing to see here\n")


def quantised(folder):
    original = hf_model("hubert")
    original.config.save_pretrained(folder)
    weights = original.state_dict() | {"encoder.layer_norm.bias": torch.zeros(32, dtype=torch.int8)}
    torch.save(weights, folder / "pytorch_model.bin")


def other_file(name, content):
    """Saves a whole model and replaces one of its files, or adds one."""

    def prepare(folder):
        hf_model("hubert").save_pretrained(folder)
        (folder / name).write_text(content)

    return prepare


def no_weights(folder):
    hf_config("hubert").save_pretrained(folder)


@pytest.mark.parametrize(
    ("prepare", "word"),
    [
        (whisper, "a model of the type whisper"),
        (changed_config(intermediate_size=48), "is (64,), by the config it should be (48,)"),
        (changed_config(num_hidden_layers=4), "lacks the tensor encoder.transformer.layers.3."),
        (changed_config(num_hidden_layers=2), "has the unexpected tensor encoder.transformer.layers.2."),
        (changed_config(num_attention_heads=5), "hidden_size 32 is no multiple of num_attention_heads 5"),
        (changed_config(conv_stride=[5, 2, 2, 2, 2, 2, 0]), "extractor_conv_layer_config is [(16, 10, 5)"),
        (changed_config(conv_dim=16), "transformers refuses its config"),
        (changed_config(conv_stride=[5, 2]), "transformers refuses its config"),
        (changed_config(hidden_size="32"), "hidden_size"),
        (changed_config(num_conv_pos_embedding_groups=5), "encoder_pos_conv_groups is 5"),
        (quantised, "its tensor encoder.layer_norm.bias is of the type torch.int8"),
        (truncated("model.safetensors"), "model.safetensors is damaged"),
        (truncated("pytorch_model.bin"), "pytorch_model.bin is damaged"),
        (text, "has no config.json"),
        (other_file("config.json", '{"model_type": "hubert", '), "config.json is damaged, or is not a JSON"),
        (other_file("config.json", "[1]"), "config.json holds no options, but a list"),
        (other_file("preprocessor_config.json", "{"), "preprocessor_config.json is damaged"),
        (
            other_file("preprocessor_config.json", '{"do_normalize": "maybe"}'),
            "normalize_waveform is 'maybe'",
        ),
        (no_weights, "has no model.safetensors or pytorch_model.bin"),
    ],
)
def test_a_model_that_is_not_whole_is_refused(prepare, word, tmp_path):
    prepare(tmp_path / "model")
    sentence = refused("convert_hubert_from_hf.py", tmp_path / "model", tmp_path)
    assert word in sentence and str(tmp_path / "model") in sentence


def test_the_comparison_sees_one_changed_weight():
    original = hf_model("wavlm")
    model = huggingface.import_huggingface_model(original, False)
    assert huggingface.largest_difference(model, original) < 1e-5
    bias = model.encoder.transformer.layers[2].final_layer_norm.bias
    bias.data = bias.data + 0.01 * torch.eye(1, 32)[0]
    assert huggingface.largest_difference(model, original) > 1e-4
    bias.data = bias.data * float("nan")
    assert huggingface.largest_difference(model, original) == float("inf")


def test_a_model_that_differs_from_its_source_is_not_written(tmp_path, monkeypatch):
    hf_model("hubert").save_pretrained(tmp_path / "model")
    swapped = {
        r"encoder\.layers\.0\.(.*)": r"encoder.transformer.layers.1.\1",
        r"encoder\.layers\.1\.(.*)": r"encoder.transformer.layers.0.\1",
    }
    monkeypatch.setattr(huggingface, "TENSORS", swapped | huggingface.TENSORS)
    sentence = refused("convert_hubert_from_hf.py", tmp_path / "model", tmp_path)
    assert "differs from transformers'" in sentence


def test_a_conversion_shares_the_memory_of_the_weights():
    original = hf_model("hubert")
    model = huggingface.import_huggingface_model(original, False)
    theirs = {parameter.data_ptr() for parameter in original.parameters()}
    own = [name for name, p in model.named_parameters() if p.data_ptr() not in theirs]
    assert own == ["feature_extractor.dummy_weight"]


def test_an_existing_output_stays_until_a_whole_one_replaces_it(tmp_path):
    changed_config(intermediate_size=48)(tmp_path / "wrong")
    hf_model("hubert").save_pretrained(tmp_path / "right")
    out = tmp_path / "out.pth"
    out.write_bytes(b"old")
    assert run_here("convert_hubert_from_hf.py", "--model", tmp_path / "wrong", "--out", out)[0] == 2
    assert out.read_bytes() == b"old"
    assert run_here("convert_hubert_from_hf.py", "--model", tmp_path / "right", "--out", out)[0] == 0
    assert load(out).get_num_params() > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.pth", "right", "wrong"]


def test_a_transformers_that_torchaudio_breaks_is_one_sentence(tmp_path, monkeypatch):
    class Broken(types.ModuleType):
        def __getattr__(self, name):
            raise RuntimeError(
                "Detected that PyTorch and TorchAudio were compiled with different CUDA versions."
            )

    monkeypatch.setitem(sys.modules, "transformers", Broken("transformers"))
    sentence = refused("convert_hubert_from_hf.py", tmp_path, tmp_path)
    assert "different CUDA versions" in sentence and "or uninstall it" in sentence


def test_weights_that_are_divided_among_files_convert(tmp_path):
    original = hf_model("hubert")
    original.save_pretrained(tmp_path / "model", max_shard_size="50KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    state_dict = load(converted("convert_hubert_from_hf.py", tmp_path / "model", tmp_path)).state_dict()
    expected = original.encoder.layers[2].feed_forward.output_dense.weight
    assert torch.equal(state_dict["encoder.transformer.layers.2.feed_forward.output_dense.weight"], expected)


# --- Untrusted folders


def test_an_index_cannot_name_files_outside_its_folder(tmp_path):
    folder = tmp_path / "model"
    hf_model("hubert").save_pretrained(folder)
    shutil.move(folder / "model.safetensors", tmp_path / "elsewhere.safetensors")
    for outside in ("../elsewhere.safetensors", str(tmp_path / "elsewhere.safetensors")):
        weight_map = {"encoder.layer_norm.weight": outside}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        assert "elsewhere.safetensors" in refused("convert_hubert_from_hf.py", folder, tmp_path)


@pytest.mark.parametrize("model_type", ["hubert", "evil"])
def test_code_in_a_folder_is_never_run(model_type, tmp_path, monkeypatch):
    """``trust_remote_code`` would import what ``auto_map`` names, also from a folder."""
    folder, mark = tmp_path / "model", tmp_path / "ran"
    classes = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}
    changes = {"auto_map": classes, "_attn_implementation": "evil/kernel", "model_type": model_type}
    changed_config(**changes)(folder)
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nimport transformers\nConfig = Model = None\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    if model_type == "hubert":
        assert load(converted("convert_hubert_from_hf.py", folder, tmp_path)).get_num_params() > 0
    else:
        assert "of the type evil" in refused("convert_hubert_from_hf.py", folder, tmp_path)
    assert not mark.exists()
