"""Full disks, folders that cannot be written, and outputs that name inputs: the sentence names the file, and
what was there stays whole."""

import os
import shutil
import subprocess
from pathlib import Path

from tests.faults.table import Case, finished, refused
from tests.helpers.stages import ROOT
from utils.run_record import read_run

FAIRSEQ = ROOT / "tests" / "golden" / "fairseq_hubert_base.pt"
FORBIDDEN = Path("/sys/no")
"""Where not even root may write."""


def untouched(do):
    """The same attack, after which the file that was there is as it was, and there is no new one."""

    def checked(world):
        shutil.copy(world.teacher, world.tmp / "out")
        outcome = do(world)
        assert {path.name for path in world.tmp.iterdir() if path.is_file()} - {"run.json"} == {"out"}
        assert (world.tmp / "out").read_bytes() == world.teacher.read_bytes()
        return outcome

    return checked


def prune(world, out, **options):
    last = world.copy_of_stages() / "ckpts" / "last.ckpt"
    return world.call("prune", *world.pruning(last), "--out", out, **options)


def save_final_ckpt(world, out, **options):
    exp = world.copy_of_stages()
    files = ["--config_path", exp / "ckpts" / "pruned_hubert_base.pth"]
    files += ["--ckpt_after_final_distill", exp / "final" / "ckpts" / "last.ckpt"]
    return world.call("save_final_ckpt", *files, "--out", out, **options)


def convert(world, out, **options):
    return world.call("convert_hubert_from_fairseq", "--ckpt", FAIRSEQ, "--out", out, **options)


def export(kind):
    def do(world, out, **options):
        return world.call(f"export_to_{kind}", "--ckpt", world.teacher, "--out", out, **options)

    return do


def prepare(world, out, **options):
    return world.call("prepare_data", "--data", world.corpus, "--out", out, "--num_workers", 1, **options)


def report(world, out, **options):
    exp, flags = world.copy_of_stages(), ["--repeats", 1, "--utterances", 1]
    files = ["--teacher_ckpt", world.teacher, "--root_dir", exp, "--out", out]
    return world.call("report", *files, *flags, **options)


def full(write, size, name="out"):
    return untouched(lambda world: write(world, world.tmp / name, file_size=size))


def forbidden(write):
    return lambda world: write(world, FORBIDDEN)


def full_while_training(world):
    """Goes on from update 2 in a folder of a finished run, on a disk that is full."""
    exp = world.copy_of_stages()
    before = (exp / "ckpts" / "previous.ckpt").read_bytes()
    (exp / "ckpts" / "last.ckpt").unlink()
    short = {"max_updates": 4, "sparsity_warmup_updates": 2, "save_interval": 2}
    outcome = world.call("distill", *world.distill(exp, **short), file_size=60_000)
    assert (exp / "ckpts" / "previous.ckpt").read_bytes() == before
    assert not list((exp / "ckpts").glob(".*"))
    assert read_run(exp)["distill"]["sessions"][-1]["outcome"] == "failed"
    return outcome


def small_files(**changes):
    """Trains where no file may have more than 12,000 bytes, a log or a batch in shared memory neither."""
    changes |= {"max_updates": 200, "save_interval": 1000}
    return lambda world: world.call("distill", *world.distill(**changes), file_size=12_000)


def full_standard_output(world):
    last = world.copy_of_stages() / "ckpts" / "last.ckpt"
    arguments = [*world.pruning(last), "--out", world.tmp / "out.pth"]
    with open("/dev/full", "w") as output:
        outcome = world.run("prune", *arguments, stdout=output, stderr=subprocess.PIPE)
    assert (world.tmp / "out.pth").exists()
    return outcome


def full_standard_error(world):
    with open("/dev/full", "w") as output:
        return world.run("distill", *world.distill(), stdout=output, stderr=output)


def temporary_folder_is_full(world):
    """With no temporary folder at all, which Lightning's own way of saving would need."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": "/sys"}
    outcome = world.run("distill", *world.distill(), env=environment)
    assert (world.tmp / "exp" / "ckpts" / "last.ckpt").exists()
    return outcome


def over_its_source(world):
    """--out names the file that --ckpt names."""
    path = world.tmp / "source"
    shutil.copy(FAIRSEQ, path)
    outcome = world.call("convert_hubert_from_fairseq", "--ckpt", path, "--out", path)
    assert path.read_bytes() == FAIRSEQ.read_bytes()
    return outcome


def over_a_file_of_its_folder(world):
    from tests.helpers.convert import hf_model

    folder = world.tmp / "hf"
    hf_model("hubert").save_pretrained(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    outcome = world.call("convert_hubert_from_hf", "--model", folder, "--out", folder / "model.safetensors")
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
    return outcome


NO_ROOM = {
    "stage 2's file": (full(prune, 60_000), "/out: File too large"),
    "stage 4's file": (full(save_final_ckpt, 20_000), "/out: File too large"),
    "run.json": (full(prune, 1_000), "cannot write ", "/run.json: File too large"),
    "a converted model": (full(convert, 60_000), "/out: File too large"),
    "a checkpoint": (full_while_training, "/last.ckpt: File too large"),
    "the log": (small_files(log_interval=1), "cannot write the logs in ", "/exp/logs: File too large"),
    "batches in shared memory": (small_files(num_workers=1), "no shared memory left", "--num_workers 0"),
    "weights for transformers": (full(export("hf"), 60_000, "new"), "/new: Error while"),
    "ONNX": (full(export("onnx"), 60_000), "/out: File too large"),
    "a report": (full(report, 1_000, "new"), "/report.json: File too large"),
    "what is printed": (full_standard_output, "could not be written (No space"),
}
"""What does not fit, how, and the words of the sentence."""

FORBIDDEN_WRITERS = {
    "stage 2": (prune, ""),
    "stage 4": (save_final_ckpt, ""),
    "a converter": (convert, ""),
    "manifests": (prepare, "/train100.tsv"),
    "transformers": (export("hf"), ""),
    "ONNX": (export("onnx"), ""),
    "a report": (report, "/report.json"),
}

CASES = [
    *(Case(f"no room for {name}", do, refused(*words)) for name, (do, *words) in NO_ROOM.items()),
    Case("no room for a run's lines", full_standard_error, finished()),
    Case("no temporary folder", temporary_folder_is_full, finished("update 10/10")),
    *(
        Case(f"{name} to where it may not", forbidden(write), refused(f"/sys/no{path}: "))
        for name, (write, path) in FORBIDDEN_WRITERS.items()
    ),
    Case(
        "a run to where it may not",
        lambda world: world.call("distill", *world.distill(FORBIDDEN)),
        refused("--exp_dir /sys/no cannot be written to"),
    ),
    Case("a converter over its source", over_its_source, refused("is --ckpt, which it would replace")),
    Case("a converter over a file of its folder", over_a_file_of_its_folder, refused("is a file of --model")),
]
