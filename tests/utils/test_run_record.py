"""A run goes on as the run that it was: flags and inputs are recorded, compared and listed."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.helpers.stages import call, checkpoint
from utils.checkpoint import fingerprint, read_checkpoint, save_checkpoint
from wav2vec2 import wav2vec2_model


@pytest.fixture(scope="module")
def other_teacher(teacher, tmp_path_factory):
    """The teacher's config with other weights."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("other") / "other.pth"
    save_checkpoint(path, wav2vec2_model(**read_checkpoint(teacher)["config"]))
    return path


@pytest.fixture
def said(monkeypatch, capsys):
    """Runs a script in this process; returns what it said."""

    def said(script, *arguments):
        capsys.readouterr()
        call(monkeypatch, script, *arguments)
        return "".join(capsys.readouterr())

    return said


def test_each_difference_is_listed_and_each_must_be_allowed(
    fails, said, stages, commands, teacher, other_teacher, tmp_path
):
    exp = shutil.copytree(stages, tmp_path / "exp")
    changes = ["--teacher_ckpt", other_teacher, "--accum_grad", 2, "--clip_norm", 5, "--max_updates", 6]
    arguments = [*commands(exp)["distill"], *changes]
    sentence = fails("distill", *arguments)
    assert f"teacher_ckpt was {teacher} (sha256 " in sentence and f"and is {other_teacher} (sha" in sentence
    assert "clip_norm was 10.0 and is 5.0" in sentence and "max_updates was 4 and is 6" in sentence
    assert f"{exp}/ckpts/last.ckpt was made with" in sentence
    assert "batches_an_update was 1 and is 2" in sentence
    every = "batches_an_update,clip_norm,max_updates,teacher_ckpt"
    assert f"--allow_changed {every}" in sentence
    assert "max_updates was" not in fails("distill", *arguments, "--allow_changed", "clip_norm,max_updates")
    output = said("distill", *arguments, "--allow_changed", every)
    assert "--allow_changed teacher_ckpt: teacher_ckpt was" in output
    assert checkpoint(exp)["global_step"] == 6
    assert checkpoint(exp)["run"]["inputs"]["teacher_ckpt"]["path"] == str(other_teacher)


def test_a_manifest_is_known_by_its_content_not_its_folder(
    fails, said, stages, commands, manifests, tmp_path
):
    moved = shutil.copytree(manifests, tmp_path / "moved")
    arguments = [*commands(stages)["distill"], "--tsv_dir", moved]
    assert "is finished" in said("distill", *arguments)
    lines = (moved / "train100.tsv").read_text().splitlines()
    (moved / "train100.tsv").write_text("\n".join(lines[:-1]) + "\n")
    assert f"train_subset was {manifests}/train100.tsv (sha256 " in fails("distill", *arguments)


def test_flags_that_change_no_result_may_change(said, stages, commands):
    arguments = commands(stages, log_interval=7, num_workers=3, save_interval=1)["distill"]
    assert "is finished" in said("distill", *arguments)


def test_a_copied_run_is_finished_wherever_it_lies(said, stages, commands, tmp_path):
    exp = shutil.copytree(stages, tmp_path / "copy", copy_function=shutil.copyfile)
    before = {path: path.read_bytes() for path in exp.rglob("*.*") if path.suffix in (".ckpt", ".pth")}
    assert len(before) == 6
    for script, arguments in commands(exp).items():
        assert "is finished" in said(script, *arguments), script
    assert before == {path: path.read_bytes() for path in before}
    # Whatever is missing is made again, from the stage on.
    models = [path for path in before if path.suffix == ".pth"]
    fingerprints = [fingerprint(path) for path in models]
    for path in (*models, *(exp / "final" / "ckpts").glob("*.ckpt")):
        path.unlink()
    for script, arguments in commands(exp).items():
        said(script, *arguments)
    assert fingerprints == [fingerprint(path) for path in models]


def test_a_flag_that_one_version_lacks_is_no_difference(said, stages, commands, tmp_path):
    exp = shutil.copytree(stages, tmp_path / "exp")
    run_json = json.loads((exp / "run.json").read_text())
    del run_json["prune"]["flags"]["round_to"]
    (exp / "run.json").write_text(json.dumps(run_json))
    assert "is finished" in said("prune", *commands(exp)["prune"])


@pytest.mark.parametrize(
    "script, flag", [("prune", "--distilled_ckpt"), ("save_final_ckpt", "--ckpt_after_final_distill")]
)
def test_an_unfinished_run_is_refused_unless_allowed(script, flag, fails, said, stages, commands, tmp_path):
    exp = shutil.copytree(stages, tmp_path / "exp")
    arguments = commands(exp)[script]
    previous = Path(arguments[arguments.index(flag) + 1]).with_name("previous.ckpt")
    arguments = [*arguments, flag, previous, "--out", tmp_path / "out.pth"]
    assert f"{previous} is at update 2 of 4: run " in fails(script, *arguments)
    assert not (tmp_path / "out.pth").exists()
    said(script, *arguments, "--allow_unfinished")
    content = torch.load(previous, weights_only=True)
    del content["run"]
    torch.save(content, previous)
    assert "wrote" in said(script, *arguments)  # the original's say nothing of their end


def test_a_stage_refuses_what_does_not_go_with_the_stage_before(
    fails, stages, commands, teacher, other_teacher, tmp_path
):
    prune, again, save = (commands(stages)[name] for name in ("prune", "final_distill", "save_final_ckpt"))
    sentence = fails("prune", *prune, "--original_ckpt", other_teacher, "--out", tmp_path / "new.pth")
    assert f"original_ckpt was {teacher} (sha256 " in sentence and str(other_teacher) in sentence
    assert not (tmp_path / "new.pth").exists()
    changes = ["--exp_dir", tmp_path / "new", "--teacher_ckpt", other_teacher, "--distill_layers", "0.1,2"]
    sentence = fails("final_distill", *again, *changes)
    assert "distill_layers was 0.1,3 and is 0.1,2" in sentence and f"teacher_ckpt was {teacher}" in sentence
    sentence = fails("final_distill", *again, "--exp_dir", stages)
    assert "is a checkpoint of distill.py, not of final_distill.py" in sentence
    pruned = stages / "ckpts" / "pruned_hubert_base.pth"
    torch.save({**torch.load(pruned, weights_only=True), "other": 1}, tmp_path / "other.pth")
    sentence = fails("save_final_ckpt", *save, "--config_path", tmp_path / "other.pth")
    assert f"config_path was {pruned} (sha256 " in sentence


def test_run_json_says_what_was_done_with_what_where_and_when(stages):
    first, second = (json.loads((folder / "run.json").read_text()) for folder in (stages, stages / "final"))
    assert first.keys() == {"distill", "prune"} and second.keys() == {"final_distill", "save_final_ckpt"}
    stage_1 = first["distill"]
    assert stage_1["flags"]["target_sparsity"] == 0.75 and stage_1["flags"]["batches_an_update"] == 1
    assert stage_1["inputs"].keys() == {"teacher_ckpt", "student_ckpt", "train_subset"}
    session = stage_1["sessions"][0]
    assert session["outcome"] == "finished" and 0 < session["seconds"] < 300
    assert session["started"] <= session["ended"] and session["flags"]["exp_dir"] == str(stages)
    assert session["versions"]["torch"] == torch.__version__ and session["machine"]["cores"] >= 1
    assert checkpoint(stages)["run"] == {key: stage_1[key] for key in ("stage", "flags", "inputs")}
    assert first["prune"]["inputs"]["original_ckpt"] == stage_1["inputs"]["student_ckpt"]
    assert second["final_distill"]["inputs"]["student_ckpt"] == first["prune"]["output"]


@pytest.mark.parametrize(
    "script, flag",
    [
        ("distill", "--teacher_ckpt"),
        ("distill", "--resume_checkpoint"),
        ("prune", "--distilled_ckpt"),
        ("final_distill", "--student_ckpt"),
        ("save_final_ckpt", "--config_path"),
    ],
)
def test_a_damaged_file_is_named_in_every_stage(script, flag, fails, stages, commands, tmp_path):
    arguments = commands(stages)[script]
    given = arguments[arguments.index(flag) + 1] if flag in arguments else stages / "ckpts" / "last.ckpt"
    path = tmp_path / "damaged.pth"
    path.write_bytes(Path(given).read_bytes()[:-1000])
    assert f"{path} is damaged, or is not a checkpoint" in fails(script, *arguments, flag, path)


def test_a_damaged_run_json_is_one_sentence(fails, stages, commands, tmp_path):
    exp = shutil.copytree(stages, tmp_path / "exp")
    entry = json.loads((exp / "run.json").read_text())["prune"]
    odd = [{}, {**entry, "inputs": 3}, {**entry, "sessions": []}]
    for content in ("{", "[]", *(json.dumps({"prune": entry}) for entry in odd)):
        (exp / "run.json").write_text(content)
        assert f"{exp}/run.json is damaged" in fails("prune", *commands(exp)["prune"]), content
