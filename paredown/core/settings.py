"""Checks of the settings that a user gives, each with one wording."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from paredown.core.errors import UserError


def require(name: str, value: object, holds: bool, expected: str) -> None:
    """Refuse a setting where ``holds`` is not true.

    Raises:
        UserError: says what was expected, and what came.

    Example:
        >>> require("lr", -1, -1 > 0, "a number above 0")
        Traceback (most recent call last):
            ...
        paredown.core.errors.UserError: lr: expected a number above 0, got -1.
    """
    if not holds:
        raise UserError(f"{name}: expected {expected}, got {value!r}.")


MOST_THREADS = 1024  # a runtime starts all that it is given at once


def check_count(name: str, value: Any, least: int = 1, most: int | None = None) -> None:
    """Refuse what is no whole number from ``least`` up, or to ``most``; True and False are none.

    Raises:
        UserError: says what was expected, and what came.

    Example:
        >>> check_count("epochs", True)
        Traceback (most recent call last):
            ...
        paredown.core.errors.UserError: epochs: expected a whole number from 1 up, got True.
    """
    whole = isinstance(value, int) and not isinstance(value, bool)
    fits = whole and value >= least and (most is None or value <= most)
    end = "up" if most is None else f"to {most}"
    require(name, value, fits, f"a whole number from {least} {end}")


def check_seed(name: str, value: Any) -> None:
    """Refuse what is no seed: a whole number that all generators take.

    Raises:
        UserError: says what was expected, and what came.

    Example:
        >>> check_seed("seed", 2**62)
        Traceback (most recent call last):
            ...
        paredown.core.errors.UserError: seed: expected a whole number from 0 to 4294967295, got \
4611686018427387904.
    """
    whole = isinstance(value, int) and not isinstance(value, bool)
    require(name, value, whole and 0 <= value < 2**32, f"a whole number from 0 to {2**32 - 1}")


def check_choice(name: str, value: object, known: Sequence[str]) -> None:
    """Refuse a setting that is none of those that are known.

    Raises:
        UserError: it is not, with the one that comes nearest.

    Example:
        >>> check_choice("at", "gobal", ("global", "1"))
        Traceback (most recent call last):
            ...
        paredown.core.errors.UserError: at: 'gobal' is not one of global, 1; did you mean 'global'?
    """
    if value not in known:
        near = difflib.get_close_matches(str(value), known, 1, 0.0)[0]
        raise UserError(
            f"{name}: {value!r} is not one of {', '.join(known)}; did you mean {near!r}?"
        )


def names_of(name: str, value: Any) -> tuple[str, ...]:
    """A setting that is a sequence of names, as a tuple.

    Raises:
        UserError: it is one text, or holds something else than texts.

    Example:
        >>> names_of("exclude", ["fc", "conv*"])
        ('fc', 'conv*')
        >>> names_of("exclude", "fc")
        Traceback (most recent call last):
            ...
        paredown.core.errors.UserError: exclude: expected a tuple of names, got the text 'fc'.
    """
    if isinstance(value, str):
        raise UserError(f"{name}: expected a tuple of names, got the text {value!r}.")
    if not isinstance(value, (tuple, list)) or not all(isinstance(each, str) for each in value):
        raise UserError(f"{name}: expected a tuple of names, got {value!r}.")
    return tuple(value)
