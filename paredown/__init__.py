"""paredown pares a trained model down to a budget, and proves it."""

from typing import Any

from paredown.core.errors import UserError
from paredown.core.goals import Goals
from paredown.core.measurement import Measurement
from paredown.core.progress import shown as progress
from paredown.core.results import Artifact, Run
from paredown.core.task import Target, Task
from paredown.core.units import Limit
from paredown.data.scores import accuracy, multilabel_accuracy, squared_error, token_accuracy
from paredown.graph.capture import capture
from paredown.graph.coupling.verify import Exactness, verify
from paredown.graph.model import Model
from paredown.measure.measure import measure
from paredown.report.page import report
from paredown.run.compress import compress
from paredown.run.replay import replay
from paredown.search.plan import plan
from paredown.ship.open import open
from paredown.ship.pack.container import pack, unpack
from paredown.steps import public_names, step_class
from paredown.steps.recipe import apply
from paredown.steps.step import Step
from paredown.targets.artifact import export

_STEPS = public_names()
__all__ = [
    "Artifact",
    "Exactness",
    "Goals",
    "Limit",
    "Measurement",
    "Model",
    "Run",
    "Step",
    "Target",
    "Task",
    "UserError",
    "accuracy",
    "apply",
    "capture",
    "compress",
    "export",
    "measure",
    "multilabel_accuracy",
    "open",
    "pack",
    "plan",
    "progress",
    "replay",
    "report",
    "squared_error",
    "token_accuracy",
    "unpack",
    "verify",
    *_STEPS,
]


def __getattr__(name: str) -> Any:
    """The class of a step, imported when it is first asked for."""
    if name not in _STEPS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return step_class(_STEPS[name])


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
