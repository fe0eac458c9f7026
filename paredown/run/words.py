"""A run, told in a terminal."""

from __future__ import annotations

from pathlib import Path

from rich.markup import escape
from rich.table import Table

from paredown.core.console import output
from paredown.core.measurement import Measurement
from paredown.core.results import Run
from paredown.core.units import human
from paredown.report.table import comparison
from paredown.run.identity import versions
from paredown.targets.artifact import parts

NARROW = 75  # columns, below which goals stand under the table


def print_found(problems: list[str], notes: list[str], facts: list[str]) -> None:
    """What a check found."""
    console = output(False)
    for word, lines in (("note:", notes), ("[red]problem:[/]", problems), ("[green]ok[/]", facts)):
        for line in lines:
            console.print(f"{word} {escape(line)}", highlight=False)


def print_measurement(name: str, measurement: Measurement) -> None:
    table = Table(title=f"{name} as it is", title_justify="left")
    table.add_column("quantity")
    table.add_column("value", justify="right")
    for row in _measurement_rows(measurement):
        table.add_row(*row)
    output(False).print(table)


def _measurement_rows(m: Measurement) -> list[tuple[str, str]]:
    score = f"{m.score:.2%}" if m.score_in_points else f"{m.score:.5g}"
    rows = [
        ("size on disk", human("size", m.size_bytes)),
        (f"score on {m.split} ({m.examples})", score),
    ]
    timed = [("latency p50", m.latency_ms_p50), ("latency p90", m.latency_ms_p90)]
    timed += [("preprocessing", m.preprocess_ms), ("postprocessing", m.postprocess_ms)]
    for name, value in [*timed, ("end to end", m.end_to_end_ms)]:
        if value is not None:
            rows.append((name, human("latency", value)))
    memory = (
        ("model memory", m.memory_model_bytes),
        ("runtime memory", m.memory_floor_bytes),
        ("peak memory", m.memory_bytes),
    )
    for name, goal, value in (
        ("throughput", "throughput", m.throughput_per_s),
        *((name, "memory", value) for name, value in memory),
    ):
        if value is not None:
            rows.append((name, human(goal, value)))
    rows.append(("where", ", ".join(f"{k} {v}" for k, v in m.where.items())))
    return rows


def print_run(finished: Run) -> None:
    console = output(False)
    table = Table(
        title="The exported file beside the original, on the test split", title_justify="left"
    )
    narrow = console.width < NARROW
    for name in ("", "original", "compressed", "ratio", *(() if narrow else ("goal", "met?"))):
        table.add_column(name, justify="left" if not name else "right")
    for row in comparison(finished):
        met = {
            "yes": "[green]yes[/]",
            "no": "[red]no[/]",
            "not proven": "[yellow]not proven[/]",
        }.get(row["met"], row["met"])
        cells = (row["name"], *row["figures"], row["change"], row["goal"], met)
        table.add_row(*cells[: len(table.columns)])
    console.print(table)
    for check in finished.checks if narrow else ():
        colour, word = ("green", "met") if check.met else ("red", "missed")
        console.print(f"[{colour}]{word}[/]: {escape(check.sentence)}", highlight=False)
    if finished.comparison is not None:
        console.print(f"Score: {finished.comparison.verdict}", highlight=False)
        console.print(f"Speed: {finished.comparison.speed}", highlight=False)
    colour = {"met": "green", "open": "yellow"}.get(finished.outcome, "red")
    console.print(f"[bold {colour}]{escape(finished.verdict)}[/]", highlight=False)
    if finished.details.get("in_reach"):
        console.print(escape(finished.details["in_reach"]), highlight=False)
    if finished.artifact is not None:
        folder = Path(finished.details["folder"])
        shipped = [str(path) for path in parts(folder / Path(finished.artifact.path).name)]
        for name, paths in (("Artifact", shipped), ("Report", [str(folder / "report.html")])):
            line = f"{name + ':':9} {escape(' and '.join(paths))}"
            console.print(line, highlight=False, soft_wrap=True)


def print_replay(run: Run, kept: str, replayed: str) -> None:
    console = output(False)
    console.print(f"kept      {kept}\nreplayed  {replayed}", highlight=False)
    same = kept == replayed
    console.print("[green]the same file[/]" if same else f"[red]another file[/]: {_why(run)}")


def _why(run: Run) -> str:
    """What differs between the run and this replay."""
    now = versions(run.target["runtime"])
    changed = [f"{n} was {v}, is {now.get(n)}" for n, v in run.versions.items() if now.get(n) != v]
    return "; ".join(changed) or (
        "made with the same versions and as many threads, so on another kind of processor, which "
        "changes how sums are rounded"
    )
