"""The table of both files, and what else tells of the two."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from paredown.core.goals import GoalCheck
from paredown.core.measurement import Comparison, Measurement
from paredown.core.results import Run
from paredown.core.speed import speed_change
from paredown.report.words import WORDS, change, quantity, ratio, score, times

SPEEDS = {  # a row -> what the comparison calls its ratio; of medians one is the other's inverse
    "Latency, median": "speedup",
    "Throughput": "speedup",
    "Latency, 90th percentile": "speedup_p90",
    "Latency, 99th percentile": "speedup_p99",
}


def comparison(run: Run) -> list[dict[str, Any]]:
    """The rows of the comparison table: name, figures (original, compressed), change, goal, met.

    A row that neither file has is left out, but for one that a goal asks for.
    """
    a, b = run.on_device.get("original"), run.on_device.get("compressed")
    if a is None and b is None:
        return []
    checks = {check.quantity or check.goal: check for check in run.checks}
    quantities = [
        ("Size on disk", "size", "size_bytes", "size"),
        ("Latency, median", "latency", "latency_ms_p50", "latency"),
        ("Latency, 90th percentile", "latency", "latency_ms_p90", ""),
        ("Latency, 99th percentile", "latency", "latency_ms_p99", ""),
        ("End to end, median", "latency", "end_to_end_ms", ""),
        ("Throughput", "throughput", "throughput_per_s", "throughput"),
        ("Model memory", "memory", "memory_model_bytes", "memory_model"),
        ("Peak memory", "memory", "memory_bytes", "memory"),
        ("Energy per inference", "energy", "energy_mj", "energy"),
    ]
    rows = []
    for name, goal, field, asked in quantities:
        values = [getattr(m, field) if m else None for m in (a, b)]
        if values != [None, None] or asked in checks:
            row = _row(run, name, goal, values, checks.get(asked))
            if goal == "energy":
                row["notes"] = [m.energy_source if m else "" for m in (a, b)]
            if field == "end_to_end_ms":
                row["notes"] = [_around(m) for m in (a, b)]
            rows.append(row)
    packed = run.details.get("packed_bytes")
    if packed:
        values = [packed["original"], packed["compressed"]]
        rows.insert(1, _row(run, "Packed for delivery", "size", values, None))
    if any(m and m.score is not None for m in (a, b)):
        rows.insert(1, _score_row(run, a, b, checks.get("max_drop")))
    return rows[:2] + _fidelity_rows(run) + rows[2:]


def _fidelity_rows(run: Run) -> list[dict[str, Any]]:
    """How far the file is from the original, where the score is that; of all examples like these at
    most so much, at the confidence that stands beside it."""
    told = run.details.get("fidelity")
    if not told:
        return []
    share, most = (f"{100 * told[name]:.3g}%" for name in ("disagreement", "bound"))
    return [
        {
            "name": "Disagreement with the original",
            "figures": ["–", share],
            "notes": ["", told["method"]],
            "change": f"≤ {most} at {told['confidence']:.0%}",
            "interval": "",
            "tone": "",
            "goal": "",
            "met": "",
        }
    ]


def _row(
    run: Run, name: str, goal: str, values: list[float | None], check: GoalCheck | None
) -> dict[str, Any]:
    speed = SPEEDS.get(name, "")
    number, word, tone = changed(run.comparison, goal, values, speed)
    interval, both = "", _interval_of(run.comparison, speed)
    if both and number and name.startswith("Latency"):
        interval = f"{times(both[0])} to {times(both[1])} as fast"
    return {
        "name": name,
        "figures": [quantity(value, goal) for value in values],
        "notes": ["", ""],
        "change": f"{number} {word}".strip() or "–",
        "interval": interval,
        "tone": tone,
        "goal": bound(run, check) if check and check.value is not None else "",
        "met": met(check),
    }


def changed(
    both: Comparison | None, goal: str, values: Sequence[float | None], speed: str = "speedup"
) -> tuple[str, str, str]:
    """How many times better or worse, as `ratio` says it; of a speed as its interval does, so that
    nothing is slower here that is not measurably so.

    Args:
        speed: what the comparison calls the ratio of such a speed; "" where it has none.
    """
    before, after = values
    number, word, tone = ratio(goal, before, after)
    found = _interval_of(both, speed) if goal in ("latency", "throughput") and number else None
    if both is None or found is None or before is None or after is None:
        return number, word, tone
    measured = both.speedup if speed == "speedup" else before / after
    assert measured is not None  # it has an interval
    number, word = speed_change(measured, *found)
    if found[0] <= 1 <= found[1]:
        return number, word, ""
    better, worse = WORDS[goal]
    faster = word == "faster"
    return number.replace("x", "×"), better if faster else worse, "better" if faster else "worse"


def _interval_of(both: Comparison | None, speed: str) -> tuple[float, float] | None:
    """Of a ratio of the comparison; None where it has none."""
    if both is None or not speed:
        return None
    low, high = getattr(both, f"{speed}_low"), getattr(both, f"{speed}_high")
    return None if low is None or high is None else (low, high)


def met(check: GoalCheck | None) -> str:
    """ "yes", "no", or "not proven" of a goal that is met as measured; "" without one."""
    if check is None:
        return ""
    return "not proven" if check.unproven else "yes" if check.met else "no"


def _around(m: Measurement | None) -> str:
    """What of the end to end is the task's own.

    Example:
        >>> _around(Measurement(1, preprocess_ms=0.5, postprocess_ms=0.25))
        'preprocessing 0.5 ms, postprocessing 0.25 ms'
    """
    if m is None:
        return ""
    both = {"preprocessing": m.preprocess_ms, "postprocessing": m.postprocess_ms}
    return ", ".join(f"{name} {quantity(ms, 'latency')}" for name, ms in both.items() if ms)


def _score_row(
    run: Run, a: Measurement | None, b: Measurement | None, check: GoalCheck | None
) -> dict[str, Any]:
    points = (b or a or run.baseline).score_in_points
    both = run.comparison
    interval = ""
    if both and both.score_difference_low is not None and both.score_difference_high is not None:
        low = change(both.score_difference_low, points, unit=False)
        interval = f"paired, {low} to {change(both.score_difference_high, points, unit=False)}"
    difference = score_difference(run, a, b) if a and b else None
    some = b or a
    meaning = run.details.get("score")
    name = f"Score, {meaning}," if meaning else "Score"
    return {
        "name": f"{name} on {some.examples:,} {some.split} examples" if some else name.strip(","),
        "figures": [score(m.score, points) if m else "–" for m in (a, b)],
        "notes": [_interval(m) for m in (a, b)],
        "change": change(difference, points),
        "interval": interval,
        "tone": "",
        "goal": bound(run, check) if check and check.value is not None else "",
        "met": met(check),
    }


def score_difference(run: Run, a: Measurement, b: Measurement) -> float | None:
    """The paired difference of scores where there is one, else that of the means."""
    if run.comparison and run.comparison.score_difference is not None:
        return run.comparison.score_difference
    return None if a.score is None or b.score is None else b.score - a.score


def bound(run: Run, check: GoalCheck) -> str:
    """What a goal asks for, such as "≤ 200 KB"."""
    if check.goal == "max_drop":
        points = run.baseline.score_in_points
        return f"≥ {change(-check.bound, points)}{'' if points else ' in change'}"
    return f"{'≥' if check.goal == 'throughput' else '≤'} {quantity(check.bound, check.goal)}"


def _interval(m: Measurement | None) -> str:
    if m is None or m.score_low is None or m.score_high is None:
        return ""
    return f"{score(m.score_low, m.score_in_points)} to {score(m.score_high, m.score_in_points)}"
