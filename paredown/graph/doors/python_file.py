"""A user's Python file, with model() and task()."""

from __future__ import annotations

import dataclasses
import importlib.util
import random
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from paredown.core.errors import UserError
from paredown.core.files import beside
from paredown.core.task import Task
from paredown.graph.doors.other_files import told
from paredown.graph.model import Model


def load(file: Path) -> tuple[nn.Module | Model, Task]:
    """The model and the task that a user's Python file makes.

    Raises:
        UserError: no such file, an error in it, or something else than a model and a task.
    """
    model, task = load_file(file)
    made = made_task(task, file)
    return made_model(model, file), made


def load_task(file: Path) -> Task:
    """The task alone.

    Raises:
        UserError: as `load`.
    """
    return made_task(load_file(file)[1], file)


def made_task(function: Callable[[], Any], file: Path) -> Task:
    """The task that a user's function makes; a student's file may lie beside its own."""
    made = call_user(function, file)
    if not isinstance(made, Task):
        raise UserError(f"{file}: task() returned a {type(made).__name__}, not a paredown.Task.")
    if isinstance(made.student, str):
        return dataclasses.replace(made, student=beside(file, made.student))
    return made


def made_model(function: Callable[[], Any], file: Path) -> nn.Module | Model:
    made = call_user(function, file)
    if not isinstance(made, (nn.Module, Model)):
        raise UserError(f"{file}: model() returned a {type(made).__name__}, not an nn.Module.")
    return made


def load_file(path: str | Path) -> tuple[Callable[[], Any], Callable[[], Task]]:
    """The ``model`` and ``task`` functions of a user's Python file, which is executed.

    Raises:
        UserError: no such file, an error in it, or one of the functions is missing.
    """
    model, task = functions_of(path, ("model", "task"))
    return model, task


def functions_of(path: str | Path, functions: tuple[str, ...]) -> list[Callable[[], Any]]:
    """The functions of these names of a user's Python file, which is executed.

    Raises:
        UserError: no such file, an error in it, or one of the functions is missing.
    """
    path = Path(path)
    if not path.is_file() or path.suffix != ".py":
        raise UserError(told(path))
    name = f"paredown_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[name] = loaded
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        spec.loader.exec_module(loaded)
    except (Exception, SystemExit) as error:  # a script's own end is no answer either
        raise UserError(f"{path}: {users_line(error)}{type(error).__name__}: {error}") from error
    finally:
        sys.path.pop(0)
    for function in functions:
        if not callable(getattr(loaded, function, None)):
            needed = " and ".join(f"{each}()" for each in functions)
            raise UserError(f"{path}: defines no function {function}(); it needs {needed}.")
    return [getattr(loaded, function) for function in functions]


def call_user(function: Callable[[], Any], path: Path) -> Any:
    """The user's ``model()`` or ``task()``; an error points at their line.

    Random numbers start from the same seed each time, so that the same file gives the same data.
    """
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    try:
        return function()
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(
            f"{path}: {function.__name__}() failed: {users_line(error)}"
            f"{type(error).__name__}: {error}"
        ) from error


def users_line(error: BaseException) -> str:
    """``file.py:12 `code`: `` of the innermost frame that is the user's own code."""
    frames = traceback.extract_tb(error.__traceback__)
    own = str(Path(__file__).parent.parent)
    users = [
        f
        for f in frames
        if not f.filename.startswith((own, "<"))
        and "site-packages" not in f.filename
        and not f.filename.startswith(sys.base_prefix)
    ]
    if not users:
        return ""
    last = users[-1]
    return f"{Path(last.filename).name}:{last.lineno} `{last.line}`: "
