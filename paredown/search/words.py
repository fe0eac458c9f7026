"""A plan, told in a terminal."""

from __future__ import annotations

from rich.markup import escape

from paredown.core.console import output
from paredown.search.proposal import Proposal
from paredown.steps import recipe


def print_plan(proposals: list[Proposal]) -> None:
    console = output(False)
    for number, item in enumerate(proposals, 1):
        console.print(f"[bold]{number}. {item.title}[/]: {item.reason}", highlight=False)
        for attempt in item.attempts:
            steps = ", ".join(recipe.line(step) for step in attempt.steps)
            console.print(f"   - {attempt.title}: {escape(steps)}", highlight=False)
            console.print(f"     why: {attempt.reason}", highlight=False)
            if attempt.expected:
                console.print(f"     expected: {attempt.expected}", highlight=False)
