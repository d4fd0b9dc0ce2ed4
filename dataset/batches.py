"""Bucketed batches of crops: which samples of which utterances make a batch, and how they are read."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from utils.files import UserError

from .audio import SAMPLE_RATE, AudioError, LoaderError, format_complaint, open_audio, samples_complaint
from .manifest import MAX_SAMPLES, MIN_SAMPLES, WINDOW, Manifest, read_manifest, unused_complaint
from .workers import leave_signals_to_training, start_method

NUM_BUCKETS = 1_000  # ranges of length that utterances are sorted into

# 0.2 s. Libraries for GPUs prepare for each new shape of a batch, so there must be few shapes.
GPU_CROP_MULTIPLE = 3_200

SUBSTITUTES = 20
"""How many other utterances are tried in place of one that cannot be read."""

Crop = tuple[int, int, int]


def _random_bits(*keys: int | np.ndarray) -> np.ndarray:
    """Hashes whole numbers, arrays element by element, to 64 random bits: SplitMix64 (Steele et al. 2014)."""
    bits = np.zeros(1, dtype=np.uint64)
    for key in keys:
        bits = (bits ^ np.asarray(key).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
        bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        bits = bits ^ (bits >> np.uint64(31))
    return bits


# One key of every hash says what the number is for, so that batch 7's place and utterance 7's crop differ.
_FOR_ORDER, _FOR_CROPS, _FOR_SUBSTITUTES = 0, 1, 2


def is_usable(lengths: np.ndarray, whole: bool) -> np.ndarray:
    """Which utterances are long enough, and short enough where they are not used whole."""
    return lengths >= WINDOW if whole else (lengths >= MIN_SAMPLES) & (lengths <= MAX_SAMPLES)


class BucketBatchSampler(Sampler[list[Crop]]):
    """The batches of one rank: lists of crops ``(utterance, first sample, number of samples)``.

    ``sampler[n]`` is the n-th batch of a run that goes through the data epoch by epoch. It follows from n
    and the arguments alone, so a resumed run starts at its batch at once.

    Utterances of ``MIN_SAMPLES`` to ``MAX_SAMPLES`` are sorted into ``NUM_BUCKETS`` equal ranges of length
    and keep their order within one. From short to long, a batch takes utterances until the next would
    bring the sum of their lengths above ``seconds_per_batch``. A batch is cropped to its shortest member.
    With ``whole``, utterances from ``WINDOW`` up are used whole, and each counts as what it is padded to on a
    GPU: the longest of its batch, rounded up to a multiple of ``GPU_CROP_MULTIPLE``. So batches do not depend
    on the device.

    All ranks have the same number of batches, and an epoch has every utterance once: where the number of
    batches is no multiple of ``world_size``, the largest batches are halved until it is. Only where every
    batch has come down to one utterance are some batches given twice instead.

    Args:
        lengths: (utterance,), in samples.
        seconds_per_batch: the most seconds of audio in a batch, before cropping or after padding.
        crop_multiple: lengths of crops are rounded down to a multiple of this number of samples.
        whole: whether utterances are used whole.
        shuffle: whether batches and crops change with the epoch. Without it, batches come from short to long
            and every epoch has the crops of epoch 0, so that validation always sees the same samples.
        seed: determines the order of batches and the crops.
        rank: which of the ``world_size`` shares of the batches to give.
        world_size: the number of processes that share the batches.
        run: the numbers of the batches that iterating gives; without it, those of one epoch.
    Attributes:
        batches_an_epoch: the number of batches that each rank has in an epoch.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray | Tensor,
        seconds_per_batch: float,
        *,
        crop_multiple: int = 1,
        whole: bool = False,
        shuffle: bool = True,
        seed: int = 2022,
        rank: int = 0,
        world_size: int = 1,
        run: range | None = None,
    ):
        self.crop_multiple, self.whole, self.shuffle, self.seed = crop_multiple, whole, shuffle, seed
        self.rank, self.world_size = rank, world_size
        self._lengths = np.asarray(lengths, dtype=np.int64)
        usable = np.flatnonzero(is_usable(self._lengths, whole))
        above = self._lengths[usable] - self._lengths[usable].min(initial=MAX_SAMPLES)
        buckets = above * NUM_BUCKETS // (above.max(initial=0) + 1)
        self._utterances = usable[np.argsort(buckets, kind="stable")]
        # Batch n is _utterances[_bounds[n]:_bounds[n + 1]], so that halving a batch is adding a bound.
        self._bounds = self._fill(seconds_per_batch * SAMPLE_RATE)
        self.batches_an_epoch = -(-(len(self._bounds) - 1) // world_size)
        self.run = range(self.batches_an_epoch) if run is None else run
        self._order: tuple[int, np.ndarray] | None = None

    def _fill(self, max_batch_samples: float) -> np.ndarray:
        lengths = self._lengths[self._utterances]
        if self.whole:
            lengths = -(-lengths // GPU_CROP_MULTIPLE) * GPU_CROP_MULTIPLE
        bounds, samples, longest = [0], 0, 0
        for position, length in enumerate(lengths.tolist()):
            longest = max(longest, length)
            samples = longest * (position + 1 - bounds[-1]) if self.whole else samples + length
            if samples > max_batch_samples and position > bounds[-1]:
                bounds.append(position)
                samples = longest = length
        if len(self._utterances):
            bounds.append(len(self._utterances))
        while (len(bounds) - 1) % self.world_size:
            sizes = np.diff(bounds)
            largest = int(sizes.argmax())
            if sizes[largest] == 1:
                break
            bounds.insert(largest + 1, bounds[largest] + int(sizes[largest]) // 2)
        return np.array(bounds, dtype=np.int64)

    def __len__(self) -> int:
        """The end of ``run``: a Trainer that resumes counts the batches before the start of ``run`` too."""
        return self.run.stop

    def __iter__(self) -> Iterator[list[Crop]]:
        return map(self.__getitem__, self.run)

    def __getitem__(self, number: int) -> list[Crop]:
        """This rank's batch ``number``, counted from 0 at the start of epoch 0."""
        epoch, place = divmod(number, self.batches_an_epoch)
        if not self.shuffle:
            epoch = 0
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, self._batches_of(epoch)
        batch = self._order[1][place]
        return self._crops(self._utterances[self._bounds[batch] : self._bounds[batch + 1]], epoch)

    def _batches_of(self, epoch: int) -> np.ndarray:
        """This rank's batches of an epoch, in order."""
        batches = np.arange(len(self._bounds) - 1)
        if self.shuffle:
            batches = np.argsort(_random_bits(self.seed, epoch, _FOR_ORDER, batches), kind="stable")
        return np.resize(batches, self.batches_an_epoch * self.world_size)[self.rank :: self.world_size]

    def _crops(self, utterances: np.ndarray, epoch: int) -> list[Crop]:
        lengths = self._lengths[utterances]
        if self.whole:
            return [
                (index, 0, length)
                for index, length in zip(utterances.tolist(), lengths.tolist(), strict=True)
            ]
        length = lengths.min() // self.crop_multiple * self.crop_multiple
        choices = (lengths - length + 1).astype(np.uint64)
        fractions = _random_bits(self.seed, epoch, _FOR_CROPS, utterances) >> np.uint64(32)
        starts = fractions * choices >> np.uint64(32)
        return list(zip(utterances.tolist(), starts.tolist(), [int(length)] * len(starts), strict=True))


class Fault(NamedTuple):
    """What was wrong with a file for which another utterance was read, and the line that lists it."""

    complaint: str
    line: str


Item = tuple[Tensor, Tensor | None, Fault | None]
"""Samples (time,) float32; with labels, the numbers (token,) int64 of the text; and the fault of the file
that they were read in place of."""


class AudioDataset(Dataset[Tensor]):
    """The utterances of the manifest ``tsv_dir/name.tsv``, read crop by crop.

    Args:
        tsv_dir, name: the manifest.
        long_utterances: "split" makes utterances of every recording above ``MAX_SAMPLES``: as few pieces of
            equal length as there can be. "drop" leaves it as it is.
        labels: :func:`dataset.labels.encode_texts` with its first two arguments. With it, utterances are used
            whole, and ``long_utterances`` does not apply.

    Attributes:
        lengths: (utterance,) int64, in samples.
    Raises:
        UserError: the manifest is missing or malformed; with ``labels``, also where it has none, or one is
            empty, has no numbers, or has more of them than CTC can place in the frames of its utterance.
    """

    def __init__(
        self,
        tsv_dir: str | Path,
        name: str,
        long_utterances: str = "drop",
        labels: Callable[[Path, Manifest], tuple[np.ndarray, np.ndarray]] | None = None,
    ):
        self.tsv = Path(tsv_dir) / f"{name}.tsv"
        manifest = read_manifest(tsv_dir, name)
        self.root, self.paths, self.recordings, _ = manifest
        self.complaint = unused_complaint(self.recordings, long_utterances, labels is not None)
        self.targets = None if labels is None else labels(self.tsv, manifest)
        pieces = np.ones(len(self.paths), dtype=np.int64)
        if labels is None and long_utterances == "split":
            pieces = np.maximum(1, -(-self.recordings // MAX_SAMPLES))
        self._recording = np.repeat(np.arange(len(pieces)), pieces)
        piece = np.arange(len(self._recording)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        whole, pieces = self.recordings[self._recording], pieces[self._recording]
        self._start = whole * piece // pieces
        self.lengths = whole * (piece + 1) // pieces - self._start

    def __len__(self) -> int:
        return len(self.lengths)

    def path(self, index: int) -> str:
        return f"{self.root}/{self.paths[self._recording[index]]}"

    def __getitem__(self, crop: Crop) -> Tensor:
        """Reads one crop ``(utterance, first sample, number of samples)``, and no more of the file than that.

        Returns:
            (time,) float32 in [-1, 1].
        Raises:
            AudioError: the file is missing, broken, not as the manifest says, or not audio.
        """
        try:
            return self._read(crop)
        except AudioError as error:
            raise AudioError(f"{error}: mend it, or leave it out ({self._line(crop)})") from error

    def _read(self, crop: Crop) -> Tensor:
        index, start, length = crop
        path, whole = self.path(index), self.recordings[self._recording[index]]
        start = int(self._start[index]) + start
        with open_audio(path) as audio:
            change = format_complaint(audio)
            if change is None and audio.claimed not in (None, whole):
                change = f"{audio.claimed} samples where its manifest says {whole}"
            if change is not None:
                raise AudioError(f"{path} has changed: {change}")
            samples = audio.read_from(start, length)
        complaint = samples_complaint(samples)
        if len(samples) != length:
            complaint = f"breaks off at sample {start + len(samples)} of {whole}"
        if complaint is not None:
            raise AudioError(f"{path}: {complaint}")
        return torch.from_numpy(samples)

    def _line(self, crop: Crop) -> str:
        return f"line {self._recording[crop[0]] + 2} of {self.tsv}"

    def __getitems__(self, crops: list[Crop]) -> list[Item]:
        """Reads the crops of a batch, as a DataLoader asks for them in place of ``__getitem__``. For one that
        cannot be read another utterance is, which follows from the crop.

        Raises:
            AudioError: none of some others can be read either.
        """
        return [self._read_or_substitute(crop) for crop in crops]

    def _read_or_substitute(self, crop: Crop) -> Item:
        try:
            return self._item(crop, None)
        except AudioError as error:
            fault = Fault(str(error), self._line(crop))
        for other in self._substitutes(crop):
            with suppress(AudioError):
                return self._item(other, fault)
        raise AudioError(
            f"{fault.complaint}, nor can up to {SUBSTITUTES} other utterances of {self.tsv} be read: "
            f"see whether {self.root} is as it was"
        )

    def _item(self, crop: Crop, fault: Fault | None) -> Item:
        target = None
        if self.targets is not None:
            numbers, ends = self.targets
            target = torch.from_numpy(numbers[ends[crop[0]] : ends[crop[0] + 1]].astype(np.int64))
        return self._read(crop), target, fault

    def _substitutes(self, crop: Crop) -> Iterator[Crop]:
        """Crops to read in place of one, which follow from it: of its length, or, of those used whole, the
        utterances nearest to it in length."""
        index, _, length = crop
        if self.targets is not None:
            others = np.flatnonzero(is_usable(self.lengths, whole=True) & (np.arange(len(self)) != index))
            nearest = others[np.argsort(abs(self.lengths[others] - length), kind="stable")[:SUBSTITUTES]]
            yield from ((other, 0, int(self.lengths[other])) for other in nearest.tolist())
            return
        others = np.flatnonzero((self.lengths >= length) & (self.lengths <= MAX_SAMPLES))
        for attempt in range(SUBSTITUTES):
            utterance, start = (_random_bits(*crop, _FOR_SUBSTITUTES, attempt, key)[0] for key in (0, 1))
            other = int(others[utterance % np.uint64(len(others))])
            yield other, int(start % np.uint64(self.lengths[other] - length + 1)), length


def collate(items: list[Item], multiple: int = 1) -> tuple:
    """Makes a batch of crops or utterances (time,).

    Args:
        items: of a batch.
        multiple: all are padded with zeros to the longest, rounded up to a multiple of this.
    Returns:
        (batch, time) float32 and the lengths (batch,) int64; where items have targets, these one after the
        other (token,) int64, and their lengths (batch,) int64; then a list of the faults, if there are any.
    Raises:
        LoaderError: in a reading process, where no shared memory is left to hand the batch over.
    """
    waveforms, targets, faults = zip(*items, strict=True)
    stacked = pad_sequence(waveforms, batch_first=True)
    stacked = pad(stacked, (0, -stacked.shape[1] % multiple))
    batch = [stacked, torch.tensor([*map(len, waveforms)])]
    if targets[0] is not None:
        batch += [torch.cat(targets), torch.tensor([*map(len, targets)])]
    faults = [fault for fault in faults if fault is not None]
    more = (faults,) if faults else ()
    if get_worker_info() is None:
        return *batch, *more
    try:
        # The queue would do the same, but where it fails it drops the batch, and training waits for ever.
        return *(tensor.share_memory_() for tensor in batch), *more
    except (RuntimeError, OSError) as error:
        raise LoaderError(
            "there is no shared memory left for a batch: give /dev/shm more room (docker run --shm-size), or "
            "read audio with --num_workers 0"
        ) from error


def make_loader(
    dataset: AudioDataset, seconds_per_batch: float, num_workers: int, *, for_gpu: bool = False, **sampling
) -> DataLoader:
    """The loader of one rank's batches ``(waveforms, lengths)``, or of a labelled dataset ``(waveforms,
    lengths, targets, target_lengths)``, which leaves global random states alone. A last entry lists the
    faults of files for which other utterances were read, where there are any.

    Args:
        dataset: the utterances.
        seconds_per_batch: the most seconds of audio in a batch, before cropping or after padding.
        num_workers: the number of processes that read audio, kept from epoch to epoch; 0 reads in this one.
        for_gpu: whether to pin batches in memory, and crop or pad them to multiples of ``GPU_CROP_MULTIPLE``.
        sampling: further arguments of the ``BucketBatchSampler``, which is the loader's ``batch_sampler``.
    Returns:
        The loader. With ``shuffle=False`` its length is 0 where no utterance can be used.
    Raises:
        UserError: no utterance can be used for training.
    """
    multiple, whole = GPU_CROP_MULTIPLE if for_gpu else 1, dataset.targets is not None
    batches = BucketBatchSampler(
        dataset.lengths, seconds_per_batch, crop_multiple=multiple, whole=whole, **sampling
    )
    if batches.shuffle and batches.batches_an_epoch == 0:
        if whole:
            raise UserError(
                f"{dataset.tsv} has {len(dataset)} utterances, but none of {WINDOW} samples "
                f"({WINDOW / SAMPLE_RATE:g} s) or more: give it some of that length"
            )
        seconds = f"{MIN_SAMPLES / SAMPLE_RATE:g} to {MAX_SAMPLES / SAMPLE_RATE:g} s"
        split = ", or --long_utterances split" if (dataset.lengths > MAX_SAMPLES).any() else ""
        raise UserError(
            f"{dataset.tsv} has {len(dataset)} utterances, but none of {MIN_SAMPLES} to {MAX_SAMPLES} "
            f"samples ({seconds}): give it some of that length{split}"
        )
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=partial(collate, multiple=multiple),
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        worker_init_fn=leave_signals_to_training,
        multiprocessing_context=start_method() if num_workers else None,
        pin_memory=for_gpu,
        # Every iterator draws a seed, which must not come from the generator that training draws from.
        generator=torch.Generator().manual_seed(batches.seed),
    )
