"""Labelled utterances: used whole, padded, with the numbers of their texts."""

import itertools
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from dataset import AudioDataset, BucketBatchSampler, make_loader
from dataset.datamodule import SpeechDataModule
from dataset.labels import encode_texts
from tests.helpers.audio import write_counting
from utils.files import UserError
from utils.vocabulary import Vocabulary

VOCABULARY = Vocabulary(["<pad>", "|", "A", "B", "C"])
LENGTHS = [400, 399, 8_000, 9_700, 16_000, 30_000, 48_000, 300_000]
TEXTS = ["A", "?", "A B", "BA", "CAB", "ABBA", "A CAB", "C" * 40]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_counting(tmp_path_factory.mktemp("labelled"), LENGTHS, TEXTS)


def frames(samples: int) -> int:
    """As the models make them."""
    return 1 + (samples - 400) // 320


def loader_of(folder: Path, num_workers: int = 0, **arguments):
    labels = arguments.pop("labels", partial(encode_texts, VOCABULARY.encode, frames))
    dataset = AudioDataset(folder, "train", labels=labels)
    return make_loader(dataset, 4, num_workers, **{"shuffle": True, **arguments})


def indices(loader) -> list[list[int]]:
    return [[index for index, _, _ in batch] for batch in loader.batch_sampler]


@pytest.mark.parametrize(("for_gpu", "multiple"), [(False, 1), (True, 3_200)])
def test_labelled_utterances_come_whole_with_their_texts(corpus, for_gpu, multiple):
    loader = loader_of(corpus, for_gpu=for_gpu)
    chosen = indices(loader)
    assert sorted(itertools.chain(*chosen)) == [0, 2, 3, 4, 5, 6, 7]
    assert loader.dataset.complaint == (
        "training leaves out, of 8 utterances, 1 below 0.025 s, 0.0967% of the audio"
    )
    for batch, (waveforms, lengths, targets, target_lengths) in zip(chosen, loader, strict=True):
        assert {lengths.dtype, targets.dtype, target_lengths.dtype} == {torch.int64}
        assert waveforms.dtype == torch.float32 and lengths.tolist() == [LENGTHS[index] for index in batch]
        assert waveforms.shape[1] == -(-max(lengths.tolist()) // multiple) * multiple
        for row, length in zip(waveforms * 32_768, lengths, strict=True):
            assert torch.equal(row[:length], (torch.arange(length) % 30_000).float())
            assert not row[length:].any()
        pieces = targets.split(target_lengths.tolist())
        assert [piece.tolist() for piece in pieces] == [VOCABULARY.encode(TEXTS[index]) for index in batch]


def test_a_batch_counts_by_its_padded_seconds_on_every_device():
    lengths = np.random.default_rng(0).integers(390, 300_000, 2_000)
    samplers = [
        BucketBatchSampler(lengths, 20, whole=True, crop_multiple=multiple, shuffle=False)
        for multiple in (1, 3_200)
    ]
    batches = list(samplers[0])
    assert batches == list(samplers[1])
    assert (
        sorted(index for batch in batches for index, _, _ in batch) == np.flatnonzero(lengths >= 400).tolist()
    )
    for batch, following in itertools.pairwise(batches):
        padded = [-(-length // 3_200) * 3_200 for _, _, length in batch]
        assert len(batch) * max(padded) <= 320_000
        assert (len(batch) + 1) * max(*padded, following[0][2]) > 320_000 - 3_200 * (len(batch) + 1)
    # A batch is not filled by what is longest in the corpus.
    assert len(batches[0]) > 3 * len(batches[-2])


def test_labelled_batches_follow_from_their_number_and_rank(corpus):
    ranks = [loader_of(corpus, rank=rank, world_size=2).batch_sampler for rank in range(2)]
    an_epoch = ranks[0].batches_an_epoch
    epochs = [[rank[n] for rank in ranks for n in range(first, first + an_epoch)] for first in (0, an_epoch)]
    for epoch in epochs:
        assert sorted(index for batch in epoch for index, _, _ in batch) == [0, 2, 3, 4, 5, 6, 7]
    assert epochs[0] != epochs[1]
    whole = [batch[2].tolist() for batch in loader_of(corpus, run=range(12))]
    assert [batch[2].tolist() for batch in loader_of(corpus, 2, run=range(5, 12))] == whole[5:]


def test_another_labelled_utterance_comes_with_its_own_label(tmp_path):
    lengths = [16_000, 30_000, 16_500, 300_000]
    write_counting(tmp_path, lengths, ["A", "B", "C", "ABC"])
    (tmp_path / "0.flac").write_bytes(b"broken")
    loader = loader_of(tmp_path)
    for batch, (_, found, targets, _, *faults) in zip(indices(loader), loader, strict=True):
        if 0 in batch:
            place = batch.index(0)
            assert (found[place], targets[place]) == (16_500, 4)
            assert [fault.line for fault in faults[0]] == [f"line 2 of {tmp_path}/train.tsv"]


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (None, r"train\.tsv has no texts or labels: .*--labels"),
        (["A", "?", " "], r"train\.tsv, line 4: '2.flac': its text is empty: write"),
        (["A?", "A", "B"], r"train\.tsv, line 2: '0.flac': '\?' is not among the tokens of .*: mend"),
        (["A", "Q", "Q"], r"line 3: '1.flac': 'Q' is not .*, and 1 more lines have such a mistake: mend"),
        (
            ["A", "BB", "CAB"],
            r"line 3: '1.flac': CTC needs 3 frames for the 2 tokens of its text, and it has 2: see",
        ),
        (
            ["", "ABC", "C"],
            r"line 2: .* empty: write .*; .*line 3: '1.flac': .* 3 frames for the 3 tokens .* 2",
        ),
    ],
)
def test_a_mistake_in_labels_is_one_sentence_before_training(tmp_path, texts, words):
    write_counting(tmp_path, [400, 720, 1_040], texts)
    with pytest.raises(UserError, match=f"^[^\n]*{words}[^\n]*$"):
        loader_of(tmp_path)
    if texts is not None and "CTC" in words:
        loader_of(tmp_path, labels=partial(encode_texts, VOCABULARY.encode, None))


def test_a_labelled_manifest_also_gives_crops_without_texts(corpus):
    batches = list(make_loader(AudioDataset(corpus, "train"), 4, 0, shuffle=False))
    assert [(waveforms.shape, lengths.tolist()) for waveforms, lengths in batches] == [
        ((1, 48_000), [48_000])
    ]


def test_what_is_too_short_to_use_needs_no_good_label(tmp_path):
    write_counting(tmp_path, [399], ["?"])
    with pytest.raises(UserError, match=r"has 1 utterances, but none of 400 samples \(0\.025 s\) or more"):
        loader_of(tmp_path)


def test_a_data_module_encodes_each_set_of_labels_once(corpus):
    calls = []

    def encode(text: str) -> list[int]:
        calls.append(text)
        return [len(text)]

    data = SpeechDataModule(str(corpus), "train", 4, 0, labels=partial(encode_texts, encode, None))
    assert data.batches_an_epoch(1) == data.batches_an_epoch(1) > 2
    assert data.has_validation()
    data.say_what_is_left_out()
    assert sorted(calls) == sorted([text for text in TEXTS if text != "?"] + ["A", "A B"])
