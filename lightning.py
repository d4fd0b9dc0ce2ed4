"""What trains: distillation loss, size constraint and learning-rate schedule, as a LightningModule. The file
has the original's name; PyTorch Lightning itself is imported as pytorch_lightning.

Equation numbers are those of DPHuBERT (Peng et al. 2023, https://arxiv.org/abs/2305.17651) unless said
otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from training.callbacks import gathered
from wav2vec2 import SizeConstraint, Wav2Vec2Model
from wav2vec2.components import valid_frames
from wav2vec2.gating import narrowed

DISTILL_MODES = {
    "layer2layer": "compare layer with layer",
    "predlayer": "predict all from the student's last layer",
    "group_mean": "compare the means of the groups' layers",
}
"""What is matched. The third follows the abstract of SKILL (Zampierin et al. 2024, arXiv 2402.16830), which
averages the layers of a cluster; no more of that paper was at hand."""


class LinearDecayLRScheduler(LRScheduler):
    """Linear warm-up from 0, then linear decay to 0: with k = 1 at the first update, lr k / warmup, then
    lr (max - k) / (max - warmup). So the last update has rate 0, as in the original.

    Args:
        optimizer: every group's ``lr`` is its peak (negative for gradient ascent).
        warmup_updates: updates to the peak.
        max_updates: updates to 0.
    """

    def __init__(self, optimizer, warmup_updates: int, max_updates: int, last_epoch: int = -1) -> None:
        self.warmup_updates = warmup_updates
        self.max_updates = max_updates
        super().__init__(optimizer, last_epoch)

    def state_dict(self) -> dict[str, int]:
        """The place in the schedule alone: its shape follows from the flags, also of a resumed run."""
        return {"last_epoch": self.last_epoch, "_step_count": self._step_count}

    def get_lr(self) -> list[float]:
        k = self.last_epoch + 1
        if k <= self.warmup_updates:
            factor = k / self.warmup_updates
        else:
            factor = max(0.0, (self.max_updates - k) / max(1, self.max_updates - self.warmup_updates))
        return [base * factor for base in self.base_lrs]


class DistillLoss(nn.Module):
    """Weighted sum of mean squared error, mean absolute error and cosine distance (equation 2, after
    DistilHuBERT).

    Args:
        l2_weight, l1_weight, cos_weight: weights of the three; one of weight 0 is not computed.
        cos_type: "raw", -mean(cos), or "log_sig", -mean(log sigmoid cos).
    """

    def __init__(self, l2_weight: float, l1_weight: float, cos_weight: float, cos_type: str) -> None:
        super().__init__()
        if cos_type not in ("raw", "log_sig"):
            raise ValueError(f'cos_type is "raw" or "log_sig", not {cos_type!r}')
        self.l2_weight = l2_weight
        self.l1_weight = l1_weight
        self.cos_weight = cos_weight
        self.cos_type = cos_type

    def forward(self, input: Tensor, target: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """
        Args:
            input, target: (batch, layer, time, feature), of the student and the teacher; computed in float32
                or better.
        Returns:
            The loss, and its three parts before weighting; 0 for one of weight 0.
        """
        precise = torch.promote_types(input.dtype, torch.float32)
        input, target = input.to(precise), target.to(precise)
        mse = l1 = cos = input.new_zeros(())
        if self.l2_weight:
            mse = F.mse_loss(input, target)
        if self.l1_weight:
            l1 = F.l1_loss(input, target)
        if self.cos_weight:
            similarity = F.cosine_similarity(input, target, dim=-1)
            cos = -(similarity if self.cos_type == "raw" else F.logsigmoid(similarity)).mean()
        return self.l2_weight * mse + self.l1_weight * l1 + self.cos_weight * cos, (mse, l1, cos)


def head_loss(student: Tensor, teacher: Tensor, lengths: Tensor | None = None) -> Tensor:
    """The Kullback-Leibler divergence of the student's distribution over tokens from the teacher's, in nats,
    as the mean over frames (Hinton et al. 2015, arXiv 1503.02531, at temperature 1); computed in float32 or
    better.

    Args:
        student, teacher: (batch, frame, token), outputs of the heads.
        lengths: (batch,) valid frames, or None where all are.
    """
    precise = torch.promote_types(student.dtype, torch.float32)
    student, teacher = (outputs.to(precise).log_softmax(-1) for outputs in (student, teacher))
    divergence = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    if lengths is not None:
        divergence = divergence[valid_frames(lengths, divergence.size(1))]
    return divergence.mean()


def distill_projections(
    mode: str,
    groups: Sequence[Sequence[int]],
    student_dim: int,
    teacher_dim: int,
    predlayer_activation: str = "gelu",
) -> nn.ModuleList:
    """The heads that read the student: one entry a distilled layer, in the order of ``groups``.

    Args:
        mode: "layer2layer" and "group_mean": a Linear shared by the layers of a group, the identity at the
            start; "predlayer" (DistilHuBERT, Chang et al. 2022): each layer's own Linear and GELU.
        groups: the distilled layers.
        student_dim, teacher_dim: features of the models.
        predlayer_activation: "gelu", or "none" to leave the GELU out, which no value below -0.17 comes from.
    """
    heads = nn.ModuleList()
    for group in groups:
        if mode != "predlayer":
            linear = nn.Linear(student_dim, teacher_dim)
            nn.init.eye_(linear.weight)
            nn.init.zeros_(linear.bias)
            heads.extend([linear] * len(group))
        else:
            ends = [nn.GELU()] if predlayer_activation == "gelu" else []
            heads.extend(nn.Sequential(nn.Linear(student_dim, teacher_dim), *ends) for _ in group)
    return heads


class ModelPass(NamedTuple):
    """What a pass of both models gave.

    Attributes:
        student, teacher: hidden states, each (batch, frame, feature); none of a teacher that is not there.
        outputs, wanted: what the student's and the teacher's heads gave, (batch, frame, token), or None.
        frames: (batch,) valid frames, or None where all are.
    """

    student: list[Tensor]
    teacher: list[Tensor]
    outputs: Tensor | None
    wanted: Tensor | None
    frames: Tensor | None


class DistillModule(pl.LightningModule):
    """Stages 1 and 3: the student learns the teacher's layers and, with ``use_reg``, which units may go.

    For each batch Lightning calls ``on_before_batch_transfer``, ``training_step`` and the backward pass.
    After --accum_grad batches come ``configure_gradient_clipping``, the steps of optimiser and scheduler, and
    ``on_update`` of the callbacks in training/callbacks.py, of which ``LastCheckpoint`` saves, by
    ``on_save_checkpoint`` here and ``RunCheckpointIO`` in training/resume.py.

    Args:
        teacher_model: the teacher, which is frozen here; None where training has another loss, as
            training.finetuning.FinetuneModule has.
        student_model: the student, with gates where ``use_reg``.
        distill_mode: one of ``DISTILL_MODES``.
        distill_layers: layers to match, 0 to the number of layers, one for each of ``distill_linear_projs``.
        student_layers: the student's layer for each of these; None for the same numbers.
        distill_linear_projs: heads on the student's layers.
        distill_loss: compares two tensors (batch, layer, time, feature).
        learning_rate, weight_decay: peak rate and decay for the student and the heads.
        warmup_updates, max_updates: the shape of the schedule, as for :class:`LinearDecayLRScheduler`.
        use_reg: train gates under the size constraint (equation 7).
        reg_learning_rate: peak rate for the gates and, in ascent, the Lagrange multipliers.
        target_sparsity: 1 - wanted cost / teacher's cost.
        sparsity_of: the cost that is constrained: "params", parameters, or "macs", multiply-accumulates of an
            utterance of 10 s (HJ-Pruning, Peng et al. 2023b, section 3).
        sparsity_warmup_updates: the target grows linearly from 0 over these.
        head_weight: weight of :func:`head_loss`, where both models have a head of the same outputs.
        tsv_dir, train_subset, seconds_per_batch, num_workers, predlayer_activation: flags, kept among the
            hyper-parameters; ``Trainer.fit`` gets its batches from a ``SpeechDataModule`` or any loader.
        seed: seeds dropout and the gates' samples.

    Attributes:
        narrow: the function that turns the student into the plain model of one pass, by default
            :func:`wav2vec2.gating.narrowed`; on a GPU training/hardware.py sets another one.
        faults: what was wrong with files that other utterances were read for (dataset.batches.Fault).
    """

    def __init__(
        self,
        *,
        teacher_model: Wav2Vec2Model | None,
        student_model: Wav2Vec2Model,
        distill_mode: str,
        distill_layers: Sequence[int],
        distill_linear_projs: nn.ModuleList,
        distill_loss: DistillLoss,
        learning_rate: float,
        weight_decay: float,
        warmup_updates: int,
        max_updates: int,
        use_reg: bool,
        reg_learning_rate: float | None = None,
        target_sparsity: float | None = None,
        sparsity_warmup_updates: int | None = None,
        sparsity_of: str = "params",
        student_layers: Sequence[int] | None = None,
        predlayer_activation: str = "gelu",
        head_weight: float = 0.0,
        tsv_dir: str | None = None,
        train_subset: str | None = None,
        seconds_per_batch: float | None = None,
        num_workers: int = 0,
        seed: int = 2022,
    ) -> None:
        super().__init__()
        if distill_mode not in DISTILL_MODES:
            raise ValueError(f"distill_mode is one of {', '.join(DISTILL_MODES)}, not {distill_mode!r}")
        distill_layers = list(distill_layers)  # a checkpoint holds plain lists
        self.save_hyperparameters(
            ignore=["teacher_model", "student_model", "distill_linear_projs", "distill_loss"], logger=False
        )
        self.teacher_model = None if teacher_model is None else teacher_model.requires_grad_(False).eval()
        self.student_model = student_model
        self.distill_linear_projs = distill_linear_projs
        self.distill_loss = distill_loss
        if use_reg:
            total = (teacher_model or student_model).count(sparsity_of).total()
            # Pruning to a target of the teacher's cost needs it, and does not read the teacher.
            self.hparams["teacher_cost"] = total
            constraint = SizeConstraint(
                student_model, target_sparsity, sparsity_warmup_updates, sparsity_of, total
            )
            # Its parts are registered one by one, under the names that the original's checkpoints have;
            # __dict__ keeps nn.Module from registering them a second time.
            self.lambda1, self.lambda2 = constraint.lambda1, constraint.lambda2
            self.student_cost = constraint.count
            self.__dict__["constraint"] = constraint
        self.narrow: Callable[[Wav2Vec2Model], Wav2Vec2Model] = narrowed
        self.gradient_norm: Tensor | None = None
        self.faults: list = []
        self._random_state: list[dict] | None = None
        self._freeze_idle_parameters()

    def _freeze_idle_parameters(self) -> None:
        """Freezes what takes no part in the loss of a moment of silence (layers above the distilled ones,
        say): DDP waits for all gradients."""
        trained = [p for p in self.parameters() if p.requires_grad]
        with torch.random.fork_rng(devices=[]):
            loss = self._losses(*self._silence(trained[0].device))["loss"]
            gradients = torch.autograd.grad(loss, trained, allow_unused=True)
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.requires_grad_(gradient is not None)

    def _silence(self, device: torch.device) -> tuple:
        """A batch to try."""
        return torch.zeros(1, 4000, device=device), None

    def train(self, mode: bool = True) -> DistillModule:
        self.training = mode
        for child in self.children():
            if child is not self.teacher_model:
                child.train(mode)
        return self

    def forward(self, waveforms: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What is compared: the student's projected layers and the teacher's, or the means of the groups of
        layers that share a projection, each (batch, layer or group, time, feature).

        Args:
            waveforms: (batch, time).
            lengths: (batch,) valid samples, or None where all are whole.
        """
        run = self._run_models(waveforms, lengths)
        return self._compared(run.student, run.teacher)

    def _run_models(self, waveforms: Tensor, lengths: Tensor | None, outputs: bool = False) -> ModelPass:
        """Runs both models as far as the loss reads them; to their ends for their ``outputs``."""
        teacher_layers = self.hparams.distill_layers
        student_layers = self.hparams.student_layers or teacher_layers
        ends = outputs or self.hparams.head_weight > 0
        top = None if ends or self.hparams.distill_mode == "predlayer" else max(student_layers)
        # This draws the gates and gives a plain model. extract_features would do the same, but it waits for a
        # GPU, so it comes before the teacher's work is queued.
        model = self.narrow(self.student_model)
        teacher, wanted = [], None
        if self.teacher_model is not None:
            head_teaches = self.hparams.head_weight > 0
            with torch.no_grad():
                teacher, _ = self.teacher_model.extract_features(
                    waveforms, lengths, None if head_teaches else max(teacher_layers)
                )
                wanted = self.teacher_model.output(teacher[-1]) if head_teaches else None
        student, frames = model.extract_features(waveforms, lengths, top)
        return ModelPass(student, teacher, model.output(student[-1]) if ends else None, wanted, frames)

    def _compared(self, student: list[Tensor], teacher: list[Tensor]) -> tuple[Tensor, Tensor]:
        """What ``forward`` returns, of the models' hidden states."""
        teacher_layers = self.hparams.distill_layers
        student_layers = self.hparams.student_layers or teacher_layers
        layered = self.hparams.distill_mode != "predlayer"
        means = self.hparams.distill_mode == "group_mean"
        # Layers that share a projection go through it together.
        together: dict[nn.Module, list[list[int]]] = {}
        for projection, *pair in zip(self.distill_linear_projs, student_layers, teacher_layers, strict=True):
            together.setdefault(projection, []).append(pair)
        learnt, taught = [], []
        for projection, pairs in together.items():
            read = torch.stack([student[layer if layered else -1] for layer, _ in pairs], dim=1)
            target = torch.stack([teacher[layer] for _, layer in pairs], dim=1)
            learnt.append(projection(read.mean(1, keepdim=True) if means else read))
            taught.append(target.mean(1, keepdim=True) if means else target)
        return torch.cat(learnt, dim=1), torch.cat(taught, dim=1)

    def _losses(self, waveforms: Tensor, lengths: Tensor | None, *labels: Tensor) -> dict[str, Tensor]:
        """The sum, ``loss``, its parts before weighting, and what else there is to log."""
        run = self._run_models(waveforms, lengths)
        losses = self._distill_losses(*self._compared(run.student, run.teacher), run)
        return self._with_size(losses)

    def _distill_losses(self, learnt: Tensor, taught: Tensor, run: ModelPass) -> dict[str, Tensor]:
        loss_distill, (mse, l1, cos) = self.distill_loss(learnt, taught)
        losses = {"loss": loss_distill, "loss_distill": loss_distill}
        losses |= {"loss_mse": mse, "loss_l1": l1, "loss_cos": cos}
        if self.hparams.head_weight:
            losses["loss_head"] = head_loss(run.outputs, run.wanted, run.frames)
            losses["loss"] = loss_distill + self.hparams.head_weight * losses["loss_head"]
        return losses

    def _with_size(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """Adds the size constraint to the sum, where there is one."""
        if not self.hparams.use_reg:
            return losses
        loss_reg, sparsity = self.constraint(self.global_step), self.constraint.sparsity
        return {
            **losses,
            "loss": losses["loss"] + loss_reg,
            "loss_reg": loss_reg,
            "sparsity_expected": sparsity,
            "sparsity_target": sparsity.new_full((), self.constraint.target(self.global_step)),
            "lambda1": self.lambda1,
            "lambda2": self.lambda2,
        }

    def training_step(self, batch: Tensor | tuple[Tensor, Tensor | None], batch_idx: int) -> Tensor:
        """One batch: waveforms (batch, time), alone or with their lengths (batch,)."""
        losses = self._losses(*_parts(batch))
        update, last = self.global_step + 1, self.trainer.max_steps
        if self.device.type == "cuda" and update % self.trainer.log_every_n_steps and update != last:
            # On a GPU log_dict takes milliseconds, so it runs only in updates whose values are written.
            return losses["loss"]
        logged = {name if "loss" not in name else f"train_{name}": value for name, value in losses.items()}
        self.log_dict(
            {k: v.detach() if isinstance(v, Tensor) else v for k, v in logged.items()}, batch_size=1
        )
        return losses["loss"]

    def validation_step(self, batch: Tensor | tuple[Tensor, Tensor | None], batch_idx: int) -> None:
        waveforms, *rest = _parts(batch)
        losses = self._losses(waveforms, *rest)
        logged = {f"valid_{name}": value for name, value in losses.items() if name.startswith("loss")}
        self.log_dict(logged, batch_size=waveforms.numel(), sync_dist=True, on_epoch=True)

    def on_before_batch_transfer(self, batch, dataloader_idx: int):
        """Notes faults of the batch's files, and drops lengths that say nothing, so that no mask is built."""
        if isinstance(batch, (tuple, list)):
            waveforms, lengths, *more = batch
            if more and isinstance(more[-1], list):
                self.faults += more.pop()
            whole = lengths is None or bool((lengths == waveforms.size(1)).all())
            return waveforms, None if whole else lengths, *more
        return batch

    def configure_optimizers(self):
        """AdamW in the groups ``main_params``, ``log_alpha`` and ``lambda`` (equation 8: the last by
        ascent)."""
        rate, projections = self.hparams.learning_rate, self.distill_linear_projs.parameters()
        if self.hparams.use_reg:
            groups = self.constraint.parameter_groups(rate, self.hparams.reg_learning_rate, projections)
        else:
            main = [p for p in (*self.student_model.parameters(), *projections) if p.requires_grad]
            groups = [{"params": main, "name": "main_params", "lr": rate}]
        optimizer = torch.optim.AdamW(groups, weight_decay=self.hparams.weight_decay, fused=True)
        scheduler = LinearDecayLRScheduler(optimizer, self.hparams.warmup_updates, self.hparams.max_updates)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def configure_gradient_clipping(
        self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None
    ) -> None:
        """Clips the norm of all gradients, which Lightning refuses to do for a fused optimiser.

        The norm before clipping is kept as ``gradient_norm``.
        """
        scaler = None if self._trainer is None else getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            # A fused optimiser unscales inside its step, and the clipping has to see unscaled gradients.
            scaler.unscale_(optimizer)
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if gradient_clip_val:
            self.gradient_norm = torch.nn.utils.clip_grad_norm_(parameters, gradient_clip_val)
        else:
            self.gradient_norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])

    @property
    def strict_loading(self) -> bool:
        return False  # the teacher is in no checkpoint, and resume_state has compared the rest

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Leaves the teacher out; adds the random state of every rank."""
        teacher = [key for key in checkpoint["state_dict"] if key.startswith("teacher_model.")]
        for key in teacher:
            del checkpoint["state_dict"][key]
        checkpoint["random_state"] = gathered(self.trainer, _random_state(self.device))

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self._random_state = checkpoint["random_state"]

    def on_train_start(self) -> None:
        """Each rank draws its own gates and dropout, or goes on drawing where the checkpoint was written.
        With another number of processes there is no state for that: they draw anew, not as at the start."""
        states, self._random_state = self._random_state, None
        if states is None or len(states) != self.trainer.world_size:
            torch.manual_seed(
                self.hparams.seed + self.global_rank + self.trainer.world_size * self.global_step
            )
            return
        state = states[self.global_rank]
        torch.set_rng_state(state["cpu"].cpu())
        if "cuda" in state and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"].cpu(), self.device)


def _parts(batch: Tensor | tuple) -> tuple:
    """Waveforms, lengths, and labels where there are any."""
    return (batch, None) if isinstance(batch, Tensor) else tuple(batch)


def _random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    return state | {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else state
