"""What the command line prints with."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import Any

from rich.console import Console

from paredown.core import progress
from paredown.core.errors import UserError
from paredown.core.terminal import WIDEST


def output(as_json: bool, quiet: bool = False) -> Console:
    """Where a verb tells a person something: beside the JSON, where that is asked for."""
    return Console(stderr=as_json, quiet=quiet, soft_wrap=not sys.stdout.isatty())


@contextlib.contextmanager
def working(as_json: bool, quiet: bool = False) -> Iterator[None]:
    """Show progress; what the user's own code prints stays out of the JSON.

    Raises:
        UserError: that code ended the program.
    """
    aside = contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()
    with aside, progress.shown(output(as_json, quiet)):
        try:
            yield
        except SystemExit as end:  # what a verb ends with itself is no such exception
            raise UserError(
                f"the user's file: its code ended the program (sys.exit, with {end.code!r}); raise "
                "an error instead."
            ) from end


def wide() -> Console:
    """For tables: as wide as the terminal, and readable where there is none."""
    return Console(width=None if sys.stdout.isatty() else WIDEST)


def print_json(value: Any) -> None:
    """One JSON object on standard output, for machines."""
    print(json.dumps(value, indent=1, allow_nan=False))
