"""Fine-tuning on labelled audio, with or without gates and a teacher, as a LightningModule."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.text import CharErrorRate, WordErrorRate

from lightning import DistillModule, ModelPass, valid_frames
from utils.vocabulary import Vocabulary
from wav2vec2 import Wav2Vec2Model

TASKS = {"ctc": "transcribe, by CTC", "classify": "give each utterance one label"}


class FinetuneModule(DistillModule):
    """Trains a model with a head on labels. Under gates that is HJ-Pruning (Peng et al. 2023b, arXiv
    2302.14132); a teacher's hidden states may be learnt beside (after DiariZen, Han et al. 2025, arXiv
    2505.24111).

    Batches are padded, and what is padding counts nowhere: convolutional norms take their statistics over
    valid frames (``masked_group_norm``), so each utterance is computed as if it were alone.

    Args:
        task: one of ``TASKS``: "ctc" (Graves et al. 2006), or "classify", cross-entropy on the mean over
            frames of the head's outputs.
        vocabulary: the tokens or labels of the head's outputs.
        arguments: those of :class:`lightning.DistillModule`; ``student_model`` has a head.
    """

    def __init__(self, *, task: str, vocabulary: Vocabulary, **arguments) -> None:
        self.task, self.vocabulary = task, vocabulary
        super().__init__(**arguments)
        self.hparams["task"] = task
        rates = {"wer": WordErrorRate, "cer": CharErrorRate} if task == "ctc" else {"accuracy": MeanMetric}
        self.rates = nn.ModuleDict({name: kind() for name, kind in rates.items()})

    def _silence(self, device: torch.device) -> tuple:
        one = torch.ones(1, dtype=torch.long, device=device)
        return torch.zeros(1, 4000, device=device), None, one, one

    def _losses(self, waveforms: Tensor, lengths: Tensor | None, *labels: Tensor) -> dict[str, Tensor]:
        """
        Args:
            waveforms, lengths: (batch, time), and (batch,) valid samples or None.
            labels: the numbers of all tokens, utterance after utterance, and (batch,) how many each has.
        """
        for model in (self.student_model, self.teacher_model):
            if model is not None:
                model.masked_group_norm = True
        run = self._run_models(waveforms, lengths, outputs=True)
        losses = {"loss": run.outputs.new_zeros(()), "loss_task": self._task_loss(run, *labels)}
        if self.teacher_model is not None:
            learnt, taught = self._compared(run.student, run.teacher)
            if run.frames is not None:
                # (batch, layer, frame, feature) -> (valid frame, layer, feature)
                valid = valid_frames(run.frames, learnt.size(2))
                learnt, taught = (states.transpose(1, 2)[valid] for states in (learnt, taught))
            losses |= self._distill_losses(learnt, taught, run)
        losses["loss"] = losses["loss"] + losses["loss_task"]
        self._outputs = run.outputs.detach(), run.frames
        return self._with_size(losses)

    def _task_loss(self, run: ModelPass, targets: Tensor, target_lengths: Tensor) -> Tensor:
        outputs = run.outputs.to(torch.promote_types(run.outputs.dtype, torch.float32))
        if self.task == "classify":
            return F.cross_entropy(mean_over_frames(outputs, run.frames), targets)
        frames = run.frames
        if frames is None:
            frames = torch.full((len(outputs),), outputs.size(1), device=outputs.device)
        scores = outputs.log_softmax(-1).transpose(0, 1)
        return F.ctc_loss(scores, targets, frames, target_lengths, blank=self.vocabulary.blank)

    def validation_step(self, batch: tuple, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        outputs, frames = self._outputs
        _, _, targets, target_lengths = batch
        if self.task == "classify":
            self.rates["accuracy"].update((mean_over_frames(outputs, frames).argmax(-1) == targets).float())
        else:
            said = transcribe(outputs, frames, self.vocabulary)
            texts = [self.vocabulary.text(part.tolist()) for part in targets.split(target_lengths.tolist())]
            for rate in self.rates.values():
                rate.update(said, texts)
        self.log_dict({f"valid_{name}": rate for name, rate in self.rates.items()}, on_epoch=True)


def labels(task: str, vocabulary: Vocabulary, model: Wav2Vec2Model) -> dict:
    """What ``SpeechDataModule`` makes of labels for a task: their numbers, and for CTC the frames that the
    model has for so many samples, of which a text needs enough."""

    def frames(samples: int) -> int:
        for layer in model.feature_extractor.conv_layers:
            samples = (samples - layer.kernel_size) // layer.stride + 1
        return samples

    if task == "ctc":
        return {"labels": vocabulary.encode, "frames": frames}
    return {"labels": vocabulary.number_of_label}


def mean_over_frames(outputs: Tensor, frames: Tensor | None) -> Tensor:
    """The scores of each label for utterances, (batch, label), from those of frames, (batch, frame, label),
    of which ``frames`` (batch,) are valid."""
    if frames is None:
        return outputs.mean(1)
    outputs = outputs * valid_frames(frames, outputs.size(1)).unsqueeze(-1)
    return outputs.sum(1) / frames.unsqueeze(-1)


def transcribe(outputs: Tensor, frames: Tensor | None, vocabulary: Vocabulary) -> list[str]:
    """The texts of the best token of each frame, from a CTC head's outputs (batch, frame, token)."""
    best = outputs.argmax(-1).tolist()
    counts = [len(row) for row in best] if frames is None else frames.tolist()
    return [vocabulary.decode(row[:count]) for row, count in zip(best, counts, strict=True)]
