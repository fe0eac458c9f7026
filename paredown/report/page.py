"""Run -> one self-contained HTML page: no network, no script, nothing outside the file."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from paredown.core.files import write_atomically
from paredown.core.results import Run
from paredown.core.task import SPLITS
from paredown.report.explained import explanation
from paredown.report.mixed import mixed_precision
from paredown.report.sections import census, classes, flips, histograms, latency, layers
from paredown.report.table import comparison, head
from paredown.report.trajectory import trajectory
from paredown.report.words import quantity, short
from paredown.targets.artifact import parts

__all__ = ["comparison", "render", "report"]


def report(run: Run, path: Path) -> Path:
    """Write the page of ``run`` at ``path``, whole or not at all.

    Raises:
        UserError: the file cannot be written.
    """
    write_atomically(path, render(run).encode())
    return path


def render(run: Run) -> str:
    """The page as text; it depends on nothing but ``run``."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"human": quantity, "short": short, "files": _files}
    source = resources.files(__package__).joinpath("page.html").read_text("utf-8")
    return environment.from_string(source).render(
        run=run,
        **head(run),
        **trajectory(run),
        mixed=mixed_precision(run),
        explained=explanation(run),
        layers=layers(run),
        histograms=histograms(run),
        classes=classes(run),
        flips=flips(run),
        latency=latency(run),
        census=census(run),
        notes=run.details.get("notes") or [],
        data=sorted(run.data.items(), key=_split_order),
        reproduce="\n".join(run.details.get("reproduce") or []),
    )


def _files(path: str) -> str:
    """The names of an artifact's files."""
    return " and ".join(part.name for part in parts(Path(path)))


def _split_order(item: tuple[str, Any]) -> tuple[int, str]:
    return (SPLITS.index(item[0]) if item[0] in SPLITS else len(SPLITS)), item[0]
