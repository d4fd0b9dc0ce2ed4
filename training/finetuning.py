"""What fine-tunes: a task's loss on labelled audio, with or without gates and a teacher."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataset import read_manifest
from dataset.labels import texts_of
from evaluation.heads import count_errors, mean_over_frames, new_rates
from lightning import DistillModule, ModelPass
from utils.checkpoint import vocabulary_path
from utils.files import UserError
from utils.processes import say
from utils.vocabulary import Vocabulary, of_characters, read_vocabulary
from wav2vec2 import Wav2Vec2Model
from wav2vec2.components import valid_frames


class FinetuneModule(DistillModule):
    """Trains a model with a head on labels. Under gates that is HJ-Pruning (Peng et al. 2023b, arXiv
    2302.14132); the hidden states of a teacher may be learnt besides (after DiariZen, Han et al. 2025, arXiv
    2505.24111).

    Batches are padded, and what is padding counts nowhere: convolutional norms take their statistics over
    valid frames (``masked_group_norm``), so each utterance is computed as if it were alone.

    Args:
        task: one of evaluation.heads.TASKS: "ctc" (Graves et al. 2006), or "classify", cross-entropy on the
            mean over frames of the head's outputs.
        vocabulary: the tokens or labels of the head's outputs.
        arguments: those of :class:`lightning.DistillModule`; ``student_model`` has a head.
    """

    def __init__(self, *, task: str, vocabulary: Vocabulary, **arguments) -> None:
        self.task, self.vocabulary = task, vocabulary
        for model in (arguments["student_model"], arguments["teacher_model"]):
            if model is not None:
                model.masked_group_norm = True
        super().__init__(**arguments)
        del self.hparams["vocabulary"]  # a checkpoint holds plain values
        self.rates = new_rates(task)

    def _silence(self, device: torch.device) -> tuple:
        token = torch.tensor([self.vocabulary.blank == 0], dtype=torch.long, device=device)  # not the blank
        return torch.zeros(1, 4000, device=device), None, token, torch.ones_like(token)

    def _losses(self, waveforms: Tensor, lengths: Tensor | None, *labels: Tensor) -> dict[str, Tensor]:
        """
        Args:
            waveforms, lengths: (batch, time), and (batch,) valid samples or None.
            labels: the numbers of all tokens, utterance after utterance, and (batch,) how many each has.
        """
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
        count_errors(self.rates, self.vocabulary, *self._outputs, *batch[2:])
        self.log_dict({f"valid_{name}": rate for name, rate in self.rates.items()}, on_epoch=True)


def vocabulary_of(args: argparse.Namespace, model: Wav2Vec2Model) -> Vocabulary:
    """The tokens or labels to train with: those of --vocab, else those of the model's head, else those of the
    training data."""
    if args.vocab is None and model.aux is None:
        manifest = read_manifest(args.tsv_dir, args.train_subset)
        texts = texts_of(Path(args.tsv_dir, f"{args.train_subset}.tsv"), manifest)
        return of_characters(texts) if args.task == "ctc" else Vocabulary(sorted(set(texts)))
    own = vocabulary_path(args.model)
    if args.vocab is None and not own.is_file():
        raise UserError(
            f"{args.model}: has a head of {model.aux.out_features} outputs, and there is no {own} that names "
            "them: name them with --vocab"
        )
    vocabulary = read_vocabulary(args.vocab or own)
    if args.task == "ctc" and vocabulary.blank is None:
        raise UserError(f"{vocabulary.source}: has no <pad>, the blank that --task ctc needs; add one")
    if args.vocab is not None:
        return vocabulary
    return vocabulary.of_head(model.aux.out_features, labels=args.task == "classify")


def put_head(args: argparse.Namespace, model: Wav2Vec2Model, vocabulary: Vocabulary) -> None:
    """Gives a model a new head for the tokens or labels, unless it has theirs."""
    if model.aux is not None:
        own, outputs = vocabulary_path(args.model), model.aux.out_features
        known = own.is_file() and args.vocab is not None
        if outputs == len(vocabulary) and (not known or read_vocabulary(own).tokens == vocabulary.tokens):
            return
        say(f"--vocab {args.vocab}: other tokens than those of the model's head, which starts anew")
    model.aux = nn.Linear(model.config["encoder_embed_dim"], len(vocabulary))
    model.change_config({"aux_num_out": len(vocabulary)})
