"""The packages that serving needs and the rest of the house does without."""

from __future__ import annotations

import importlib

from paredown.core.errors import UserError

PACKAGES = ("granian", "starlette", "orjson")


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
