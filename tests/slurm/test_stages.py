"""The project's own scripts under a real SLURM: a stopped job goes on as if nothing had happened."""

import json
import sys

import pytest

from tests.helpers.stages import RECIPE, ROOT, assert_equal_to_the_bit, checkpoint, flags, run, weights
from tests.slurm.cluster import Job, case, cases_of
from utils.checkpoint import fingerprint

pytestmark = pytest.mark.slurm


def stopped_recipe(world, ranks):
    """Runs run.sh without its report, unbroken and stopped in stages 1 and 3; both have to end alike."""
    python = world.folder / "python"
    python.write_text(f'#!/bin/bash\n[[ $1 == */report.py ]] || exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    variables = {**RECIPE, "tsv_dir": world.manifests, "teacher_ckpt": world.teacher, "python": python}
    variables |= {"max": 40, "final_max": 40, "save_interval": 25, "cpu_tasks": ranks, "OMP_NUM_THREADS": 1}

    def submit(name):
        folders = {"root_dir": world.folder / name, "final_dir": world.folder / name / "final"}
        folders["root_dir"].mkdir()
        return folders["root_dir"], Job(
            world.cluster, ROOT / "run.sh", cwd=world.folder, **variables | folders
        )

    (unbroken, first), (stopped, second) = submit("unbroken"), submit("stopped")
    for number, to in enumerate(([], ["--batch"]), 1):
        second.says("\nupdate 0: valid", number, 240)
        second.says("\nupdate 4/40", number)
        world.cluster.command("scancel", *to, "--signal=USR1", second.id)
        second.says("SLURM starts this job again", number)
    for job, stops in ((first, 0), (second, 2)):
        state, output = job.ends(400)
        assert state == "COMPLETED" and output.count("stopped at update") == stops, output
    assert checkpoint(stopped)["run"]["flags"]["batches_an_update"] == ranks
    for part in ("", "final"):
        assert_equal_to_the_bit(weights(unbroken / part), weights(stopped / part))
        models = [exp / part / "ckpts" / "pruned_hubert_base.pth" for exp in (unbroken, stopped)]
        assert fingerprint(models[0]) == fingerprint(models[1])


@case
def a_stopped_recipe_ends_with_the_unbroken_ones_weights(world):
    stopped_recipe(world, 1)


@case
def a_stopped_recipe_of_two_ranks_ends_with_the_unbroken_ones_weights(world):
    stopped_recipe(world, 2)


@case
def a_later_start_takes_over_from_one_on_a_lost_node(world):
    script = f'#!/bin/bash\nsrun --kill-on-bad-exit=0 {sys.executable} {ROOT}/distill.py "$@"\n'
    (world.folder / "job.sh").write_text(script)
    endless = {"max_updates": 10**6, "save_interval": 10**6, "num_workers": 0}
    arguments = flags(world.manifests, world.teacher, world.folder / "exp", **endless)
    options = ("--partition=brittle", "--ntasks-per-node=2", "--requeue", "--open-mode=append")
    job = Job(world.cluster, *options, "job.sh", *arguments, cwd=world.folder, OMP_NUM_THREADS=1)
    job.says("\nupdate 3/", seconds=120)
    refused = run("distill.py", *arguments, check=False).stderr
    assert f", start 0 of SLURM job {job.id}, step 0)" in refused.splitlines()[-1], refused
    node = job.field("BatchHost")
    world.cluster.kill_node(node)
    job.says("waiting until an earlier start of this job has saved and left: process", seconds=120)
    job.says("\nupdate ", job.output.count("\nupdate ") + 3, 120)
    first, second = json.loads((world.folder / "exp" / "run.json").read_text())["distill"]["sessions"]
    assert (first["outcome"], second["outcome"]) == ("stopped by SIGTERM", "running")
    world.cluster.command("scancel", job.id)
    job.ends()
    world.cluster.start_node(node)


@case
def what_srun_starts_counts_and_not_the_job(world):
    arguments = flags(world.manifests, world.teacher, world.folder / "exp", max_updates=2, num_workers=0)
    command = ["salloc", "--quiet", "--ntasks-per-node=2", "srun", "--ntasks=1", sys.executable]
    world.cluster.command(*command, ROOT / "distill.py", *arguments)
    assert checkpoint(world.folder / "exp")["run"]["flags"]["batches_an_update"] == 1


@case
def one_rank_says_what_all_have_found(world):
    arguments = flags(world.manifests, "no.pth", world.folder / "exp", student_ckpt=world.teacher)
    for wrong, words in ((arguments, "no.pth: no such file"), (["--gpus", "-1"], "argument --gpus")):
        command = ["srun", "--ntasks=2", sys.executable, ROOT / "distill.py", *wrong]
        said = world.cluster.command(*command, check=False, cwd=world.folder)
        assert said.count("distill.py: error: ") == 1 and words in said, said


@pytest.mark.parametrize("name", cases_of(__name__))
def test_stages_under_slurm(name, results):
    results[name].result()
