"""The place in the data: which batches training and validation get, from the first update or any other."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytorch_lightning as pl
from torch.utils.data import DataLoader

from utils.processes import say

from .batches import AudioDataset, make_loader


class SpeechDataModule(pl.LightningDataModule):
    """The batches of a training stage: those of update u (from 0) are numbers ``u * accum_grad`` to
    ``(u + 1) * accum_grad - 1`` of a rank's sampler. Nothing but updates is counted.

    Args:
        tsv_dir, train_subset: manifests ``tsv_dir/train_subset.tsv`` and ``valid.tsv``.
        seconds_per_batch: seconds of audio in a batch on one device, before cropping.
        num_workers: processes per device that read audio.
        seed: the order of batches and the crops follow from it.
        long_utterances: what is done with recordings longer than training takes: "drop" or "split".
        labels: for labelled utterances, as for :class:`~dataset.batches.AudioDataset`.

    Attributes:
        first_update: where training starts: 0, or the update of the checkpoint that is resumed.
    """

    def __init__(
        self,
        tsv_dir: str,
        train_subset: str,
        seconds_per_batch: float,
        num_workers: int,
        seed: int = 2022,
        long_utterances: str = "drop",
        labels: Callable | None = None,
    ) -> None:
        super().__init__()
        self.tsv_dir = tsv_dir
        self.train_subset = train_subset
        self.seconds_per_batch = seconds_per_batch
        self.num_workers = num_workers
        self.seed = seed
        # Texts are encoded once.
        self._dataset = cache(lambda subset: AudioDataset(self.tsv_dir, subset, long_utterances, labels))
        self.first_update = 0
        self._training: DataLoader | None = None

    def batches_an_epoch(self, world_size: int) -> int:
        """How many batches each of ``world_size`` processes gets in an epoch of the training data."""
        return len(self._batches(self.train_subset, shuffle=True, world_size=world_size))

    def has_validation(self) -> bool:
        """Whether ``valid.tsv`` is there and has an utterance to use."""
        if not (Path(self.tsv_dir) / "valid.tsv").exists():
            return False
        return len(self._batches("valid", shuffle=False)) > 0

    def say_what_is_left_out(self) -> None:
        """Tells the user which utterances training and validation do not use."""
        for subset in (self.train_subset, "valid") if self.has_validation() else (self.train_subset,):
            if complaint := self._batches(subset, shuffle=False).dataset.complaint:
                say(f"{self.tsv_dir}/{subset}.tsv: {complaint}")

    def _batches(self, subset: str, num_workers: int = 0, **arguments) -> DataLoader:
        return make_loader(self._dataset(subset), self.seconds_per_batch, num_workers, **arguments)

    def train_dataloader(self) -> DataLoader:
        """The batches of the updates from ``first_update`` to the trainer's last one.

        To Lightning the whole run is one epoch. If each epoch of the data were one, Lightning would end it
        with an update of too few batches, and start the loader's processes anew.
        """
        accum_grad = self.trainer.accumulate_grad_batches
        run = range(self.first_update * accum_grad, self.trainer.max_steps * accum_grad)
        self._training = self._loader(self.train_subset, shuffle=True, run=run)
        return self._training

    def utterances(self, update: int) -> list[str]:
        """The paths of the utterances that this process trained on in the update that ended as ``update``."""
        accum_grad = self.trainer.accumulate_grad_batches
        batches, dataset = self._training.batch_sampler, self._training.dataset
        numbers = range((update - 1) * accum_grad, update * accum_grad)
        return [dataset.path(index) for number in numbers for index, _, _ in batches[number]]

    def val_dataloader(self) -> DataLoader | list:
        return self._loader("valid", shuffle=False) if self.has_validation() else []

    def _loader(self, subset: str, **arguments) -> DataLoader:
        return self._batches(
            subset,
            self.num_workers,
            seed=self.seed,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
            for_gpu=self.trainer.strategy.root_device.type == "cuda",
            **arguments,
        )

    def state_dict(self) -> dict[str, int]:
        """The place: after this update."""
        return {"update": self.trainer.global_step}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.first_update = state_dict["update"]
