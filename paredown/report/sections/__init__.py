"""The sections of the page; adding one is two new files here and a line in this tuple.

``NAME.py`` says what the section tells of a run, and its template ``NAME.html`` how.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from paredown.core.named import named
from paredown.core.results import Run

SECTIONS = (  # in the order of the page
    "paredown.report.sections.head:facts",
    "paredown.report.sections.comparison:facts",
    "paredown.report.sections.fidelity:facts",
    "paredown.report.sections.trajectory:facts",
    "paredown.report.sections.undone:facts",
    "paredown.report.sections.mixed:facts",
    "paredown.report.sections.explained:facts",
    "paredown.report.sections.layers:facts",
    "paredown.report.sections.histograms:facts",
    "paredown.report.sections.classes:facts",
    "paredown.report.sections.flips:facts",
    "paredown.report.sections.latency:facts",
    "paredown.report.sections.census:facts",
    "paredown.report.sections.repeat:facts",
)


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        template: the file's name, here; it is given the run and the facts.
        facts: what the template shows of a run; None leaves the section out.
    """

    template: str
    facts: Callable[[Run], dict[str, Any] | None]


def sections() -> list[Section]:
    """All of them, in their order.

    Example:
        >>> sections()[0].template
        'head.html'
    """
    return [Section(f"{_name(each)}.html", named(each)) for each in SECTIONS]


def _name(spelled: str) -> str:
    return spelled.partition(":")[0].rpartition(".")[2]
