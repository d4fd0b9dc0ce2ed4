"""evaluate.py: labelled recordings in, an honest accuracy out."""

import itertools
import json
import shutil

import numpy as np
import pytest
import soundfile
import soxr
import torch
from transformers import HubertConfig, HubertModel

from evaluation.classifier import interval, judge
from evaluation.data import make_folds, read_examples
from evaluation.features import make_batches, model_features
from tests.helpers.stages import call, run
from utils.checkpoint import load_model
from utils.files import UserError

SPEAKERS = {"ann": (1.0, 8_000), "bob": (1.03, 16_000), "cid": (1.06, 22_050), "dee": (1.09, 44_100)}
"""The factor of each voice's pitch, and its sampling rate."""


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Hums and hisses of four voices at four sampling rates, and the manifests of three tasks: ``sound`` is
    easy, ``voice`` has the speaker as its label, and ``coin`` has labels by the toss of a coin."""
    root = tmp_path_factory.mktemp("recordings")
    random = np.random.default_rng(0)
    rows = {"sound": [], "voice": [], "coin": []}
    for label, speaker, number in itertools.product(("hum", "hiss"), SPEAKERS, range(12)):
        factor, rate = SPEAKERS[speaker]
        (root / label).mkdir(exist_ok=True)
        time = np.arange(int(8_000 * random.uniform(0.2, 0.4))) / 8_000
        hum = np.sin(2 * np.pi * 150 * factor * random.uniform(0.85, 1.15) * time)
        noise = random.standard_normal(len(time))
        samples = 0.1 * hum + 0.001 * noise if label == "hum" else 0.1 * noise
        # What the lowest rate can hold: else the rate would give away the speaker.
        samples = soxr.resample(samples, 8_000, rate)
        path = f"{label}/{speaker}_{number}.{'flac' if number % 2 else 'wav'}"
        # Two channels now and then, of which the mean is taken.
        soundfile.write(root / path, np.stack([samples] * 2, 1) if number == 0 else samples, rate)
        rows["sound"].append(f"{path}\t{label}\t{speaker}")
        rows["voice"].append(f"{path}\t{speaker}\t{speaker}")
        rows["coin"].append(f"{path}\t{'heads' if random.random() < 0.5 else 'tails'}\t{speaker}")
    for task, lines in rows.items():
        (root / f"{task}.tsv").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A model that transformers saved, of another number of layers than the teacher's, with layer norms."""
    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    small |= {"conv_dim": (16,) * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
    path = tmp_path_factory.mktemp("other")
    HubertModel(HubertConfig(**small, feat_extract_norm="layer")).save_pretrained(path)
    return path


@pytest.fixture
def evaluate(monkeypatch, tmp_path):
    """Runs evaluate.py in this process; returns its results."""

    def evaluate(*flags):
        call(monkeypatch, "evaluate", *flags, "--json", tmp_path / "out.json")
        return json.loads((tmp_path / "out.json").read_text())

    return evaluate


def test_json_table_and_picture_show_every_model(recordings, teacher, other, tmp_path):
    out, picture = tmp_path / "made" / "sound.json", tmp_path / "sound.png"
    teacher = shutil.copy(teacher, tmp_path / "$x_$.pth")  # no formula, though matplotlib knows such
    files = ("--models", teacher, "--hf", other, "--json", out, "--picture", picture)
    process = run("evaluate.py", "--data", recordings, "--task", "sound", *files)
    result = json.loads(out.read_text())
    assert (result["recordings"], result["labels"]) == (96, {"hiss": 48, "hum": 48})
    assert (result["speakers"], result["chance"]) == (4, 0.5)
    assert (result["folds"], result["speakers_kept_apart"]) == (4, True)
    assert [row["name"] for row in result["models"]] == ["log-mel", str(teacher), str(other)]
    mel, first, second = result["models"]
    assert (mel["parameters"], mel["layers"], mel["dimension"]) == (None, 1, 80)
    assert (first["layers"], first["dimension"], second["layers"]) == (4, 32, 3)
    tensors = torch.load(teacher, weights_only=True)["state_dict"].values()
    assert first["parameters"] == sum(tensor.numel() for tensor in tensors)
    lines = process.stdout.splitlines()
    assert "96 recordings, 2 labels, 4 speakers; 4 folds with speakers kept apart" in lines[0]
    for row in result["models"]:
        low, high = row["interval"]
        assert row["accuracy"] >= (0.98 if row is mel else 0.85)
        assert 0 <= low <= row["accuracy"] <= high <= 1
        assert sum(row["layer_weights"]) == pytest.approx(1, abs=1e-5)
        assert len(row["layer_weights"]) == row["layers"]
        assert np.mean(row["fold_accuracies"]) == pytest.approx(row["accuracy"])
        assert any(row["name"] in line and f"{100 * row['accuracy']:.1f}%" in line for line in lines)
    assert set(second["differences"]) == {"log-mel", str(teacher)}
    assert second["differences"]["log-mel"]["mean"] == pytest.approx(second["accuracy"] - mel["accuracy"])
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_labels_by_the_toss_of_a_coin_are_only_guessed(evaluate, recordings):
    assert 0.25 < evaluate("--data", recordings, "--task", "coin")["models"][0]["accuracy"] < 0.75


def test_speakers_are_recognised_on_other_recordings(evaluate, recordings, capsys):
    result = evaluate("--data", recordings, "--task", "voice", "--folds", "5")
    assert (result["folds"], result["speakers_kept_apart"]) == (5, False)
    assert result["bootstrap"]["over"] == "recordings"
    assert "5 folds over recordings" in capsys.readouterr().out


def test_names_of_folders_are_labels(evaluate, recordings, tmp_path):
    shutil.copytree(recordings, tmp_path / "data", ignore=shutil.ignore_patterns("*.tsv"))
    result = evaluate("--data", tmp_path / "data")
    assert (result["speakers"], result["labels"]) == (None, {"hiss": 48, "hum": 48})
    assert result["models"][0]["accuracy"] >= 0.98


def test_folds_keep_speakers_apart_and_judge_each_once():
    random = np.random.default_rng(0)
    speakers = np.array([f"speaker {i % 7}" for i in range(140)])
    labels = random.permutation(np.array([f"label {i % 4}" for i in range(140)]))
    folds, apart = make_folds(labels, speakers, 5, seed=0)
    assert (len(folds), apart) == (5, True)
    for train, judged in folds:
        assert not set(speakers[train]) & set(speakers[judged])
        assert sorted([*train, *judged]) == list(range(140))
    assert sorted(np.concatenate([judged for _, judged in folds])) == list(range(140))
    assert len(make_folds(labels, speakers, 10, seed=0)[0]) == 7
    assert not make_folds(labels, None, 5, seed=0)[1]
    assert len(make_folds(np.array([*"yynn"]), speakers[:4], 10, seed=0)[0]) == 2

    folds, apart = make_folds(speakers, speakers, 5, seed=0)
    assert (len(folds), apart) == (5, False)
    assert all(set(speakers[judged]) == set(speakers) for _, judged in folds)


def test_features_do_not_depend_on_what_is_read_beside(teacher):
    generator = torch.Generator().manual_seed(0)
    waveforms = [0.1 * torch.randn(400 + 320 * n, generator=generator) for n in (9, 4, 9, 6, 4, 9)]
    lengths = [len(waveform) for waveform in waveforms]
    assert list(make_batches(lengths, 2 * 3_280 / 16_000)) == [[1, 4], [3], [0, 2], [5]]
    model, cpu = load_model(teacher), torch.device("cpu")
    together = model_features(model, waveforms, 30, cpu, "model")
    alone = [model_features(model, [waveform], 30, cpu, "model")[0] for waveform in waveforms]
    np.testing.assert_allclose(together, np.stack(alone), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        states, _ = model.extract_features(waveforms[3][None])
    np.testing.assert_allclose(together[3], [s[0].mean(0) for s in states], rtol=1e-4, atol=1e-5)


def test_the_layer_weights_find_the_layer_that_knows():
    random = np.random.default_rng(0)
    labels = np.arange(120) % 3
    features = random.standard_normal((120, 4, 6)).astype(np.float32)
    features[np.arange(120), 2, labels] += 100
    features[:, 2] *= 1e-3
    folds, _ = make_folds(labels, None, 4, seed=0)
    correct, weights = judge(features, labels, folds, c=1.0)
    assert correct.all()
    assert (weights.argmax(1) == 2).all()
    assert weights.min(0)[2] > 0.5


def test_the_interval_is_wider_over_speakers_who_differ():
    """Half of ten speakers are always recognised: the mean varies as that of ten tosses, not of 1,000."""
    speakers = np.repeat(np.arange(10), 100)
    correct = (speakers % 2).astype(float)
    low, high = interval(correct, speakers, seed=0)
    assert (low, high) == (pytest.approx(0.2, abs=0.01), pytest.approx(0.8, abs=0.01))
    low, high = interval(correct, np.arange(1000), seed=0)
    assert (low, high) == (pytest.approx(0.469, abs=0.005), pytest.approx(0.531, abs=0.005))


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["a.wav\tyes", "b.wav\tyes"], ["'yes'", "two labels"]),
        ([""], ["no recording"]),
        (["a.wav\tyes", "b.wav no"], ["line 2", "path<TAB>label"]),
        (["a.wav\tyes\tann", "b.wav\tno"], ["line 2", "speaker"]),
        (["a.wav\tyes", "b.wav\tno", "a.wav\tno"], ["line 3", "a.wav", "line 1"]),
        (["a.wav\tyes", "../b.wav\tno"], ["line 2", "'../b.wav'", "without .."]),
        (["a.wav\tyes", "b.wav\tno", "c.wav\tno"], ["'yes'", "one recording only"]),
        (["a.wav\tyes\tann", "b.wav\tno\tbob", "c.wav\tno\tcid"], ["all speakers of the label 'yes'"]),
    ],
)
def test_a_manifest_that_cannot_be_judged_is_refused(lines, words, tmp_path):
    (tmp_path / "task.tsv").write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError) as error:
        _, labels, speakers = read_examples(tmp_path, None)
        make_folds(labels, speakers, 10, 0)
    assert all(word in str(error.value) for word in words), error.value


def test_unusable_recordings_are_named_together(fails, recordings, tmp_path):
    for label in ("hum", "hiss"):
        shutil.copytree(recordings / label, tmp_path / label)
    (tmp_path / "hum" / "text.wav").write_text("no audio\n")
    soundfile.write(tmp_path / "hiss" / "short.wav", np.zeros(100), 16_000)
    soundfile.write(tmp_path / "hiss" / "loud.wav", np.full(1_000, np.inf), 16_000, subtype="FLOAT")
    message = fails("evaluate", "--data", tmp_path, "--json", tmp_path / "out.json")
    assert "these recordings cannot be used: " in message
    for words in ("text.wav: Format not", "short.wav: shorter than", "loud.wav: holds samples that"):
        assert words in message
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--data DATA", "coin, sound, voice"),
        ("--data DATA --task colour", "there is no"),
        ("--data TMP", "no recording: give two labels, by a manifest NAME.tsv or"),
        ("--data DATA --task sound --models missing.pth", "missing.pth: no such file"),
        ("--data DATA --task sound --hf nowhere", "--hf nowhere: there is no such folder"),
        ("--data DATA --models TEACHER --picture weights.txt", ".png"),
        ("--data DATA --task sound --folds 1", "--folds"),
        ("--data DATA --task sound --json DATA/sound.tsv", "is --data, which it would replace"),
    ],
)
def test_a_mistake_in_flags_is_one_sentence(flags, words, fails, recordings, teacher, tmp_path):
    for name, path in (("DATA", recordings), ("TMP", tmp_path), ("TEACHER", teacher)):
        flags = flags.replace(name, str(path))
    assert words in fails("evaluate", *flags.split())
