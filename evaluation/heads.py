"""Error rates of a model's own head, for CTC or classification, on labelled audio."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.text import CharErrorRate, WordErrorRate
from tqdm import tqdm

from dataset import AudioDataset, make_loader
from dataset.labels import encode_texts
from utils.vocabulary import Vocabulary
from wav2vec2 import Wav2Vec2Model
from wav2vec2.components import valid_frames

TASKS = {"ctc": "transcribe, by CTC", "classify": "give each utterance one label"}


def new_rates(task: str) -> nn.ModuleDict:
    """The error rates of words and characters for "ctc", the accuracy for "classify", before any utterance is
    counted."""
    kinds = {"wer": WordErrorRate, "cer": CharErrorRate} if task == "ctc" else {"accuracy": MeanMetric}
    return nn.ModuleDict({name: kind() for name, kind in kinds.items()})


def count_errors(
    rates: nn.ModuleDict,
    vocabulary: Vocabulary,
    outputs: Tensor,
    frames: Tensor | None,
    targets: Tensor,
    target_lengths: Tensor,
) -> None:
    """Adds the utterances of a batch to rates.

    Args:
        rates: those of :func:`new_rates`.
        vocabulary: the tokens or labels of the head.
        outputs: (batch, frame, token), of the head; ``frames`` (batch,) of them are valid, or all for None.
        targets, target_lengths: the numbers of all tokens, utterance after utterance, and how many each has.
    """
    if "accuracy" in rates:
        rates["accuracy"].update((mean_over_frames(outputs, frames).argmax(-1) == targets).float())
        return
    said = transcribe(outputs, frames, vocabulary)
    texts = [vocabulary.text(numbers.tolist()) for numbers in targets.split(target_lengths.tolist())]
    for rate in rates.values():
        rate.update(said, texts)


@torch.inference_mode()
def error_rates(
    model: Wav2Vec2Model, vocabulary: Vocabulary, tsv_dir: str | Path, subset: str, seconds_per_batch: float
) -> dict[str, float]:
    """The rates of a model with a head on the labelled manifest ``tsv_dir/subset.tsv``; one whose vocabulary
    has no blank classifies.

    Raises:
        UserError: the vocabulary is not the head's, the manifest cannot be read, or a text in it is not made
            of the vocabulary's tokens.
    """
    task = "classify" if vocabulary.blank is None else "ctc"
    vocabulary = vocabulary.of_head(model.aux.out_features, labels=task == "classify")
    dataset = AudioDataset(tsv_dir, subset, labels=labelling(task, vocabulary, model))
    loader = make_loader(dataset, seconds_per_batch, 0, shuffle=False)
    model.eval().masked_group_norm = True
    device = next(model.parameters()).device
    rates = new_rates(task).to(device)
    for waveforms, lengths, *labels in tqdm(loader, desc=subset, unit=" batches", leave=False):
        batch = [part.to(device) for part in (waveforms, lengths, *labels)]
        count_errors(rates, vocabulary, *model(*batch[:2]), *batch[2:])
    return {name: rate.compute().item() for name, rate in rates.items()}


def labelling(task: str, vocabulary: Vocabulary, model: Wav2Vec2Model) -> Callable:
    """The argument ``labels`` of ``AudioDataset`` for a task: it encodes the texts of a manifest, and for CTC
    refuses one that does not fit into the frames of its utterance."""

    def frames(samples: int) -> int:
        for layer in model.feature_extractor.conv_layers:
            samples = (samples - layer.kernel_size) // layer.stride + 1
        return samples

    if task == "ctc":
        return partial(encode_texts, vocabulary.encode, frames)
    return partial(encode_texts, vocabulary.number_of_label, None)


def mean_over_frames(outputs: Tensor, frames: Tensor | None) -> Tensor:
    """The scores of each label for utterances, (batch, label), from those of frames, (batch, frame, label),
    of which ``frames`` (batch,) are valid."""
    if frames is None:
        return outputs.mean(1)
    valid = valid_frames(frames, outputs.size(1)).unsqueeze(-1)
    return (outputs * valid).sum(1) / frames.unsqueeze(-1)


def transcribe(outputs: Tensor, frames: Tensor | None, vocabulary: Vocabulary) -> list[str]:
    """The texts of the best token of each frame, from a CTC head's outputs (batch, frame, token)."""
    best = outputs.argmax(-1).tolist()
    counts = [len(row) for row in best] if frames is None else frames.tolist()
    return [vocabulary.decode(row[:count]) for row, count in zip(best, counts, strict=True)]
