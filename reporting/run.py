"""Reads what a run of the four stages left in its folders: models, records of the stages, and logs."""

from __future__ import annotations

import copy
import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from utils.checkpoint import build_model, fingerprint, load_model, read_checkpoint
from utils.cli import abbreviate
from utils.files import UserError
from utils.run_record import read_run
from utils.stage_checkpoint import config_of, gated_student, part, read_trained, student_tensors
from wav2vec2 import PruningError, Wav2Vec2Model

STAGES = {
    "distill": "Stage 1: distil and prune",
    "prune": "Stage 2: cut what the gates closed",
    "final_distill": "Stage 3: distil the small model",
    "save_final_ckpt": "Stage 4: keep the student alone",
}
"""The stages by their scripts. The first two write into EXP, the others into EXP2."""

FINAL_NAME = "pruned_hubert_base.pth"
"""The file that stage 2 writes into EXP/ckpts, and stage 4 into EXP2/ckpts."""


@dataclass
class Student:
    """The student, without gates and in evaluation mode, that a stage of the run has made.

    Args:
        path: the file that it was read from.
        stage: the stage that made it, in words.
        projections: the tensors of the training's projections, by their names in a module list.
        settings: the training's hyper-parameters, which say what the projections read and predict.
        saved: whether the file holds this very model, so that its size means something.
        gated: the model before it was cut in memory, where no file holds it cut.
    """

    model: Wav2Vec2Model
    path: Path
    stage: str
    projections: dict[str, Tensor] = field(default_factory=dict)
    settings: dict = field(default_factory=dict)
    saved: bool = True
    gated: Wav2Vec2Model | None = None

    def project(self, states: Sequence[Tensor]) -> dict[int, Tensor]:
        """What training compares with the teacher's layers, by layer: projections of hidden states, all
        (batch, frame, feature)."""
        # Computed here because importing lightning.py takes longer than all the rest of a small report.
        predicts = self.settings.get("distill_mode") == "predlayer"
        if not self.projections:
            return {}
        layers = self.settings.get("distill_layers", [])
        read = [-1] * len(layers) if predicts else self.settings.get("student_layers") or layers
        curved = predicts and self.settings.get("predlayer_activation") != "none"
        result = {}
        for place, (layer, source) in enumerate(zip(layers, read, strict=True)):
            name = f"{place}.0" if predicts else str(place)
            weight, bias = self.projections[f"{name}.weight"], self.projections[f"{name}.bias"]
            projected = F.linear(states[source], weight, bias)
            result[layer] = F.gelu(projected) if curved else projected
        return dict(sorted(result.items()))


class Run:
    """The folders of a run: EXP of stages 1 and 2, and, as soon as there is one, EXP2 of stages 3 and 4."""

    def __init__(self, root_dir: Path, final_dir: Path | None) -> None:
        if not root_dir.is_dir():
            raise UserError(f"--root_dir {root_dir}: no such folder; give stage 1's --exp_dir")
        self.folders = {"distill": root_dir, "final_distill": final_dir}
        recorded: dict[str, dict] = {}
        for training, folder in self.folders.items():
            stages = {} if folder is None else read_run(folder)
            if "finetune" in stages:  # finetune.py may take the place of either distillation.
                stages = {training: stages["finetune"], **stages}
            recorded |= stages
        self.records: dict[str, dict | None] = {stage: recorded.get(stage) for stage in STAGES}

    def flag(self, stage: str, name: str):
        """The value of a flag of a stage, or None where it is not recorded."""
        record = self.records[stage]
        return None if record is None else record["sessions"][-1]["flags"].get(name)

    def students(self, teacher_ckpt: Path, student_ckpt: Path | None) -> list[Student]:
        """The student after each stage whose file is there, the one to report on last.

        While there is no pruned file, ``student_ckpt`` names what stage 1's student started from, by default
        what is recorded, or else the teacher. Raises a UserError where there is no student yet, or a file
        cannot be read.
        """
        pruned = self._checkpoint("distill", FINAL_NAME)
        self._check_records(teacher_ckpt, student_ckpt, pruned)
        again = self._checkpoint("final_distill", "last.ckpt")
        final = self._checkpoint("final_distill", FINAL_NAME)
        students = []
        if pruned:
            content = read_checkpoint(pruned)
            model = build_model(content["config"], content["state_dict"], pruned).eval()
            handed_on = content.get("distill_linear_projs", {})
            students.append(Student(model, pruned, "after stage 2", handed_on))
        if final:
            students.append(Student(load_model(final).eval(), final, "after stage 4"))
        if again and students:
            content = read_trained(again)
            if not final:
                config, weights = students[0].model.config, part(content["state_dict"], "student_model.")
                model = build_model(config, weights, f"{again} with the config of {pruned}").eval()
                students.append(Student(model, again, f"in stage 3, {_progress(content)}", saved=False))
            students[-1].projections = part(content["state_dict"], "distill_linear_projs.")
            # Stage 3 distils the layers of stage 1, whose projections stage 2 hands on.
            for student in students:
                student.settings = content["hyper_parameters"]
        if not students:
            recorded = self.flag("distill", "student_ckpt") or self.flag("distill", "model")
            if student_ckpt is None:
                student_ckpt = Path(recorded) if recorded and Path(recorded).is_file() else teacher_ckpt
            students.append(self._cut_in_memory(student_ckpt))
        return students

    def _check_records(self, teacher_ckpt: Path, student_ckpt: Path | None, pruned: Path | None) -> None:
        """Refuses files that the stages were not made with, and another run's EXP2."""
        for stage, name, path in (
            ("distill", "teacher_ckpt", teacher_ckpt),
            ("distill", "student_ckpt", student_ckpt),
            ("final_distill", "teacher_ckpt", teacher_ckpt),
            ("final_distill", "student_ckpt", pruned),
            ("save_final_ckpt", "config_path", pruned),
        ):
            record = self.records[stage] or {"inputs": {}}
            if name == "student_ckpt" and "model" in record["inputs"]:
                name = "model"
            made_with = record["inputs"].get(name)
            if path is not None and made_with is not None and made_with["sha256"] != fingerprint(path):
                folder = self.folders["distill" if stage == "distill" else "final_distill"]
                raise UserError(
                    f"{path} does not belong to {folder}, where {record['stage']}.py had another --{name}, "
                    f"{abbreviate(made_with['path'])}: give the files and folders of one run"
                )

    def _cut_in_memory(self, original: Path) -> Student:
        """Stage 1's student as stage 2 would cut it now, or as it is where fine-tuning has no gates."""
        distilled = self._checkpoint("distill", "last.ckpt")
        if distilled is None:
            raise UserError(
                f"--root_dir {self.folders['distill']}: has no ckpts/last.ckpt and no ckpts/{FINAL_NAME}; "
                "wait until stage 1 has saved (every --save_interval updates), or give another run's folder"
            )
        content = read_trained(distilled)
        heads = part(content["state_dict"], "distill_linear_projs.")
        if content["hyper_parameters"].get("use_reg") is False:
            tensors = student_tensors(content, distilled)
            model = build_model(config_of(original, tensors), tensors, distilled).eval()
            return Student(model, distilled, _progress(content), heads, content["hyper_parameters"], False)
        gated = gated_student(content, distilled, original)
        model = copy.deepcopy(gated)
        try:
            model.prune()
        except PruningError as error:
            raise UserError(f"{distilled}: {error}") from error
        stage = f"in stage 1, {_progress(content)}, cut as its gates stand"
        return Student(model, distilled, stage, heads, content["hyper_parameters"], False, gated)

    def _checkpoint(self, stage: str, name: str) -> Path | None:
        folder = self.folders[stage]
        return folder / "ckpts" / name if folder and (folder / "ckpts" / name).is_file() else None

    def logs(self) -> dict[str, dict[str, dict[str, list]]]:
        """What the two distillations logged, by their scripts' names; see :func:`read_scalars`."""
        folders = self.folders.items()
        return {stage: read_scalars(folder / "logs") if folder else {} for stage, folder in folders}


def _progress(content: dict) -> str:
    updates = content["hyper_parameters"].get("max_updates")
    return f"after update {content['global_step']:,}" + ("" if updates is None else f" of {updates:,}")


def read_scalars(folder: Path) -> dict[str, dict[str, list]]:
    """Reads TensorBoard's event files: for each name the ``step`` and ``value`` of its points.

    A run that was resumed or started anew logs some updates a second time; the later start counts.
    """
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    points: defaultdict[str, list] = defaultdict(list)
    for file in sorted(folder.glob("events.out.tfevents.*"), key=_start):
        events = EventAccumulator(str(file), size_guidance={"scalars": 0}, purge_orphaned_data=False)
        events.Reload()
        for name in events.Tags()["scalars"]:
            for event in events.Scalars(name):
                while points[name] and points[name][-1].step >= event.step:
                    points[name].pop()
                points[name].append(event)
    return {
        name: {"step": [point.step for point in logged], "value": [point.value for point in logged]}
        for name, logged in sorted(points.items())
    }


def _start(file: Path) -> tuple[int, str]:
    """What sorts logs: the start of the run, which training writes at the end of the name, and the time."""
    number = file.name.rpartition(".start")[2]
    return int(number) if number.isdecimal() else -1, file.name
