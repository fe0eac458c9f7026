"""The packages that serving needs and the rest of the house does without."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from paredown.core.errors import UserError

# uvloop, which is not for Windows, answers half as many requests again as asyncio's own loop
LOOP = "asyncio" if sys.platform == "win32" else "uvloop"
PACKAGES = ("granian", "starlette", "orjson", LOOP)


def check_extra() -> None:
    """Refuse to go on without them.

    Raises:
        UserError: one is not installed.
    """
    for name in PACKAGES:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise UserError(
                f"serve: {name} is not installed here; run pip install 'paredown[serve]'."
            ) from error


def event_loop() -> Any:
    """The package whose ``run`` runs a coroutine in an event loop of its own."""
    return importlib.import_module(LOOP)
