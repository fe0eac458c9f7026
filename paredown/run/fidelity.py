"""What a score without labels says of a file, before it is deployed: how often it will differ."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paredown.data.answer import Answer, Fidelity
from paredown.data.fidelity import NEIGHBOURS, largest_change, margins, neighbour_overlap
from paredown.graph import structure
from paredown.measure import stats, timing
from paredown.measure.bounds import proportion_bound
from paredown.measure.measure import Measured
from paredown.measure.scoring import ran
from paredown.run.stages import Point, State

CONFIDENCE = 0.95
NOISE = 1e-6  # of a score, by which examples do not differ
CLASSES = ("classification", "segmentation", "tokens")
MOST_NEIGHBOURS = 2_000  # embeddings among which the nearest are looked for
DIFFERS = {  # what differs of a kind
    "classification": "the top class of {} of the examples",
    "segmentation": "the class of {} of the pixels",
    "tokens": "the top class of {} of the tokens",
    "embedding": "{} of the cosine",
    "regression": "{} of the original's output",
    "detection": "{} of the boxes",
}


def facts(state: State, point: Point, compressed: Measured) -> dict[str, Any] | None:
    """The disagreement of a file with the original on the test split, which no decision has seen,
    its upper bound at 95 % confidence, and what else tells of it; None where labels give the score.

    The bound of answers that are the same or not, and of few that differ, is exact
    (Clopper-Pearson), else the one-sided end of the mean's interval.
    """
    score = state.task.score
    if not isinstance(score, Fidelity):
        return None
    kind, each = score.answer.kind, 1 - compressed.scores.double()
    differ = int((each > NOISE).sum())
    exact = kind == "classification" or differ < stats.MIN_ODD
    if exact:  # no example differs by more than 1, so the mean is at most the share that differs
        bound = proportion_bound(differ, len(each), CONFIDENCE)
    else:
        bound = stats.mean_interval(each.numpy(), 2 * CONFIDENCE - 1).high
    return {
        "kind": kind,
        "examples": len(each),
        "differ": differ,
        "disagreement": float(each.mean()),
        "bound": bound,
        "confidence": CONFIDENCE,
        "method": "Clopper-Pearson" if exact else "the mean's interval",
        **_beyond(state, point.file, score.answer),
    }


def _beyond(state: State, file: Path, answer: Answer) -> dict[str, Any]:
    """Of classes the original's margins beside the largest change that the file made; of embeddings
    the overlap of their nearest neighbours."""
    if answer.kind not in (*CLASSES, "embedding"):
        return {}
    leads: list[Tensor] = []
    vectors: list[tuple[Tensor, Tensor]] = []
    change = 0.0
    with timing.opened({"compressed": file}, state.target, fresh=False) as probes:
        for batch, outputs in ran(probes, state.original, state.task, "test", "margins of test"):
            output = structure.unflatten(outputs["compressed"], state.original.outputs)
            [got], ([wanted], mask) = answer.of(output), answer.taught(batch.target)
            if answer.kind == "embedding":
                vectors.append((_pooled(wanted, mask), _pooled(got, mask)))
                continue
            change = max(change, largest_change(wanted, got, answer.dim))
            lead = margins(wanted, answer.dim, answer.threshold)
            leads.append(lead.flatten() if mask is None else lead[mask != 0])
    if answer.kind == "embedding":
        return _near(vectors)
    every = torch.cat(leads)
    return {
        "largest_change": change,
        "median_margin": float(every.median()),
        "within_reach": float((every <= change).float().mean()),
    }


def _pooled(vectors: Tensor, mask: Tensor | None) -> Tensor:
    """One embedding for each example: of tokens the mean of those that count."""
    if vectors.dim() == 2:
        return vectors
    weights = torch.ones(vectors.shape[:2]) if mask is None else (mask != 0).float()
    total = weights.sum(1, keepdim=True).clamp(min=1)
    return (vectors * weights[..., None]).sum(1) / total


def _near(vectors: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    before, after = (torch.cat(each)[:MOST_NEIGHBOURS] for each in zip(*vectors, strict=True))
    count = min(NEIGHBOURS, len(before) - 1)
    if count < 1:
        return {}
    return {"neighbours": count, "neighbour_overlap": neighbour_overlap(before, after, count)}


def sentence(told: dict[str, Any] | None) -> str:
    """What the score says and what it bounds; "" where labels give it.

    Example:
        >>> told = {"kind": "classification", "examples": 80, "differ": 1, "disagreement": 0.0125,
        ...         "bound": 0.058, "confidence": 0.95, "method": "Clopper-Pearson"}
        >>> print(sentence(told))
        The score is fidelity to the original, not accuracy: on 80 test examples that no decision \
has seen, the top class of 1.25 % of the examples differs; of examples like these at most 5.8 % at \
95 % confidence, and accuracy drops by no more than that.
    """
    if told is None:
        return ""
    sure = f"{told['confidence']:.0%}".replace("%", " %")
    differs = DIFFERS[told["kind"]].format(percent(told["disagreement"]))
    text = (
        f"The score is fidelity to the original, not accuracy: on {told['examples']:,} test "
        f"examples that no decision has seen, {differs} differs; of examples like these at most "
        f"{percent(told['bound'])} at {sure} confidence"
    )
    if told["kind"] == "classification":
        return f"{text}, and accuracy drops by no more than that."
    if told["kind"] in CLASSES:
        return f"{text}, and the share of right ones drops by no more than that."
    near = ""
    if "neighbour_overlap" in told:
        near = (
            f" Of the {told['neighbours']} nearest neighbours "
            f"{percent(told['neighbour_overlap'])} stay."
        )
    return f"{text}. What that means for accuracy only labels can tell.{near}"


def percent(share: float) -> str:
    """A share in words.

    Example:
        >>> percent(0.0125), percent(0.0)
        ('1.25 %', '0 %')
    """
    return f"{100 * share:.3g} %"
