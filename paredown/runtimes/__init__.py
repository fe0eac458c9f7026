"""Runtimes by name; each is a module with ``lower(model, path)`` and ``open(path, threads)``."""

from __future__ import annotations

import importlib
from typing import Any

from paredown.types import UserError

RUNTIMES = {
    "onnxruntime": "paredown.runtimes.onnxruntime",
    "pytorch": "paredown.runtimes.pytorch",
}


def runtime(name: str) -> Any:
    """The runtime's module.

    Raises:
        UserError: no such runtime.
    """
    if name not in RUNTIMES:
        raise UserError(f"runtime: {name!r} is not one of {', '.join(RUNTIMES)}.")
    return importlib.import_module(RUNTIMES[name])
