"""Examples that the two models answer differently."""

from __future__ import annotations

import re
from typing import Any

from paredown.core.results import Run
from paredown.report.words import short

FLIPS = 36
PICTURE_BYTES = 400_000  # of all pictures together, so that the page stays under 1 MB
_PICTURE = re.compile(r"data:image/(png|jpeg|gif|webp);base64,[A-Za-z0-9+/=]+")


def facts(run: Run) -> dict[str, Any] | None:
    given = run.details.get("flips") or []
    counts = run.details.get("flip_counts") or {}
    right = [f for f in given if f["after"] == f["target"]]
    wrong = [f for f in given if f["after"] != f["target"]]
    if not given and not counts:
        return None
    budget = [PICTURE_BYTES]
    groups = []
    for name, key, members in (
        ("Now wrong", "now_wrong", wrong),
        ("Now right", "now_right", right),
    ):
        shown = [_flip(member, budget) for member in members[:FLIPS]]
        pictures = [flip for flip in shown if flip["picture"]]
        count = counts.get(key, len(members))
        groups.append(
            {
                "name": name,
                "key": key,
                "count": count,
                "tiles": pictures,
                "plain": [flip for flip in shown if not flip["picture"]],
                "more": max(0, count - len(shown)),
            }
        )
    return {"groups": groups, "examples": counts.get("examples")}


def _flip(flip: dict[str, Any], budget: list[int]) -> dict[str, str | None]:
    """A flip with its picture, if that is one (never an address) and there is room for it."""
    picture = flip.get("picture") or ""
    flip = {key: short(flip[key]) for key in ("index", "target", "before", "after")}
    if not _PICTURE.fullmatch(picture) or len(picture) > budget[0]:
        return {**flip, "picture": None}
    budget[0] -= len(picture)
    return {**flip, "picture": picture}
