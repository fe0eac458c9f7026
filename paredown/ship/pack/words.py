"""What a container holds, told in a terminal."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from paredown.core.console import output, print_json
from paredown.core.units import human
from paredown.ship.pack.container import Contents, contents


def print_contents(path: Path, as_json: bool) -> None:
    found = contents(path)
    if as_json:
        files = [{"name": f.name, "bytes": f.size, "sha256": f.sha256.hex()} for f in found.files]
        parts = [dataclasses.asdict(part) for part in found.parts]
        print_json({"packed_bytes": found.packed_bytes, "files": files, "parts": parts})
        return
    table = Table(title=f"{escape(str(path))}", title_justify="left")
    for name in ("coding", "elements", "before", "packed", "ratio"):
        table.add_column(name, justify="left" if name in ("coding", "elements") else "right")
    for (coding, element), (before, after) in _summed(found).items():
        ratio = f"{before / max(1, after):.2f}x"
        table.add_row(coding, element, human("size", before), human("size", after), ratio)
    console = output(False)
    console.print(table)
    names = ", ".join(file.name for file in found.files)
    console.print(
        f"{escape(names)}: {human('size', found.size_bytes)} packed into "
        f"{human('size', found.packed_bytes)}, "
        f"{found.size_bytes / found.packed_bytes:.2f}x smaller",
        highlight=False,
        soft_wrap=True,
    )


def _summed(found: Contents) -> dict[tuple[str, str], tuple[int, int]]:
    """Bytes before and after by coding and element, the largest first."""
    sums: dict[tuple[str, str], tuple[int, int]] = {}
    for part in found.parts:
        key = (part.coding, part.element)
        before, after = sums.get(key, (0, 0))
        sums[key] = (before + part.size_bytes, after + part.packed_bytes)
    return dict(sorted(sums.items(), key=lambda item: -item[1][0]))
