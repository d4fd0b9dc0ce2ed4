"""Each benchmark runs as a user would run it, on a tiny model, and gives every figure that it promises."""

import json
import shutil

import pytest
import torch

from tests.helpers.stages import run


@pytest.fixture
def figures(tmp_path):
    """Runs a benchmark; returns the figures that it has written, all of which are numbers."""

    def measure(script, *flags):
        path = tmp_path / "figures.json"
        run(f"benchmarks/{script}.py", *flags, "--json", path)
        content = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} in {path}"))
        assert {"cpu", "threads", "torch", "date", "command"} <= content["machine"].keys()
        return content

    return measure


@pytest.mark.slow
def test_train_step_compares_variants_in_both_stages(figures, teacher):
    variants = ["baseline", "product", "product+bf16"]
    size = ("--sparsity", 0.5, "--seconds_per_batch", 1, "--utterance_seconds", 0.5, "--device", "cpu")
    turns = ("--compare", ",".join(variants), "--updates", 1, "--warmup", 1)
    content = figures("train_step", "--model", teacher, *size, *turns)
    for stage in ("stage 1", "stage 3"):
        assert list(content[stage]["variants"]) == variants
        assert content[stage]["sparsity"] == pytest.approx(0.5, abs=0.05)
        for row in content[stage]["variants"].values():
            parts = [row[f"{part} ms"] for part in ("forward", "backward", "optimiser")]
            assert all(part > 0 for part in parts)
            assert sum(parts) == pytest.approx(row["total ms"], rel=0.05)
            assert 0 < row["% of matrix product"] < 100 and row["times the first"] > 0


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    "script, flags, sentence",
    [
        (
            "train_step",
            ["--compare", "product+fast"],
            "error: --compare product+fast: choose from baseline, ",
        ),
        ("deploy", ["--device", "cpu", "--ways", "fp8"], "error: --ways fp8: choose from PyTorch, "),
        ("gpu_check", [], "error: no GPU is found: run this on a machine with one"),
    ],
)
def test_a_mistake_is_one_sentence(script, flags, sentence):
    process = run(f"benchmarks/{script}.py", *flags, check=False)
    assert process.returncode == 2
    assert process.stderr.startswith(f"{script}.py: {sentence}") and process.stderr.count("\n") == 1


@pytest.mark.slow
def test_gpu_check_passes_with_tiny_models_on_the_cpu(figures):
    checks = figures("gpu_check", "--small", "--device", "cpu")["checks"]
    assert not any(row["result"] == "FAIL" for row in checks.values())
    assert checks["wavlm_large pruned, product+bf16: error of gradients"]["result"] == "pass"
    assert checks["difference of a stopped and resumed run from a whole one"]["figure"] == 0


@pytest.mark.slow
def test_deploy_measures_teacher_and_student_in_every_way(figures, teacher):
    ways = ["PyTorch", "onednn.py", "bf16", "int8", "torch.export", "ONNX int8"]
    size = ("--sparsity", 0.4, "--seconds", 0.5, "--batch", 1, 2, "--threads", 1)
    turns = ("--repeats", 1, "--device", "cpu", "--ways", *ways)
    rows = figures("deploy", "--model", teacher, *size, *turns)["rows"]
    assert list(rows) == [f"{name}, {way}" for name in ("teacher", "student") for way in ways]
    assert rows["student, PyTorch"]["error %"] == 0 and rows["student, torch.export"]["error %"] < 0.01
    assert all(0.1 < rows[f"student, {way}"]["error %"] < 10 for way in ("bf16", "int8", "ONNX int8"))
    assert all(row["0.5 s, 1 thread"] > 0 and row["2 x 0.5 s, 1 thread"] > 0 for row in rows.values())
    for figure in ("parameters", "MMAC per second of audio", "MB"):
        assert rows["student, PyTorch"][figure] < rows["teacher, PyTorch"][figure]


@pytest.mark.slow
def test_results_compares_students_made_in_every_way(figures, teacher, manifests, tmp_path):
    short = ("--updates", 2, 1, "--seconds_per_batch", 4, "--distill_layers", "0.1,3")
    common = ("--tsv_dir", manifests, "--teacher_ckpt", teacher, "--out", tmp_path / "results")
    results = tmp_path / "results"
    for row in ("random", "random_macs", "fithubert"):
        run("benchmarks/results.py", row, "--seed", 3, *common, *short, "--target_sparsity", 0.5)
        if row == "random":
            shutil.copytree(results / "random-3", results / "params-3")
    rows = figures("results", "table", *common, "--repeats", 1)["rows"]
    whole = rows["teacher"]["parameters"]
    random, by_macs, thin = rows["random-3"], rows["random_macs-3"], rows["fithubert-3"]
    assert 0.45 * whole < random["parameters"] <= 0.5 * whole
    assert abs(thin["parameters"] - 0.5 * whole) < 0.1 * whole
    assert 0.9 * random["M MACs/s"] < by_macs["M MACs/s"] <= random["M MACs/s"]
    assert random.keys() >= {"projected 0", "projected 1", "projected 3", "layer 3", "times faster"}
    assert thin.keys() >= {"projected 2"} and "layer 3" not in thin
