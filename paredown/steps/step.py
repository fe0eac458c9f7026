"""What every technique promises, and what it may depend on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

from paredown.core.task import Target, Task
from paredown.graph.model import Model


def forget(fact: dict[str, Any]) -> None:
    """Where notes go that nobody collects."""


@dataclass(frozen=True)
class Setting:
    """What a step may depend on besides the model and the task.

    Attributes:
        original: the model that the recipe started from; None is the step's own.
        target: where the result is to run: whose latency counts, and what its kernels take.
        scratch: a folder for checkpoints, by which a step that was killed goes on; None keeps none.
        note: takes what a step found out for the report, as a dict that JSON can hold, with its
            ``kind``.

    Example:
        >>> found = []
        >>> Setting(note=found.append).note({"kind": "curve", "points": [1, 2]})
        >>> found, Setting().target.runtime
        ([{'kind': 'curve', 'points': [1, 2]}], 'onnxruntime')
    """

    original: Model | None = None
    target: Target = field(default_factory=Target)
    scratch: Path | None = None
    note: Callable[[dict[str, Any]], None] = forget


ALONE = Setting()  # of a step that no recipe applies


@dataclass(frozen=True)
class Entry:
    """What the table of techniques says of a step, or of one way to use it; in Markdown."""

    call: str
    does: str
    pays: str
    does_not: str = ""


@runtime_checkable
class Step(Protocol):
    """A technique: a frozen dataclass that names this as its base; its fields are its settings.

    ``needs`` names the Task fields it cannot work without, and ``table`` says what it is good for.
    ``apply`` depends on what it is given and on nothing else.

    Example:
        >>> from dataclasses import dataclass, field
        >>> @dataclass(frozen=True)
        ... class Halve(Step):
        ...     needs = frozenset()
        ...     def apply(self, model, task, setting=ALONE):
        ...         made = model.copy()
        ...         for parameter in made.parameters():
        ...             parameter.data /= 2
        ...         return made
        >>> import paredown, torch
        >>> module = torch.nn.Linear(1, 1, bias=False)
        >>> task = paredown.Task(example=(torch.ones(1, 1),), score=None)
        >>> bool(paredown.apply(module, [Halve()], task)(torch.ones(1, 1)) == module.weight / 2)
        True
    """

    needs: ClassVar[frozenset[str]]
    table: ClassVar[tuple[Entry, ...]] = ()

    @property
    def form(self) -> str | None:
        """The name of the weight form that it makes; None where all stays float32.

        A runtime names in its own ``FORMS`` those that it can write.
        """
        return None

    @property
    def role(self) -> str:
        """ "compresses", "recovers" what the step before it has cost, or "replaces" the model by
        another one."""
        return "compresses"

    def contents(self, task: Task) -> dict[str, str]:
        """What it reads besides its settings, on which a run's result depends too: name -> SHA-256.

        Raises:
            UserError: it cannot be read.
        """
        return {}

    def unfit(self, model: Model, task: Task) -> Sequence[str]:
        """What of this model and task would stop it later, one sentence each, seen before any
        work."""
        return ()

    def problems(self) -> Sequence[str]:
        """What would stop it later, one sentence each, seen before any work."""
        return ()

    def settle(self, model: Model, task: Task, setting: Setting) -> Step:
        """The step with all that must be measured found, so that it repeats to the byte."""
        return self

    def apply(self, model: Model, task: Task, setting: Setting = ALONE) -> Model:
        """A changed copy; the model is left as it was.

        Raises:
            UserError: there is nothing to change, or what is needed is missing.
        """
        raise NotImplementedError
