"""How far the file is from the original, where no labels were there."""

from __future__ import annotations

from typing import Any

from paredown.core.results import Run

BOUNDS = {  # what a disagreement bounds, by the kind of task
    "classification": "Accuracy drops by no more than the disagreement.",
    "segmentation": "The share of right pixels drops by no more than the disagreement.",
    "tokens": "The share of right tokens drops by no more than the disagreement.",
}


def facts(run: Run) -> dict[str, Any] | None:
    told = run.details.get("fidelity")
    if not told:
        return None
    bounds = BOUNDS.get(told["kind"], "What it means for accuracy only labels can tell.")
    return {"told": told, "bounds": bounds, "rows": _rows(told)}


def _rows(told: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [
        ("test examples", f"{told['examples']:,}, which no decision has seen"),
        ("that differ", f"{told['differ']:,}"),
        ("disagreement", percent(told["disagreement"])),
        (
            f"at most, at {told['confidence']:.0%} confidence",
            f"{percent(told['bound'])}, by {told['method']}",
        ),
    ]
    if "within_reach" in told:
        rows += [
            ("largest change between two classes", f"{told['largest_change']:.3g}"),
            ("median margin of the original's top class", f"{told['median_margin']:.3g}"),
            ("answers whose margin is within that change", percent(told["within_reach"])),
        ]
    if "neighbour_overlap" in told:
        name = f"of the {told['neighbours']} nearest neighbours stay"
        rows.append((name, percent(told["neighbour_overlap"])))
    return rows


def percent(share: float) -> str:
    """A share as the page has it.

    Example:
        >>> percent(0.0125)
        '1.25%'
    """
    return f"{100 * share:.3g}%"
