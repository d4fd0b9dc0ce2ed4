"""Exports for Hugging Face: what transformers computes with them, fine-tuning, and what is refused.

They test the release of transformers that the Python has which runs them; docs/huggingface.md says how to run
them with an older one.
"""

import json
import os
import runpy
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from transformers import AutoFeatureExtractor, AutoModel, AutoModelForCTC

from converters.huggingface import import_huggingface_model
from tests.helpers.models import config_of, randomly_gated, ungated
from tests.helpers.stages import ENVIRONMENT, ROOT, run
from utils.checkpoint import save_checkpoint
from wav2vec2 import wav2vec2_model
from wav2vec2.model import normalize

transformers.utils.logging.disable_progress_bar()
pytestmark = pytest.mark.filterwarnings(
    "ignore:Support for mismatched key_padding_mask",  # transformers' own WavLM
    "ignore:.*is deprecated and will be removed in v6",
)

CLASSES = {"hubert": "Hubert", "wav2vec2": "Wav2Vec2", "wavlm": "WavLM"}
LARGE = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}


@pytest.fixture(autouse=True)
def one_thread():
    """More threads slow these models down."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def transformers_model(family, **changes):
    """A tiny model of transformers' own with random weights, norms and biases too."""
    torch.manual_seed(0)
    options = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "conv_dim": [16] * 7,
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 4,
        **({"num_buckets": 32, "max_bucket_distance": 80} if family == "wavlm" else {}),
        **changes,
    }
    config = getattr(transformers, f"{CLASSES[family]}Config")(**options)
    model = getattr(transformers, f"{CLASSES[family]}Model")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def pruned_model(family):
    """A model with some channels, heads and features and two whole branches cut."""
    model = randomly_gated(family, seed=2, closed=0.4).eval()
    layers = model.encoder.transformer.layers
    for gate in model.gates():
        if gate.n_in == 1:
            gate.log_alpha.data.fill_(4.0)
    closed = [layers[1].attention.hard_concrete_for_layer, layers[2].feed_forward.hard_concrete_for_layer]
    if "wavlm" in family:  # this one has no head left, and stays for its position bias
        closed.append(layers[0].attention.hard_concrete_for_heads)
    for gate in closed:
        gate.log_alpha.data.fill_(-20.0)
    model.prune()
    return model


def run_in_process(*flags):
    """Runs export_to_hf.py in this process, which saves the time of importing torch and transformers."""
    argv, sys.argv = sys.argv, ["export_to_hf.py", *map(str, flags)]
    try:
        runpy.run_path(str(ROOT / "export_to_hf.py"), run_name="__main__")
    except SystemExit as exit:
        return exit.code
    finally:
        sys.argv = argv
    return 0


def export(model, folder):
    ckpt = folder.with_suffix(".pth")
    save_checkpoint(ckpt, model.eval())
    assert run_in_process("--ckpt", ckpt, "--out", folder) == 0
    return folder


def load(folder, auto=AutoModel, **options):
    return auto.from_pretrained(folder, trust_remote_code=True, **options).eval()


def batch():
    """Two utterances of 1 s and 0.7 s, and their attention mask."""
    torch.manual_seed(1)
    waveforms = 0.1 * torch.randn(2, 16_000)
    mask = (torch.arange(16_000) < torch.tensor([[16_000], [11_200]])).long()
    return waveforms * mask, mask


def largest_difference(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("size", ["base", "large"])
@pytest.mark.parametrize("family", CLASSES)
@torch.no_grad()
def test_an_unpruned_export_computes_what_the_model_of_transformers_computes(family, size, tmp_path):
    original = transformers_model(family, **(LARGE if size == "large" else {}))
    ours = import_huggingface_model(original, size == "large")
    exported = load(export(ours, tmp_path / "model"))
    waveforms, mask = batch()
    for attention_mask in (None, mask):
        theirs = original(waveforms, attention_mask=attention_mask, output_hidden_states=True)
        output = exported(waveforms, attention_mask=attention_mask, output_hidden_states=True)
        # Releases differ in whether the last entry has been through the final layer norm; ours has.
        expected = [*theirs.hidden_states[:-1], theirs.last_hidden_state]
        assert len(output.hidden_states) == len(expected) == 4
        for state, state_of_theirs in zip(output.hidden_states, expected, strict=True):
            assert largest_difference(state, state_of_theirs) < 1e-5
        assert torch.equal(output.last_hidden_state, output.hidden_states[-1])
        as_tuple = exported(waveforms, attention_mask, output_hidden_states=True, return_dict=False)
        assert torch.equal(as_tuple[0], output[0]) and len(as_tuple[1]) == 4
    lengths = original._get_feat_extract_output_lengths(mask.sum(-1))
    assert torch.equal(exported._get_feat_extract_output_lengths(mask.sum(-1)), lengths)


@pytest.mark.parametrize("family", ["hubert_base", "hubert_large", "wavlm_base", "wavlm_large"])
@torch.no_grad()
def test_a_pruned_export_computes_what_the_checkpoint_computes(family, tmp_path):
    model = pruned_model(family)
    folder = export(model, tmp_path / "model")
    extractor = AutoFeatureExtractor.from_pretrained(folder)
    exported = load(folder)
    assert model.config["encoder_use_attention"][1] is False
    assert model.config["encoder_use_feed_forward"][2] is False
    waveforms, mask = batch()
    lengths = mask.sum(-1)
    inputs = extractor(
        [w[:n].numpy() for w, n in zip(waveforms, lengths, strict=True)],
        sampling_rate=16_000,
        padding=True,
        return_tensors="pt",
    )
    assert torch.equal(inputs.attention_mask.long(), mask)
    normalized = normalize(waveforms, lengths) if model.normalize_waveform else waveforms
    # The two normalisations differ by the constants that they add to the variance.
    assert (inputs.input_values - normalized).abs().max() < 0.005
    states, frames = model.extract_features(waveforms, lengths)
    output = exported(normalized, mask, output_hidden_states=True)
    for state, ours in zip(output.hidden_states[1:-1], states[1:-1], strict=True):
        assert largest_difference(state, ours) < 1e-5
    assert largest_difference(output.last_hidden_state, model(waveforms, lengths)[0]) < 1e-5
    assert torch.equal(exported._get_feat_extract_output_lengths(lengths), frames)
    heard_by_both = exported(**inputs).last_hidden_state
    assert largest_difference(heard_by_both, output.last_hidden_state) < 0.02


def test_gradient_checkpointing_gives_the_same_gradients_and_one_tensor_is_never_trained(tmp_path):
    model = load(export(ungated("wavlm_large"), tmp_path / "model")).train()
    waveforms, mask = batch()
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable()
            assert model.is_gradient_checkpointing
        model.zero_grad()
        output = model(waveforms, mask, output_hidden_states=True)
        assert model.encoder.transformer.activation_checkpointing is checkpointed
        sum(state.square().mean() for state in output.hidden_states).backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], rtol=1e-5, atol=1e-8), name
        assert gradient.abs().max() > 0 or name.endswith("k_proj.bias"), name
    assert not any("dummy_weight" in name for name in gradients[0])
    model.freeze_feature_encoder()
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name in gradients[0] if name.startswith("feature_extractor.")}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_is_near_to_float32(dtype, tmp_path):
    folder = export(ungated("wavlm_large"), tmp_path / "model")
    waveforms, mask = batch()
    expected = load(folder)(waveforms, mask).last_hidden_state
    half = load(folder, torch_dtype=dtype)
    assert {parameter.dtype for parameter in half.parameters()} == {dtype}
    actual = half(waveforms, mask).last_hidden_state
    assert actual.dtype == dtype
    assert largest_difference(actual.float(), expected) < (0.1 if dtype == torch.bfloat16 else 0.01)


@torch.no_grad()
def test_a_checkpoint_with_an_output_layer_becomes_a_model_with_a_ctc_head(tmp_path):
    config = {
        key: False if key.count("_prune_") else value for key, value in config_of("hubert_large").items()
    }
    model = wav2vec2_model(**{**config, "aux_num_out": 7}).eval()
    folder = export(model, tmp_path / "model")
    waveforms, mask = batch()
    exported = load(folder, AutoModelForCTC)
    assert exported.config.vocab_size == 7
    logits = exported(normalize(waveforms, mask.sum(-1)), mask).logits
    assert largest_difference(logits, model(waveforms, mask.sum(-1))[0]) < 1e-5
    encoder = load(folder)
    normalized = normalize(waveforms, mask.sum(-1))
    assert torch.equal(model.aux(encoder(normalized, mask).last_hidden_state), logits)


TONES = (300, 700, 1500, 3000)
"""What the utterances below are made of: token 1 is the first tone, and so on."""


def utterances():
    """Six waveforms of three to five tones with silence between, and their tokens."""
    generator = np.random.default_rng(0)
    waveforms, labels = [], []
    time = np.arange(1600) / 16_000
    for number in range(6):
        tokens = generator.integers(1, len(TONES) + 1, size=3 + number % 3)
        parts = [np.zeros(400)]
        for token in tokens:
            parts += [0.3 * np.sin(2 * np.pi * TONES[token - 1] * time), np.zeros(960)]
        waveform = np.concatenate(parts)
        waveforms.append((waveform + 0.01 * generator.standard_normal(len(waveform))).astype(np.float32))
        labels.append(tokens.tolist())
    return waveforms, labels


def decode(logits, frames):
    """The tokens of the best path of CTC."""
    result = []
    for row, length in zip(logits.argmax(-1), frames, strict=True):
        path = torch.unique_consecutive(row[:length]).tolist()
        result.append([token for token in path if token != 0])
    return result


# What a user's program does with the fine-tuned model, where this project is not installed.
READER = """
import sys
sys.modules["wav2vec2"] = None
import torch
from transformers import AutoModel, AutoModelForCTC

folder, inputs, outputs = sys.argv[1:]
inputs = torch.load(inputs)
model = AutoModelForCTC.from_pretrained(folder, trust_remote_code=True).eval()
encoder = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
with torch.no_grad():
    logits, states = model(**inputs).logits, encoder(**inputs).last_hidden_state
torch.save({"logits": logits, "states": states}, outputs)
"""


def test_a_ctc_head_learns_a_handful_of_utterances_and_predicts_the_same_when_loaded_again(tmp_path):
    torch.manual_seed(0)
    folder = export(pruned_model("wavlm_base"), tmp_path / "model")
    extractor = AutoFeatureExtractor.from_pretrained(folder)
    model = AutoModelForCTC.from_pretrained(
        folder,
        trust_remote_code=True,
        vocab_size=len(TONES) + 1,
        ctc_loss_reduction="mean",
        ctc_zero_infinity=True,
        layerdrop=0.0,
    )
    assert model.config.encoder_layer_drop == 0.0 and model.lm_head.weight.std() < 0.03
    waveforms, labels = utterances()
    inputs = extractor(waveforms, sampling_rate=16_000, padding=True, return_tensors="pt")
    dataset = [{"input_values": w, "labels": tokens} for w, tokens in zip(waveforms, labels, strict=True)]

    def collate(items):
        padded = nn.utils.rnn.pad_sequence(
            [torch.tensor(item["labels"]) for item in items], batch_first=True, padding_value=-100
        )
        normalized = extractor(
            [item["input_values"] for item in items],
            sampling_rate=16_000,
            padding=True,
            return_tensors="pt",
        )
        return {**normalized, "labels": padded}

    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=str(tmp_path / "run"),
            max_steps=150,
            learning_rate=1e-2,
            warmup_steps=20,
            per_device_train_batch_size=6,
            gradient_checkpointing=True,
            remove_unused_columns=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=dataset,
        eval_dataset=dataset,
        data_collator=collate,
    )
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.05
    after = model.state_dict()
    untouched = {name for name in before if before[name].numel() and torch.equal(before[name], after[name])}
    # The gate of the position bias has no head to act on in the first layer.
    not_trained = ("dummy_weight", "remaining_heads", "layers.0.attention.gru_rel_pos")
    assert [name for name in untouched if not any(part in name for part in not_trained)] == []

    model.eval()
    with torch.no_grad():
        logits = model(**inputs).logits
        states = model.pruned_speech(**inputs).last_hidden_state
    frames = model._get_feat_extract_output_lengths(inputs.attention_mask.sum(-1))
    assert decode(logits, frames) == labels

    model.save_pretrained(tmp_path / "tuned")
    files = {name: tmp_path / name for name in ("reader.py", "inputs.pt", "outputs.pt")}
    files["reader.py"].write_text(READER)
    torch.save(dict(inputs), files["inputs.pt"])
    subprocess.run(
        [sys.executable, files["reader.py"], tmp_path / "tuned", files["inputs.pt"], files["outputs.pt"]],
        env=ENVIRONMENT,
        cwd=tmp_path,
        check=True,
        timeout=300,
    )
    loaded = torch.load(files["outputs.pt"])
    assert torch.equal(loaded["logits"], logits)
    assert torch.equal(loaded["states"], states)


def test_the_model_card_says_what_is_known_of_the_run(tmp_path):
    ckpts = tmp_path / "exp" / "ckpts"
    save_checkpoint(ckpts / "final.pth", ungated("hubert_base"))
    stage = {
        "flags": {"teacher_ckpt": "/home/someone/pretrained/hubert.pth", "target_sparsity": 0.75},
        "sessions": [{"started": "2026-01-02T03:04:05+00:00", "machine": {"host": "secret-node"}}],
    }
    (tmp_path / "exp" / "run.json").write_text(json.dumps({"distill": stage}))
    process = run("export_to_hf.py", "--ckpt", ckpts / "final.pth", "--out", tmp_path / "student")
    model = ungated("hubert_base")
    size = sum(parameter.numel() for parameter in model.parameters())
    assert f"{size:,} parameters" in process.stdout
    card = (tmp_path / "student" / "README.md").read_text()
    assert f"| parameters | {size:,} |" in card
    assert "| feed-forward features | 64, 64, 64 |" in card
    assert "### distill" in card and "- target_sparsity: `0.75`" in card and "2026-01-02" in card
    assert "- teacher_ckpt: `hubert.pth`" in card
    assert "someone" not in card and "secret-node" not in card
    names = {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"}
    assert names < set(os.listdir(tmp_path / "student"))
    assert os.listdir(tmp_path) == ["exp", "student"] or set(os.listdir(tmp_path)) == {"exp", "student"}


def test_mistakes_are_one_sentence_and_leave_nothing_behind(tmp_path, capsys):
    save_checkpoint(tmp_path / "gated.pth", randomly_gated("hubert_base", seed=0))
    save_checkpoint(tmp_path / "whole.pth", ungated("hubert_base"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "run.json").write_text("[1")
    for flags, words in (
        (("gated.pth", "new"), ("gated.pth", "prune.py", "save_final_ckpt.py")),
        (("missing.pth", "new"), ("missing.pth", "no such file")),
        (("whole.pth", "new"), ("run.json", "damaged")),
        (("whole.pth", "full"), ("full", "already there")),
        (("whole.pth", "a.b"), ("a.b", "a-b")),
    ):
        if flags[1] in ("full", "a.b"):
            (tmp_path / "run.json").unlink(missing_ok=True)
        assert run_in_process("--ckpt", tmp_path / flags[0], "--out", tmp_path / flags[1]) == 2
        error = capsys.readouterr().err
        assert error.startswith("export_to_hf.py: error: ") and error.count("\n") == 1
        assert all(word in error for word in words), error
    assert {path.name for path in tmp_path.iterdir()} == {"gated.pth", "whole.pth", "full"}
    assert os.listdir(tmp_path / "full") == ["notes.txt"]


def test_a_failing_comparison_leaves_no_folder(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "model.pth", ungated("hubert_base"))
    script = runpy.run_path(str(ROOT / "export_to_hf.py"))
    main = script["main"]
    monkeypatch.setitem(main.__globals__, "TOLERANCE", -1.0)
    monkeypatch.setattr(
        sys,
        "argv",
        ["export_to_hf.py", "--ckpt", str(tmp_path / "model.pth"), "--out", str(tmp_path / "out")],
    )
    with pytest.raises(ValueError, match="hidden states differ by"):
        main()
    assert os.listdir(tmp_path) == ["model.pth"]
