"""``prepare_data.py`` as a user runs it, on folders of real audio files."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

import prepare_data
from dataset import read_manifest
from tests.helpers.audio import BROKEN, FLAC, MP3, OPUS, SAMPLES, VOICE, WAV, changed, encoded, flac_length
from tests.helpers.stages import ended, sentence_of, start

SCRIPT = Path(prepare_data.__file__)


def write_audio(path: Path, samples: int = 400, rate: int = 16_000, channels: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (samples, channels) if channels > 1 else samples
    noise = np.random.default_rng(samples).integers(-9, 9, shape).astype(np.int16)
    soundfile.write(path, noise, rate, format=path.suffix[1:].upper())
    return path


def run(*flags: object, **process) -> subprocess.CompletedProcess:
    """Runs the script in a process of its own."""
    command = [sys.executable, SCRIPT, *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **process)


def prepare(data: Path, out: Path, layout: str = "flat", share: float = 0.25, **arguments):
    """Runs the script's work in this process, with one process to read headers."""
    flags = {"data": data, "out": out, "layout": layout, "valid_share": share, "num_workers": 1, **arguments}
    words = [f"--{flag}={value}".removesuffix("=True") for flag, value in flags.items()]
    prepare_data.main(words)


def listed(out: Path, name: str) -> list[str]:
    return read_manifest(out, name).paths


def test_librispeech_becomes_three_sorted_manifests(tmp_path):
    # Neither the name of the root folder nor that of a file must put anything into a set.
    data = tmp_path / "training dev train-clean-100"
    folders = ("train-other-500/2", "train-clean-100/Z", "train-clean-100/a", "dev-clean/ü 1", "dev-other/9")
    paths = [f"LibriSpeech/{folder}/{name}.flac" for folder in folders for name in ("dev train", "B")]
    samples = {path: 1000 + number for number, path in enumerate(paths)}
    for path, length in samples.items():
        write_audio(data / path, length)
    write_audio(data / "LibriSpeech/test-clean/1/1.flac")
    write_audio(data / "LibriSpeech/dev-clean/1.wav")
    (data / "LibriSpeech/dev-clean/1.txt").write_text("no audio")

    done = run("--data", os.path.relpath(data, tmp_path), "--out", "out/new", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "100%" in done.stderr and "10/10" in done.stderr
    wanted = {
        "train100": [path for path in samples if "train-clean-100" in path],
        "train960": [path for path in samples if path.startswith("LibriSpeech/train")],
        "valid": [path for path in samples if path.startswith("LibriSpeech/dev")],
    }
    assert {file.name for file in (tmp_path / "out/new").iterdir()} == {f"{name}.tsv" for name in wanted}
    for name, paths in wanted.items():
        lines = [str(data)] + [f"{path}\t{samples[path]}" for path in sorted(paths)]
        assert (tmp_path / f"out/new/{name}.tsv").read_bytes().decode() == "\n".join(lines) + "\n"
    assert f"train960.tsv: {len(wanted['train960'])} files" in done.stdout


def test_unusable_files_are_named_left_out_and_counted(tmp_path):
    data = tmp_path / "data"
    good = [write_audio(data / name) for name in ("good.wav", "good 2.WAV")]
    write_audio(data / "fast.wav", rate=44_100)
    write_audio(data / "slow.wav", rate=8_000)
    write_audio(data / "stereo.wav", channels=2)
    write_audio(data / "silent.wav", samples=0)
    for name, value in (("nan.wav", np.nan), ("loud.wav", 1e30)):
        soundfile.write(data / name, np.array([0, value], dtype=np.float32), 16_000, subtype="FLOAT")
    (data / "zero.wav").touch()
    (data / "text.wav").write_text("no audio at all")
    (data / "gone.wav").symlink_to(data / "nowhere.wav")
    os.mkfifo(data / "pipe.wav")
    write_audio(data / "tab\tbed.wav")
    shutil.copy(good[0], os.fsencode(data) + b"/latin\xfc.wav")

    done = run("--data", data, "--out", tmp_path / "out", "--layout", "flat", "--extension", ".Wav")
    assert done.returncode == 0, done.stderr
    names = listed(tmp_path / "out", "train") + listed(tmp_path / "out", "valid")
    assert names == ["good 2.WAV", "good.wav"]
    for name, reason in {
        "fast": "not 16 kHz (44100 Hz)",
        "slow": "not 16 kHz (8000 Hz)",
        "stereo": "not mono (2 channels)",
        "silent": "empty",
        "zero": "cannot be read (it is empty)",
        "nan": "holds samples that are not finite",
        "loud": "holds samples of 1e+30, where audio lies between -1 and 1",
        "text": "cannot be read (Format not recognised)",
        "gone": "cannot be read (no such file)",
        "pipe": "cannot be read (not a file)",
        r"tab\tbed": "a tab, a line break or a byte that is not UTF-8 in its name",
        r"latin\udcfc": "a tab, a line break or a byte that is not UTF-8 in its name",
    }.items():
        assert f"left out '{name}.wav': {reason}\n" in done.stderr
    for count in ("left out 12: ", "4 cannot be read", "2 not 16 kHz", "1 not mono", "2 a tab, a line break"):
        assert count in done.stdout


def test_manifests_that_do_not_fit_the_disk_replace_none(tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    for number in range(200):
        write_audio(data / f"dev/{'long' * 30}{number}.flac")
    write_audio(data / "train-clean-100/1.flac")
    out.mkdir()
    for name in ("train100", "train960", "valid"):
        (out / f"{name}.tsv").write_text("as it was")

    # train100 and train960 fit in 8,000 bytes, and valid does not.
    limit = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, 8_000))}
    done = run("--data", data, "--out", out, **limit)
    assert done.returncode == 2
    assert done.stderr.endswith(f"prepare_data.py: error: cannot write {out}/valid.tsv: File too large\n")
    assert [file.read_text() for file in out.iterdir()] == ["as it was"] * 3


@pytest.mark.parametrize(
    ("flag", "value", "sentence"),
    [
        ("--data", "1.flac", "no folder 1.flac"),
        ("--data", "", "--data: is empty"),
        ("--out", "1.flac", "cannot write 1.flac/train.tsv: "),
        ("--extension", "mp3", "no .mp3 file under .: change --data, or --extension"),
        ("--extension", "wav", "(1 not 16 kHz)"),
        ("--valid_share", "1", "--valid_share: '1' is not a number from 0 to below 1"),
        ("--valid_share", "nan", "--valid_share: 'nan' is not a number"),
        ("--num_workers", "0", "--num_workers: '0' is not a whole number above 0"),
        ("--layout", "librispeech", "none of the 1 .flac files under . has train or dev in its path"),
    ],
)
def test_a_mistake_in_a_flag_is_named_and_nothing_written(
    monkeypatch, capsys, tmp_path, flag, value, sentence
):
    write_audio(tmp_path / "1.flac")
    write_audio(tmp_path / "2.wav", rate=48_000)
    monkeypatch.chdir(tmp_path)
    arguments = {"--data": ".", "--out": "out", "--layout": "flat", flag: value}
    words = [word for pair in arguments.items() for word in pair]
    assert sentence in sentence_of(monkeypatch, capsys, "prepare_data", *words)
    assert {path.name for path in tmp_path.iterdir()} == {"1.flac", "2.wav"}


def test_a_set_that_became_empty_keeps_no_earlier_files(tmp_path, capsys):
    data, out = tmp_path / "data", tmp_path / "out"
    write_audio(data / "train-clean-100/1.flac")
    write_audio(data / "train-clean-360/2.flac")
    prepare(data, out, "librispeech")
    shutil.rmtree(data / "train-clean-100")
    prepare(data, out, "librispeech")
    assert [len(listed(out, name)) for name in ("train100", "train960", "valid")] == [0, 1, 0]
    said = capsys.readouterr().out
    assert "train100.tsv: empty" in said and "valid.tsv: empty" in said


def test_the_choice_for_validation_has_its_share_and_follows_from_seed_and_path():
    paths = [f"speaker {number % 10}/{number}.flac" for number in range(1000)]
    shares = [(40, 0.25), (40, 0), (40, 0.001), (1, 0.5), (2, 0.9)]
    sizes = [len(prepare_data.split_off(paths[:count], share, seed=0)) for count, share in shares]
    assert sizes == [10, 0, 1, 0, 1]
    chosen = prepare_data.split_off(paths, 0.1, seed=1)
    assert len(chosen) == 100
    assert prepare_data.split_off(paths[::-1], 0.1, seed=1) == chosen
    # By chance a tenth would be chosen again: ten, with a standard deviation of three.
    assert len(prepare_data.split_off(paths, 0.1, seed=2) & chosen) < 25
    assert len(prepare_data.split_off(paths[:-10], 0.1, seed=1) - chosen) <= 10


def test_links_are_followed_and_nothing_is_listed_twice(tmp_path, capsys):
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    write_audio(data / "z/real.flac")
    write_audio(elsewhere / "deep/far.flac")
    write_audio(elsewhere / "single.flac")
    (tmp_path / "corpus").symlink_to(data)
    (data / "a-loop").symlink_to(data)
    (data / "a-second-name").symlink_to(data / "z")
    (data / "b-far").symlink_to(elsewhere / "deep")
    (elsewhere / "deep/back").symlink_to(elsewhere / "deep")
    (data / "linked.flac").symlink_to(elsewhere / "single.flac")
    (data / "linked-again.flac").symlink_to(data / "linked.flac")
    (data / "also-real.flac").symlink_to(data / "z/real.flac")
    prepare(tmp_path / "corpus/", tmp_path / "out", share=0)
    manifest = read_manifest(tmp_path / "out", "train")
    assert manifest.paths == ["b-far/far.flac", "linked-again.flac", "z/real.flac"]
    assert manifest.root == f"{tmp_path}/corpus", "its name as it was given"
    said = capsys.readouterr().err
    for path in ("a-loop", "a-second-name", "b-far/back", "also-real.flac", "linked.flac"):
        assert f"left out '{path}': another name of a" in said


def converted(folder: Path) -> dict[str, np.ndarray]:
    """The files in a folder that --convert_to has written, by their paths."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    for path in paths:
        info = soundfile.info(path)
        assert (info.format, info.samplerate, info.channels) == ("FLAC", 16_000, 1)
    return {str(path.relative_to(folder)): soundfile.read(path, dtype="int16")[0] for path in paths}


def test_conversion_takes_any_format_rate_and_channels(tmp_path, capsys):
    data, folder, out = (tmp_path / name for name in ("data", "16k", "out"))
    for name, write in {
        "a/x.mp3": MP3,
        "a/x.wav": encoded(44_100, 2, format="WAV"),
        "b/ü 1.opus": OPUS,
        "b/six.FLAC": encoded(48_000, 6, format="FLAC"),
        "same.wav": WAV,
        "unknown.flac": changed(FLAC, flac_length(0)),
        "broken.flac": BROKEN["cut flac"][0],
        "c/text.wav": BROKEN["text"][0],
        "video.m4a": BROKEN["noise"][0],
    }.items():
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        write(data / name)
    before = {path: path.read_bytes() for path in data.rglob("*.*")}
    for _ in range(2):
        prepare(data, out, share=0, convert_to=folder, num_workers=2)
        manifest = read_manifest(out, "train")
        files = converted(folder)
        assert manifest.root == str(folder) and manifest.paths == sorted(files)
        assert manifest.lengths.tolist() == [len(files[path]) for path in manifest.paths]
        said = capsys.readouterr().err
        assert "left out 'broken.flac': cannot be read (Error : flac decoder lost sync)" in said
        assert "left out 'c/text.wav': cannot" in said and "left out 'video.m4a': cannot" in said
    assert {name: len(samples) for name, samples in files.items()} == {
        "a/x.mp3.flac": SAMPLES,
        "a/x.wav.flac": round(SAMPLES * 16 / 44.1),
        "b/six.flac": SAMPLES // 3,
        "b/ü 1.flac": SAMPLES,
        "same.flac": SAMPLES,
        "unknown.flac": SAMPLES,
    }
    # What is 16 kHz mono already stays as it is, to the bit.
    assert np.array_equal(files["same.flac"], soundfile.read(data / "same.wav", dtype="int16")[0])
    assert before == {path: path.read_bytes() for path in data.rglob("*.*")}


def test_conversion_does_again_what_is_missing_alone(tmp_path, capsys):
    data, folder, out = (tmp_path / name for name in ("data", "16k", "out"))
    for name in "abcde":
        write_audio(data / f"{name}.wav", 40_000 + ord(name))

    def convert():
        prepare(data, out, share=0, convert_to=folder)
        return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}

    first = convert()
    (folder / "a.flac").unlink()
    (folder / "b.flac").write_bytes((folder / "b.flac").read_bytes()[:-300])
    (folder / ".c.flac.1234.tmp").write_bytes(b"left by a kill")
    write_audio(data / "c.wav", 50_000)
    write_audio(folder / "d.flac")
    mine = (folder / "d.flac").read_bytes()
    capsys.readouterr()
    again = convert()
    assert {name for name in first if first[name] != again[name]} == {"a.flac", "b.flac", "c.flac", "d.flac"}
    assert read_manifest(out, "train").lengths.tolist() == [40_097, 40_098, 50_000, 40_101]
    assert set(again) == set(first)
    # Another program's file is left alone.
    assert (folder / "d.flac").read_bytes() == mine
    assert "left out 'd.wav': the file to write is there, and" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_conversion_goes_on_where_it_was(tmp_path, number):
    data, folder = tmp_path / "data", tmp_path / "16k"
    for index in range(60):
        (data / f"{index % 3}").mkdir(parents=True, exist_ok=True)
        soundfile.write(data / f"{index % 3}/{index}.wav", np.tile(VOICE, 20), 44_100)
    flags = ["--data", data, "--out", tmp_path / "out", "--layout", "flat", "--convert_to", folder]
    process = start("prepare_data.py", *flags, "--num_workers", 2)
    while len(list(folder.rglob("[0-9]*.flac"))) < 4:
        time.sleep(0.05)
    # SIGKILL comes to the first process alone, and the others have to end with it.
    (os.kill if number == signal.SIGKILL else os.killpg)(process.pid, number)
    status, output = ended(process)
    assert status == (-number if number == signal.SIGKILL else 128 + number)
    assert "Traceback" not in output and not (tmp_path / "out").exists()
    done = {path: path.stat().st_mtime_ns for path in folder.rglob("[0-9]*.flac")}
    assert 4 <= len(done) < 60
    assert run(*flags).returncode == 0
    lengths = {len(samples) for samples in converted(folder).values()}
    assert lengths == {round(20 * SAMPLES * 16 / 44.1)} and len(converted(folder)) == 60
    assert all(path.stat().st_mtime_ns == when for path, when in done.items())


def test_conversion_into_the_corpus_itself_is_refused(fails, tmp_path):
    write_audio(tmp_path / "1.wav")
    for folder in (tmp_path, tmp_path / "new"):
        flags = ("--data", tmp_path, "--out", tmp_path / "out", "--convert_to", folder)
        assert "name a folder outside of it" in fails("prepare_data", *flags)
    assert [path.name for path in tmp_path.iterdir()] == ["1.wav"]


@pytest.mark.slow
def test_a_full_disk_ends_a_conversion_in_one_sentence(tmp_path):
    (tmp_path / "data").mkdir()
    for name in "abc":
        FLAC(tmp_path / f"data/{name}.flac")
    limit = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))}
    flags = ("--data", tmp_path / "data", "--layout", "flat", "--out", tmp_path / "out")
    done = run(*flags, "--convert_to", tmp_path / "16k", **limit)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"prepare_data.py: error: cannot write {tmp_path}/16k/a.flac" in done.stderr.splitlines()[-1]
    assert not list((tmp_path / "16k").iterdir())


def test_headers_are_verified_and_lengths_counted(tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    for name, write in {
        "cut": BROKEN["cut flac"][0],
        "few": BROKEN["flac of too few"][0],
        "good": FLAC,
        "unknown": changed(FLAC, flac_length(0)),
    }.items():
        write(data / f"{name}.flac")
    prepare(data, tmp_path / "out", share=0)
    # A header that can be believed is believed.
    lengths = [SAMPLES, SAMPLES // 2, SAMPLES, SAMPLES]
    assert read_manifest(tmp_path / "out", "train").lengths.tolist() == lengths
    prepare(data, tmp_path / "out", share=0, verify=True)
    assert listed(tmp_path / "out", "train") == ["good.flac", "unknown.flac"]
    said = capsys.readouterr().err
    assert "'cut.flac': cannot be read (" in said and "'few.flac': does not end where its" in said


def test_audio_that_training_leaves_out_is_counted(tmp_path, capsys):
    for name, samples in {"a": 20_000, "b": 100_000, "c": 250_000, "d": 250_001, "e": 280_000}.items():
        write_audio(tmp_path / f"data/{name}.flac", samples)
    prepare(tmp_path / "data", tmp_path / "out", share=0)
    sentence = "of 5 utterances, 2 above 15.6 s, 58.9% of the audio and 1 below 2 s, 2.22% of the audio"
    assert f"{sentence} (--long_utterances split uses" in capsys.readouterr().out


def labelled_lines(out: Path, name: str) -> dict[str, str]:
    manifest = read_manifest(out, name)
    return dict(zip(manifest.paths, manifest.texts or [], strict=True))


def test_librispeechs_transcripts_become_labels(tmp_path, capsys):
    data = tmp_path / "data"
    for path in ("train-clean-100/1/2/1-2-0000", "train-clean-100/1/2/1-2-0001", "dev-clean/3/4/3-4-0000"):
        write_audio(data / f"{path}.flac")
    lines = "1-2-0000 MISTER  QUILTER'S\r\n1-2-0007 GONE\n1-2-0001\n"
    (data / "train-clean-100/1/2/1-2.trans.txt").write_text(lines)
    (data / "dev-clean/3/4/3-4.trans.txt").write_text("3-4-0000 \u00dcBER\u2028ALL", encoding="utf-8")
    prepare(data, tmp_path / "out", "librispeech", labels="transcripts")
    train = {"train-clean-100/1/2/1-2-0000.flac": "MISTER QUILTER'S"}
    assert (
        labelled_lines(tmp_path / "out", "train100") == labelled_lines(tmp_path / "out", "train960") == train
    )
    assert labelled_lines(tmp_path / "out", "valid") == {"dev-clean/3/4/3-4-0000.flac": "\u00dcBER ALL"}
    said = capsys.readouterr().err
    assert "left out 1 files without a label: 'train-clean-100/1/2/1-2-0001.flac' for one" in said
    assert "left out 1 labels without a file: 'train-clean-100/1/2/1-2-0007' for one" in said


def test_names_of_folders_become_labels_of_converted_files(tmp_path, capsys):
    data = tmp_path / "data"
    for path in ("yes/deep/a.wav", "yes/a.wav", "no way/a.wav", "a.wav"):
        write_audio(data / path, 4_000, rate=8_000)
    flags = {"convert_to": tmp_path / "16k", "labels": "folders"}
    prepare(data, tmp_path / "out", share=0, **flags)
    labels = {"no way/a.flac": "no way", "yes/a.flac": "yes", "yes/deep/a.flac": "yes"}
    assert labelled_lines(tmp_path / "out", "train") == labels
    assert read_manifest(tmp_path / "out", "train").root == str(tmp_path / "16k")
    said = capsys.readouterr()
    assert "left out 1 files without a label: 'a.wav' for one" in said.err and "16k/a.flac" not in said.err
    assert not (tmp_path / "16k/a.flac").exists()
    # Half a second is too little for crops alone.
    assert "training leaves out" not in said.out


@pytest.mark.parametrize("root", ["data", "data/clips"])
def test_paths_of_labels_are_below_data_or_the_files_folder(tmp_path, root, capsys):
    for name in ("a.flac", "deep/b.flac"):
        write_audio(tmp_path / "data/clips" / name)
    text = "\ufeff./clips/a.flac\tA B\r\nclips/deep/b.flac\tB\nclips/c.flac\tC\n"
    (tmp_path / "data/l.tsv").write_text(text, encoding="utf-8")
    prepare(tmp_path / root, tmp_path / "out", share=0, labels=str(tmp_path / "data/l.tsv"))
    assert list(labelled_lines(tmp_path / "out", "train").values()) == ["A B", "B"]
    assert "left out 1 labels without a file: " in capsys.readouterr().err
    shutil.move(tmp_path / "data/l.tsv", tmp_path / "l.tsv")
    if root == "data":
        prepare(tmp_path / root, tmp_path / "out", share=0, labels=str(tmp_path / "l.tsv"))
        assert list(labelled_lines(tmp_path / "out", "train").values()) == ["A B", "B"]


def test_whole_speakers_are_held_out_where_labels_name_them():
    hold_out = prepare_data.speakers_to_hold_out
    rows = [(str(digit), f"s{speaker}") for speaker in range(10) for digit in range(20)]
    sizes = [len(hold_out(rows, share, seed=1)) for share in (0, 0.01, 0.14, 0.16, 0.34, 0.99)]
    assert sizes == [0, 1, 1, 2, 3, 9]
    assert hold_out(rows[::-1], 0.34, seed=1) == hold_out(rows, 0.34, seed=1)
    assert len({tuple(hold_out(rows, 0.01, seed)) for seed in range(20)}) > 4
    # A speaker with most of the files is none to validate a little on.
    assert hold_out([*rows[:40], *([("x", "much")] * 400)], 0.1, seed=1) in ({"s0"}, {"s1"}, {"s0", "s1"})
    for none in ([row[:1] for row in rows], [(s, s) for _, s in rows], rows[:20]):
        assert hold_out(none, 0.1, seed=1) == set()
    # Everyone reads a text of their own, and several.
    assert hold_out([(f"{s} {d}", s) for d, s in rows], 0.1, seed=1) != set()


def test_held_out_speakers_are_in_validation_alone(tmp_path, capsys):
    lines = []
    for number in range(24):
        write_audio(tmp_path / f"data/{number}.flac")
        lines.append(f"{number}.flac\t{number % 2}\tvoice {number // 2 % 4}\n")
    (tmp_path / "data/l.tsv").write_text("".join(lines))
    prepare(tmp_path / "data", tmp_path / "out", share=0.2, labels=str(tmp_path / "data/l.tsv"))
    train, valid = (
        {int(path[:-5]) // 2 % 4 for path in listed(tmp_path / "out", name)} for name in ("train", "valid")
    )
    assert (len(train), len(valid), len(train & valid)) == (3, 1, 0)
    assert f"valid.tsv has all files of 1 of the speakers: voice {valid.pop()}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--labels nothing", "there is no file nothing: give transcripts, folders or a file with --labels"),
        ("--labels transcripts", r"*.trans.txt beside the audio has a line ID TEXT"),
        ("--labels folders", "none for the 1 audio files under"),
        ("--labels a.tsv", "a.tsv, line 2: not path<TAB>label"),
        ("--labels b.tsv", "has none for the 1 audio files"),
        ("--labels train.tsv --out .", "--out train.tsv is --labels, which it would replace"),
    ],
)
def test_a_mistake_in_labels_is_named_and_nothing_written(tmp_path, monkeypatch, capsys, flags, words):
    write_audio(tmp_path / "1.flac")
    for name, text in {"a": "1.flac\tA\n2.flac\n", "b": "2.flac\tB\n", "train": "1.flac\tA\n"}.items():
        (tmp_path / f"{name}.tsv").write_text(text)
    monkeypatch.chdir(tmp_path)
    arguments = ["--data", ".", "--layout", "flat", "--out", "out", *flags.split()]
    assert words in sentence_of(monkeypatch, capsys, "prepare_data", *arguments)
    assert len(list(tmp_path.iterdir())) == 4
