"""Reads what a run of the four stages left in its folders: models, records of the stages, and logs."""

from __future__ import annotations

import copy
import logging
import math
from dataclasses import dataclass, field
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from utils.checkpoint import build_model, load_model, read_checkpoint
from utils.files import UserError
from utils.run_record import read_run
from utils.stage_checkpoint import gated_student, gated_tensors, part, read_trained
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
    """The student that a stage of the run has made.

    Args:
        model: the model without gates, in evaluation mode.
        path: the file that it was read from.
        stage: the stage that made it, in words.
        saved: whether the file holds this very model, so that its size means something.
        gated: the model before it was cut in memory, where no file holds it cut.
        projections: the training loss's projections of its layers, by the teacher's layer.
        reads_last_layer: whether all projections read the last layer (``--distill_mode predlayer``).
    """

    model: Wav2Vec2Model
    path: Path
    stage: str
    saved: bool = True
    gated: Wav2Vec2Model | None = None
    projections: dict[int, nn.Module] = field(default_factory=dict)
    reads_last_layer: bool = False


class Run:
    """The folders of a run.

    Args:
        root_dir: EXP, the folder of stages 1 and 2.
        final_dir: EXP2, the folder of stages 3 and 4; None, or a folder that is not there yet, where the run
            has not come so far.
    Raises:
        UserError: ``root_dir`` is no folder, or a ``run.json`` cannot be read.
    """

    def __init__(self, root_dir: Path, final_dir: Path | None) -> None:
        if not root_dir.is_dir():
            raise UserError(f"--root_dir {root_dir}: no such folder; give stage 1's --exp_dir")
        self.root_dir = root_dir
        self.final_dir = final_dir if final_dir is not None and final_dir.is_dir() else None
        recorded = read_run(root_dir) | ({} if self.final_dir is None else read_run(self.final_dir))
        self.records: dict[str, dict | None] = {stage: recorded.get(stage) for stage in STAGES}

    def flag(self, stage: str, name: str):
        """The value of a flag of a stage, or None where it is not recorded."""
        record = self.records[stage]
        return None if record is None else record["sessions"][-1]["flags"].get(name)

    def students(self, teacher_ckpt: Path, student_ckpt: Path | None) -> list[Student]:
        """The student after each stage whose file is there, the one to report on last.

        Args:
            teacher_ckpt: the teacher of the run.
            student_ckpt: the file that stage 1's student started from, needed while there is no pruned file;
                None stands for the one that stage 1 has recorded, or else for the teacher.
        Raises:
            UserError: there is no student yet, or a file cannot be read.
        """
        pruned = _checkpoint(self.root_dir, FINAL_NAME)
        distilled = _checkpoint(self.root_dir, "last.ckpt")
        again = _checkpoint(self.final_dir, "last.ckpt")
        final = _checkpoint(self.final_dir, FINAL_NAME)
        students = []
        handed_on: dict = {}
        if pruned is not None:
            content = read_checkpoint(pruned)
            model = build_model(content["config"], content["state_dict"], pruned)
            students.append(Student(model.eval(), pruned, "after stage 2"))
            handed_on = content.get("distill_linear_projs", {})
        if final is not None:
            students.append(Student(load_model(final).eval(), final, "after stage 4"))
        if again is not None and students:
            content = read_distilled(again)
            if final is None:
                weights = part(content["state_dict"], "student_model.")
                source = f"{again} with the config of {pruned}"
                model = build_model(students[-1].model.config, weights, source)
                students.append(
                    Student(model.eval(), again, f"in stage 3, {_progress(content)}", saved=False)
                )
            add_projections(students[-1], part(content["state_dict"], "distill_linear_projs."), content)
            # Stage 3 distils the layers of stage 1, whose projections stage 2 hands on.
            if pruned is not None:
                add_projections(students[0], handed_on, content)
        if students:
            return students
        if distilled is None:
            raise UserError(
                f"--root_dir {self.root_dir}: has no ckpts/last.ckpt and no ckpts/{FINAL_NAME}; wait until "
                "stage 1 has saved (every --save_interval updates), or give another run's folder"
            )
        recorded = self.flag("distill", "student_ckpt")
        if student_ckpt is None:
            student_ckpt = Path(recorded) if recorded and Path(recorded).is_file() else teacher_ckpt
        return [self._cut_in_memory(distilled, student_ckpt)]

    def _cut_in_memory(self, distilled: Path, original: Path) -> Student:
        """Stage 1's student as stage 2 would cut it now."""
        content = read_distilled(distilled)
        gated = gated_student(gated_tensors(content["state_dict"], distilled), distilled, original)
        model = copy.deepcopy(gated)
        try:
            model.prune()
        except PruningError as error:
            raise UserError(f"{distilled}: {error}") from error
        stage = f"in stage 1, {_progress(content)}, cut as its gates stand"
        student = Student(model, distilled, stage, saved=False, gated=gated)
        add_projections(student, part(content["state_dict"], "distill_linear_projs."), content)
        return student

    def logs(self) -> dict[str, dict[str, dict[str, list]]]:
        """What the two distillations logged, by their scripts' names; see :func:`read_scalars`."""
        folders = {"distill": self.root_dir, "final_distill": self.final_dir}
        return {
            stage: {} if folder is None else read_scalars(folder / "logs")
            for stage, folder in folders.items()
        }


def _checkpoint(folder: Path | None, name: str) -> Path | None:
    path = None if folder is None else folder / "ckpts" / name
    return path if path is not None and path.is_file() else None


def _progress(content: dict) -> str:
    updates = content["hyper_parameters"].get("max_updates")
    return f"after update {content['global_step']:,}" + ("" if updates is None else f" of {updates:,}")


def read_distilled(path: Path) -> dict:
    """The ``last.ckpt`` of a distillation.

    Raises:
        UserError: the file is something else.
    """
    content = read_trained(path)
    if not content["state_dict"] or type(content.get("global_step")) is not int:
        raise UserError(f"{path}: is not a checkpoint of a training stage; give the folders of a run")
    return content


def add_projections(student: Student, tensors: dict, content: dict) -> None:
    """Gives ``student`` its projections, where it is known which layers they read.

    Args:
        student: the student whose hidden states they read.
        tensors: the projections' tensors, by the names of a module list.
        content: the distillation's checkpoint, whose settings name the layers.
    """
    settings = content["hyper_parameters"]
    layers, mode = settings.get("distill_layers"), settings.get("distill_mode")
    if not layers or not mode or not tensors:
        return
    # Rebuilt here rather than by lightning.py, whose import takes longer than all the rest of a small report.
    layered = "0." if mode == "predlayer" else ""
    for place, layer in enumerate(layers):
        weight, bias = (tensors[f"{place}.{layered}{name}"] for name in ("weight", "bias"))
        linear = nn.Linear(weight.size(1), weight.size(0))
        linear.load_state_dict({"weight": weight, "bias": bias})
        student.projections[layer] = nn.Sequential(linear, nn.GELU()) if layered else linear
    student.reads_last_layer = mode == "predlayer"


def read_scalars(folder: Path) -> dict[str, dict[str, list]]:
    """Reads TensorBoard's event files: for each name the ``step`` and ``value`` of its points.

    A run that was resumed from a checkpoint logs the updates after it a second time, and a run that was
    started anew logs all of them again; the later one counts. A value that is not finite becomes None.
    """
    if not any(folder.glob("events.out.tfevents.*")):
        return {}
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}, purge_orphaned_data=False)
    events.Reload()
    result = {}
    for name in sorted(events.Tags()["scalars"]):
        steps: list[int] = []
        values: list[float | None] = []
        for event in sorted(events.Scalars(name), key=lambda event: event.wall_time):
            while steps and steps[-1] >= event.step:
                steps.pop()
                values.pop()
            steps.append(event.step)
            values.append(event.value if math.isfinite(event.value) else None)
        result[name] = {"step": steps, "value": values}
    return result
