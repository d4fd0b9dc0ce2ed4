"""A run that was cut and is run again ends as if nothing had happened, to the bit."""

import os
import signal
import subprocess

from tests.helpers.stages import (
    ENVIRONMENT,
    assert_equal_to_the_bit,
    call,
    checkpoint,
    flags,
    run,
    sentence_of,
    start,
    two_ranks,
    wait_for,
    weights,
)


def test_a_killed_run_goes_on_to_the_weights_of_an_unbroken_one(manifests, teacher, tmp_path):
    """With two loader workers and two batches an update, over the end of epochs of three batches."""
    arguments = flags(manifests, teacher, tmp_path / "whole", num_workers=0, accum_grad=2)
    run("distill.py", *arguments)
    arguments = flags(manifests, teacher, tmp_path / "cut", num_workers=2, accum_grad=2)
    process = start("distill.py", *arguments)
    wait_for(process, "update 6/10")
    process.kill()
    process.wait()
    assert checkpoint(tmp_path / "cut")["global_step"] == 4
    resumed = run("distill.py", *arguments)
    assert "update 5/10" in resumed.stderr and "update 4/10" not in resumed.stderr
    assert_equal_to_the_bit(weights(tmp_path / "cut"), weights(tmp_path / "whole"))


def test_two_ranks_of_which_one_is_signalled_stop_together_and_go_on(manifests, teacher, tmp_path):
    def arguments(name):
        return flags(manifests, teacher, tmp_path / name, num_workers=1, accum_grad=2, save_interval=1000)

    subprocess.run(
        two_ranks("distill.py", *arguments("whole")), env=ENVIRONMENT, check=True, capture_output=True
    )
    command = two_ranks("tests/helpers/ddp_worker.py", *arguments("cut"))
    environment = {**ENVIRONMENT, "NOTES": str(tmp_path)}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_for(process, "update 3/10")
    os.kill(int((tmp_path / "rank1.pid").read_text()), signal.SIGUSR1)
    output = process.stdout.read()
    assert process.wait() != 0
    assert "stopped at update" in output
    assert 3 <= checkpoint(tmp_path / "cut")["global_step"] < 10
    # Each rank has to end with the status by which run.sh requeues.
    assert {(tmp_path / f"rank{rank}.status").read_text() for rank in (0, 1)} == {"138"}
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert_equal_to_the_bit(weights(tmp_path / "cut"), weights(tmp_path / "whole"))


def test_the_checkpoint_before_the_last_one_stays_and_stands_in_for_it(
    monkeypatch, capsys, manifests, teacher, tmp_path
):
    arguments = flags(manifests, teacher, tmp_path, num_workers=0, save_interval=4)
    call(monkeypatch, "distill", *arguments)
    whole = weights(tmp_path)
    ckpts = tmp_path / "ckpts"
    assert checkpoint(tmp_path)["global_step"] == 10
    assert checkpoint(tmp_path, "previous.ckpt")["global_step"] == 8
    (ckpts / "last.ckpt").write_bytes((ckpts / "last.ckpt").read_bytes()[:-30_000])
    capsys.readouterr()
    call(monkeypatch, "distill", *arguments)
    output = capsys.readouterr().err
    assert "damaged" in output and f"going on from {ckpts}/previous.ckpt" in output
    assert "update 9/10" in output and "update 8/10" not in output
    assert_equal_to_the_bit(weights(tmp_path), whole)
    assert checkpoint(tmp_path, "previous.ckpt")["global_step"] == 8
    (ckpts / "last.ckpt").unlink()
    call(monkeypatch, "distill", *arguments)
    assert_equal_to_the_bit(weights(tmp_path), whole)


def test_running_again_and_going_back_on_purpose_lose_nothing(
    monkeypatch, capsys, manifests, teacher, tmp_path
):
    arguments = flags(manifests, teacher, tmp_path, num_workers=0, max_updates=6, save_interval=2)
    call(monkeypatch, "distill", *arguments)
    ckpts = tmp_path / "ckpts"
    content = {name: (ckpts / name).read_bytes() for name in ("last.ckpt", "previous.ckpt")}
    for _ in range(2):
        capsys.readouterr()
        call(monkeypatch, "distill", *arguments)
        assert "finished" in capsys.readouterr().err
    other = flags(manifests, teacher, tmp_path, num_workers=0, max_updates=6, cos_type="log_sig")
    for _ in range(2):
        assert "cos_type was raw" in sentence_of(monkeypatch, capsys, "distill", *other)
    assert content == {path.name: path.read_bytes() for path in ckpts.iterdir()}
    call(monkeypatch, "distill", *arguments, "--resume_checkpoint", ckpts / "previous.ckpt")
    assert (ckpts / "last.1.ckpt").read_bytes() == content["last.ckpt"]
    assert (ckpts / "previous.ckpt").read_bytes() == content["previous.ckpt"]
    assert checkpoint(tmp_path)["global_step"] == 6


def test_what_is_no_checkpoint_of_a_training_stage_is_not_resumed(
    monkeypatch, capsys, manifests, teacher, tmp_path
):
    arguments = flags(manifests, teacher, tmp_path / "exp", num_workers=0)
    sentence = sentence_of(monkeypatch, capsys, "distill", *arguments, "--resume_checkpoint", teacher)
    assert f"{teacher}: has no global_step" in sentence
