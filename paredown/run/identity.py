"""What every stage of a run depends on, what is asked of them, and what of that has changed."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from paredown.core.errors import UserError
from paredown.core.files import sync_folder, write_atomically
from paredown.core.goals import Goals
from paredown.core.source import Source
from paredown.core.task import SPLITS, Target, Task
from paredown.data import splits
from paredown.data.answer import answer_from
from paredown.graph import store
from paredown.graph.model import Model
from paredown.steps import recipe
from paredown.steps.step import Step
from paredown.targets.runtimes import ready

FORMAT, IDENTITY = 2, "identity.json"
TRAINED = (  # what most often makes a model another one
    "Where model() trains or draws its weights, they are others each time: save them once, and let "
    "model() load them."
)
PACKAGES = ("torch", "numpy", "safetensors", "paredown")  # and those of the runtime


def identity_of(
    model: Model,
    task: Task,
    target: Target,
    seed: int,
) -> dict[str, Any]:
    """What every stage of a run depends on."""
    given = {name: getattr(task, name) for name in SPLITS if getattr(task, name) is not None}
    return {
        "model": store.digest(model),
        "data": {
            name: {"examples": splits.size(split), "fingerprint": splits.fingerprint(split)}
            for name, split in given.items()
        },
        "batch_size": task.batch_size,
        **ignore_of(task),
        **kind_of(task),
        "target": where(target),
        "seed": seed,
        "versions": versions(target.runtime),
    }


def question_of(
    goals: Goals, steps: Sequence[Step] | None, students: dict[str, str]
) -> dict[str, Any]:
    """What is asked of a run's stages: its result depends on this too, and other questions may be
    asked of the same stages.

    Args:
        students: name -> SHA-256 of those that the steps or the task name.
    """
    return {
        "goals": dataclasses.asdict(goals),
        "recipe": recipe.to_toml(steps) if steps else "",
        "students": students,
    }


def where(target: Target) -> dict[str, Any]:
    """What a result depends on of a target; how often it is timed only says how surely."""
    return {name: value for name, value in dataclasses.asdict(target).items() if name != "rounds"}


def ignore_of(task: Task) -> dict[str, list[int]]:
    """What the task says of ignored labels, where it says something, as JSON has it."""
    given = splits.ignored(task)
    return {} if given is None else {"ignore": list(given)}


def kind_of(task: Task) -> dict[str, Any]:
    """How a task that was made from samples is scored, as JSON."""
    answer = answer_from(task)
    if answer is None:
        return {}
    return {"task": {"kind": answer.kind, "labels": bool(task.score.labelled)}}  # type: ignore[attr-defined]


def recorded(source: Source | None, task: Task) -> dict[str, Any]:
    """What a run was started from, with the kind of its task as it was found, as JSON."""
    if source is None:
        return {}
    answer = answer_from(task)
    known = source if answer is None else dataclasses.replace(source, task=answer.kind)
    return dataclasses.asdict(known)


def versions(name: str) -> dict[str, str]:
    """Of Python and of the packages that a result depends on in the runtime of that name.

    Example:
        >>> sorted(versions("pytorch"))
        ['numpy', 'paredown', 'python', 'safetensors', 'torch']
    """
    packages = dict.fromkeys((*PACKAGES, *ready(name).PACKAGES))
    return {each: version(each) for each in packages} | {"python": platform.python_version()}


def check_identity(folder: Path, wanted: dict[str, Any]) -> None:
    path = folder / IDENTITY
    if not path.exists():
        text = json.dumps({"paredown": FORMAT, "identity": wanted}, indent=1, sort_keys=True)
        write_atomically(path, text.encode())
        sync_folder(folder.absolute().parent)
        return
    try:
        found = json.loads(path.read_bytes())
        form, identity = found["paredown"], dict(found["identity"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder}: the output folder holds other files ({IDENTITY} is not a run's). "
            "Choose another --out, or an empty folder."
        ) from error
    if form != FORMAT:
        raise UserError(
            f"{folder}: was written in format {form}; this paredown reads format {FORMAT}. "
            "Choose another --out, or delete the folder."
        )
    changes = _changes(_flat(identity), _flat(wanted))
    if changes:
        lines = "\n".join(f"  {change}" for change in changes)
        if any(".fingerprint:" in change for change in changes):
            lines += "\n`paredown check` says whether the data are others each time they are read."
        if any(change.startswith("model:") for change in changes):
            lines += f"\n{TRAINED}"
        raise UserError(
            f"{folder}: holds a run of something else, so it cannot be gone on with. Changed:\n"
            f"{lines}\nChoose another --out, or delete the folder."
        )


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested keys with dots between them -> the value as JSON."""
    flat: dict[str, str] = {}
    for key, item in value.items():
        if isinstance(item, dict) and item:
            flat |= _flat(item, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = json.dumps(item, sort_keys=True, ensure_ascii=False)
    return flat


def _changes(old: dict[str, str], new: dict[str, str]) -> list[str]:
    lines = []
    for key in sorted(old.keys() | new.keys()):
        before, now = old.get(key, "(nothing)"), new.get(key, "(nothing)")
        if before != now:
            same = _first_difference(before, now)
            lines.append(f"{key}: was {_around(before, same)}, is now {_around(now, same)}")
    return lines


def _first_difference(one: str, other: str) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))


def _around(text: str, place: int, width: int = 60) -> str:
    """At most ``width`` characters of ``text``, those from shortly before ``place`` on."""
    if len(text) <= width:
        return text
    start = max(0, min(place - width // 4, len(text) - width))
    end = start + width
    return f"{'...' * (start > 0)}{text[start:end]}{'...' * (end < len(text))}"
