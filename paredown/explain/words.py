"""An explanation as a person reads it in a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from paredown.explain.explanation import Explanation
from paredown.explain.findings import KINDS
from paredown.inspect import broken
from paredown.types import human

SOURCES = {
    "file": "Inner values are those of the exported file, as it ships.",
    "graph": "{runtime} cannot show inner values of its file; those of the graph stand for them.",
}


def percent(db: float) -> str:
    """The size of an error, beside that of the signal.

    Example:
        >>> percent(20.0), percent(40.0), percent(66.0)
        ('10%', '1%', '0.05%')
    """
    share = 100 * 10 ** (-db / 20)
    return f"{share:.0f}%" if share >= 10 else f"{share:.1g}%"


def summary(found: Explanation) -> list[str]:
    """The sentences at the top.

    Example:
        >>> nothing = dict(examples=8, source="file", runtime="onnxruntime", agreement_db=60.0)
        >>> print(summary(Explanation(**nothing, output_db=20.0, rounding_db=40.0, layers=[],
        ...                           ranking=None))[0])
        The outputs differ from the original's by 10% (20.0 dB) on 8 validation examples.
    """
    said = []
    if found.output_db is not None:
        said.append(
            f"The outputs differ from the original's by {percent(found.output_db)} "
            f"({found.output_db:.1f} dB) on {found.examples} validation examples."
        )
    rounding = found.rounding_db
    if rounding is not None and (found.output_db is None or rounding > found.output_db + 1):
        said.append(
            f"Rounding alone makes {percent(rounding)} ({rounding:.1f} dB) of difference; the rest "
            "came with what was cut and trained."
        )
    said.append(SOURCES[found.source].format(runtime=found.runtime))
    if found.agreement_db is not None:
        said[-1] += f" The file's outputs agree with the graph's at {found.agreement_db:.0f} dB."
    return said


def shown(found: Explanation, width: int, top: int, points: bool) -> Iterator[Table | Text]:
    """The explanation in ``width`` columns; ``points`` says that scores lie in [0, 1]."""
    yield from (Text(line) for line in summary(found))
    layers = noisiest(found.layers)
    if layers:
        yield Text(f"\nNoise by layer, {_first(top, len(layers), 'the noisiest')}\n")
        yield _noise_table(layers[:top], width)
    if found.ranking is not None:
        restored = found.ranking["restored"]
        yield Text(f"\nWhat each layer wins, {_first(top, len(restored), 'the most won')}\n")
        yield _ranking_table(found.ranking, top, width, points)
        yield Text(_ranking_words(found.ranking, points))
    elif layers:
        yield Text("\nThere is no layer to restore on its own.")
    yield Text("\nCauses\n" if found.causes else "\nNo cause stands out from the figures.")
    for number, cause in enumerate(found.causes, 1):
        yield _cause(number, cause)


def _first(top: int, count: int, what: str) -> str:
    return f"{what} first" + (f" ({top} of {count}; --top shows more)" if count > top else "")


def noisiest(layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The layers that add noise, most first; where nothing is rounded, those that differ most."""
    found = [row for row in layers if (row["own_db"] if row["bits"] else row["snr_db"]) is not None]
    return sorted(found, key=lambda row: row["own_db"] if row["bits"] else row["snr_db"])
