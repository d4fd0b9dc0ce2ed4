"""`sbatch run.sh` under a real SLURM, with stand-ins for the scripts that it runs. The cases wait for minutes
and compute nothing, so that all of them run at the same time."""

import shutil
import sys
from functools import wraps

import pytest

from tests.helpers.stages import ROOT
from tests.slurm import cluster
from tests.slurm.cluster import Job

pytestmark = pytest.mark.slurm

SCRIPTS = ("distill", "prune", "final_distill", "save_final_ckpt", "report")


class Submit:
    """Submits run.sh, or another command, in a checkout with stand-ins for the scripts."""

    def __init__(self, world):
        self.cluster, self.folder, self.exp = world.cluster, world.folder, world.folder / "exp"
        shutil.copy(ROOT / "run.sh", self.folder)
        for script in SCRIPTS:
            shutil.copy(ROOT / "tests" / "slurm" / "stage.py", self.folder / f"{script}.py")
        self.variables = {"python": sys.executable, "root_dir": self.exp, "gpus": 0}

    def __call__(self, *flags, cwd=None, command=("run.sh",), **variables):
        return Job(self.cluster, *flags, *command, cwd=cwd or self.folder, **self.variables | variables)


def case(function):
    """Makes a case of a function that submits."""

    @wraps(function)
    def case(world):
        function(Submit(world))

    return cluster.case(case)


def whole(output):
    """Whether a job has come to the end of all stages."""
    places = [output.rfind(f"\n{script} ends") for script in SCRIPTS]
    return places == sorted(places) and min(places) >= 0


def signalled(submit, *to):
    """Signals a job in each of its stages."""
    submit.variables |= {f"SECONDS_{script}": 10 for script in SCRIPTS}
    job = submit("--nodelist=node1", cpu_tasks=2)
    for number, script in enumerate(SCRIPTS, 1):
        job.says(f"{script} from 0, rank 0")
        submit.cluster.command("scancel", *to, "--signal=USR1", job.id)
        job.says("SLURM starts this job again", number)
    state, output = job.ends()
    assert state == "COMPLETED" and whole(output), output
    assert job.field("Restarts") == "5"


@case
def a_signal_to_the_shell_comes_back_from_every_stage(submit):
    signalled(submit, "--batch")


@case
def a_signal_to_the_steps_comes_back_from_every_stage(submit):
    signalled(submit)


@case
def a_signal_to_all_comes_back_from_every_stage(submit):
    signalled(submit, "--full")


@case
def one_command_comes_back_and_runs_alone(submit):
    shutil.copy(ROOT / "tests" / "slurm" / "stage.py", submit.folder / "finetune.py")
    job = submit("--nodelist=node1", command=("run.sh", "finetune.py"), cpu_tasks=2, SECONDS_finetune=10)
    job.says("finetune from 0, rank 1")
    submit.cluster.command("scancel", "--batch", "--signal=USR1", job.id)
    job.says("SLURM starts this job again")
    state, output = job.ends()
    assert state == "COMPLETED" and "\nfinetune ends" in output and "distill" not in output, output


def warned(submit, *flags):
    """Runs a job that is warned 30 s before its limit of a minute."""
    job = submit(*flags, cpu_tasks=2, SECONDS_distill=70)
    state, output = job.ends(200)
    assert state == "COMPLETED" and whole(output) and "TIME LIMIT" not in output, output
    assert int(job.field("Restarts")) >= 1


@case
def the_header_warns_before_the_time_limit(submit):
    header = (submit.folder / "run.sh").read_text().replace("@300", "@30").replace("48:00:00", "1")
    (submit.folder / "run.sh").write_text(header)
    warned(submit)


@case
def a_user_may_have_the_steps_warned(submit):
    warned(submit, "--time=1", "--signal=USR1@30")


@case
def the_limit_itself_without_warning_comes_back(submit):
    job = submit("--time=1", "--signal=URG@1", cpu_tasks=2, SECONDS_distill=100)
    state, output = job.ends(200)
    assert state == "COMPLETED" and whole(output) and "DUE TO TIME LIMIT" in output, output
    assert job.field("Restarts") == "1"


@case
def a_limit_that_is_too_short_ends(submit):
    job = submit("--time=1", SECONDS_distill=100, SAVES_NOTHING=1)
    state, output = job.ends(200)
    assert state == "FAILED" and "time limit (--time) is too short" in output, output
    assert job.field("Restarts") == "1" and "prune" not in output


@case
def scancel_saves_and_ends(submit):
    job = submit(cpu_tasks=2, SECONDS_distill=100)
    job.says("distill from 0, rank 1")
    submit.cluster.command("scancel", job.id)
    state, output = job.ends()
    assert (
        state == "CANCELLED"
        and output.count("distill ends") == 2
        and "again" not in output.split("run.sh")[0]
    )
    assert (submit.exp / "ckpts" / "last.ckpt").exists() and job.field("Restarts") == "0"


@case
def a_requeue_by_hand_saves_and_comes_back(submit):
    job = submit(cpu_tasks=2, SECONDS_distill=6)
    job.says("distill from 0, rank 1")
    submit.cluster.command("scontrol", "requeue", job.id)
    state, output = job.ends()
    assert state == "COMPLETED" and whole(output) and job.field("Restarts") == "1", output
    assert output.count("\ndistill from 0,") == 2, output


def preempted(submit, partition):
    """Preempts a job by another one that wants its node's GPUs."""
    job = submit(
        f"--partition={partition}", "--nodelist=node7", "--gpus-per-node=64", cpu_tasks=2, SECONDS_distill=8
    )
    job.says("distill from 0, rank 1")
    other = submit("--partition=high", "--gpus-per-node=64", "--wrap=true", command=())
    other.ends()
    state, output = job.ends()
    assert state == "COMPLETED" and whole(output) and job.field("Restarts") == "1", output
    assert output.count("\ndistill from 0,") == 2, output
    return job


@case
def preemption_saves_and_comes_back(submit):
    # One after the other, since both want the whole node.
    preempted(submit, "graceful")
    shutil.rmtree(submit.exp)
    preempted(submit, "abrupt")


@case
def a_lost_node_does_not_finish_a_stage(submit):
    job = submit("--partition=fragile", cpu_tasks=2, SECONDS_distill=40)
    job.says("distill from 0, rank 1")
    node = job.field("BatchHost")
    submit.cluster.kill_node(node)
    job.says("distill from 0, rank 1", 2, seconds=120)
    assert "prune" not in job.output
    state, output = job.ends(120)
    assert state == "COMPLETED" and whole(output), output
    submit.cluster.start_node(node)


@case
def a_mistake_ends_all_ranks_for_good(submit):
    job = submit(cpu_tasks=2, STATUS_distill="2 -")
    state, output = job.ends(120)
    assert state == "FAILED" and job.field("ExitCode") == "2:0" and job.field("Restarts") == "0", output
    assert "prune" not in output and "distill.py is not finished: status 2" in output


@case
def a_failing_report_leaves_the_model_finished(submit):
    state, output = submit(STATUS_report="2").ends()
    assert state == "COMPLETED" and "report.py is not finished: status 2" in output, output


@case
def the_number_of_tasks_is_what_is_asked_for(submit):
    for asked, tasks in (({}, 1), ({"cpu_tasks": 2}, 2), ({"gpus": 2}, 2), ({"gpus": 4}, 4)):
        shutil.rmtree(submit.exp, ignore_errors=True)
        _, output = submit(**asked).ends()
        assert whole(output) and output.count("\ndistill from") == tasks, output
        assert output.count("prune from 0, rank 0 of 1\n") == 1, output


@case
def two_nodes_have_tasks_each(submit):
    state, output = submit("--nodes=2", cpu_tasks=2).ends()
    assert state == "COMPLETED" and whole(output) and "final_distill from 0, rank 3 of 4" in output, output


@case
def an_allocation_that_is_too_small_is_one_sentence(submit):
    for asked in ({"gpus": 8}, {"cpu_tasks": 5}, {"nodes": 2}):
        state, output = submit(**asked).ends()
        assert state == "FAILED" and job_is_too_small(output), output


def job_is_too_small(output):
    return "run.sh: this job has no room for" in output and output.count("\n") == 2


@case
def an_empty_environment_reaches_the_step_as_the_shell_has_it(submit):
    wrapper = submit.folder / "wrapper.sh"
    settings = "".join(f"export {name}={value}\n" for name, value in submit.variables.items())
    wrapper.write_text(f"#!/bin/bash\n{settings}export MODULE=' with modules'\nbash {submit.folder}/run.sh\n")
    state, output = submit("--export=NONE", "--ntasks-per-node=1", command=(wrapper,)).ends()
    assert state == "COMPLETED" and "distill from 0, rank 0 of 1 with modules" in output, output


@case
def run_sh_finds_the_scripts_from_another_folder(submit):
    elsewhere = submit.folder / "else where"
    elsewhere.mkdir()
    job = submit(cwd=elsewhere, command=(submit.folder / "run.sh",))
    state, output = job.ends()
    assert state == "COMPLETED" and whole(output), output
    assert (submit.exp / f"slurm-{job.id}.out").samefile(elsewhere / f"slurm-{job.id}.out")


@case
def it_runs_in_a_step_of_an_interactive_job(submit):
    output = submit.cluster.command(
        "srun", "--ntasks=1", "bash", "run.sh", cwd=submit.folder, **submit.variables
    )
    assert whole(output) and "rank 0 of 1" in output


@case
def a_job_that_may_not_be_requeued_says_how_it_ended(submit):
    job = submit("--no-requeue", SECONDS_distill=20)
    job.says("distill from 0")
    submit.cluster.command("scancel", "--signal=USR1", job.id)
    state, output = job.ends()
    assert state == "FAILED" and job.field("ExitCode") == "138:0", output
    assert "run it again to go on" in output and job.field("Restarts") == "0"


@case
def salloc_ends_as_the_stage_did(submit):
    wait = "until [ \"$(grep -sc 'distill from' out)\" = 2 ]; do sleep 0.5; done"
    script = (
        f"({wait}; scancel --signal=USR1 $SLURM_JOB_ID) & bash run.sh > out; echo status $? >> out; cat out"
    )
    flags = ("salloc", "--quiet", "--ntasks-per-node=2")
    variables = submit.variables | {"SECONDS_distill": 40, "cpu_tasks": 2}
    output = submit.cluster.command(*flags, "bash", "-c", script, cwd=submit.folder, **variables)
    assert output.endswith("status 138\n") and output.count("distill ends") == 2, output


@pytest.mark.parametrize("name", cluster.cases_of(__name__))
def test_run_sh_under_slurm(name, results):
    results[name].result()
