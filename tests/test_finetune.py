"""finetune.py as a user runs it, with gates, a teacher and signals; and what a head teaches a head."""

import json
import math
import re
import signal
import sys

import numpy as np
import pytest
import soundfile
import torch

import finetune
from dataset import write_manifests
from evaluation.heads import error_rates
from tests.helpers.models import without_dropout
from tests.helpers.stages import (
    as_words,
    assert_equal_to_the_bit,
    call,
    checkpoint,
    ended,
    run,
    sentence_of,
    start,
    wait_for,
    weights,
)
from tests.helpers.stages import flags as flags_of_stages
from training.arguments import distillation
from utils.checkpoint import load_model, save_checkpoint, vocabulary_path
from utils.vocabulary import Vocabulary, read_vocabulary
from wav2vec2 import wav2vec2_model

TEXTS = ["low", "high low", "low low", "high"]


@pytest.fixture(scope="module")
def tones(tmp_path_factory):
    """Utterances whose words are tones in noise, with texts, and with labels in ``labels``."""
    root, generator = tmp_path_factory.mktemp("tones"), np.random.default_rng(0)
    time, gap = np.arange(3_200) / 16_000, np.zeros(1_600)
    tone = {"low": np.sin(2 * np.pi * 200 * time), "high": np.sin(2 * np.pi * 2_000 * time)}
    rows = []
    for number in range(48):
        text = TEXTS[number % 4]
        silence = np.zeros(generator.integers(500, 4_000))
        samples = np.concatenate(
            [silence, *(part for word in text.split() for part in (0.5 * tone[word], gap))]
        )
        soundfile.write(root / f"{number}.flac", samples + generator.normal(0, 0.01, len(samples)), 16_000)
        rows.append((f"{number}.flac", len(samples), text))
    write_manifests(root, str(root), {"train": rows[:40], "valid": rows[40:]})
    labels = [(path, samples, text.split()[0]) for path, samples, text in rows]
    write_manifests(root / "labels", str(root), {"train": labels[:40], "valid": labels[40:]})
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "model.pth"
    save_checkpoint(path, wav2vec2_model(**without_dropout()))
    return path


def flags(tsv_dir, model, exp_dir, /, **changes):
    values = {
        "tsv_dir": tsv_dir,
        "train_subset": "train",
        "model": model,
        "exp_dir": exp_dir,
        "gpus": 0,
        "num_workers": 0,
        "max_updates": 6,
        "warmup_updates": 2,
        "seconds_per_batch": 3,
        "save_interval": 2,
        "log_interval": 1,
        **changes,
    }
    return as_words(**values)


def test_words_are_learnt_pruned_and_saved(tones, model, tmp_path, monkeypatch, capsys):
    exp, final = tmp_path / "exp", tmp_path / "final"
    rates = {"learning_rate": 3e-3, "warmup_updates": 10, "seconds_per_batch": 6, "log_interval": 60}
    gates = {"pruning_units": "head,interm", "target_sparsity": 0.3, "reg_learning_rate": 0.1}
    call(monkeypatch, "finetune", *flags(tones, model, exp, max_updates=40, **rates, **gates))
    cut = {"distilled_ckpt": exp / "ckpts/last.ckpt", "original_ckpt": model, "target_sparsity": 0.3}
    call(monkeypatch, "prune", *as_words(**cut))
    pruned = exp / "ckpts/pruned_hubert_base.pth"
    call(monkeypatch, "finetune", *flags(tones, pruned, final, max_updates=80, **rates))
    said = re.findall(r"valid loss_task (\S+), wer (\S+), cer (\S+)", capsys.readouterr().err)
    assert float(said[-1][0]) < 0.3 * float(said[0][0])
    trained = ["--ckpt_after_final_distill", final / "ckpts/last.ckpt"]
    call(monkeypatch, "save_final_ckpt", "--config_path", pruned, *trained)
    small, whole = load_model(final / "ckpts/pruned_hubert_base.pth"), load_model(model)
    assert 0.68 < small.count().total() / whole.count().total() < 0.71
    vocabulary = read_vocabulary(vocabulary_path(final / "ckpts/pruned_hubert_base.pth"))
    assert vocabulary.tokens == ["<pad>", "|", "g", "h", "i", "l", "o", "w"]
    rates = error_rates(small, vocabulary, tones, "valid", 10)
    assert [f"{rate:.4f}" for rate in rates.values()] == list(said[-1][1:])
    models = ["--models", final / "ckpts/pruned_hubert_base.pth", "--json", tmp_path / "rates.json"]
    call(monkeypatch, "evaluate", "--tsv_dir", tones, *models)
    [row] = json.loads((tmp_path / "rates.json").read_text())["models"]
    assert [row["wer"], row["cer"]] == pytest.approx([*rates.values()])


@pytest.mark.slow
def test_labels_are_learnt_beside_a_teacher(tones, model, tmp_path, monkeypatch, capsys):
    changes = {"task": "classify", "teacher_ckpt": model, "distill_layers": "0.3", "max_updates": 60}
    rates = {"learning_rate": 3e-3, "warmup_updates": 10, "seconds_per_batch": 6, "log_interval": 60}
    call(monkeypatch, "finetune", *flags(tones / "labels", model, tmp_path / "exp", **changes, **rates))
    said = re.findall(r"loss_task (\S+), accuracy (\S+)", capsys.readouterr().err)
    assert float(said[-1][0]) < 0.4 < 0.6 < float(said[0][0]) and float(said[-1][1]) > 0.8
    assert json.loads(vocabulary_path(tmp_path / "exp/ckpts/last.ckpt").read_text()) == {"high": 0, "low": 1}
    [projection, _] = [
        name for name in weights(tmp_path / "exp") if name.startswith("distill_linear_projs.0")
    ]
    assert weights(tmp_path / "exp")[projection].abs().sum() > 32


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_bit(tones, model, tmp_path):
    changes = {"pruning_units": "interm", "seconds_per_batch": 1.5, "max_updates": 12}
    run("finetune.py", *flags(tones, model, tmp_path / "whole", **changes))
    process = start("finetune.py", *flags(tones, model, tmp_path / "stopped", **changes))
    wait_for(process, "update 3/12")
    process.send_signal(signal.SIGTERM)
    assert ended(process)[0] == 143
    assert 3 <= checkpoint(tmp_path / "stopped")["global_step"] < 12
    run("finetune.py", *flags(tones, model, tmp_path / "stopped", **changes))
    assert_equal_to_the_bit(weights(tmp_path / "whole"), weights(tmp_path / "stopped"))


@pytest.mark.parametrize("stage", ["distill", "final_distill"])
def test_a_teachers_head_teaches_the_students(stage, manifests, tmp_path, monkeypatch):
    torch.manual_seed(0)
    save_checkpoint(tmp_path / "teacher.pth", wav2vec2_model(**without_dropout(aux_num_out=5)))
    torch.manual_seed(1)
    save_checkpoint(tmp_path / "student.pth", wav2vec2_model(**without_dropout(aux_num_out=5)))
    changes = {"student_ckpt": tmp_path / "student.pth", "sparsity_warmup_updates": None, "max_updates": 3}
    changes |= {"warmup_updates": 1, "learning_rate": 1e-2, "num_workers": 0}
    moved = {}
    for weight in (None, 0, 5):
        folders = manifests, tmp_path / "teacher.pth", tmp_path / str(weight)
        call(monkeypatch, stage, *flags_of_stages(*folders, head_weight=weight, **changes))
        before = load_model(tmp_path / "student.pth").aux.weight
        moved[weight] = (weights(tmp_path / str(weight))["student_model.aux.weight"] - before).norm().item()
    assert moved[0] == 0 and moved[None] > 1e-3 and not math.isclose(moved[None], moved[5])


MISTAKES = [
    ({"model": "no.pth"}, "no.pth: no such file"),
    ({"target_sparsity": 0.5}, "--target_sparsity belongs to --pruning_units"),
    ({"cos_weight": 2}, "--cos_weight belongs to --teacher_ckpt"),
    ({"pruning_units": "heads"}, "heads is none of conv"),
    ({"vocab": "no.json"}, "no.json: cannot be read"),
    ({"vocab": "labels.json"}, "has no <pad>, the blank that --task ctc needs"),
    ({"vocab": "few.json"}, "'hi' is not among the tokens of few.json"),
    ({"vocab": "wrong.json"}, "wrong.json: is no vocabulary"),
    ({"model": "nameless.pth"}, "names them: name them with --vocab"),
    ({"model": "short.pth"}, "short.vocab.json has 2 tokens, and the head 5 outputs"),
    ({"task": "classify", "vocab": "labels.json"}, "the label 'high low' is not among those of labels.json"),
    ({"tsv_dir": "unlabelled"}, "has no texts or labels"),
]


@pytest.mark.parametrize("changes, words", MISTAKES)
def test_a_mistake_is_one_sentence(changes, words, tones, model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, tokens in {"labels": ["low", "high"], "few": ["<pad>", "|", "l", "o", "w", "g"]}.items():
        Vocabulary(tokens).write(f"{name}.json")
    (tmp_path / "wrong.json").write_text('{"a": 1}')
    for name in ("nameless", "short"):
        save_checkpoint(f"{name}.pth", wav2vec2_model(**without_dropout(aux_num_out=5)))
    Vocabulary(["<pad>", "h"]).write("short.vocab.json")
    write_manifests("unlabelled", str(tones), {"train": [("0.flac", 6000)]})
    arguments = flags(tones, model, tmp_path / "exp", **changes)
    assert words in sentence_of(monkeypatch, capsys, "finetune", *arguments)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_the_report_reads_a_run_of_fine_tuning(tones, model, tmp_path, monkeypatch, capsys):
    call(monkeypatch, "finetune", *flags(tones, model, tmp_path / "exp", pruning_units="interm"))
    call(monkeypatch, "report", *as_words(teacher_ckpt=model, root_dir=tmp_path / "exp", repeats=1))
    assert "target 0.7500" in capsys.readouterr().out
    report = json.loads((tmp_path / "exp/report/report.json").read_text())
    assert report["stages"]["distill"]["stage"] == "finetune" and report["distance"] is None
    assert {"valid_wer", "valid_cer", "train_loss_task"} <= report["training"]["distill"].keys()


def test_a_teachers_head_teaches_only_when_it_is_asked_to(tones, model, tmp_path, monkeypatch):
    teacher = wav2vec2_model(**without_dropout(aux_num_out=5))
    for given, weight in (({}, 0.0), ({"head_weight": 2}, 2.0)):
        words = flags(tones, model, tmp_path, teacher_ckpt=model, distill_layers="0.3", **given)
        monkeypatch.setattr(sys, "argv", ["finetune.py", *words])
        assert distillation(finetune.parse_args(), teacher, teacher)["head_weight"] == weight
