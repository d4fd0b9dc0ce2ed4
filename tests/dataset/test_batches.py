"""Bucketed batches, and the loader of crops, on real files."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from dataset import AudioDataset, AudioError, BucketBatchSampler, make_loader, write_manifests
from tests.helpers.audio import write_counting
from tests.helpers.stages import ENVIRONMENT, ROOT
from utils.files import UserError


def spread_lengths(count: int, seed: int = 0) -> np.ndarray:
    """Lengths that LibriSpeech might have, some below and some above the range that is used."""
    return np.random.default_rng(seed).integers(20_000, 270_000, count)


def epoch_of(batches: BucketBatchSampler, epoch: int) -> list[list[tuple[int, int, int]]]:
    first = epoch * batches.batches_an_epoch
    return [batches[first + place] for place in range(batches.batches_an_epoch)]


def utterances_of(batches: BucketBatchSampler) -> list[int]:
    return [index for batch in batches for index, _, _ in batch]


def test_batches_go_from_short_to_long_filled_to_the_limit():
    lengths = spread_lengths(3000)
    batches = list(BucketBatchSampler(lengths, 87.5, shuffle=False))
    sums = [sum(int(lengths[index]) for index, _, _ in batch) for batch in batches]
    assert max(sums) <= 1_400_000
    bucket = (250_000 - 32_000) / 1000
    for batch, following, total in zip(batches, batches[1:], sums, strict=False):
        assert total + lengths[following[0][0]] > 1_400_000
        assert lengths[following[0][0]] > max(lengths[index] for index, _, _ in batch) - bucket
    assert epoch_of(BucketBatchSampler(lengths, 87.5, shuffle=False), 7) == batches, (
        "validation's never change"
    )
    for batch in batches:
        shortest = min(lengths[index] for index, _, _ in batch)
        assert {length for _, _, length in batch} == {shortest}


def test_an_utterance_longer_than_a_batch_is_one_itself():
    batches = list(BucketBatchSampler([100_000, 32_000, 33_000, 200_000], 5, shuffle=False))
    assert [[index for index, _, _ in batch] for batch in batches] == [[1, 2], [0], [3]]


@pytest.mark.parametrize(("world_size", "shuffle"), [(1, True), (2, False), (7, True), (64, True)])
def test_every_utterance_is_seen_once_an_epoch_over_all_ranks(world_size, shuffle):
    lengths = spread_lengths(501)
    ranks = [
        BucketBatchSampler(lengths, 87.5, shuffle=shuffle, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    seen = sorted(index for rank in ranks for index in utterances_of(rank))
    assert seen == np.flatnonzero((lengths >= 32_000) & (lengths <= 250_000)).tolist()
    assert {len(list(rank)) for rank in ranks} == {len(ranks[0])}


@pytest.mark.parametrize(
    ("lengths", "seconds", "sizes"),
    [([40_000] * 5, 2.5, [1] * 8), ([40_000] * 10 + [100_000] * 2, 12.5, [2, 2, 3, 5])],
    ids=["single utterances repeat", "the largest batches are halved"],
)
def test_ranks_have_equal_numbers_of_batches(lengths, seconds, sizes):
    ranks = [BucketBatchSampler(lengths, seconds, rank=rank, world_size=4) for rank in range(4)]
    assert {index for rank in ranks for index in utterances_of(rank)} == set(range(len(lengths)))
    assert sorted(len(batch) for rank in ranks for batch in rank) == sizes


def test_epoch_and_seed_change_only_the_order_of_batches():
    def epoch(number: int, seed: int = 2022) -> list[tuple[int, ...]]:
        batches = BucketBatchSampler(lengths, 87.5, seed=seed)
        return [tuple(index for index, _, _ in batch) for batch in epoch_of(batches, number)]

    lengths = spread_lengths(1000)
    first = epoch(0)
    in_order = [tuple(i for i, _, _ in batch) for batch in BucketBatchSampler(lengths, 87.5, shuffle=False)]
    assert epoch(0) == first
    for other in (epoch(1), epoch(0, seed=1), in_order):
        assert other != first
        assert sorted(other) == sorted(first)
        # About one batch of an order stays where it was by chance.
        assert sum(a == b for a, b in zip(first, other, strict=True)) < 6


def test_crops_do_not_depend_on_the_number_of_ranks():
    def crops(world_size: int, epoch: int = 3, seed: int = 2022) -> dict[int, tuple[int, int]]:
        result = {}
        for rank in range(world_size):
            batches = BucketBatchSampler(lengths, 87.5, rank=rank, world_size=world_size, seed=seed)
            crops = [crop for batch in epoch_of(batches, epoch) for crop in batch]
            result.update({index: (start, length) for index, start, length in crops})
        return result

    # Ten batches, so that none is halved for two or five ranks: a halved one has another length to crop to.
    lengths = np.random.default_rng(0).integers(240_000, 250_000, 48)
    assert len(BucketBatchSampler(lengths, 87.5)) == 10
    one = crops(1)
    assert crops(2) == crops(5) == one
    for other in (crops(1, epoch=4), crops(1, seed=1)):
        assert sum(other[index] != one[index] for index in one) > 30


def test_crop_starts_are_uniform_to_the_last_possible_one():
    # Pairs of 32,000 and 32,003 samples: the longer one has starts 0, 1, 2 and 3.
    batches = BucketBatchSampler([32_000, 32_003], 87.5)
    counts = np.zeros(4)
    for epoch in range(4000):
        ((_, shortest, length), (_, start, _)) = batches[epoch]
        assert (shortest, length) == (0, 32_000)
        counts[start] += 1
    # Five standard deviations of a binomial with n = 4000 and p = 1/4.
    assert np.abs(counts - 1000).max() < 5 * np.sqrt(750)


def test_order_and_crops_are_those_of_earlier_versions():
    """So that a run that an earlier version began goes on with its own batches."""
    batches = BucketBatchSampler(range(32_000, 250_000, 20_000), 30, seed=7)
    assert batches[0] == [(5, 0, 132000), (6, 8244, 132000), (7, 18756, 132000)]
    assert batches[6] == [(8, 0, 192000), (9, 12836, 192000)]
    assert batches[7] == [(5, 0, 132000), (6, 8643, 132000), (7, 32424, 132000)]


def test_a_batch_of_a_run_follows_from_its_number_alone():
    lengths = spread_lengths(300)

    def batches(run=None):
        return BucketBatchSampler(lengths, 87.5, rank=1, world_size=2, run=run)

    an_epoch = batches().batches_an_epoch
    total = 2 * an_epoch + 5
    whole = list(batches(range(total)))
    assert whole[:an_epoch] == list(batches())
    assert whole[an_epoch : 2 * an_epoch] == epoch_of(batches(), 1) != whole[:an_epoch]
    backwards = batches()
    assert [backwards[number] for number in reversed(range(total))] == whole[::-1]
    for start in (0, 3, an_epoch, an_epoch + 1, total):
        rest = batches(range(start, total))
        assert list(rest) == list(rest) == whole[start:] and len(rest) == total


def test_batches_of_a_large_corpus_take_less_than_seconds():
    begin = time.process_time()
    assert BucketBatchSampler(spread_lengths(281_241), 87.5, world_size=32)[100_000]
    assert time.process_time() - begin < 3


def test_batches_for_a_gpu_have_few_shapes_and_lose_little():
    # LibriSpeech has a mean of 12.3 s: three quarters of its utterances last 12 to 16.5 s.
    generator = np.random.default_rng(0)
    seconds = np.append(generator.uniform(1.4, 11, 15_600), generator.normal(14.4, 1.3, 44_400).clip(1.3, 35))
    lengths = (seconds * 16_000).astype(np.int64)
    samples, shapes = [], []
    for multiple in (1, 3_200):
        batches = BucketBatchSampler(lengths, 160, crop_multiple=multiple)
        first = [batches[number] for number in range(1_000)]
        shapes.append({(len(batch), batch[0][2]) for batch in first})
        samples.append(sum(length for batch in first for _, _, length in batch))
    assert len(shapes[0]) > 900 and len(shapes[1]) < 100
    assert all(length % 3_200 == 0 for _, length in shapes[1])
    assert 0.98 * samples[0] < samples[1] < samples[0]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    lengths = np.random.default_rng(1).integers(32_000, 48_000, 24).tolist()
    return write_counting(tmp_path_factory.mktemp("a corpus"), lengths)


def loader_of(corpus: Path, num_workers: int = 0, **arguments):
    return make_loader(AudioDataset(corpus, "train"), 12.5, num_workers, **{"shuffle": True, **arguments})


@pytest.mark.parametrize("text", ["", "{root}\n", "{root}"])
def test_an_empty_manifest_can_validate_but_not_train(tmp_path, text):
    (tmp_path / "few.tsv").write_text(text.format(root=tmp_path))
    assert len(make_loader(AudioDataset(tmp_path, "few"), 87.5, 0, shuffle=False)) == 0
    assert list(make_loader(AudioDataset(tmp_path, "few"), 87.5, 0, shuffle=False)) == []
    with pytest.raises(
        UserError, match=r"few\.tsv has 0 utterances, but none of 32000 to 250000 samples \(2 to"
    ):
        make_loader(AudioDataset(tmp_path, "few"), 87.5, 0, shuffle=True)


def test_a_loader_gives_the_crops_of_its_sampler(corpus):
    loader = loader_of(corpus)
    assert len(loader) == len(loader.batch_sampler) > 4
    for crops, (waveforms, lengths) in zip(list(loader.batch_sampler), loader, strict=True):
        expected = [torch.arange(start, start + length) % 30_000 for _, start, length in crops]
        assert waveforms.dtype == torch.float32
        assert torch.equal(waveforms * 32_768, torch.stack(expected).float())
        assert lengths.dtype == torch.long and lengths.tolist() == [len(row) for row in expected]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_run_gives_the_rest_of_its_batches(corpus, num_workers):
    total = 2 * len(loader_of(corpus)) + 2
    whole = [waveforms for waveforms, _ in loader_of(corpus, run=range(total))]
    assert len(whole) == total
    rest = [waveforms for waveforms, _ in loader_of(corpus, num_workers, run=range(3, total))]
    assert len(rest) == total - 3
    assert all(torch.equal(a, b) for a, b in zip(rest, whole[3:], strict=True))


NOISE = (np.random.default_rng(0).standard_normal(40_000) / 10).astype(np.float32)


def rewrite(samples: np.ndarray, rate: int = 16_000, **form):
    return lambda file: soundfile.write(file, samples, rate, **form)


CHANGES = {
    "missing": (Path.unlink, "no such file"),
    "no audio": (lambda file: file.write_bytes(b"what"), "Format not recognised"),
    "empty": (lambda file: file.write_bytes(b""), "it is empty"),
    "cut": (lambda file: file.write_bytes(file.read_bytes()[:20_000]), "lost sync|breaks off"),
    "longer": (rewrite(np.tile(NOISE, 2)), "80000 samples where its manifest says 40000"),
    "rate": (rewrite(NOISE, 8_000), r"not 16 kHz \(8000 Hz\)"),
    "stereo": (rewrite(np.stack([NOISE, NOISE], axis=1)), r"not mono \(2 channels\)"),
    "nan": (rewrite(NOISE * np.nan, format="WAV", subtype="FLOAT"), "holds samples that are not finite"),
    "1e30": (rewrite(NOISE * 1e30, format="WAV", subtype="FLOAT"), "holds samples of .* lies between -1"),
}
"""What happens to a file after its manifest was made, and what the error says."""


@pytest.mark.parametrize(("how", "num_workers"), [*((how, 0) for how in CHANGES), ("longer", 1)])
def test_a_file_that_changed_is_an_error_that_names_it(tmp_path, how, num_workers):
    change, words = CHANGES[how]
    rewrite(NOISE)(tmp_path / "one.flac")
    write_manifests(tmp_path, str(tmp_path), {"train": [("one.flac", len(NOISE))]})
    change(tmp_path / "one.flac")
    batches = iter(make_loader(AudioDataset(tmp_path, "train"), 87.5, num_workers))
    with pytest.raises(AudioError, match=rf"^[^\n]*{tmp_path}/one.flac[^\n]*({words})[^\n]*$"):
        next(batches)
    if num_workers:
        # The garbage collection would do it in an order in which it takes five seconds.
        batches._shutdown_workers()


def test_long_recordings_become_equal_pieces_read_in_place(tmp_path):
    lengths = [32_000, 250_000, 250_001, 600_001, 31_999]
    write_counting(tmp_path, lengths)
    pieces = [(0, 0, 32_000), (1, 0, 250_000), (2, 0, 125_000), (2, 125_000, 125_001)]
    pieces += [(3, 0, 200_000), (3, 200_000, 200_000), (3, 400_000, 200_001), (4, 0, 31_999)]
    dataset = AudioDataset(tmp_path, "train", "split")
    assert dataset.lengths.tolist() == [length for _, _, length in pieces]
    for index, (number, first, length) in enumerate(pieces):
        assert dataset.path(index) == f"{tmp_path}/{number}.flac"
        crop = dataset[index, 7, length - 7] * 32_768
        assert torch.equal(crop, (torch.arange(first + 7, first + length) % 30_000).float())
    loader = make_loader(AudioDataset(tmp_path, "train", "split"), 87.5, 0, shuffle=True)
    assert sorted(utterances_of(loader.batch_sampler)) == list(range(7))
    # In one piece, those of 32,000 to 250,000 samples are used.
    dropped = make_loader(AudioDataset(tmp_path, "train"), 87.5, 0, shuffle=True)
    assert sorted(utterances_of(dropped.batch_sampler)) == [0, 1]
    assert AudioDataset(tmp_path, "train", "drop").lengths.tolist() == lengths


@pytest.mark.parametrize("num_workers", [0, 2])
def test_another_utterance_is_read_for_one_that_is_broken(corpus, tmp_path, num_workers):
    folder = shutil.copytree(corpus, tmp_path / "copy")
    manifest = (folder / "train.tsv").read_text()
    (folder / "train.tsv").write_text(manifest.replace(str(corpus), str(folder)))
    for number in (3, 9):
        (folder / f"{number}.flac").write_bytes(b"broken")

    def batches(of):
        return list(make_loader(AudioDataset(of, "train"), 12.5, num_workers, shuffle=True, run=range(12)))

    first, again, whole = batches(folder), batches(folder), batches(corpus)
    seen = []
    for (waveforms, lengths, *faults), (same, _, *_), (expected, expected_lengths) in zip(
        first, again, whole, strict=True
    ):
        assert torch.equal(waveforms, same) and torch.equal(lengths, expected_lengths)
        changed = [not torch.equal(a, b) for a, b in zip(waveforms, expected, strict=True)]
        assert sum(changed) == sum(map(len, faults))
        seen += [fault for some in faults for fault in some]
        # The substitutes are audio of this corpus too.
        assert all(((row[1:] - row[:-1]) * 32_768 == 1).sum() >= len(row) - 3 for row in waveforms)
    assert {fault.line for fault in seen} == {f"line {line} of {folder}/train.tsv" for line in (5, 11)}
    assert {fault.complaint for fault in seen} == {
        f"cannot read {folder}/{number}.flac: Format not recognised" for number in (3, 9)
    }
    # What takes its place changes from epoch to epoch.
    assert len(seen) > 3


@pytest.mark.slow
def test_a_reader_that_hangs_at_its_start_is_started_again(corpus, tmp_path):
    """Its hook stands for a lock of Python's own, which a thread may hold while another one forks."""
    script = f"""
import os, pathlib, time
first = pathlib.Path({str(tmp_path / "first")!r})
def stand_still():
    try:
        first.touch(exist_ok=False)
    except FileExistsError:
        return
    time.sleep(600)
os.register_at_fork(after_in_child=stand_still)
from dataset import workers
from dataset.batches import AudioDataset, make_loader
workers.SECONDS = 0.5
loader = make_loader(AudioDataset({str(corpus)!r}, "train"), 12.5, 2, shuffle=False)
print(sum(len(waveforms) for waveforms, _ in loader))
"""
    command = [sys.executable, "-c", script]
    process = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert process.returncode == 0, process.stderr
    loader = make_loader(AudioDataset(corpus, "train"), 12.5, 0, shuffle=False)
    assert int(process.stdout) == sum(len(waveforms) for waveforms, _ in loader)
    assert (tmp_path / "first").exists(), "one was to stand still"
