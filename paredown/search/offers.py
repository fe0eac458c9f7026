"""What a plan can offer: recipes, each with its reason and what is expected of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from paredown.core.goals import Goals
from paredown.core.measurement import Measurement
from paredown.core.task import Task
from paredown.core.units import GOALS, Limit, human
from paredown.data import splits
from paredown.graph.model import Model
from paredown.graph.quantized.regions import INTEGER_KINDS
from paredown.graph.sites import sites
from paredown.graph.state import tensor_of
from paredown.steps import step_class
from paredown.steps.step import Step

RECOVERY_EPOCHS = (3, 10)  # at least and at most, in between as many as
RECOVERY_STEPS = 100  # updates take
MARGIN = 0.85  # of the share that would do: what is expected and what comes differ
ROUND = 0.6  # the least share that one round of pruning leaves; smaller cuts are easier to mend


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


@dataclass(frozen=True)
class Rounds:
    """How channels are cut: ``attempts`` that leave ``share`` of ``amount`` together."""

    share: float
    amount: str
    attempts: tuple[Attempt, ...]


def prune(task: Task, share: float, amount: str, seed: int) -> Rounds:
    """Small cuts with training between where there is something to train with, else one."""
    trains = task.train is not None
    rounds = max(1, math.ceil(math.log(share) / math.log(ROUND))) if trains else 1
    ratio = round(1 - share ** (1 / rounds), 3)
    steps = [_make("prune_channels", ratio=ratio, amount=amount, reconstruct=True)]
    if trains:
        steps.append(_recovery(task, 1e-3, seed))
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
    return Rounds(share, named, tuple(made))


def narrow(task: Task, goals: Goals, cuts: Rounds, int8: Attempt | None) -> Recipe:
    rounds = len(cuts.attempts)
    if task.train is None:
        how = "fitting what reads them by least squares, since there is nothing to train with"
    else:
        trained = "fine-tuning" if task.loss else "distillation, which needs no labels"
        how = f"in {_counted(rounds)}, each with a least-squares fit and {trained}"
    reason = f"{_asked(goals)}: leave {cuts.share:.0%} of the {cuts.amount}, {how}"
    title = f"Cut channels to {cuts.share:.0%}"
    return _then_int8(title, reason, cuts.attempts, int8)


def _then_int8(
    title: str, reason: str, attempts: tuple[Attempt, ...], int8: Attempt | None
) -> Recipe:
    if int8 is None:
        return Recipe(title, reason, attempts)
    reason += ", and quantize last, so that the integer ranges are those of the final weights"
    small = replace(int8, expected="a quarter of the bytes left; 1 to 3 times as fast")
    return Recipe(f"{title}, then int8", reason, (*attempts, small))


def factored(goals: Goals, share: float, amount: str, int8: Attempt | None) -> Recipe:
    named = "multiply-adds" if amount == "macs" else amount
    attempt = Attempt(
        (_make("low_rank", ratio=round(1 - share, 3), amount=amount),),
        "Factor weights",
        "weights become products of smaller ones, by what layers see of the calibration data",
        f"{share:.2f}x of the {named}, in about twice as many layers",
    )
    reason = f"{_asked(goals)}: leave {share:.0%} of the {named} in factors, train nothing"
    return _then_int8(f"Factor to {share:.0%}", reason, (attempt,), int8)


def _recovery(task: Task, lr: float, seed: int) -> Step:
    """Fine-tuning on the task's loss, or where it has none, what the original says."""
    how = {"epochs": _recovery_epochs(task), "lr": lr, "seed": seed}
    return _make("fine_tune", **how) if task.loss else _make("distill", alpha=0.0, **how)


def _recovery_epochs(task: Task) -> int:
    """More passes over data that is soon through."""
    steps = -(-splits.size(splits.split(task, "train")) // task.batch_size)
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


def int8_alone(int8: Attempt, goals: Goals) -> Recipe:
    reason = f"{_asked(goals)}: 8-bit integers need calibration data alone, and no training"
    return Recipe("int8", reason, (int8,))


def int8_trained(task: Task, int8: Attempt, seed: int) -> Recipe:
    attempt = Attempt(
        (*int8.steps, _recovery(task, 1e-4, seed)),
        "8-bit integers, then train through the rounding",
        "where 8-bit integers alone lose too much, training through the rounding wins it back",
        int8.expected,
    )
    reason = "the fallback where accuracy is the goal missed"
    return Recipe("int8 with training", reason, (attempt,))


def int8_mixed(int8: Attempt, max_drop: float) -> Recipe:
    attempt = Attempt(
        (_make("quantize", max_drop=max_drop),),
        "8-bit integers, but for a few layers",
        "layers that cost most of the score for the bytes that they save stay in float, as few as "
        "the score needs",
        int8.expected,
    )
    reason = "the fallback where a few layers cannot be rounded; without training"
    return Recipe("int8 in mixed precision", reason, (attempt,))


def with_fewer_bits(
    recipes: list[Recipe],
    model: Model,
    task: Task,
    goals: Goals,
    baseline: Measurement,
    chosen: Any,
    seed: int,
) -> list[Recipe]:
    """Four bits first where they should do for the size, one bit last where not even they do."""
    if task.train is None or not isinstance(goals.size, Limit):
        return recipes
    asked = goals.size.absolute(baseline.size_bytes)
    expected = {
        bits: expected_integer_bytes(model, baseline.size_bytes, chosen.INT8_BYTES, bits)
        for bits in (4, 1)
    }
    trained = _recovery(task, 1e-3, seed)
    if "int4" in chosen.FORMS and expected[4] <= MARGIN * asked:
        attempt = Attempt(
            (_make("quantize", scheme="int4"), trained),
            "4-bit weights on 8-bit kernels, then train through the rounding",
            "two weights to a byte; the channels stay, and training wins back the rounding",
            f"about {human('size', expected[4])} ({expected[4] / baseline.size_bytes:.2f}x)",
        )
        return [Recipe("int4 with training", _asked(goals), (attempt,)), *recipes]
    if "binary" in chosen.FORMS:
        attempt = Attempt(
            (_make("binarize"), trained, _make("quantize")),
            "Signs for weights, trained, then 8-bit activations",
            "one bit a weight but in the first and the last layer",
            f"above {human('size', expected[1])} ({expected[1] / baseline.size_bytes:.2f}x)",
        )
        return [*recipes, Recipe("binary", "the smallest that weights can be", (attempt,))]
    return recipes


def few_values(task: Task, goals: Goals, seed: int) -> list[Recipe]:
    """For a runtime whose file keeps shared values once, and rounded weights in float."""
    asked, trained = _asked(goals), _recovery(task, 5e-4, seed)
    shared = Attempt(
        (_make("share_weights", k=16), trained),
        "Sixteen values a layer, trained",
        "the file keeps a number of four bits for each weight, in a byte",
        "about a quarter of the weights' bytes",
    )
    hashed = Attempt(
        (_make("hash_weights", ratio=1 / 64), _recovery(task, 1e-3, seed)),
        "One value for 64 weights, by a hash, trained",
        "the file keeps the values and the hash's seed",
        "about a fortieth of the weights' bytes",
    )
    return [
        Recipe("shared values", f"{asked}: weights that are few values", (shared,)),
        Recipe("hashed values", f"{asked}: the smallest, for the most training", (hashed,)),
    ]


def tables_weigh_most(model: Model, baseline: Measurement) -> bool:
    """Whether more than half of the file is tables that are looked up."""
    tables = {s.weight for s in sites(model.graph) if s.kind == "embedding"}
    return 2 * sum(tensor_of(model.graph, t).nbytes for t in tables) > baseline.size_bytes


def four_bit_weights(task: Task) -> Recipe:
    method = "rtn" if task.missing({"calibration"}) else "gptq"
    attempt = Attempt(
        (_make("quantize_weights", bits=4, method=method),),
        "4-bit weights, 8-bit tables",
        "most of the file is tables that are looked up; activations stay in float",
        "about a quarter of the tables' bytes, and an eighth of the layers'",
    )
    return Recipe("4-bit weights", "tables weigh most: weights alone need be small", (attempt,))


def sixteen_bit(baseline: Measurement) -> Recipe:
    size = baseline.size_bytes * 0.5
    attempt = Attempt(
        (_make("cast", dtype="fp16"),),
        "16-bit floats",
        "half the bytes at almost no loss; CPUs mostly compute in 32 bits, so rarely faster",
        f"about {human('size', size)} (0.50x)",
    )
    return Recipe("fp16", "the last resort for size: the smallest loss", (attempt,))


def int8(model: Model, baseline: Measurement, integers: tuple[int, int]) -> Attempt:
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
    """The file's size with so many bits for each quantizable weight, 8 for each of a table, and
    what the integers bring along for each channel and each layer, in bytes."""
    layers = {s.weight: s for s in sites(model.graph) if s.kind in (*INTEGER_KINDS, "embedding")}
    weights = {id(tensor_of(model.graph, name)): site for name, site in layers.items()}
    saved = 0.0
    for site in weights.values():
        weight, taken = tensor_of(model.graph, site.weight), 8 if site.kind == "embedding" else bits
        saved += weight.numel() * (weight.element_size() - taken / 8)
    channels = sum(tensor_of(model.graph, n).shape[s.axis] for n, s in layers.items())
    added = integers[0] * channels + integers[1] * len(layers)
    return float(max(size_bytes - saved, 0) + added)


def quantizable(model: Model) -> bool:
    return any(site.kind in INTEGER_KINDS for site in sites(model.graph))


def _make(name: str, **settings: object) -> Step:
    return step_class(name)(**settings)
