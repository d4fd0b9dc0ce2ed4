"""Audio that breaks while a run goes on: nothing is lost, and the user knows how to go on."""

import re
import shutil

import numpy as np
import pytest
import soundfile

from lightning import DistillModule
from tests.helpers.stages import (
    assert_equal_to_the_bit,
    call,
    checkpoint,
    ended,
    flags,
    start,
    wait_for,
    weights,
)

GOES_ON = "remove line 6 of {}/train100.tsv and go on with --allow_changed train_subset"


@pytest.fixture
def broken(manifests, tmp_path):
    """A copy of the corpus, by the folder of its manifests, with a recording of 37.5 s for training at the
    end, and with one in line 6 that breaks off."""
    root = manifests.joinpath("train100.tsv").read_text().partition("\n")[0]
    folder = shutil.copytree(root, tmp_path / "corpus")
    shutil.copytree(manifests, tmp_path / "tsv")
    for manifest in (tmp_path / "tsv").iterdir():
        manifest.write_text(manifest.read_text().replace(root, str(folder)))
    train = tmp_path / "tsv/train100.tsv"
    path = folder / train.read_text().splitlines()[5].partition("\t")[0]
    path.write_bytes(path.read_bytes()[:20_000])
    soundfile.write(folder / "long.flac", 0.1 * np.random.default_rng(0).standard_normal(600_000), 16_000)
    train.write_text(train.read_text() + "long.flac\t600000\n")
    return tmp_path / "tsv"


def test_a_broken_file_saves_the_run_and_names_its_line(fails, monkeypatch, broken, teacher, tmp_path):
    arguments = flags(broken, teacher, tmp_path / "exp", num_workers=0, save_interval=1000)
    sentence = fails("distill", *arguments)
    assert GOES_ON.format(broken) in sentence and "--skip_unreadable" in sentence
    done = checkpoint(tmp_path / "exp")["global_step"]
    assert f"saved at update {done}, " in sentence and done < 10
    lines = (broken / "train100.tsv").read_text().splitlines(keepends=True)
    (broken / "train100.tsv").write_text("".join(lines[:5] + lines[6:]))
    assert "--allow_changed train_subset" in fails("distill", *arguments)
    call(monkeypatch, "distill", *arguments, "--allow_changed", "train_subset")
    assert checkpoint(tmp_path / "exp")["global_step"] == 10


@pytest.mark.slow
def test_a_lost_disk_saves_the_run(fails, monkeypatch, broken, teacher, tmp_path):
    """No other utterance can be read either."""
    arguments = flags(broken, teacher, tmp_path / "exp", num_workers=0, save_interval=1000)
    step = DistillModule.training_step

    def lose(self, *batch):
        if self.global_step == 2 and (tmp_path / "corpus").exists():
            (tmp_path / "corpus").rename(tmp_path / "lost")
        return step(self, *batch)

    monkeypatch.setattr(DistillModule, "training_step", lose)
    sentence = fails("distill", *arguments, "--skip_unreadable")
    assert "no such file, nor can up to 20 other utterances of " in sentence
    assert checkpoint(tmp_path / "exp")["global_step"] == 3
    (tmp_path / "lost").rename(tmp_path / "corpus")
    monkeypatch.undo()
    call(monkeypatch, "distill", *arguments, "--skip_unreadable")
    whole = flags(broken, teacher, tmp_path / "whole", num_workers=0)
    call(monkeypatch, "distill", *whole, "--skip_unreadable")
    assert_equal_to_the_bit(weights(tmp_path / "exp"), weights(tmp_path / "whole"))


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_bit_all_the_same(monkeypatch, capsys, broken, teacher, tmp_path):
    """Over a file that is skipped and the pieces of a long recording."""

    def arguments(folder, **changes):
        given = flags(broken, teacher, tmp_path / folder, max_updates=24, **changes)
        return [*given, "--skip_unreadable", "--long_utterances", "split"]

    call(monkeypatch, "distill", *arguments("whole", num_workers=0))
    said = capsys.readouterr().err
    assert re.findall(r"cannot read .* \(line 6 of .*train100.tsv\): another utter", said)
    assert "below 2 s" not in said and "above 15.6 s" not in said
    process = start("distill.py", *arguments("cut", num_workers=2))
    wait_for(process, "update 18/")
    process.kill()
    process.wait()
    assert checkpoint(tmp_path / "cut")["global_step"] == 16
    call(monkeypatch, "distill", *arguments("cut", num_workers=0))
    assert_equal_to_the_bit(weights(tmp_path / "cut"), weights(tmp_path / "whole"))


@pytest.mark.slow
def test_of_two_ranks_one_with_a_broken_file_saves_both(broken, teacher, tmp_path):
    arguments = flags(broken, teacher, tmp_path / "exp", num_workers=1, save_interval=1000)
    process = start("tests/helpers/ddp_worker.py", *arguments, ranks=2, NOTES=tmp_path)
    status, output = ended(process)
    assert status != 0 and output.count(".py: error: ") == 1
    assert GOES_ON.format(broken) in output
    assert {(tmp_path / f"rank{rank}.status").read_text() for rank in (0, 1)} == {"2"}
    done = checkpoint(tmp_path / "exp")["global_step"]
    assert 0 < done < 10 and f"saved at update {done}, " in output
