"""Exports for Hugging Face: what transformers computes with them, fine-tuning, and what is refused.

They test the release of transformers that is installed; docs/huggingface.md runs them with an older one.
"""

import argparse
import json
import platform
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoFeatureExtractor, AutoModel, AutoModelForCTC, dynamic_module_utils

from converters.huggingface import import_huggingface_model, load_huggingface
from exports import huggingface
from tests.helpers.convert import CLASSES, converted, hf_model, refused, save_recogniser
from tests.helpers.convert import load as load_checkpoint
from tests.helpers.models import FAMILIES, randomly_gated, ungated, with_absent_branches
from tests.helpers.stages import ENVIRONMENT, call
from utils.checkpoint import save_checkpoint
from utils.compare import relative_difference
from utils.files import UserError
from utils.run_record import RunLog
from utils.vocabulary import Vocabulary
from wav2vec2.model import normalize

transformers.utils.logging.disable_progress_bar()
pytestmark = pytest.mark.filterwarnings(
    "ignore:Support for mismatched key_padding_mask",  # transformers' own WavLM
    "ignore:.*is deprecated and will be removed in v6",
)


def export(model, folder):
    huggingface.export(model.eval(), folder, {})
    return folder


def load(folder, auto=AutoModel, **options):
    return auto.from_pretrained(folder, trust_remote_code=True, **options).eval()


def batch():
    """Two utterances of 1 s and 0.7 s, and their attention mask."""
    torch.manual_seed(1)
    waveforms = 0.1 * torch.randn(2, 16_000)
    mask = (torch.arange(16_000) < torch.tensor([[16_000], [11_200]])).long()
    return waveforms * mask, mask


def extract(extractor, waveforms):
    arrays = [waveform.numpy() for waveform in waveforms]
    return extractor(arrays, sampling_rate=16_000, padding=True, return_tensors="pt")


@pytest.mark.parametrize("size", ["base", "large"])
@pytest.mark.parametrize("family", CLASSES)
@torch.no_grad()
def test_an_unpruned_export_equals_the_model_of_transformers(family, size, tmp_path):
    original = hf_model(family, size)
    exported = load(export(import_huggingface_model(original, size == "large"), tmp_path / "model"))
    waveforms, mask = batch()
    for attention_mask in (None, mask):
        theirs = original(waveforms, attention_mask=attention_mask, output_hidden_states=True)
        output = exported(waveforms, attention_mask=attention_mask, output_hidden_states=True)
        # Releases differ in whether the last entry has been through the final layer norm; ours has.
        expected = [*theirs.hidden_states[:-1], theirs.last_hidden_state]
        assert relative_difference(output.hidden_states, expected) < 1e-5
        assert torch.equal(output.last_hidden_state, output.hidden_states[-1])
        as_tuple = exported(waveforms, attention_mask, output_hidden_states=True, return_dict=False)
        assert torch.equal(as_tuple[0], output[0]) and len(as_tuple[1]) == 4
    lengths = original._get_feat_extract_output_lengths(mask.sum(-1))
    assert torch.equal(exported._get_feat_extract_output_lengths(mask.sum(-1)), lengths)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_pruned_export_equals_the_checkpoint(family, tmp_path):
    model = with_absent_branches(family)
    folder = export(model, tmp_path / "model")
    exported = load(folder)
    waveforms, mask = batch()
    expected, frames = model(waveforms, mask.sum(-1))
    assert torch.equal(exported._get_feat_extract_output_lengths(mask.sum(-1)), frames)
    normalized = normalize(waveforms, mask.sum(-1)) if model.normalize_waveform else waveforms
    assert relative_difference(exported(normalized, mask)[:1], [expected]) < 1e-5
    inputs = extract(AutoFeatureExtractor.from_pretrained(folder), [waveforms[0], waveforms[1, :11_200]])
    # The two normalisations differ by the constants that they add to the variance.
    assert (inputs.input_values - normalized).abs().max() < 0.005
    assert relative_difference(exported(**inputs)[:1], [expected]) < 0.02


def test_checkpointing_recomputes_and_keeps_the_gradients(tmp_path):
    model = load(export(ungated("wavlm_large"), tmp_path / "model")).train()
    waveforms, mask = batch()
    computed, gradients = [], []
    for layer in model.encoder.transformer.layers:
        layer.feed_forward.register_forward_pre_hook(lambda *_: computed.append(1))

    def train_once():
        computed.clear()
        model.zero_grad()
        output = model(waveforms, mask, output_hidden_states=True)
        sum(state.square().mean() for state in output.hidden_states).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
        return len(computed)

    assert train_once() == 3
    model.gradient_checkpointing_enable()
    assert train_once() == 6
    assert all(g.abs().max() > 0 or name.endswith("k_proj.bias") for name, g in gradients[0].items())
    model.freeze_feature_encoder()
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name in gradients[0] if name.startswith("feature_extractor.")}
    # Nothing before the last layer is trained, as with adapters.
    model.requires_grad_(False).encoder.transformer.layers[-1].requires_grad_(True)
    assert train_once() == 4
    for recomputed in gradients[1:]:
        for name, gradient in recomputed.items():
            assert torch.allclose(gradient, gradients[0][name], rtol=1e-5, atol=1e-8), name


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.01)])
@torch.no_grad()
def test_half_precision_is_near_to_float32(dtype, tolerance, tmp_path):
    folder = export(ungated("wavlm_large"), tmp_path / "model")
    half = load(folder, torch_dtype=dtype)
    assert {parameter.dtype for parameter in half.parameters()} == {dtype}
    actual = half(*batch()).last_hidden_state
    assert actual.dtype == dtype
    assert relative_difference([actual.float()], load(folder)(*batch())[:1]) < tolerance


@torch.no_grad()
def test_torch_compile_finds_one_graph(tmp_path):
    model = load(export(with_absent_branches("wavlm_base"), tmp_path / "model"))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert relative_difference(compiled(*batch())[:1], model(*batch())[:1]) < 1e-5


def head_of(original, folder, auto, **options):
    """The export in ``folder`` with the head of a model of transformers, and the vector of masked frames."""
    model = load(folder, auto, **options)
    prefix = f"{original.base_model_prefix}."
    for name, tensor in original.state_dict().items():
        if not name.startswith(prefix) or ("masked" in name and "mask_time_prob" in options):
            model.state_dict()[name.replace(prefix, "pruned_speech.")].copy_(tensor)
    return model


@pytest.fixture(scope="module")
def recognisers(tmp_path_factory):
    """Two folders with the same CTC model and processor: of transformers, and of this project."""
    theirs, ours = (tmp_path_factory.mktemp("ctc") / name for name in ("theirs", "ours"))
    original = hf_model("hubert", head="ForCTC")
    original.save_pretrained(theirs)
    export(import_huggingface_model(original, False), ours)
    head_of(original, ours, AutoModelForCTC, vocab_size=12).save_pretrained(ours)
    letters = {letter: i for i, letter in enumerate(["<pad>", "|", *"ETAOINSHRD"])}
    (theirs / "letters.json").write_text(json.dumps(letters))
    special = {"pad_token": "<pad>", "unk_token": "<pad>", "bos_token": None, "eos_token": None}
    tokenizer = transformers.Wav2Vec2CTCTokenizer(theirs / "letters.json", **special)
    processor = transformers.Wav2Vec2Processor(AutoFeatureExtractor.from_pretrained(ours), tokenizer)
    for folder in (theirs, ours):
        processor.save_pretrained(folder)
    return theirs, ours


OLD = int(transformers.__version__[0]) < 5


def pipeline(task, folder):
    """transformers 4.48 finds no extractor and no tokenizer for a type of model that it does not know."""
    given = {"feature_extractor": AutoFeatureExtractor.from_pretrained(folder)} if OLD else {}
    if OLD and "speech" in task:
        given["tokenizer"] = transformers.Wav2Vec2CTCTokenizer.from_pretrained(folder)
    return transformers.pipeline(task, str(folder), trust_remote_code=True, **given)


@pytest.mark.parametrize(
    "how",
    [
        {"chunk_length_s": 2},
        {"chunk_length_s": 3, "stride_length_s": (1, 0.5), "return_timestamps": "word", "batch_size": 2},
        {"return_timestamps": "char"},
    ],
)
def test_a_pipeline_reads_and_times_as_with_hubert(how, recognisers):
    task, waveform = "automatic-speech-recognition", 0.1 * torch.randn(160_000).numpy()
    theirs, ours = (pipeline(task, folder) for folder in recognisers)
    expected = theirs(waveform.copy(), **how)
    assert ours(waveform.copy(), **how) == expected and len(expected["text"]) > 50
    if "return_timestamps" in how:
        assert expected["chunks"][-1]["timestamp"][1] > 9


@pytest.mark.parametrize("norm", ["base", pytest.param("large", marks=pytest.mark.slow)])
def test_a_kept_head_transcribes_as_the_source(norm, tmp_path, monkeypatch):
    """With the tokenizer and the extractor of the source, and with what is made of its vocabulary."""
    save_recogniser(tmp_path / "source", "Hubert", norm)
    ckpt = converted("convert_hubert_from_hf.py", tmp_path / "source", tmp_path, "--keep_head")
    waveform = 0.1 * torch.randn(48_000).numpy()
    task = "automatic-speech-recognition"
    theirs = pipeline(task, tmp_path / "source")
    for name, flags in (("with", ["--processor", tmp_path / "source"]), ("without", [])):
        call(monkeypatch, "export_to_hf", "--ckpt", ckpt, "--out", tmp_path / name, *flags)
        # Releases from 4.48 on find both for themselves.
        ours = transformers.pipeline(task, str(tmp_path / name), trust_remote_code=True)
        for how in ({}, {"chunk_length_s": 1}):
            expected = theirs(waveform.copy(), **how)["text"]
            assert ours(waveform.copy(), **how)["text"] == expected and len(set(expected)) > 1
        assert ours.model.config.pad_token_id == 11
        assert "recognise(" in (tmp_path / name / "README.md").read_text()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("size", ["base", "large"])
@torch.no_grad()
def test_a_classifier_equals_that_of_transformers(size, weighted, tmp_path):
    if OLD and weighted and size == "large":
        pytest.skip("transformers 4.48 sums the last layer after the final norm")
    options = {"num_labels": 3, "use_weighted_layer_sum": weighted, "classifier_proj_size": 24}
    original = hf_model("hubert", size, "ForSequenceClassification", **options)
    folder = export(import_huggingface_model(original, size == "large"), tmp_path / "model")
    auto = transformers.AutoModelForAudioClassification
    model = head_of(original, folder, auto, **options, id2label={0: "a", 1: "b", 2: "c"})
    waveforms, mask = batch()
    for attention_mask in (None, mask):
        inputs = {"attention_mask": attention_mask, "labels": torch.tensor([0, 2])}
        expected, actual = original(waveforms, **inputs), model(waveforms, **inputs)
        assert torch.allclose(actual.logits, expected.logits, atol=1e-5)
        assert abs(actual.loss - expected.loss) < 1e-5
    model.save_pretrained(folder)
    classify = pipeline("audio-classification", folder)
    waveform = waveforms[0].numpy()
    values = AutoFeatureExtractor.from_pretrained(folder)(waveform, sampling_rate=16_000, return_tensors="pt")
    scores = {entry["label"]: entry["score"] for entry in classify(waveform)}
    expected = original(**values).logits.softmax(-1)[0]
    assert torch.allclose(torch.tensor([scores[label] for label in "abc"]), expected, atol=1e-4)


def test_spec_augment_masks_what_transformers_masks(tmp_path):
    spec = {"mask_time_prob": 0.3, "mask_time_length": 4, "mask_feature_prob": 0.2, "mask_feature_length": 6}
    still = dict.fromkeys([key for key in transformers.HubertConfig().to_dict() if "drop" in key], 0.0)
    original = hf_model("wav2vec2", head="ForCTC", **spec, **still).train()
    folder = export(import_huggingface_model(original.eval(), False), tmp_path / "model")
    model = head_of(original.train(), folder, AutoModelForCTC, vocab_size=12, **spec).train()
    waveforms, mask = batch()
    for attention_mask in (None, mask):
        logits = []
        for each in (original, model):
            np.random.seed(5)
            logits.append(each(waveforms, attention_mask=attention_mask).logits)
        assert torch.allclose(logits[1], logits[0], atol=1e-5)
        unmasked = model.eval()(waveforms, attention_mask=attention_mask).logits
        assert not torch.allclose(logits[1], unmasked, atol=0.1)
        model.train()
    logits[1].square().mean().backward()
    assert model.pruned_speech.masked_spec_embed.grad.abs().max() > 0
    for options in ({}, {**spec, "apply_spec_augment": False}):
        plain = load(folder, AutoModelForCTC, **options).train()
        assert plain.pruned_speech.masked_spec_embed is None
        assert torch.equal(plain(waveforms).logits, plain(waveforms).logits)


@torch.no_grad()
def test_a_masked_group_norm_is_a_key_of_the_config(tmp_path):
    with_head = load(export(ungated("hubert_base", aux_num_out=5), tmp_path / "head"), AutoModelForCTC)
    assert with_head.config.masked_group_norm is True
    model = load(export(ungated("hubert_base"), tmp_path / "model"), masked_group_norm=True)
    waveforms, mask = batch()
    together = model(waveforms, mask).last_hidden_state[1, :34]
    assert relative_difference([together], [model(waveforms[1:, :11_200]).last_hidden_state[0]]) < 1e-5
    model.save_pretrained(tmp_path / "again")
    assert load(tmp_path / "again").config.masked_group_norm is True


# A rank of a user's own training, as accelerate starts it for Trainer with gradient checkpointing.
RANK = """
import sys, torch, transformers
torch.distributed.init_process_group("gloo")
torch.manual_seed(torch.distributed.get_rank())
options = {"layerdrop": 0.7, "mask_time_prob": 0.05, "mask_time_min_masks": 0, "trust_remote_code": True}
if sys.argv[1] == "ctc":
    model = transformers.AutoModelForCTC.from_pretrained("model", vocab_size=5, **options)
else:
    auto = transformers.AutoModelForAudioClassification
    model = auto.from_pretrained("model", num_labels=5, use_weighted_layer_sum=True, **options)
model.train().gradient_checkpointing_enable()
parallel = torch.nn.parallel.DistributedDataParallel(model)
labels = torch.tensor([[1, 2], [3, 4]]) if sys.argv[1] == "ctc" else torch.tensor([1, 2])
for _ in range(5):
    parallel(0.1 * torch.randn(2, 8000), labels=labels).loss.backward()
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("task", "family"), [("ctc", "wavlm_base"), ("classes", "hubert_large")])
def test_ddp_trains_with_layer_drop_and_checkpointing(task, family, tmp_path):
    export(with_absent_branches(family), tmp_path / "model")
    (tmp_path / "rank.py").write_text(RANK)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    process = subprocess.run(
        [*launch, "rank.py", task], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stderr


def test_an_export_converts_back_and_no_code_runs(recognisers, tmp_path):
    model, copy = with_absent_branches("wavlm_large"), tmp_path / "model"
    export(model, copy)
    for code in copy.glob("*.py"):
        code.write_text("raise SystemExit('this code must not run')")
    again = load_checkpoint(converted("convert_wavlm_from_hf.py", copy, tmp_path))
    assert again.config == model.config
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    tuned, remark = load_huggingface(str(recognisers[1]), "wav2vec2")
    assert tuned.aux is None and "left out: lm_head" in remark
    assert "convert it with convert_wavlm_from_hf.py" in refused(
        "convert_hubert_from_hf.py", copy, tmp_path / "x"
    )
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"encoder_num_layers": 2}))
    assert "encoder_use_attention has 3 entries" in refused("convert_wavlm_from_hf.py", copy, tmp_path / "x")


def utterances():
    """Six waveforms and their labels: three to five tones with silence between."""
    pairs, time = [], torch.arange(1600) / 16_000
    for number in range(6):
        tokens = torch.randint(1, 5, (3 + number % 3,))
        tones = [0.3 * torch.sin(6.2832 * (300, 700, 1500, 3000)[token - 1] * time) for token in tokens]
        waveform = torch.cat([torch.zeros(400), *(torch.cat([tone, torch.zeros(960)]) for tone in tones)])
        pairs.append((waveform + 0.01 * torch.randn_like(waveform), tokens))
    return pairs


# What a user's program does with the fine-tuned model, where this project is not installed.
READER = """
import sys
sys.modules["wav2vec2"] = None
import torch
import transformers

inputs = torch.load("inputs.pt")
autos = transformers.AutoModelForCTC, transformers.AutoModel
with torch.no_grad():
    models = [auto.from_pretrained("tuned", trust_remote_code=True).eval() for auto in autos]
    torch.save([model(**inputs)[0] for model in models], "outputs.pt")
"""


@pytest.mark.slow
def test_a_ctc_head_learns_and_predicts_the_same_loaded_again(tmp_path):
    torch.manual_seed(0)
    folder = export(with_absent_branches("wavlm_base"), tmp_path / "model")
    extractor = AutoFeatureExtractor.from_pretrained(folder)
    ctc = {"vocab_size": 5, "ctc_loss_reduction": "mean", "ctc_zero_infinity": True}
    model = load(folder, AutoModelForCTC, **ctc, layerdrop=0.0)
    assert model.config.encoder_layer_drop == 0.0 and model.lm_head.weight.std() < 0.03

    def collate(items):
        waveforms, labels = zip(*items, strict=True)
        padded = pad_sequence(list(labels), batch_first=True, padding_value=-100)
        return {**extract(extractor, waveforms), "labels": padded}

    dataset = utterances()
    waveforms, labels = zip(*dataset, strict=True)
    arguments = transformers.TrainingArguments(
        str(tmp_path / "run"),
        gradient_checkpointing=True,
        remove_unused_columns=False,
        use_cpu=True,
        **{"max_steps": 150, "warmup_steps": 20, "learning_rate": 1e-2, "per_device_train_batch_size": 6},
        **{"report_to": "none", "save_strategy": "no", "disable_tqdm": True},
    )
    trainer = transformers.Trainer(model, arguments, collate, train_dataset=dataset, eval_dataset=dataset)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.05

    inputs = extract(extractor, waveforms)
    with torch.no_grad():
        logits, states = model.eval()(**inputs).logits, model.pruned_speech(**inputs).last_hidden_state
    frames = model._get_feat_extract_output_lengths(inputs.attention_mask.sum(-1))
    paths = [torch.unique_consecutive(row[:n]) for row, n in zip(logits.argmax(-1), frames, strict=True)]
    assert [path[path != 0].tolist() for path in paths] == [tokens.tolist() for tokens in labels]

    model.save_pretrained(tmp_path / "tuned")
    torch.save(dict(inputs), tmp_path / "inputs.pt")
    subprocess.run([sys.executable, "-c", READER], env=ENVIRONMENT, cwd=tmp_path, check=True, timeout=300)
    loaded = torch.load(tmp_path / "outputs.pt")
    assert torch.equal(loaded[0], logits) and torch.equal(loaded[1], states)


def test_the_wrapper_itself_imports_all_exported_modules():
    """transformers 4.48 fetches what this one file imports."""
    pattern = re.compile(r"^from \.(?: import )?(\w+)", re.MULTILINE)
    imports = {file.stem: set(pattern.findall(file.read_text())) for file in huggingface.CODE}
    others = imports.keys() - {"modeling_pruned_speech"}
    assert imports["modeling_pruned_speech"] == others == set().union(*imports.values())


def test_the_check_leaves_the_users_cache_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "cache"))
    for name in ("first", "second"):
        export(ungated("hubert_base"), tmp_path / name)
    assert {path.name for path in tmp_path.iterdir()} == {"first", "second"}
    assert not [path for path in sys.path if path.startswith(str(tmp_path))]


def test_the_command_writes_a_model_card_of_the_run(tmp_path, monkeypatch, capsys):
    model, exp = ungated("hubert_base"), tmp_path / "exp"
    save_checkpoint(exp / "ckpts" / "final.pth", model)
    flags = {"teacher_ckpt": "/home/someone/pretrained/hubert.pth", "target_sparsity": 0.75}
    for stage, made in (("distill", {}), ("prune", {"output": {"path": "another file", "sha256": "00"}})):
        with RunLog(exp, {"stage": stage, "flags": flags, "inputs": {}}, argparse.Namespace(**flags)) as log:
            log.note(**made)
    out = tmp_path / "student"
    call(monkeypatch, "export_to_hf", "--ckpt", exp / "ckpts" / "final.pth", "--out", out)
    size = sum(parameter.numel() for parameter in model.parameters())
    assert f"{size:,} parameters, no head" in capsys.readouterr().out
    card = (out / "README.md").read_text()
    wanted = [f"| parameters | {size:,} |", "| feed forward, layer by layer | 64, 64, 64 |", "### distill"]
    wanted += ["- target_sparsity: `0.75`", "- teacher_ckpt: `hubert.pth`", "- started: `20"]
    wanted += [f"- torch: `{torch.__version__}`"]
    assert not [words for words in wanted if words not in card]
    assert not [words for words in ("### prune", "someone", platform.node()) if words in card]
    contents = {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"}
    assert {path.name for path in out.iterdir()} == contents | {path.name for path in huggingface.CODE}
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o644}
    assert {path.name for path in tmp_path.iterdir()} == {"exp", "student"}


def other_tokens(folder):
    (folder / "vocab.json").write_text((folder / "vocab.json").read_text().replace("E", "X"))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda folder: (folder / "vocab.json").unlink(), "cannot read a tokenizer of one language"),
        (lambda folder: shutil.rmtree(folder), "no such folder, and no hub has it"),
        (lambda folder: save_recogniser(folder, pad_token="<unk>"), "which of them is the blank (pad_token)"),
        (other_tokens, "are not those of"),
        (lambda folder: save_recogniser(folder, norm="large"), "do_normalize (16000, True), and"),
        (lambda folder: (folder / "preprocessor_config.json").unlink(), "no feature extractor in it"),
    ],
)
def test_another_models_processor_is_refused(change, word, fails, tmp_path):
    save_recogniser(tmp_path / "source")
    ckpt = converted("convert_hubert_from_hf.py", tmp_path / "source", tmp_path, "--keep_head")
    change(tmp_path / "source")
    out = ["--out", tmp_path / "out"]
    assert word in fails("export_to_hf", "--ckpt", ckpt, *out, "--processor", tmp_path / "source")
    assert not (tmp_path / "out").exists()


def test_a_vocabulary_of_another_size_is_refused(fails, teacher, tmp_path):
    save_checkpoint(tmp_path / "a.pth", ungated("hubert_base", aux_num_out=7))
    (tmp_path / "a.vocab.json").write_text('{"<pad>": 0, "|": 1}')
    flags = ["--ckpt", tmp_path / "a.pth", "--out", tmp_path / "out"]
    assert "a.vocab.json has 2 tokens, and the head 7 outputs" in fails("export_to_hf", *flags)
    flags = ["--ckpt", teacher, "--out", tmp_path / "out", "--processor", tmp_path]
    assert "--processor belongs to a CTC head" in fails("export_to_hf", *flags)


def test_pieces_of_words_need_their_own_tokenizer(monkeypatch, capsys, tmp_path):
    save_checkpoint(tmp_path / "a.pth", ungated("hubert_base", aux_num_out=3))
    (tmp_path / "a.vocab.json").write_text('{"<pad>": 0, "\u2581the": 1, "n": 2}')
    call(monkeypatch, "export_to_hf", "--ckpt", tmp_path / "a.pth", "--out", tmp_path / "out")
    assert "a.vocab.json: has pieces of words" in capsys.readouterr().out
    assert not (tmp_path / "out" / "vocab.json").exists()


def test_mistakes_are_one_sentence_and_nothing_is_written(fails, teacher, tmp_path):
    gated = tmp_path / "gated.pth"
    save_checkpoint(gated, randomly_gated("hubert_base", seed=0))
    for ckpt, out, words in (
        (gated, tmp_path / "new", "gated.pth: its model still has gates; run prune.py"),
        (teacher, tmp_path, "is already there"),
        (teacher, tmp_path / "a.b", "name it a-b"),
    ):
        assert words in fails("export_to_hf", "--ckpt", ckpt, "--out", out)
    assert list(tmp_path.iterdir()) == [gated]


def test_an_export_that_computes_something_else_gets_no_name(tmp_path):
    model = ungated("hubert_base")
    model.encoder.transformer.layers[1].register_forward_hook(lambda *call: 1.001 * call[-1])
    with pytest.raises(UserError, match="hidden states differ by"):
        export(model, tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_a_classifier_names_labels_in_a_pipeline(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = ungated("hubert_base", aux_num_out=3).eval()
    save_checkpoint(tmp_path / "model.pth", model)
    Vocabulary(["no", "yes", "maybe"]).write(tmp_path / "model.vocab.json")
    call(monkeypatch, "export_to_hf", "--ckpt", tmp_path / "model.pth", "--out", tmp_path / "export")
    waveform = torch.randn(8_000).numpy()
    found = pipeline("audio-classification", tmp_path / "export")(waveform)
    wanted = model(torch.from_numpy(waveform)[None])[0].mean(1).softmax(-1)[0].tolist()
    scores = {each["label"]: each["score"] for each in found}
    assert scores == pytest.approx(dict(zip(["no", "yes", "maybe"], wanted, strict=True)), rel=1e-4)
