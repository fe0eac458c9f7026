"""An explanation as a person reads it in a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from paredown.core.terminal import WIDEST, broken
from paredown.core.units import human
from paredown.explain.cause import KINDS
from paredown.explain.explanation import Explanation

SOURCES = {
    "file": "Inner values are those of the exported file, as it ships.",
    "graph": "{runtime} does not show inner values of its file: those of the graph stand for them.",
}
PARTS = ("weights", "input", "output")


def percent(db: float) -> str:
    """The size of an error beside that of the signal.

    Example:
        >>> percent(20.0), percent(40.0), percent(66.0)
        ('10%', '1%', '0.05%')
    """
    share = 100 * 10 ** (-db / 20)
    return f"{share:.0f}%" if share >= 9.5 else f"{share:.1g}%"


def summary(found: Explanation) -> list[str]:
    """The sentences at the top.

    Example:
        >>> found = Explanation(8, "graph", "litert", 41.0, 20.0, 40.0, [], None)
        >>> print("\\n".join(summary(found)))
        The outputs differ from the original's by 10% (20.0 dB) on 8 validation examples.
        Rounding alone makes 1% (40.0 dB); the rest came with what was cut and trained.
        Training moves outputs too, also to better ones: the score says whether that is a loss.
        litert does not show inner values of its file: those of the graph stand for them.
        The file's outputs agree with the graph's at 41 dB.
    """
    said = []
    if found.output_db is not None:
        said.append(
            f"The outputs differ from the original's by {percent(found.output_db)} "
            f"({found.output_db:.1f} dB) on {found.examples} validation examples."
        )
    if found.rounding_db is not None and cut_too(found):
        said.append(
            f"Rounding alone makes {percent(found.rounding_db)} ({found.rounding_db:.1f} dB); "
            "the rest came with what was cut and trained."
        )
    if found.output_db is not None and (found.rounding_db is None or cut_too(found)):
        said.append(
            "Training moves outputs too, also to better ones: "
            "the score says whether that is a loss."
        )
    said.append(SOURCES[found.source].format(runtime=found.runtime))
    if found.agreement_db is not None:
        said.append(f"The file's outputs agree with the graph's at {found.agreement_db:.0f} dB.")
    return said


def cut_too(found: Explanation) -> bool:
    """Whether more than rounding changed the outputs."""
    return (found.rounding_db or 0.0) > (found.output_db or 0.0) + 1


def shown(found: Explanation, width: int, top: int, points: bool) -> Iterator[Table | Text]:
    """The explanation in ``width`` columns; ``points`` says that scores lie in [0, 1]."""
    width = min(max(width, 70), WIDEST)
    yield from (Text(line) for line in summary(found))
    layers = noisiest(found.layers)
    if layers:
        yield Text(f"\nNoise by layer in dB, {_first(top, len(layers), 'the noisiest')}\n")
        yield _noise_table(layers[:top], width)
    if found.ranking is not None:
        count = len(found.ranking["restored"])
        yield Text(f"\nWhat restoring a layer wins, {_first(top, count, 'the most')}\n")
        yield _ranking_table(found.ranking, top, width, points)
        yield Text("\n" + ranking_words(found.ranking, points))
    yield Text("\nCauses" if found.causes else "\nNo cause stands out from the figures.")
    for number, cause in enumerate(found.causes, 1):
        yield Text(f"\n{number}. {KINDS[cause['kind']]}: {names(cause['layers'])}")
        yield Text(f"   {cause['words']}.")
        yield Text(f"   remedy: {cause['remedy']}{tried(cause)}")


def _first(top: int, count: int, what: str) -> str:
    return f"{what} first" + (f" ({top} of {count}; --top shows more)" if count > top else "")


def noisiest(layers: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The layers that add noise, most first; where nothing is rounded, those that differ most."""
    key = "own_db" if any(row["bits"] for row in layers) else "snr_db"
    return sorted((row for row in layers if row[key] is not None), key=lambda row: row[key])


def names(layers: Sequence[str], most: int = 3) -> str:
    """The first names, and how many more there are.

    Example:
        >>> names(["a", "b", "c", "d"], 3), names(["a"])
        ('a, b, c and 1 more', 'a')
    """
    more = f" and {len(layers) - most} more" if len(layers) > most else ""
    return ", ".join(layers[:most]) + more


def tried(cause: dict[str, Any]) -> str:
    """What came of the remedy where it was tried."""
    if cause["tried_db"] is None:
        return ""
    return f" (tried: the outputs win {cause['tried_db']:+.1f} dB)"


def decibels(value: float | None) -> str:
    """A signal-to-noise ratio; what float32 cannot tell apart is "exact".

    Example:
        >>> decibels(31.46), decibels(140.0), decibels(None)
        ('31.5', 'exact', '–')
    """
    if value is None:
        return "–"
    return "exact" if value >= 100 else f"{value:.1f}"


def _noise_table(rows: Sequence[dict[str, Any]], width: int) -> Table:
    rounds = any(row["bits"] for row in rows)
    heads = ["so far"] + ["rounding", "alone", *PARTS] * rounds
    table = _table(width - 10 * len(heads) - 6)
    table.add_column("bits", justify="right", width=4)
    for head in heads:
        table.add_column(head, justify="right", width=8)
    for row in rows:
        cells = [decibels(row["snr_db"])]
        if rounds:
            cells += [decibels(row["rounding_db"]), decibels(row["own_db"])]
            cells += ["–" if row[part] is None else f"{row[part]:.0%}" for part in PARTS]
        name = broken(row["name"], int(table.columns[0].width or 20))
        table.add_row(name, str(row["bits"] or "–"), *cells)
    return table


def _table(free: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("layer", width=free, overflow="fold")
    return table


def _ranking_table(ranking: dict[str, Any], top: int, width: int, points: bool) -> Table:
    table = _table(width - 50)
    for head in ("outputs", "score", "loss", "bytes"):
        table.add_column(head, justify="right", width=11)
    for row in ranking["restored"][:top]:
        name = broken(", ".join(row["layers"]), int(table.columns[0].width or 20))
        table.add_row(name, *won(row, ranking["compressed"], points))
    return table


def won(row: dict[str, Any], now: dict[str, Any], points: bool) -> list[str]:
    """What one restored layer wins: outputs, score and loss, and the bytes that it costs."""
    return [
        "–" if row["won_db"] is None else _signed(row["won_db"], 1) + " dB",
        _change(row["score"], now["score"], 100 if points else 1, " pts" if points else ""),
        _change(row["loss"], now["loss"], 1, ""),
        "+" + human("size", row["bytes"]) if row["bytes"] else "–",
    ]


def _signed(value: float, digits: int) -> str:
    text = f"{value:+.{digits}f}"
    return text if float(text) else text[1:]


def _change(after: float | None, before: float | None, scale: float, unit: str) -> str:
    if after is None or before is None:
        return "–"
    difference = scale * (after - before)
    return f"{difference:+.3g}{unit}" if difference else f"0{unit}"


def ranking_words(ranking: dict[str, Any], points: bool) -> str:
    """Scores from the original to the compressed model, and how they were measured."""
    tried_layers = sum(len(row["layers"]) for row in ranking["restored"])
    steps = [("original", "original"), ("exact", "without rounding"), ("compressed", "compressed")]
    scores = [(name, ranking[key]["score"]) for key, name in steps]
    if ranking["exact"] == ranking["original"]:
        del scores[1]
    told = [f"{name} {_score(value, points)}" for name, value in scores if value is not None]
    said = f"Score on the graph: {', '.join(told)}; " if told else ""
    return (
        f"{said}{tried_layers} of {ranking['layers']} layers on {ranking['examples']} examples of "
        "validation."
    )


def _score(value: float, points: bool) -> str:
    return f"{value:.2%}" if points else f"{value:.4g}"
