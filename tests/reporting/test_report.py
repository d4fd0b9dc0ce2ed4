"""report.py on runs that real processes made: its numbers against independent ones, and its page."""

import csv
import io
import itertools
import json
import re
import shutil
import time
from contextlib import redirect_stdout

import numpy as np
import pytest
import soundfile
import torch
from torch.utils.tensorboard import SummaryWriter

from report import as_json
from reporting.run import read_scalars
from tests.helpers.models import tiny_config, ungated
from tests.helpers.stages import as_words, call, flags
from utils.checkpoint import load_model, save_checkpoint
from utils.processes import available_cpus
from wav2vec2 import wav2vec2_model
from wav2vec2.cost import multiply_accumulates

NAME = "pruned_hubert_base.pth"
UPDATES, TARGET = 4, 0.75
STAGE_1 = {"pruning_units": "conv,head,interm", "reg_learning_rate": 0.1, "num_workers": 0}


def read(out):
    """The numbers and the page in the folder that a report was written to."""
    return json.loads((out / "report.json").read_text()), (out / "report.html").read_text()


@pytest.fixture(scope="module")
def report(stages, teacher, manifests, tmp_path_factory):
    """The report of all four stages: its numbers, its page, and what was printed."""
    printed, out = io.StringIO(), tmp_path_factory.mktemp("report")
    folders = as_words(root_dir=stages, final_dir=stages / "final", tsv_dir=manifests, repeats=1, out=out)
    with pytest.MonkeyPatch.context() as monkeypatch, redirect_stdout(printed):
        call(monkeypatch, "report", "--teacher_ckpt", teacher, *folders)
    return *read(out), printed.getvalue()


def tensors_of(path):
    return torch.load(path, weights_only=True)["state_dict"]


def numel(state_dict):
    return sum(tensor.numel() for tensor in state_dict.values())


def rows_of(state_dict, name, layers=3):
    """The output width of a linear layer or convolution in each layer, 0 where it is gone."""
    keys = [[key for key in state_dict if key.endswith(f".{layer}.{name}.weight")] for layer in range(layers)]
    return [sum(len(state_dict[key]) for key in found) for found in keys]


def pictures_of(page):
    """Counts the pictures of a page, which has to refer to nothing outside."""
    assert not re.search(r"url\(|@import|<script|<link", page)
    for address in re.findall(r'(?:src|href)="([^"]*)', page):
        assert address.startswith("data:image/svg+xml;base64,") or f'id="{address[1:]}"' in page, address[:80]
    return len(re.findall(r'<img src="data:[^"]{1000,}" alt="[^"]+"', page))


def test_sizes_costs_and_widths_are_those_of_the_files(report, stages, teacher):
    content, page, printed = report
    student = stages / "final" / "ckpts" / NAME
    assert content["student"]["path"] == str(student) and "stage 4" in content["student"]["stage"]
    for name, path in (("teacher", teacher), ("student", student)):
        state_dict = tensors_of(path)
        sizes, widths = content["sizes"][name], content["widths"][name]
        assert sizes["parameters"] == numel(state_dict)
        assert sizes["file_bytes"] == path.stat().st_size
        assert f"{numel(state_dict):,}" in page and f"{numel(state_dict):,}" in printed
        assert sizes["macs_per_second"] == {
            str(n): multiply_accumulates(load_model(path), n) for n in (1, 10)
        }
        parts = sizes["components"].values()
        assert sum(part["parameters"] for part in parts) == numel(state_dict)
        assert sum(part["macs_per_second"] for part in parts) == pytest.approx(sizes["macs_per_second"]["10"])
        attention = {key: value for key, value in state_dict.items() if ".attention." in key}
        assert sizes["components"]["attention"]["parameters"] == numel(attention)
        assert widths["conv_channels"] == rows_of(state_dict, "conv", layers=7)
        assert [8 * heads for heads in widths["heads"]] == rows_of(state_dict, "attention.q_proj")
        assert widths["feed_forward"] == rows_of(state_dict, "feed_forward.intermediate_dense")
    sizes = [content["sizes"][name]["parameters"] for name in ("student", "teacher")]
    assert content["sparsity"]["reached"] == pytest.approx(1 - sizes[0] / sizes[1])
    assert content["sparsity"]["target"] == pytest.approx(TARGET)
    assert content["sparsity"]["expected"] is None


def test_the_curves_are_what_training_printed(report, stages):
    content, _, _ = report
    stage1, stage3 = content["training"]["distill"], content["training"]["final_distill"]
    said = (stages / "said.txt").read_text()
    lines = re.findall(r"update (\d+)/4: loss (\S+), sparsity (\S+), target (\S+), audio", said)
    assert [int(update) for update, *_ in lines] == list(range(1, UPDATES + 1))
    assert stage1["train_loss"]["step"] == list(range(UPDATES))
    for column, name in ((1, "train_loss"), (2, "sparsity_expected"), (3, "sparsity_target")):
        printed = [float(line[column]) for line in lines]
        assert stage1[name]["value"] == pytest.approx(printed, abs=1e-4)
    assert stage1["lambda2"]["value"][0] == 0 < stage1["lambda2"]["value"][-1]
    assert stage3["valid_loss_distill"]["step"][0] == 0 and len(stage3["train_loss"]["value"]) == 4


def test_distances_are_those_computed_from_the_audio(report, stages, teacher, manifests):
    content, _, _ = report
    with open(manifests / "valid.tsv") as file:
        folder, *rows = csv.reader(file, delimiter="\t")
    waveforms = [soundfile.read(f"{folder[0]}/{path}", dtype="float32")[0] for path, _ in rows]
    assert content["distance"]["utterances"] == len(waveforms) == 4
    assert content["distance"]["audio_seconds"] == pytest.approx(sum(map(len, waveforms)) / 16_000)

    def hidden_states(path):
        model = load_model(path).eval()
        with torch.no_grad():
            lists = [model.extract_features(torch.from_numpy(wave)[None])[0] for wave in waveforms]
        return [np.concatenate([states[layer][0].numpy() for states in lists]) for layer in range(4)]

    def check(entry, student, wanted):
        cosine = (student * wanted).sum(1) / np.linalg.norm(student, axis=1) / np.linalg.norm(wanted, axis=1)
        error = np.linalg.norm(student - wanted) / np.linalg.norm(wanted)
        assert entry["cosine"] == pytest.approx(cosine.mean(), abs=1e-5)
        assert entry["relative_error"] == pytest.approx(error, rel=1e-4)
        assert entry["l1"] == pytest.approx(np.abs(student - wanted).mean(), rel=1e-4)

    wanted = hidden_states(teacher)
    tensors = tensors_of(stages / "final" / "ckpts" / "last.ckpt")
    after_stage_3 = {key.removeprefix("distill_linear_projs."): value for key, value in tensors.items()}
    after_stage_2 = torch.load(stages / "ckpts" / NAME, weights_only=True)["distill_linear_projs"]
    made = {"after stage 2": (stages, after_stage_2), "after stage 4": (stages / "final", after_stage_3)}
    assert [student["stage"] for student in content["distance"]["students"]] == list(made)
    for student, (folder, tensors) in zip(content["distance"]["students"], made.values(), strict=True):
        states = hidden_states(folder / "ckpts" / NAME)
        assert [entry["layer"] for entry in student["hidden_states"]] == [0, 1, 2, 3]
        for entry in student["hidden_states"]:
            check(entry, states[entry["layer"]], wanted[entry["layer"]])
        assert [entry["layer"] for entry in student["projected"]] == [0, 1, 3]
        for place, entry in enumerate(student["projected"]):
            weight, bias = (tensors[f"{place}.{name}"].numpy() for name in ("weight", "bias"))
            check(entry, states[entry["layer"]] @ weight.T + bias, wanted[entry["layer"]])


def test_speeds_are_given_for_both_lengths_of_audio(report):
    content, page, printed = report
    rows = content["speed"]["rows"]
    lengths = [(row["audio_seconds"], row["threads"]) for row in rows]
    assert lengths == list(itertools.product((1, 10), sorted({1, available_cpus()})))
    for row in rows:
        seconds = [row[name]["real_time_factor"] * row["audio_seconds"] for name in ("teacher", "student")]
        assert row["times_faster"] == pytest.approx(seconds[0] / seconds[1])
    factors = [f"{rows[-1][name]['real_time_factor']:.4f}" for name in ("teacher", "student")]
    assert f"{factors[0]}{factors[1]:>14}\n" in printed
    assert all(factor in page for factor in factors)


def test_the_page_is_complete_in_itself(report):
    # Both distillations add the validation loss by kind, and the learning rates.
    assert pictures_of(report[1]) == 3 + 5 + 4 + 2
    session = report[0]["stages"]["distill"]["sessions"][-1]
    assert "max_updates" in session["changed"] and "clip_norm" not in session["changed"]
    head, _, folded = report[1].partition("<details>")
    assert "--max_updates" in head and "--clip_norm" not in head and "--clip_norm" in folded
    assert report[0]["audio"]["train100"]["utterances"] == 12 and "Hours of audio" in report[1]
    assert "Loss by distilled layer and kind" in report[1]
    assert "report.html" in report[2].splitlines()[-1]


@pytest.mark.slow
def test_runs_side_by_side(stages, teacher, manifests, tmp_path, monkeypatch, fails):
    other = tmp_path / "other"
    shutil.copytree(stages, other, ignore=shutil.ignore_patterns("final", "report"))
    content = json.loads((other / "run.json").read_text())
    content["distill"]["sessions"][-1]["flags"]["target_sparsity"] = 0.5
    (other / "run.json").write_text(json.dumps(content))
    several = ["--teacher_ckpt", teacher, "--root_dir", stages, other, "--tsv_dir", manifests, "--repeats", 1]
    assert "--out is missing" in fails("report", *several)
    assert "--final_dir has 1 folders" in fails("report", *several, "--final_dir", stages / "final")
    call(monkeypatch, "report", *several, "--out", tmp_path / "out")
    numbers, page = read(tmp_path / "out")
    assert [report["student"]["stage"] for report in numbers.values()] == ["after stage 2"] * 2
    assert "distill --target_sparsity" in page and "distill --learning_rate" not in page
    assert pictures_of(page) == 1 + 3


def test_a_run_in_stage_3_and_its_record(stages, report, teacher, manifests, tmp_path, monkeypatch):
    root, final = tmp_path / "exp", tmp_path / "exp" / "final"
    shutil.copytree(stages, root)
    entry = json.loads((root / "run.json").read_text())["distill"]
    [session] = entry["sessions"]
    session |= {"started": "2026-01-02T03:04:05+00:00", "seconds": 9000.0}
    session["flags"]["target_sparsity"] = 0.6
    session["machine"] |= {"host": "node7", "gpus": ["NVIDIA A100"] * 4}
    (root / "run.json").write_text(json.dumps({"distill": entry}))
    (final / "run.json").unlink()
    (final / "ckpts" / NAME).unlink()
    more = ["--final_dir", final, "--out", tmp_path / "out", "--utterances", 3, "--repeats", 1]
    call(monkeypatch, "report", "--teacher_ckpt", teacher, "--root_dir", root, *more)
    content, page = read(tmp_path / "out")
    assert content["student"]["path"] == str(final / "ckpts" / "last.ckpt")
    assert content["student"]["stage"] == "in stage 3, after update 4 of 4"
    assert content["sizes"]["student"]["parameters"] == report[0]["sizes"]["student"]["parameters"]
    assert content["widths"] == report[0]["widths"]
    assert content["stages"] == dict.fromkeys(content["stages"]) | {"distill": entry}
    assert content["sparsity"]["target"] == 0.6
    assert (content["distance"]["utterances"], content["distance"]["out_of"]) == (3, 4)
    words = ["NVIDIA A100", "2:30:00", "2026-01-02 03:04 UTC", entry["inputs"]["teacher_ckpt"]["sha256"][:12]]
    assert all(word in page for word in words)
    assert page.count("not recorded") == 3


@pytest.mark.slow
def test_a_wavlm_without_validation_in_stages_1_and_2(manifests, tmp_path, monkeypatch):
    torch.manual_seed(0)
    teacher, root, data = tmp_path / "wavlm.pth", tmp_path / "exp", tmp_path / "data"
    save_checkpoint(teacher, ungated("wavlm_large"))
    data.mkdir()
    shutil.copy(manifests / "train100.tsv", data)
    call(monkeypatch, "distill", *flags(data, teacher, root, **STAGE_1))
    last, pruned = root / "ckpts" / "last.ckpt", root / "ckpts" / NAME
    more = as_words(teacher_ckpt=teacher, root_dir=root, repeats=1)
    call(monkeypatch, "report", *more, *as_words(final_dir=root / "later", tsv_dir=manifests))
    content, page = read(root / "later" / "report")
    assert content["student"]["path"] == str(last)
    assert "in stage 1, after update 10 of 10" in content["student"]["stage"]
    assert content["sizes"]["student"]["file_bytes"] is None and "not written yet" in page
    kept = content["widths"]["student"]
    assert sum(kept["feed_forward"]) < 3 * 64 and 0 < content["sparsity"]["expected"] < 1
    assert len(content["distance"]["students"][0]["hidden_states"]) == 4
    assert pictures_of(page) == 3 + 5 + 2

    call(monkeypatch, "prune", *as_words(distilled_ckpt=last, original_ckpt=teacher))
    call(monkeypatch, "report", *more)
    content, page = read(root / "report")
    assert content["student"]["stage"] == "after stage 2"
    assert content["widths"]["student"] == kept
    state_dict = tensors_of(pruned)
    assert kept["feed_forward"] == rows_of(state_dict, "feed_forward.intermediate_dense")
    assert content["sizes"]["student"]["parameters"] == numel(state_dict)
    assert content["distance"] is None and "valid_loss" not in content["training"]["distill"]
    assert "Not measured: no" in page and "No validation loss was logged" in page
    assert pictures_of(page) == 3 + 5


def test_the_later_values_of_a_resumed_run_count(tmp_path):
    for values in ([(0, 1.0), (10, 2.0), (20, 3.0)], [(11, 5.0), (21, float("nan"))]):
        with SummaryWriter(tmp_path) as writer:
            for step, value in values:
                writer.add_scalar("train_loss", value, step)
    written = json.loads(as_json(read_scalars(tmp_path)), parse_constant=pytest.fail)
    assert written == {"train_loss": {"step": [0, 10, 11, 21], "value": [1.0, 2.0, 5.0, None]}}


def test_a_clock_that_was_set_back_loses_no_updates(manifests, teacher, tmp_path, monkeypatch):
    now = time.time
    for updates, back in ((4, 0), (6, 7200)):
        monkeypatch.setattr(time, "time", lambda: now() - back)  # noqa: B023
        changes = {"max_updates": updates, "allow_changed": "max_updates", "num_workers": 0}
        call(monkeypatch, "distill", *flags(manifests, teacher, tmp_path, **changes))
    assert read_scalars(tmp_path / "logs")["train_loss"]["step"] == list(range(6))


def test_files_of_another_run_are_refused(stages, teacher, fails, tmp_path):
    root, final = stages, stages / "final"
    other, exp = tmp_path / "other.pth", tmp_path / "exp"
    torch.manual_seed(5)
    save_checkpoint(other, wav2vec2_model(**tiny_config()))
    given = {"teacher_ckpt": teacher, "root_dir": root, "final_dir": final, "out": tmp_path / "out"}
    for flag in ("teacher_ckpt", "student_ckpt"):
        sentence = fails("report", *as_words(**given | {flag: other}))
        assert f"{other} does not belong to {root}, where distill.py had another --{flag}, " in sentence
    shutil.copytree(root, exp)
    (exp / "ckpts" / NAME).write_bytes(other.read_bytes())
    sentence = fails("report", *as_words(**given | {"root_dir": exp}))
    assert f"does not belong to {final}, where final_distill.py had another --student_ckpt" in sentence
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("run_json", "more", "words"),
    [
        ("{}", [], "has no ckpts/last.ckpt and no ckpts/pruned_hubert_base.pth; wait until"),
        ('{"distill": ', [], "run.json is damaged"),
        ("{}", ["--root_dir", "nowhere"], "--root_dir nowhere: no such folder"),
        ("{}", ["--out", __file__], "is a file: name a folder"),
    ],
)
def test_a_mistake_is_one_sentence(run_json, more, words, teacher, tmp_path, fails):
    (tmp_path / "run.json").write_text(run_json)
    assert words in fails("report", "--teacher_ckpt", teacher, "--root_dir", tmp_path, *more)
    assert not list(tmp_path.rglob("report.*"))
