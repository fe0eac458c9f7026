"""Goals -> ranked recipes, each with its reason and what is expected; and what of them to keep."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from paredown import data, recipe
from paredown.graph.coupling import analyze
from paredown.graph.model import Model
from paredown.graph.sites import sites, tensor_of
from paredown.measure import Measured, compare
from paredown.runtimes import runtime
from paredown.steps import step_class
from paredown.types import GOALS, Comparison, Goals, Limit, Measurement, Step, Target, Task, human

QUANTIZABLE = ("conv", "linear", "matmul")  # kinds of layers with an integer kernel
RECOVERING = ("fine_tune", "distill")  # steps that win back accuracy for the one before them
RECOVERY_EPOCHS = (3, 10)  # at least and at most, in between as many as
RECOVERY_STEPS = 100  # updates take
PAYS = {"size": 0.99, "memory": 0.97}  # an attempt pays below this share of the best so far
FASTER = 1.02  # and above this speed-up, if its interval excludes 1
INT8_TIME = 0.5  # of float, as found on convolutional nets: more often less than more
MARGIN = 0.85  # of the share that would do: what is expected and what comes differ
ROUND = 0.6  # the least share that one round of pruning leaves; smaller cuts are easier to mend
NARROW = 0.5  # share to leave where no amount is asked for
NARROWEST = 0.02  # a smaller share is no model any more


@dataclass(frozen=True)
class Attempt:
    """Steps that are tried, measured, and kept or undone together.

    The first compresses, the rest recover accuracy.
    """

    steps: tuple[Step, ...]
    title: str
    reason: str
    expected: str


@dataclass(frozen=True)
class Recipe:
    """Attempts in order, with the reason for this order."""

    title: str
    reason: str
    attempts: tuple[Attempt, ...]

    @property
    def steps(self) -> list[Step]:
        return [step for attempt in self.attempts for step in attempt.steps]


def plan(
    model: Model,
    task: Task,
    goals: Goals,
    baseline: Measurement,
    seed: int = 0,
    target: Target | None = None,
) -> list[Recipe]:
    """Recipes for these goals, the most promising first, of what the target's runtime can write.

    Where 8-bit integers alone should do, they come first. Where more is asked for, channels are
    cut before it, in rounds with fine-tuning between where the task can train, else once with a
    least-squares fit; a deeper cut follows, for where the first one misses. Later recipes are
    tried only where the earlier ones miss a goal. ``seed`` is that of the training.
    """
    chosen = runtime((target or Target()).runtime)
    recipes = []
    if not task.missing({"calibration"}):
        integers = chosen.INT8_BYTES if _quantizable(model) else None
        int8 = _int8(model, baseline, integers) if integers else None
        share, amount = needed_share(model, goals, baseline, integers)
        recipes = [_int8_alone(int8, goals)] if int8 and share >= 1 else []
        if analyze(model).groups:
            first = NARROW if share >= 1 else share * MARGIN
            for kept in (first, first / 2):
                prune = _prune(task, max(NARROWEST, kept), amount, seed)
                recipes.append(_narrow(task, goals, prune, int8))
        if int8 and not task.missing({"train", "loss"}):
            recipes.append(_int8_trained(task, int8, seed))
        elif int8 and share < 1:
            recipes.append(_int8_alone(int8, goals))
        if int8 and goals.max_drop is not None and not task.missing({"validation", "score"}):
            recipes.append(_int8_mixed(int8, float(goals.max_drop)))
        if integers and share < 1 and amount == "parameters":
            recipes = _with_fewer_bits(recipes, model, task, goals, baseline, chosen, seed)
    if "int4-weights" in chosen.FORMS and _tables_weigh_most(model, baseline):
        recipes.append(_four_bit_weights(task))
    return [*recipes, *([_sixteen_bit(baseline)] if "fp16" in chosen.FORMS else [])]


def needed_share(
    model: Model, goals: Goals, baseline: Measurement, integers: tuple[int, int] | None
) -> tuple[float, str]:
    """The share that may stay for the goals, and of what: "parameters" where the size asks for the
    most, else "macs".

    8-bit integers are counted in where ``integers``, their bytes for a channel and for a layer, are
    known; the share is 1 and more where they should do by themselves.
    """
    size = time = math.inf
    if isinstance(goals.size, Limit):
        bytes_ = baseline.size_bytes
        expected = expected_integer_bytes(model, bytes_, integers) if integers else bytes_
        size = goals.size.absolute(bytes_) / expected
    for goal in ("latency", "energy", "throughput"):
        limit, value = getattr(goals, goal), baseline.quantity(goal)
        if limit is not None and value:
            asked = limit.absolute(value) / value
            left = 1 / asked if goal == "throughput" else asked
            time = min(time, left / INT8_TIME if integers else left)
    return (size, "parameters") if size <= time else (time, "macs")


@dataclass(frozen=True)
class _Rounds:
    """How channels are cut: ``attempts`` that leave ``share`` of ``amount`` together."""

    share: float
    amount: str
    attempts: tuple[Attempt, ...]


def _prune(task: Task, share: float, amount: str, seed: int) -> _Rounds:
    """Small cuts with training between where there is something to train with, else one."""
    trains = not task.missing({"train", "loss"})
    rounds = max(1, math.ceil(math.log(share) / math.log(ROUND))) if trains else 1
    ratio = round(1 - share ** (1 / rounds), 3)
    steps = [_make("prune_channels", ratio=ratio, amount=amount, reconstruct=True)]
    if trains:
        steps.append(_make("fine_tune", epochs=_recovery_epochs(task), lr=1e-3, seed=seed))
    named = "multiply-adds" if amount == "macs" else amount
    made = [
        Attempt(
            tuple(steps),
            f"Cut channels, round {number} of {rounds}" if rounds > 1 else "Cut channels",
            "the whole channels, neurons and heads that matter least go; what is left is a "
            "smaller dense model, smaller and faster on every runtime",
            f"{(1 - ratio) ** number:.2f}x of the {named}",
        )
        for number in range(1, rounds + 1)
    ]
    return _Rounds(share, named, tuple(made))


def _narrow(task: Task, goals: Goals, prune: _Rounds, int8: Attempt | None) -> Recipe:
    rounds = len(prune.attempts)
    if task.missing({"train", "loss"}):
        how = "fitting what reads them by least squares, since there is nothing to train with"
    else:
        how = f"in {_counted(rounds)}, each with a least-squares fit and fine-tuning"
    reason = f"{_asked(goals)}: leave {prune.share:.0%} of the {prune.amount}, {how}"
    title = f"Cut channels to {prune.share:.0%}"
    if int8 is None:
        return Recipe(title, reason, prune.attempts)
    reason += ", and quantize last, so that the integer ranges are those of the final weights"
    small = replace(int8, expected="a quarter of the bytes left; 1 to 3 times as fast")
    return Recipe(f"{title}, then int8", reason, (*prune.attempts, small))


def _recovery_epochs(task: Task) -> int:
    """More passes over data that is soon through."""
    steps = -(-data.size(data.split(task, "train")) // task.batch_size)
    least, most = RECOVERY_EPOCHS
    return max(least, min(most, -(-RECOVERY_STEPS // steps)))


def _counted(rounds: int) -> str:
    return "one round" if rounds == 1 else f"{rounds} rounds"


def _asked(goals: Goals) -> str:
    """What the goals ask for.

    Example:
        >>> _asked(Goals(size="0.3x", latency="2ms")), _asked(Goals(max_drop="1%"))
        ('size and latency are asked for', 'no amount is asked for')
    """
    names = [goal for goal in GOALS if getattr(goals, goal) is not None]
    if not names:
        return "no amount is asked for"
    *others, last = names
    listed = f"{', '.join(others)} and {last}" if others else last
    return f"{listed} {'are' if others else 'is'} asked for"


def _int8_alone(int8: Attempt, goals: Goals) -> Recipe:
    reason = f"{_asked(goals)}: 8-bit integers need calibration data alone, and no training"
    return Recipe("int8", reason, (int8,))


def _int8_trained(task: Task, int8: Attempt, seed: int) -> Recipe:
    attempt = Attempt(
        (*int8.steps, _make("fine_tune", epochs=_recovery_epochs(task), lr=1e-4, seed=seed)),
        "8-bit integers, then fine-tune through the rounding",
        "where 8-bit integers alone lose too much, training through the rounding wins it back",
        int8.expected,
    )
    reason = "the fallback where accuracy is the goal missed"
    return Recipe("int8 with fine-tuning", reason, (attempt,))


def _int8_mixed(int8: Attempt, max_drop: float) -> Recipe:
    attempt = Attempt(
        (_make("quantize", max_drop=max_drop),),
        "8-bit integers, but for a few layers",
        "layers that cost most of the score for the bytes that they save stay in float, as few as "
        "the score needs",
        int8.expected,
    )
    reason = "the fallback where a few layers cannot be rounded; without training"
    return Recipe("int8 in mixed precision", reason, (attempt,))


def _with_fewer_bits(
    recipes: list[Recipe],
    model: Model,
    task: Task,
    goals: Goals,
    baseline: Measurement,
    chosen: Any,
    seed: int,
) -> list[Recipe]:
    """Four bits first where they should do for the size, one bit last where not even they do."""
    if task.missing({"train", "loss"}) or not isinstance(goals.size, Limit):
        return recipes
    asked = goals.size.absolute(baseline.size_bytes)
    expected = {
        bits: expected_integer_bytes(model, baseline.size_bytes, chosen.INT8_BYTES, bits)
        for bits in (4, 1)
    }
    trained = _make("fine_tune", epochs=_recovery_epochs(task), lr=1e-3, seed=seed)
    if "int4" in chosen.FORMS and expected[4] <= MARGIN * asked:
        attempt = Attempt(
            (_make("quantize", scheme="int4"), trained),
            "4-bit weights on 8-bit kernels, then fine-tune through the rounding",
            "two weights to a byte; the channels stay, and training wins back the rounding",
            f"about {human('size', expected[4])} ({expected[4] / baseline.size_bytes:.2f}x)",
        )
        return [Recipe("int4 with fine-tuning", f"{_asked(goals)}", (attempt,)), *recipes]
    if "binary" in chosen.FORMS:
        attempt = Attempt(
            (_make("binarize"), trained, _make("quantize")),
            "Signs for weights, fine-tuned, then 8-bit activations",
            "one bit a weight but in the first and the last layer",
            f"above {human('size', expected[1])} ({expected[1] / baseline.size_bytes:.2f}x)",
        )
        return [*recipes, Recipe("binary", "the smallest that weights can be", (attempt,))]
    return recipes


def _tables_weigh_most(model: Model, baseline: Measurement) -> bool:
    """Whether more than half of the file is tables that are looked up, which int8 leaves alone."""
    tables = {s.weight for s in sites(model.graph) if s.kind == "embedding"}
    return 2 * sum(tensor_of(model.graph, t).nbytes for t in tables) > baseline.size_bytes


def _four_bit_weights(task: Task) -> Recipe:
    method = "rtn" if task.missing({"calibration"}) else "gptq"
    attempt = Attempt(
        (_make("quantize_weights", bits=4, method=method),),
        "4-bit weights, 8-bit tables",
        "most of the file is tables that are looked up, whose rows are read as integers",
        "about a quarter of the tables' bytes, and an eighth of the layers'",
    )
    return Recipe("4-bit weights", "tables weigh most, and int8 leaves them in float", (attempt,))


def _sixteen_bit(baseline: Measurement) -> Recipe:
    size = baseline.size_bytes * 0.5
    attempt = Attempt(
        (_make("cast", dtype="fp16"),),
        "16-bit floats",
        "half the bytes at almost no loss; CPUs mostly compute in 32 bits, so rarely faster",
        f"about {human('size', size)} (0.50x)",
    )
    return Recipe("fp16", "the last resort for size: the smallest loss", (attempt,))


def _int8(model: Model, baseline: Measurement, integers: tuple[int, int]) -> Attempt:
    size = expected_integer_bytes(model, baseline.size_bytes, integers)
    return Attempt(
        (_make("quantize"),),
        "8-bit integers",
        "weights in a byte instead of four, and kernels that compute on bytes",
        f"about {human('size', size)} ({size / baseline.size_bytes:.2f}x); 1 to 3 times as fast "
        "where layers are large enough",
    )


def expected_integer_bytes(
    model: Model, size_bytes: int, integers: tuple[int, int], bits: int = 8
) -> float:
    """The file's size with so many bits for each quantizable weight, and what the integers bring
    along for each channel and each layer, in bytes."""
    layers = {s.weight: s for s in sites(model.graph) if s.kind in QUANTIZABLE}
    weights = {id(t): t for t in (tensor_of(model.graph, name) for name in layers)}
    saved = sum(t.numel() * (t.element_size() - bits / 8) for t in weights.values())
    channels = sum(tensor_of(model.graph, n).shape[s.axis] for n, s in layers.items())
    added = integers[0] * channels + integers[1] * len(layers)
    return float(max(size_bytes - saved, 0) + added)


def _quantizable(model: Model) -> bool:
    return any(site.kind in QUANTIZABLE for site in sites(model.graph))


def _make(name: str, **settings: object) -> Step:
    return step_class(name)(**settings)


def attempts(steps: Sequence[Step]) -> tuple[Attempt, ...]:
    """A user's own recipe cut into attempts: each step with the recovering ones behind it."""
    groups: list[list[Step]] = []
    for step in steps:
        if groups and recipe.name(step) in RECOVERING:
            groups[-1].append(step)
        else:
            groups.append([step])
    return tuple(Attempt(tuple(group), recipe.line(group[0]), "asked for", "") for group in groups)


def rank(goals: Goals, measurement: Measurement, baseline: Measurement) -> tuple[float, ...]:
    """Fewest goals missed, then the least excess over the bounds, then the smallest file."""
    missed = [check for check in goals.check(measurement, baseline) if not check.met]
    excess = sum(_excess(check.goal, check.value, check.bound) for check in missed)
    return (-len(missed), -excess, -measurement.size_bytes)


def _excess(goal: str, value: float | None, bound: float) -> float:
    if value is None:
        return 1.0
    ratio = value / max(bound, 1e-12)
    return 1 / ratio - 1 if goal == "throughput" else ratio - 1


def decide(measured: dict[str, Measured], allowed: float | None) -> tuple[bool, str]:
    """Keep what pays on the exported file and stays within the allowed drop of the score.

    ``measured`` holds the original, the candidate and the best so far, where that is not the
    original, measured together.
    """
    standing = measured.get("best", measured["original"])
    best, candidate = standing.measurement, measured["candidate"].measurement
    drop = (measured["original"].measurement.score or 0.0) - (candidate.score or 0.0)
    if allowed is not None and drop > allowed + 1e-12:
        scale, unit = (100, " points") if candidate.score_in_points else (1, "")
        return False, (
            f"the score fell by {drop * scale:.3g}{unit}; the goal allows {allowed * scale:.3g}"
        )
    against_best = compare(standing, measured["candidate"], None)
    size = candidate.size_bytes / best.size_bytes
    found = f"size {_change('size', best, candidate)} ({size:.2f}x), {against_best.speed}"
    if size <= PAYS["size"] or _faster(against_best):
        return True, found
    if _lighter(best, candidate):
        return True, f"peak memory {_change('memory', best, candidate)}; {found}"
    return False, f"it does not pay in the exported file: {found}"


def _faster(against_best: Comparison) -> bool:
    return (against_best.speedup or 1) >= FASTER and (against_best.speedup_low or 0) > 1


def _lighter(best: Measurement, candidate: Measurement) -> bool:
    if best.memory_bytes is None or candidate.memory_bytes is None:
        return False
    return candidate.memory_bytes / best.memory_bytes <= PAYS["memory"]


def _change(goal: str, before: Measurement, after: Measurement) -> str:
    return " to ".join(human(goal, m.quantity(goal) or 0.0) for m in (before, after))
