"""The sections of the page. Each is two files here: what it tells of a run, and its template."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from paredown.core.results import Run
from paredown.report.sections import (
    census,
    classes,
    comparison,
    explained,
    flips,
    head,
    histograms,
    latency,
    layers,
    mixed,
    repeat,
    trajectory,
    undone,
)


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        name: that of its template, ``NAME.html``, which is given the run and the facts.
        facts: what the template shows of a run; None leaves the section out.
    """

    name: str
    facts: Callable[[Run], dict[str, Any] | None]


SECTIONS: tuple[Section, ...] = (  # in the order of the page
    Section("head", head.facts),
    Section("comparison", comparison.facts),
    Section("trajectory", trajectory.facts),
    Section("undone", undone.facts),
    Section("mixed", mixed.facts),
    Section("explained", explained.facts),
    Section("layers", layers.facts),
    Section("histograms", histograms.facts),
    Section("classes", classes.facts),
    Section("flips", flips.facts),
    Section("latency", latency.facts),
    Section("census", census.facts),
    Section("repeat", repeat.facts),
)
