"""The front door: one function a verb; each parses, calls and prints.

What a verb needs is imported within it: ``paredown --help`` waits for no PyTorch.
"""

from __future__ import annotations

import sys
from typing import NoReturn

from rich.console import Console
from rich.markup import escape

from paredown.cli import models, monitoring, runs, serving, shipping
from paredown.cli.command import FAILED, INTERRUPTED, app
from paredown.core import threads
from paredown.core.errors import UserError

VERBS = (models, monitoring, runs, serving, shipping)  # each has registered its verbs with the app


def main() -> None:
    """Run the command line; a user's mistake ends in a sentence, never in a traceback."""
    threads.sleep_at_barriers()
    try:
        app()
    except UserError as error:
        _fail(str(error), FAILED)
    except SystemExit as end:  # typer's own answer to Ctrl-C is this code, without a word
        if end.code != INTERRUPTED:
            raise
        _fail(
            "interrupted. What was finished is kept; the same command goes on from there.",
            INTERRUPTED,
        )
    except MemoryError:
        _fail("out of memory. Use a smaller batch_size in task(), or a machine with more.", FAILED)
    except OSError as error:
        _fail(f"{error.filename or 'the system'}: {error.strerror or error}.", FAILED)


def _fail(text: str, code: int) -> NoReturn:
    Console(stderr=True, soft_wrap=True).print(f"[red]error:[/] {escape(text)}", highlight=False)
    sys.exit(code)
