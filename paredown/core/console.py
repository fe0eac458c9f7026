"""What the command line prints with."""

from __future__ import annotations

import json
import sys
from typing import Any

from rich.console import Console

from paredown.core.terminal import WIDEST


def output(as_json: bool, quiet: bool = False) -> Console:
    """Where a verb tells a person something: beside the JSON, where that is asked for."""
    return Console(stderr=as_json, quiet=quiet, soft_wrap=not sys.stdout.isatty())


def wide() -> Console:
    """For tables: as wide as the terminal, and readable where there is none."""
    return Console(width=None if sys.stdout.isatty() else WIDEST)


def print_json(value: Any) -> None:
    """One JSON object on standard output, for machines."""
    print(json.dumps(value, indent=1, allow_nan=False))
