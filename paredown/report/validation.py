"""The page of a device: the run's sections as they are there, and what was found of its outputs."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from paredown.core.results import Run
from paredown.report.page import shown, templates
from paredown.report.sections import head, sections

BESIDE, LAST = "comparison.html", "latency.html"  # sections that a device has too
TITLES = {"passed": "Passed here", "missed": "Not passed here"}


def render(run: Run, facts: dict[str, Any]) -> str:
    """The page as text.

    Args:
        run: with the measurements, checks and verdict of the device.
        facts: what ``validation.html`` shows, and ``outcome``, "passed" or "missed".
    """
    made, outcome = templates(), facts["outcome"]
    by_name = {each.template: each for each in sections()}
    top = head.facts(run) | {"title": TITLES[outcome]}
    top["banner"] = "met" if outcome == "passed" else "missed"
    texts = [
        Markup(made.get_template("sections/head.html").render(top, run=run)),
        shown(by_name[BESIDE], made, run),
        Markup(made.get_template("validation.html").render(facts, run=run)),
        shown(by_name[LAST], made, run),
    ]
    there = [text for text in texts if text is not None]
    return made.get_template("page.html").render(run=run, sections=there, outcome=outcome)
