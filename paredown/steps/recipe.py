"""A recipe is a list of steps: check it against a task, apply it, write it as TOML."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomli_w
from torch import nn

from paredown.core import progress
from paredown.core.errors import UserError
from paredown.core.files import beside
from paredown.core.memory import release
from paredown.core.settings import check_arguments, described
from paredown.core.task import Target, Task
from paredown.data import splits
from paredown.graph import lazily, machine
from paredown.graph.capture import capture
from paredown.graph.holds.every import HOLDS
from paredown.graph.model import Model
from paredown.graph.quantized.forms import WEIGHT_FORMS
from paredown.steps import STEPS, step_class
from paredown.steps.step import ALONE, Setting, Step
from paredown.targets.runtimes import RUNTIMES, runtime

NONE = "none"  # TOML has no null


def apply(
    model: Model | nn.Module, steps: Sequence[Step], task: Task, target: Target | None = None
) -> Model:
    """Apply a recipe without a run folder; the input is left as it was.

    Args:
        target: where the result is to run, for steps whose amounts are measured there, and for
            what its kernels take. None is the default target, and refuses no form.

    Raises:
        UserError: a step lacks what it needs (all such problems at once, before any work), or
            has nothing to change.

    Example:
        >>> import torch, paredown
        >>> task = paredown.Task(example=(torch.zeros(1, 4),), score=None)
        >>> pruned = apply(torch.nn.Linear(4, 2), [paredown.PruneWeights(0.5)], task)
        >>> int((pruned.state_dict()["weight"] == 0).sum())
        4
    """
    check_arguments(task=(task, Task), target=(target, Target | None))
    steps, task = checked(steps), splits.prepared(task)
    with machine.free_threads():
        made = capture(model, task.example, task.dynamic)
        found = problems(steps, task, target) or unfit(steps, made, task)
        if found:
            raise UserError("\n".join(found))
        setting = Setting(original=made, target=target or Target())
        for step in steps:
            progress.say(f"  {line(step)}")
            with machine.same_numbers(0):
                made = apply_step(made, step.settle(made, task, setting), task, setting)
        return made


def checked(steps: Any) -> list[Step]:
    """The steps of a recipe that came from Python.

    Raises:
        UserError: they are no sequence of steps.

    Example:
        >>> from paredown.steps.quantization.cast import Cast
        >>> checked(Cast())
        Traceback (most recent call last):
            ...
        paredown.core.errors.UserError: steps: expected a list of steps, got a Cast; write [Cast()].
    """
    hint = f"; write [{line(steps)}]" if _is_step(steps) else ""
    if not isinstance(steps, (list, tuple)):
        raise UserError(f"steps: expected a list of steps, got {described(steps)}{hint}.")
    for number, step in enumerate(steps, 1):
        if not _is_step(step):
            made = isinstance(step, type) and dataclasses.is_dataclass(step)
            hint = f"; write {step.__name__}()" if made else ""
            raise UserError(f"steps, step {number}: expected a step, got {described(step)}{hint}.")
    return list(steps)


def _is_step(value: Any) -> bool:
    return isinstance(value, Step) and dataclasses.is_dataclass(value)


def apply_step(model: Model, step: Step, task: Task, setting: Setting = ALONE) -> Model:
    """One step, and the check that all that later steps must hold was held through it."""
    try:
        made = step.apply(model, task, setting)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # of the user's loss or data, or an op the step does not know
        raise UserError(f"{line(step)}: failed: {type(error).__name__}: {error}") from error
    release(model.size_bytes)
    for hold in HOLDS:
        broken = next(hold.broken(made), None)
        if broken is not None:
            raise UserError(f"{line(step)}: {broken}")
    for name, tensor in made.state_dict().items():
        if not lazily.finite(tensor):
            raise UserError(f"{line(step)}: {name!r} became NaN or infinite.")
    return made


def problems(steps: Sequence[Step], task: Task, target: Target | None = None) -> list[str]:
    """What the task, and the target's runtime, lack for these steps, one sentence each."""
    found = []
    for number, step in enumerate(steps):
        lacking = task.missing(step.needs)
        if lacking:
            found.append(f"{line(step)}: needs {' and '.join(lacking)} of the task.")
        if number and step.role == "replaces":
            found.append(
                f"{line(step)}: puts another model in place of what the steps before it made; make "
                "it the first step."
            )
        found += [f"{line(step)}: {problem}" for problem in step.problems()]
    return found + (_unwritable(steps, target.runtime) if target else [])


def unfit(steps: Sequence[Step], model: Model, task: Task) -> list[str]:
    """What of the model would stop these steps later, one sentence each."""
    return [f"{line(step)}: {told}" for step in steps for told in step.unfit(model, task)]


def contents(steps: Sequence[Step], task: Task) -> dict[str, str]:
    """Name -> SHA-256 of what each step reads besides its settings, such as a student."""
    return {name: sha256 for step in steps for name, sha256 in step.contents(task).items()}


def _unwritable(steps: Sequence[Step], name: str) -> list[str]:
    """Steps whose result the runtime cannot write, each with what would do."""
    can = runtime(name).FORMS
    able = {other: runtime(other).FORMS for other in RUNTIMES}
    found = []
    for step in steps:
        form = step.form
        if form is not None and form not in can:
            others = [other for other, forms in able.items() if form in forms]
            here = " or ".join(f.made_by for f in WEIGHT_FORMS.values() if f.name in can)
            elsewhere = f", or the runtime {' or '.join(others)}" if others else ""
            found.append(f"{line(step)}: {name} cannot run {form}; use {here}{elsewhere}.")
    return found


def name(step: Step) -> str:
    """The name under which a step stands in `STEPS`."""
    spelled = f"{type(step).__module__}:{type(step).__qualname__}"
    for key, value in STEPS.items():
        if value == spelled:
            return key
    raise UserError(f"step: {type(step).__name__} is not one of {', '.join(STEPS)}.")


def settings(step: Step) -> dict[str, Any]:
    """A step's settings that differ from their defaults, and those without one."""
    found = {}
    for field in dataclasses.fields(step):  # type: ignore[arg-type]
        value = getattr(step, field.name)
        if value != field.default:
            plain = list(value) if isinstance(value, tuple) else value
            found[field.name] = NONE if plain is None else plain
    return found


def line(step: Step) -> str:
    """A step as a person would type it.

    Example:
        >>> from paredown.steps.quantization.quantize import Quantize
        >>> line(Quantize(ranges="entropy"))
        "Quantize(ranges='entropy')"
    """
    inside = ", ".join(f"{key}={_short(value)}" for key, value in settings(step).items())
    return f"{type(step).__name__}({inside})"


def _short(value: Any) -> str:
    return f"<{type(value).__name__}>" if isinstance(value, (nn.Module, Model)) else repr(value)


def to_toml(steps: Sequence[Step]) -> str:
    """A recipe as TOML: one ``[[step]]`` table each.

    Example:
        >>> from paredown.steps.quantization.quantize import Quantize
        >>> print(to_toml([Quantize(last=False)]).strip())
        [[step]]
        name = "quantize"
        last = false
    """
    for step in steps:
        held = [key for key, v in settings(step).items() if isinstance(v, (nn.Module, Model))]
        if held:
            raise UserError(f"{line(step)}: {held[0]} is no text; name a file to write it as TOML.")
    tables = [tomli_w.dumps({"name": name(step), **settings(step)}) for step in steps]
    return "\n".join(f"[[step]]\n{table}" for table in tables)


def from_toml(text: str, where: str = "recipe") -> list[Step]:
    """The steps of a recipe; names come from `STEPS` alone and nothing is evaluated.

    Raises:
        UserError: not TOML, an unknown step or setting, or a value that the step refuses.
    """
    try:
        tables = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UserError(f"{where}: not a recipe in TOML: {error}.") from error
    steps = tables.pop("step", [])
    if tables or not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        other = f", found {next(iter(tables))!r}" if tables else ""
        raise UserError(f"{where}: expected [[step]] tables and nothing else{other}.")
    made, wrong = [], []
    for number, step in enumerate(steps, 1):
        try:
            made.append(_step(dict(step)))
        except (UserError, TypeError, ValueError) as error:
            wrong.append(f"{where}, step {number}: {error}")
    if wrong:
        raise UserError("\n".join(wrong))
    return made


def load(path: str | Path) -> list[Step]:
    """The steps of a recipe file; a student's file may lie beside it, or in the current folder.

    Raises:
        UserError: as `from_toml`, or the file cannot be read or holds no step.
    """
    path = Path(path)
    try:
        steps = from_toml(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a recipe in TOML: it is not UTF-8 text.") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}.") from error
    if not steps:
        raise UserError(f"{path}: holds no [[step]].")
    return [_beside(path, step) for step in steps]


def _beside(path: Path, step: Step) -> Step:
    named = getattr(step, "student", None)
    if not isinstance(named, str):
        return step
    return dataclasses.replace(step, student=beside(path, named))  # type: ignore[type-var]


def _step(table: dict[str, Any]) -> Step:
    named = table.pop("name", None)
    if not isinstance(named, str):
        raise UserError('has no name = "...".')
    kind = step_class(named)
    known = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(table) - known)
    if unknown:
        raise UserError(
            f"{named} has no setting {unknown[0]!r}; it has {', '.join(sorted(known))}."
        )
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in table.items()}
    values = {k: None if v == NONE else v for k, v in values.items()}
    return kind(**values)
