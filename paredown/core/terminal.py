"""Text that fits a terminal."""

from __future__ import annotations

import re

WIDEST = 100  # columns of a terminal that a table takes at most


def broken(names: str, width: int) -> str:
    """Words in lines of ``width``; wider ones break after dots and underscores.

    Example:
        >>> print(broken("encoder.layers.0.attention.query", 16))
        encoder.layers.
        0.attention.
        query
    """
    lines: list[str] = []
    for word in names.split(" "):
        pieces = re.findall(r"[^._]*[._]+|[^._]+$", word) if len(word) > width else [word]
        for number, piece in enumerate(pieces):
            glue = " " if number == 0 and lines else ""
            if lines and len(lines[-1] + glue + piece) <= width:
                lines[-1] += glue + piece
            else:
                lines.append(piece)
    return "\n".join(lines)
