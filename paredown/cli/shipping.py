"""Verbs for what is delivered: pack, unpack."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from paredown.cli.command import Json, app
from paredown.core.console import output, print_json, working


@app.command("pack")
def pack_verb(
    file: Annotated[Path, typer.Argument(help="The artifact of any runtime.")],
    out: Annotated[Path | None, typer.Option(help="The container; default: FILE.pare.")] = None,
    as_json: Json = False,
) -> None:
    """Pack an artifact for delivery: lossless, each tensor by what compression left in it."""
    from paredown.ship.pack.container import pack
    from paredown.ship.pack.words import print_contents

    with working(as_json):
        path = pack(file, out)
    print_contents(path, as_json)


@app.command("unpack")
def unpack_verb(
    file: Annotated[Path, typer.Argument(help="A .pare container.")],
    out: Annotated[Path | None, typer.Option(help="Folder; default: the container's.")] = None,
    only_list: Annotated[
        bool, typer.Option("--list", help="Say what it holds; unpack nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Unpack a container, bit for bit, checked by SHA-256."""
    from paredown.ship.pack.container import unpack
    from paredown.ship.pack.words import print_contents

    if only_list:
        print_contents(file, as_json)
        return
    with working(as_json):
        path = unpack(file, out)
    if as_json:
        print_json({"file": str(path)})
    else:
        output(False).print(f"Unpacked: {escape(str(path))}", highlight=False, soft_wrap=True)
