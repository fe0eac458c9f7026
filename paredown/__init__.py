"""paredown pares a trained model down to a budget, and proves it."""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from paredown.core.named import named
from paredown.steps import public_names, step_class

if TYPE_CHECKING:
    from paredown.core.errors import UserError as UserError
    from paredown.core.goals import Goals as Goals
    from paredown.core.measurement import Measurement as Measurement
    from paredown.core.progress import shown as progress  # noqa: F401
    from paredown.core.results import Artifact as Artifact
    from paredown.core.results import Run as Run
    from paredown.core.task import Target as Target
    from paredown.core.task import Task as Task
    from paredown.core.units import Limit as Limit
    from paredown.data.load import load as load
    from paredown.data.scores import accuracy as accuracy
    from paredown.data.scores import multilabel_accuracy as multilabel_accuracy
    from paredown.data.scores import squared_error as squared_error
    from paredown.data.scores import token_accuracy as token_accuracy
    from paredown.graph.capture import capture as capture
    from paredown.graph.coupling.verify import Exactness as Exactness
    from paredown.graph.coupling.verify import verify as verify
    from paredown.graph.model import Model as Model
    from paredown.measure.measure import measure as measure
    from paredown.report.page import report as report
    from paredown.run.compress import compress as compress
    from paredown.run.replay import replay as replay
    from paredown.search.plan import plan as plan
    from paredown.ship.guard.bound import Bound as Bound
    from paredown.ship.guard.guard import Guard as Guard
    from paredown.ship.guard.observation import Observation as Observation
    from paredown.ship.guard.policy import Policy as Policy
    from paredown.ship.guard.profile import Profile as Profile
    from paredown.ship.open import open as open
    from paredown.ship.pack.container import pack as pack
    from paredown.ship.pack.container import unpack as unpack
    from paredown.steps.recipe import apply as apply
    from paredown.steps.step import Step as Step
    from paredown.targets.artifact import export as export

# Each is imported when it is first asked for: `paredown --help` needs no PyTorch.
NAMES = {
    "Artifact": "paredown.core.results:Artifact",
    "Bound": "paredown.ship.guard.bound:Bound",
    "Exactness": "paredown.graph.coupling.verify:Exactness",
    "Goals": "paredown.core.goals:Goals",
    "Guard": "paredown.ship.guard.guard:Guard",
    "Limit": "paredown.core.units:Limit",
    "Measurement": "paredown.core.measurement:Measurement",
    "Model": "paredown.graph.model:Model",
    "Observation": "paredown.ship.guard.observation:Observation",
    "Policy": "paredown.ship.guard.policy:Policy",
    "Profile": "paredown.ship.guard.profile:Profile",
    "Run": "paredown.core.results:Run",
    "Step": "paredown.steps.step:Step",
    "Target": "paredown.core.task:Target",
    "Task": "paredown.core.task:Task",
    "UserError": "paredown.core.errors:UserError",
    "accuracy": "paredown.data.scores:accuracy",
    "apply": "paredown.steps.recipe:apply",
    "capture": "paredown.graph.capture:capture",
    "compress": "paredown.run.compress:compress",
    "export": "paredown.targets.artifact:export",
    "load": "paredown.data.load:load",
    "measure": "paredown.measure.measure:measure",
    "multilabel_accuracy": "paredown.data.scores:multilabel_accuracy",
    "open": "paredown.ship.open:open",
    "pack": "paredown.ship.pack.container:pack",
    "plan": "paredown.search.plan:plan",
    "progress": "paredown.core.progress:shown",
    "replay": "paredown.run.replay:replay",
    "report": "paredown.report.page:report",
    "squared_error": "paredown.data.scores:squared_error",
    "token_accuracy": "paredown.data.scores:token_accuracy",
    "unpack": "paredown.ship.pack.container:unpack",
    "verify": "paredown.graph.coupling.verify:verify",
}
_STEPS = public_names()
__all__ = [*NAMES, *_STEPS]


class _Package(ModuleType):
    """Where a room is called as a public name is, the name stays what it is: `paredown.measure` is
    the function, whoever has imported a module of the room."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in NAMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        """By name, as other modules: else functions that use it cannot be sent to a cluster."""
        return importlib.import_module, (self.__name__,)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name in NAMES:
        found = globals()[name] = named(NAMES[name])
        return found
    if name in _STEPS:
        return step_class(_STEPS[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
