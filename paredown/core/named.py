"""Things by name: plain tables of ``"module:attribute"``, imported when first asked for."""

from __future__ import annotations

import importlib
from typing import Any


def named(spelled: str) -> Any:
    """What ``"module:attribute"`` stands for; without an attribute the module.

    Example:
        >>> named("math:tau") / 2 == named("math").pi
        True
    """
    module, _, attribute = spelled.partition(":")
    found = importlib.import_module(module)
    return getattr(found, attribute) if attribute else found
