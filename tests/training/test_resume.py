"""A run that was cut and is run again ends as if nothing had happened, to the bit."""

import os
import signal

import pytest
import torch

import dataset.batches
from lightning import DistillModule
from tests.helpers.stages import assert_equal_to_the_bit, checkpoint, ended, flags, start, wait_for, weights


def test_killed_run_ends_with_the_unbroken_runs_weights(distil, manifests, teacher, tmp_path):
    """With two processes that read audio, over the end of epochs of three updates of two batches each."""
    distil("whole", accum_grad=2)
    process = start("distill.py", *flags(manifests, teacher, tmp_path / "cut", num_workers=2, accum_grad=2))
    wait_for(process, "update 6/10")
    process.kill()
    process.wait()
    assert checkpoint(tmp_path / "cut")["global_step"] == 4
    said = distil("cut", accum_grad=2)
    assert "update 5/10" in said and "update 4/10" not in said
    assert_equal_to_the_bit(weights(tmp_path / "cut"), weights(tmp_path / "whole"))


@pytest.mark.parametrize("precision", ["16", "bf16"])
def test_mixed_precision_resumes_to_the_bit(precision, distil, tmp_path):
    """On the CPU float16 is bfloat16, but its flag takes another way."""
    distil("whole", precision=precision, save_interval=8)
    distil("cut", precision=precision, resume_checkpoint=tmp_path / "whole" / "ckpts" / "previous.ckpt")
    assert_equal_to_the_bit(weights(tmp_path / "cut"), weights(tmp_path / "whole"))


@pytest.fixture
def updates(monkeypatch):
    """For each update that has begun: each batch's epoch and utterances, and the optimiser's groups."""
    found, unused = {}, []
    crops, step = dataset.batches.BucketBatchSampler._crops, DistillModule.training_step
    clip = DistillModule.configure_gradient_clipping

    def note_batch(self, utterances, epoch):
        if self.shuffle:
            unused.append((epoch, utterances.tolist()))
        return crops(self, utterances, epoch)

    def note_step(self, batch, batch_idx):
        found.setdefault(self.global_step + 1, {"batches": []})["batches"].append(unused.pop(0))
        return step(self, batch, batch_idx)

    def note_groups(self, optimizer, *args, **kwargs):
        groups = [{key: group[key] for key in ("lr", "weight_decay")} for group in optimizer.param_groups]
        found[self.global_step + 1]["groups"] = groups
        clip(self, optimizer, *args, **kwargs)

    monkeypatch.setattr(dataset.batches.BucketBatchSampler, "_crops", note_batch)
    monkeypatch.setattr(DistillModule, "training_step", note_step)
    monkeypatch.setattr(DistillModule, "configure_gradient_clipping", note_groups)
    return found


def test_another_accum_grad_goes_on_with_the_right_batches(distil, updates, tmp_path):
    """Update u trains on batches 4 (u - 1) to 4 u - 1 of the run, whatever those before it trained on."""
    distil("four", accum_grad=4, max_updates=6)
    expected = {update: noted["batches"] for update, noted in updates.items()}
    updates.clear()
    assert [len(batches) for batches in expected.values()] == [4] * 6
    # An epoch of six batches ends within an update.
    assert {epoch for epoch, _ in expected[2]} == {0, 1}
    batches = [batch for batches in expected.values() for batch in batches]
    assert sorted(index for epoch, indices in batches if epoch == 0 for index in indices) == list(range(12))
    distil("two", accum_grad=2, max_updates=6)
    updates.clear()
    changed = {"accum_grad": 4, "allow_changed": "batches_an_update", "max_updates": 6}
    distil("on", resume_checkpoint=tmp_path / "two" / "ckpts" / "previous.ckpt", **changed, save_interval=5)
    assert {update: noted["batches"] for update, noted in updates.items()} == {
        update: expected[update] for update in (5, 6)
    }
    steps = checkpoint(tmp_path / "on")["optimizer_states"][0]["state"]
    assert {int(state["step"]) for state in steps.values()} == {6}
    # What was written under the new number goes on to the bit.
    distil("again", resume_checkpoint=tmp_path / "on" / "ckpts" / "previous.ckpt", **changed)
    assert_equal_to_the_bit(weights(tmp_path / "again"), weights(tmp_path / "on"))


def test_a_resumed_run_has_the_rates_of_its_flags(distil, updates, tmp_path):
    distil("first", save_interval=8)
    updates.clear()
    previous = tmp_path / "first" / "ckpts" / "previous.ckpt"
    changes = {"learning_rate": 0.5, "weight_decay": 0.1, "max_updates": 12}
    distil("on", resume_checkpoint=previous, **changes, allow_changed=",".join(changes))
    for update in (9, 11):
        main, gates, _ = updates[update]["groups"]
        assert main == pytest.approx({"lr": 0.5 * (12 - update) / (12 - 3), "weight_decay": 0.1})
        assert gates == pytest.approx({"lr": 0.02 * (12 - update) / (12 - 3), "weight_decay": 0.0})


def test_a_checkpoint_of_other_models_is_one_sentence(distil, refused, tmp_path):
    distil("first", max_updates=2)
    last = tmp_path / "first" / "ckpts" / "last.ckpt"
    changed = {"distill_layers": "0.1,2", "max_updates": 4, "allow_changed": "distill_layers,max_updates"}
    sentence = refused("first", **changed)
    assert f"{last} does not belong to these models and flags: what is trained differ" in sentence
    changed = {"pruning_units": "conv", "max_updates": 4, "allow_changed": "pruning_units,max_updates"}
    assert "hard_concrete_for_heads.log_alpha" in refused("first", **changed)
    for key in ("random_state", "optimizer_states", "run"):
        content = checkpoint(tmp_path / "first")
        del content[key]
        torch.save(content, tmp_path / "part.ckpt")
        sentence = refused("new", resume_checkpoint=tmp_path / "part.ckpt")
        assert "part.ckpt is not a checkpoint that this version's training stages wrote" in sentence


def test_the_checkpoint_before_the_last_one_stands_in_for_it(distil, tmp_path):
    distil("exp")
    ckpts, whole = tmp_path / "exp" / "ckpts", weights(tmp_path / "exp")
    (ckpts / "last.ckpt").write_bytes((ckpts / "last.ckpt").read_bytes()[:-30_000])
    said = distil("exp")
    assert f"{ckpts}/last.ckpt is damaged" in said and f"going on from {ckpts}/previous.ckpt" in said
    assert "update 9/10" in said and "update 8/10" not in said
    assert_equal_to_the_bit(weights(tmp_path / "exp"), whole)
    assert checkpoint(tmp_path / "exp", "previous.ckpt")["global_step"] == 8
    (ckpts / "last.ckpt").unlink()
    distil("exp")
    assert_equal_to_the_bit(weights(tmp_path / "exp"), whole)


def test_running_again_and_going_back_lose_nothing(distil, refused, tmp_path):
    distil("exp", max_updates=6, save_interval=2)
    ckpts = tmp_path / "exp" / "ckpts"
    content = {name: (ckpts / name).read_bytes() for name in ("last.ckpt", "previous.ckpt")}
    assert "finished" in distil("exp", max_updates=6)
    assert "cos_type was raw" in refused("exp", max_updates=6, cos_type="log_sig")
    assert content == {path.name: path.read_bytes() for path in ckpts.iterdir()}
    distil("exp", resume_checkpoint=ckpts / "previous.ckpt", max_updates=6, save_interval=2)
    assert (ckpts / "last.1.ckpt").read_bytes() == content["last.ckpt"]
    assert (ckpts / "previous.ckpt").read_bytes() == content["previous.ckpt"]
    assert checkpoint(tmp_path / "exp")["global_step"] == 6


def test_a_resume_checkpoint_starts_a_folder_only_once(distil, tmp_path):
    """A job that SLURM starts again has the flag again."""
    distil("first", max_updates=4)
    ckpts = tmp_path / "on" / "ckpts"
    for given in (tmp_path / "first" / "ckpts" / "last.ckpt", ckpts / "previous.ckpt"):
        changes = {"resume_checkpoint": given, "allow_changed": "max_updates"}
        start = torch.load(given, weights_only=True)["global_step"]
        assert f"update {start + 1}/{start + 4}" in distil("on", max_updates=start + 4, **changes)
        said = distil("on", max_updates=start + 6, **changes)
        assert f"update {start + 5}/" in said and f"update {start + 4}/" not in said


def test_no_file_of_a_run_is_written_through_a_link(distil, refused, tmp_path):
    kept = tmp_path / "kept"
    kept.write_text("somebody's")
    (tmp_path / "exp").mkdir()
    (tmp_path / "scratch").mkdir()
    (tmp_path / "exp" / "ckpts").symlink_to(tmp_path / "scratch")
    for name in (".lock", "run.json", "ckpts/last.ckpt"):
        link = tmp_path / "exp" / name
        link.symlink_to(kept)
        refused("exp")
        link.unlink()
        assert kept.read_text() == "somebody's"
    distil("exp", max_updates=2)
    assert {path.name for path in (tmp_path / "scratch").iterdir()} == {"last.ckpt"}


@pytest.mark.slow
def test_two_ranks_stop_together_and_go_on_to_the_bit(manifests, teacher, tmp_path):
    def train(name):
        changes = {"num_workers": 1, "accum_grad": 2, "save_interval": 1000}
        arguments = flags(manifests, teacher, tmp_path / name, **changes)
        return start("tests/helpers/ddp_worker.py", *arguments, ranks=2, NOTES=tmp_path)

    assert ended(train("whole"))[0] == 0
    process = train("cut")
    wait_for(process, "update 3/10")
    os.kill(int((tmp_path / "rank1.pid").read_text()), signal.SIGUSR1)
    status, output = ended(process)
    assert status != 0 and "stopped at update" in output
    assert 3 <= checkpoint(tmp_path / "cut")["global_step"] < 10
    # Each rank has to end with the status by which run.sh has SLURM start it again.
    assert {(tmp_path / f"rank{rank}.status").read_text() for rank in (0, 1)} == {"138"}
    assert ended(train("cut"))[0] == 0
    assert_equal_to_the_bit(weights(tmp_path / "cut"), weights(tmp_path / "whole"))
