"""Each benchmark runs as a user would run it, on a tiny model, and prints every figure that it promises."""

import json
import math
import shutil

import pytest
import torch

from tests.helpers.stages import run

PARTS = ("teacher", "student forward", "backward", "optimiser")
COMMON = ("--threads", 1, "--device", "cpu")


def numbers(value):
    """All numbers in what a benchmark wrote."""
    if isinstance(value, dict):
        return [number for item in value.values() for number in numbers(item)]
    return [value] if isinstance(value, (int, float)) and not isinstance(value, bool) else []


def written(path):
    content = json.loads(path.read_text())
    assert all(math.isfinite(number) for number in numbers(content))
    assert {"cpu", "threads", "torch", "date", "command"} <= content["machine"].keys()
    return content


def train_step(teacher, path, *flags):
    tiny = ("--sparsity", 0.5, "--seconds_per_batch", 1, "--utterance_seconds", 0.5, *COMMON)
    short = ("--updates", 1, "--warmup", 1, "--json", path)
    return run("benchmarks/train_step.py", "--model", teacher, *tiny, *short, *flags)


def test_train_step_compares_variants_in_both_stages(teacher, tmp_path):
    variants = ["baseline", "no_skip", "skip", "skip+bf16"]
    process = train_step(teacher, tmp_path / "figures.json", "--compare", ",".join(variants))
    content = written(tmp_path / "figures.json")
    for stage in ("stage 1", "stage 3"):
        assert f"{stage} of {teacher}" in process.stdout
        assert list(content[stage]["variants"]) == variants
        assert content[stage]["sparsity"] == pytest.approx(0.5, abs=0.05)
        assert content[stage]["ratios"].keys() >= {"skip / baseline", "skip+bf16 / baseline"}
        for figures in content[stage]["variants"].values():
            parts = [figures[f"{part} ms"] for part in PARTS]
            assert all(part > 0 for part in parts)
            assert sum(parts) == pytest.approx(figures["total ms"], rel=0.05)
    open_units, all_units = (
        content["stage 1"]["variants"]["skip"][f"GFLOP/s, {units} counted"]
        for units in ("open units", "all units")
    )
    assert 0 < open_units < all_units
    rows = [line.split("  ")[0] for line in process.stdout.splitlines()]
    for row in ("audio seconds a second", "total ms", "share of matrix product %, all units counted"):
        assert rows.count(row) == 2


def test_train_step_measures_one_variant_by_itself_and_its_memory(teacher, tmp_path):
    train_step(teacher, tmp_path / "figures.json", "--stage", 1, "--baseline", "--vary_lengths")
    content = written(tmp_path / "figures.json")
    assert list(content["stage 1"]["variants"]) == ["baseline"] and "stage 3" not in content
    assert content["stage 1"]["variants"]["baseline"]["peak memory GiB"] > 0


def test_train_step_names_an_unknown_variant(teacher, tmp_path):
    flags = ("--model", teacher, "--compare", "skip,fast", *COMMON)
    process = run("benchmarks/train_step.py", *flags, check=False)
    assert process.returncode == 2
    assert process.stderr.strip().splitlines()[-1].startswith("train_step.py: error: --compare fast:")


def test_gpu_check_makes_every_check_of_tiny_models_on_the_cpu(tmp_path):
    flags = ("--small", *COMMON, "--json", tmp_path / "figures.json")
    process = run("benchmarks/gpu_check.py", *flags, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
    checks = written(tmp_path / "figures.json")["checks"]
    assert not any(row["result"] == "FAIL" for row in checks.values())
    for name in (
        "WavLM Large pruned, bf16: gradients",
        "a resumed run against a whole one",
        "a signal saves",
    ):
        assert checks[name]["result"] == "pass"
    assert checks["a resumed run against a whole one"]["figure"] == "equal to the bit"


def test_gpu_check_says_in_one_sentence_that_there_is_no_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    process = run("benchmarks/gpu_check.py", check=False)
    assert process.returncode == 2
    assert process.stderr == "gpu_check.py: no GPU is found: run this on a machine with one\n"


def test_inference_compares_a_model_with_the_first(teacher, tmp_path):
    other = shutil.copy(teacher, tmp_path / "other.pth")
    flags = ("--model", teacher, other, "--batch", 1, 2, "--seconds", 0.5)
    process = run(
        "benchmarks/inference.py", *flags, "--repeats", 2, *COMMON, "--json", tmp_path / "figures.json"
    )
    content = written(tmp_path / "figures.json")
    assert list(content["models"]) == [f"{m}, batch {b}" for b in (1, 2) for m in (teacher, other)]
    assert all(figures["real-time factor"] > 0 for figures in content["models"].values())
    assert "times the first" in process.stdout


def test_data_measures_every_part_on_files_of_its_own_or_given(corpus, tmp_path):
    flags = ("--repeats", 1, "--num_workers", 0, 1, *COMMON, "--json", tmp_path / "figures.json")
    for source in (("--files", 4), ("--data", corpus)):
        run("benchmarks/data.py", *source, *flags)
        rates = written(tmp_path / "figures.json")["rates"]
        making = ["batches, 0 workers", "batches, 1 workers"]
        assert list(rates) == ["manifest making", "manifest reading", "decoding", *making]
        assert all(row["audio seconds a second"] > 0 for row in rates.values())


def test_deploy_measures_teacher_and_student_in_every_way_asked_for(teacher, tmp_path):
    ways = ["PyTorch", "onednn.py", "bf16", "int8", "torch.export", "ONNX int8"]
    flags = ("--model", teacher, "--sparsity", 0.4, "--seconds", 0.5, "--threads", 1, "--repeats", 1)
    run("benchmarks/deploy.py", *flags, "--ways", *ways, "--json", tmp_path / "figures.json")
    content = written(tmp_path / "figures.json")
    assert list(content["rows"]) == [f"{name}, {way}" for name in ("teacher", "student") for way in ways]
    errors = {name: row["error %"] for name, row in content["rows"].items()}
    assert errors["student, PyTorch"] == 0 and errors["student, torch.export"] < 0.01
    assert all(0.1 < errors[f"student, {way}"] < 10 for way in ("bf16", "int8", "ONNX int8"))
    assert all(row["0.5 s, 1 thread"] > 0 and row["MB"] > 0 for row in content["rows"].values())
    assert content["rows"]["student, PyTorch"]["MB"] < content["rows"]["teacher, PyTorch"]["MB"]
    assert content["times its teacher in the same way"].keys() == set(ways)


def test_streaming_costs_less_the_more_of_the_recording_a_chunk_hears(teacher, corpus, tmp_path):
    flags = ("--model", teacher, "--audio", corpus, "--files", 3, "--chunk", 0.5, 9, "--context", 0, 1)
    run("benchmarks/streaming.py", *flags, "--json", tmp_path / "figures.json")
    rows = list(written(tmp_path / "figures.json")["errors %"].values())
    assert [len(row) for row in rows] == [4] * 4
    alone, with_context, *whole = ([*row.values()] for row in rows)
    assert all(a > 1.2 * c > 0.1 for a, c in zip(alone, with_context, strict=True))
    assert all(max(row) < 0.01 for row in whole), "a chunk longer than the recording is the recording"


def test_results_compares_students_made_in_every_way(teacher, manifests, tmp_path):
    out = tmp_path / "results"
    short = (
        "--updates",
        2,
        1,
        "--seconds_per_batch",
        4,
        "--distill_layers",
        "0.1,3",
        "--target_sparsity",
        0.5,
    )
    common = ("--tsv_dir", manifests, "--teacher_ckpt", teacher, "--out", out)
    rows = ["random", "first_layers"]
    for row in rows:
        run("benchmarks/results.py", row, "--seed", 3, *common, *short)
    run("benchmarks/results.py", "table", *common, "--repeats", 1, "--json", tmp_path / "table.json")
    content = json.loads((tmp_path / "table.json").read_text())["rows"]
    whole = content["teacher"]["parameters"]
    random, layers = content["random-3"], content["first_layers-3"]
    assert 0.45 * whole < random["parameters"] <= 0.5 * whole < layers["parameters"] < whole
    assert random.keys() >= {f"projected {layer}" for layer in (0, 1, 3)}
    assert "layer 3" in random and "layer 3" not in layers
    assert layers.keys() >= {"projected 1", "projected 3"}
