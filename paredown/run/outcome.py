"""What came of a run, in words: the verdict, what it does not prove, and what else was in reach."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from paredown.core.goals import GoalCheck
from paredown.core.measurement import Comparison
from paredown.core.results import Trial
from paredown.core.units import Limit, human
from paredown.measure.constant import best_constant
from paredown.measure.measure import Measured
from paredown.run.stages import Point, State
from paredown.search import decide, plan
from paredown.search.offers.smaller import NARROWEST

NEXT = 0.5  # of the file that came, as the size to ask for


def verdict(
    checks: Sequence[GoalCheck],
    changed: bool,
    tried: bool,
    compared: Comparison | None = None,
    besides: str = "",
    went_on: bool = False,
) -> str:
    """The outcome in a few sentences; every goal that is missed or not proven is named, and a drift
    of the machine, and what else is to be said.

    Args:
        changed: whether any step is in the artifact.
        tried: whether any step was tried.
        compared: the artifact beside the original.
        besides: what else there is to say of the file: what its score bounds, that it is of no use.
        went_on: whether all that was planned was tried for the want of a proof alone.
    """
    drifted = "".join(f" {check.drifted}" for check in checks if check.drifted)
    kept = "The best file is kept." if changed else "No step paid; the original is kept."
    besides = f" {besides}" if besides else ""
    missed = [check for check in checks if not check.met]
    told = " ".join(check.sentence for check in missed)
    if any(not check.within for check in missed):
        return f"Goals missed. {told}{drifted} {kept}{besides}"
    if missed:
        searched = " All that was planned was tried for it." if went_on else ""
        reason = f"{_open(missed, compared)}{searched}{drifted}"
        return f"Goals not proven. {told}{reason} {kept}{besides}"
    if not tried:
        return f"The original meets every goal already; nothing was changed.{besides}"
    if not checks:
        return f"No goal was set. {kept}{besides}"
    unproven = [check for check in checks if check.unproven]
    found = "Every goal is met by the exported file"
    if unproven:
        goals = " and ".join(check.title for check in unproven)
        found += f" as it was measured, but this data cannot prove it for {goals}"
    rest = _open(unproven, compared) + drifted + ("" if changed else f" {kept}")
    return f"{found}.{rest}{besides}"


def _open(unproven: Sequence[GoalCheck], compared: Comparison | None) -> str:
    """Why a goal is not proven, as far as there is more to say."""
    if compared is None:
        return ""
    found = []
    for check in unproven:
        said = compared.verdict if check.goal == "max_drop" else compared.speed
        found.append(f" {check.title.capitalize()}: {said}.")
    return "".join(found)


def useless_file(state: State, measured: dict[str, Measured]) -> str:
    """That the artifact is no better than one output for every input, in words; "" where it is."""
    constant = best_constant(state.original, state.task, "test")
    original, compressed = measured["original"], measured["compressed"]
    if constant is None or not constant.as_good(compressed.scores):
        return ""
    points = compressed.measurement.score_in_points
    scores = [float(compressed.scores[constant.examples].mean()), constant.mean]
    figures = [f"{score:.2%}" if points else f"{score:.4g}" for score in scores]
    looked, all_of = len(constant.examples), len(compressed.scores)
    those = f"{all_of:,}" if looked == all_of else f"{looked:,} of the {all_of:,}"
    told = (
        f"The file is of no use as far as this data can tell: on {those} test examples it scores "
        f"{figures[0]}, and the same output for every input {figures[1]}."
    )
    if constant.as_good(original.scores):
        return f"{told} Nor is the original: are its weights the trained ones?"
    return told


def in_reach(state: State, trials: Sequence[Trial], best: Point) -> str:
    """That a smaller file may be had, and how to ask for it, where no amount was asked for and the
    search ended at the first recipe that pays; else ""."""
    if state.asked or decide.asks(state.goals) or not best.steps:
        return ""
    size = best.standing.measurement.size_bytes / state.baseline.size_bytes
    share = float(f"{NEXT * size:.2g}")
    if share < NARROWEST:  # no model any more
        return ""
    goals = replace(state.goals, size=Limit(share, relative=True))
    planned = plan.plan(state.original, state.task, goals, state.baseline, state.seed, state.target)
    known = {trial.recipe for trial in trials}
    item = next((item for item in planned if item.title not in known), None)
    if item is None:
        return ""
    half = human("size", share * state.baseline.size_bytes)
    return (
        "No amount was asked for, so the search ended at the first recipe that pays. Smaller may "
        f"be in reach: for half the size of this file, {half}, the plan begins with {item.title}. "
        f'Ask for it by --size {share:g}x, or Goals(size="{share:g}x").'
    )
