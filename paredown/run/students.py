"""Students that a user gives in memory -> files of the run's folder, which a recipe can name."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from paredown.core.files import sha256, write_atomically
from paredown.core.task import Task
from paredown.graph.store import encode
from paredown.steps import recipe
from paredown.steps.step import Step
from paredown.steps.training.distill import Distill
from paredown.train.distill.student import Student, captured


@dataclass
class Students:
    """The students in memory of a recipe and a task: the name of each one's file, and its bytes."""

    files: dict[str, bytes] = field(default_factory=dict)
    _names: dict[int, str] = field(default_factory=dict)  # id of what was given -> name

    @staticmethod
    def of(steps: Sequence[Step] | None, task: Task) -> Students:
        """Raises:
        UserError: one cannot be captured.
        """
        made = Students()
        given = [step.student for step in steps or () if isinstance(step, Distill)]
        for student in [*given, task.student]:
            if student is not None and not isinstance(student, (str, Path)):
                data = encode(captured(student, task))
                name = f"student-{sha256(data)[:16]}.safetensors"
                made.files[name], made._names[id(student)] = data, name
        return made

    def named(
        self, steps: Sequence[Step] | None, task: Task, folder: Path = Path()
    ) -> tuple[list[Step] | None, Task]:
        """Recipe and task with each student's file, in ``folder``, in its place."""
        task = dataclasses.replace(task, student=self._name(task.student, folder))
        if steps is None:
            return None, task
        return [
            dataclasses.replace(step, student=self._name(step.student, folder))
            if isinstance(step, Distill)
            else step
            for step in steps
        ], task

    def _name(self, student: Student | None, folder: Path) -> str | None:
        if student is None or isinstance(student, (str, Path)):
            return None if student is None else str(student)
        return str(folder / self._names[id(student)])

    def digests(self, steps: Sequence[Step] | None, task: Task) -> dict[str, str]:
        """Name -> SHA-256 of every student, whether given in memory or as a file."""
        asked = [*(steps or ()), *([Distill(student=task.student)] if task.student else ())]
        files = [
            step
            for step in asked
            if isinstance(step, Distill) and isinstance(step.student, (str, Path))
        ]
        return recipe.contents(files, task) | dict.fromkeys(self.files, "")

    def write(self, folder: Path) -> None:
        for name, data in self.files.items():
            if not (folder / name).is_file():
                write_atomically(folder / name, data)
