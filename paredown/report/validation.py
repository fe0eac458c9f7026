"""The page of a device: the run's sections as they are there, and what was found of its outputs."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from paredown.core.results import Run
from paredown.report.page import shown, templates
from paredown.report.sections import sections

BEFORE, AFTER = ("head.html", "comparison.html"), ("latency.html",)  # sections that a device has


def render(run: Run, facts: dict[str, Any]) -> str:
    """The page as text.

    Args:
        run: with the measurements, checks and verdict of the device.
        facts: what ``validation.html`` shows.
    """
    made = templates()
    by_name = {each.template: each for each in sections()}
    own = Markup(made.get_template("validation.html").render(facts, run=run))
    before, after = (
        [shown(by_name[name], made, run) for name in names] for names in (BEFORE, AFTER)
    )
    texts = [text for text in (*before, own, *after) if text is not None]
    return made.get_template("page.html").render(run=run, sections=texts)
