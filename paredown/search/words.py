"""A plan, told in a terminal."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.markup import escape

from paredown.core.console import output
from paredown.core.measurement import Measurement
from paredown.search.proposal import Proposal
from paredown.steps import recipe


def plan_rows(
    proposals: list[Proposal], baseline: Measurement, unreachable: list[str]
) -> dict[str, Any]:
    """A plan, as JSON."""
    recipes = [
        {"title": item.title, "reason": item.reason, "recipe": recipe.to_toml(item.steps)}
        for item in proposals
    ]
    given = {"baseline": dataclasses.asdict(baseline), "out_of_reach": unreachable}
    return {**given, "recipes": recipes}


def print_plan(proposals: list[Proposal], unreachable: list[str]) -> None:
    console = output(False)
    for sentence in unreachable:
        console.print(f"[red]out of reach:[/] {escape(sentence)}", highlight=False)
    for number, item in enumerate(proposals, 1):
        console.print(f"[bold]{number}. {item.title}[/]: {item.reason}", highlight=False)
        for attempt in item.attempts:
            steps = ", ".join(recipe.line(step) for step in attempt.steps)
            console.print(f"   - {attempt.title}: {escape(steps)}", highlight=False)
            console.print(f"     why: {attempt.reason}", highlight=False)
            if attempt.expected:
                console.print(f"     expected: {attempt.expected}", highlight=False)
