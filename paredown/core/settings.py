"""Checks of the settings that a user gives, each with one wording."""

from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from collections.abc import Sequence
from pathlib import Path
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


def check_above_zero(name: str, value: Any) -> None:
    """Refuse what is no finite number above 0; True and False are none.

    Raises:
        UserError: says what was expected, and what came.

    Example:
        >>> check_above_zero("width", 0)
        Traceback (most recent call last):
            ...
        paredown.core.errors.UserError: width: expected a number above 0, got 0.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    require(name, value, number and 0 < value < math.inf, "a number above 0")


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


# --- types ----------------------------------------------------------------------------------------

_TYPES: dict[str, tuple[tuple[type, ...], str]] = {  # of an annotation, what is taken
    "float": ((int, float), "a number"),
    "int": ((int,), "a whole number"),
    "str": ((str,), "a text"),
    "bool": ((bool,), "true or false"),
    "None": ((type(None),), '"none"'),
}
_NAMES = "tuple[str, ...]"
_WORDS = {  # of a type, by its name
    "str": "a text",
    "int": "a whole number",
    "float": "a number",
    "dict": "a dict",
    "NoneType": "None",
    "Path": "a path",
    "Module": "an nn.Module",
    "Model": "a Model of paredown.capture",
    "Run": "a Run of paredown.compress",
}


def check_fields(settings: Any) -> None:
    """Refuse a dataclass one of whose fields is not of the plain types that it is annotated with.

    Raises:
        UserError: says what was expected, and what came.
    """
    for field in dataclasses.fields(settings):
        value, parts = getattr(settings, field.name), str(field.type).split(" | ")
        if parts == [_NAMES]:
            names_of(field.name, value)
        elif all(part in _TYPES for part in parts):
            kinds = [_TYPES[part] for part in parts]
            fits = any(_is(value, allowed) for allowed, _ in kinds)
            require(field.name, value, fits, " or ".join(words for _, words in kinds))


def check_arguments(**given: tuple[object, Any]) -> None:
    """Refuse an argument that is not of its type, each given as ``name=(value, type)``.

    Raises:
        UserError: says what was expected, and what came.

    Example:
        >>> check_arguments(threads=(2, int), folder=("runs/mine", str | Path))
        >>> check_arguments(folder=(None, str | Path))
        Traceback (most recent call last):
            ...
        paredown.core.errors.UserError: folder: expected a path, got None.
    """
    for name, (value, kind) in given.items():
        kinds = typing.get_args(kind) or (kind,)
        if not _is(value, kinds):
            there = [each for each in kinds if not (each is str and Path in kinds)]
            words = [_WORDS.get(each.__name__) or _a(each) for each in there]
            raise UserError(f"{name}: expected {' or '.join(words)}, got {described(value)}.")


def _is(value: object, kinds: tuple[type, ...]) -> bool:
    """As `isinstance`, but True and False are no numbers, and a whole number is a number."""
    if isinstance(value, bool):
        return bool in kinds
    return isinstance(value, kinds) or (float in kinds and isinstance(value, int))


def _a(kind: type) -> str:
    return f"{'an' if kind.__name__[0] in 'AEIOUaeiou' else 'a'} {kind.__name__}"


def described(value: object) -> str:
    """What came instead of what was expected.

    Example:
        >>> described(3), described({}), described(dict)
        ('3', 'a dict', 'the class dict')
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    return f"the class {value.__name__}" if isinstance(value, type) else _a(type(value))
