"""The project's own scripts under a real SLURM: a stopped job goes on as if nothing had happened."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.helpers.stages import RECIPE, ROOT, assert_equal_to_the_bit, checkpoint, flags, run, weights
from tests.slurm.cluster import Job
from utils.checkpoint import fingerprint

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def recipes(cluster, manifests, teacher, tmp_path_factory):
    """Runs run.sh without its report, with one rank and with two, unbroken and stopped in stages 1 and 3;
    gives the folders, by the ranks and ``unbroken`` or ``stopped``."""
    folder = tmp_path_factory.mktemp("recipes")
    python = folder / "python"
    python.write_text(f'#!/bin/bash\n[[ $1 == */report.py ]] || exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    variables = {**RECIPE, "max": 40, "final_max": 40, "tsv_dir": manifests, "teacher_ckpt": teacher}
    variables |= {"python": python, "OMP_NUM_THREADS": 1, "save_interval": 25}

    def job(name, ranks, signals):
        exp = folder / name
        exp.mkdir()
        folders = {"root_dir": exp, "final_dir": exp / "final", "cpu_tasks": ranks}
        job = Job(cluster, ROOT / "run.sh", cwd=exp, **variables | folders)
        for number, to in enumerate(signals):
            job.says("\nupdate 0: valid", number + 1, 180)
            job.says("\nupdate 4/40", number + 1)
            cluster.command("scancel", *to, "--signal=USR1", job.id)
            job.says("SLURM starts this job again", number + 1)
        state, output = job.ends(400)
        assert state == "COMPLETED" and output.count("stopped at update") == len(signals), output
        return exp

    stopped = ([], ["--batch"])
    with ThreadPoolExecutor(4) as pool:
        yield {
            (ranks, how): pool.submit(job, f"{how} {ranks}", ranks, signals)
            for ranks in (2, 1)
            for how, signals in (("unbroken", []), ("stopped", stopped))
        }


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_stopped_recipe_ends_with_the_unbroken_ones_weights(ranks, recipes):
    unbroken, stopped = (recipes[ranks, how].result() for how in ("unbroken", "stopped"))
    assert checkpoint(stopped)["run"]["flags"]["batches_an_update"] == ranks
    for part in ("", "final"):
        assert_equal_to_the_bit(weights(unbroken / part), weights(stopped / part))
        models = [exp / part / "ckpts" / "pruned_hubert_base.pth" for exp in (unbroken, stopped)]
        assert fingerprint(models[0]) == fingerprint(models[1])


def test_a_later_start_takes_over_from_one_on_a_lost_node(cluster, manifests, teacher, tmp_path):
    script = f'#!/bin/bash\nsrun --kill-on-bad-exit=0 {sys.executable} {ROOT}/distill.py "$@"\n'
    (tmp_path / "job.sh").write_text(script)
    arguments = flags(
        manifests, teacher, tmp_path / "exp", max_updates=10**6, save_interval=10**6, num_workers=0
    )
    options = ("--partition=fragile", "--ntasks-per-node=2", "--requeue", "--open-mode=append")
    job = Job(cluster, *options, "job.sh", *arguments, cwd=tmp_path, OMP_NUM_THREADS=1)
    job.says("\nupdate 3/", seconds=120)
    refused = run("distill.py", *arguments, check=False).stderr
    assert f", start 0 of SLURM job {job.id}, step 0)" in refused.splitlines()[-1], refused
    node = job.field("BatchHost")
    cluster.kill_node(node)
    job.says("has saved and left: SLURM has started this job again", seconds=120)
    job.says("\nupdate ", job.output.count("\nupdate ") + 3, 120)
    first, second = json.loads((tmp_path / "exp" / "run.json").read_text())["distill"]["sessions"]
    assert (first["outcome"], second["outcome"]) == ("stopped by SIGTERM", "running")
    cluster.command("scancel", job.id)
    job.ends()
    cluster.start_node(node)


def test_what_srun_starts_counts_and_not_the_job(cluster, manifests, teacher, tmp_path):
    arguments = flags(manifests, teacher, tmp_path / "exp", max_updates=2, num_workers=0)
    command = [
        "salloc",
        "--quiet",
        "--ntasks-per-node=2",
        "srun",
        "--ntasks=1",
        sys.executable,
        ROOT / "distill.py",
    ]
    cluster.command(*command, *arguments)
    assert checkpoint(tmp_path / "exp")["run"]["flags"]["batches_an_update"] == 1


def test_one_rank_says_what_all_have_found(cluster, manifests, teacher, tmp_path):
    arguments = flags(manifests, "no.pth", tmp_path / "exp", student_ckpt=teacher)
    for wrong, words in ((arguments, "no.pth: no such file"), (["--gpus", "-1"], "argument --gpus")):
        command = ["srun", "--ntasks=3", sys.executable, ROOT / "distill.py", *wrong]
        said = cluster.command(*command, check=False, cwd=tmp_path)
        assert said.count("distill.py: error: ") == 1 and words in said, said
