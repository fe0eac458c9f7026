"""Goals -> ranked recipes, each with its reason and what is expected; and what of them to keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from paredown import recipe
from paredown.graph.model import Model
from paredown.graph.sites import sites, tensor_of
from paredown.measure import Measured, compare
from paredown.steps import step_class
from paredown.types import GOALS, Comparison, Goals, Measurement, Step, Task, human

QUANTIZABLE = ("conv", "linear", "matmul")  # kinds of layers with an integer kernel
RECOVERING = ("fine_tune",)  # steps that win back accuracy for the one before them
SPARSITY = 0.5
RECOVERY_EPOCHS = 3
PAYS = {"size": 0.99, "memory": 0.97}  # an attempt pays below this share of the best so far
FASTER = 1.02  # and above this speed-up, if its interval excludes 1
CHANNEL_BYTES = 8  # of scales and zero points, as found in ONNX files of conv nets
LAYER_BYTES = 1050  # of the nodes around an integer layer, and their names


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
    model: Model, task: Task, goals: Goals, baseline: Measurement, seed: int = 0
) -> list[Recipe]:
    """Recipes for these goals, the most promising first.

    Without data to train with, post-training quantization is all there is; where the task can
    train, pruning with fine-tuning goes before it, since quantization comes last. Later recipes
    are tried only where the earlier ones miss a goal. ``seed`` is that of the training.
    """
    trains = not task.missing({"train", "loss"})
    recipes = []
    if not task.missing({"calibration"}) and _quantizable(model):
        int8 = _int8(model, baseline)
        recipes = [_int8_alone(int8)]
        if trains:
            recipes = [_pruned_and_quantized(goals, int8, seed), _int8_trained(int8, seed)]
    return [*recipes, _sixteen_bit(baseline)]


def _pruned_and_quantized(goals: Goals, int8: Attempt, seed: int) -> Recipe:
    prune = Attempt(
        (
            _make("prune_weights", sparsity=SPARSITY),
            _make("fine_tune", epochs=RECOVERY_EPOCHS, seed=seed),
        ),
        "Prune half of the weights",
        "half of a trained network's weights can usually go; whether zeros pay is up to the "
        "runtime's file format and kernels, so it is measured",
        "accuracy about kept; smaller only if the file stores zeros compactly, faster only if "
        "the kernels skip them",
    )
    reason = (
        f"{_asked(goals)}, and the task can train: prune first, fine-tune, and quantize last, so "
        "that the integer ranges are those of the final weights"
    )
    return Recipe("Prune, then int8", reason, (prune, int8))


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


def _int8_alone(int8: Attempt) -> Recipe:
    reason = "nothing to train with: post-training quantization needs calibration data alone"
    return Recipe("int8", reason, (int8,))


def _int8_trained(int8: Attempt, seed: int) -> Recipe:
    attempt = Attempt(
        (*int8.steps, _make("fine_tune", epochs=RECOVERY_EPOCHS, lr=1e-4, seed=seed)),
        "8-bit integers, then fine-tune through the rounding",
        "where 8-bit integers alone lose too much, training through the rounding wins it back",
        int8.expected,
    )
    reason = "the fallback where accuracy is the goal missed"
    return Recipe("int8 with fine-tuning", reason, (attempt,))


def _sixteen_bit(baseline: Measurement) -> Recipe:
    size = baseline.size_bytes * 0.5
    attempt = Attempt(
        (_make("cast", dtype="fp16"),),
        "16-bit floats",
        "half the bytes at almost no loss; CPUs mostly compute in 32 bits, so rarely faster",
        f"about {human('size', size)} (0.50x)",
    )
    return Recipe("fp16", "the last resort for size: the smallest loss", (attempt,))


def _int8(model: Model, baseline: Measurement) -> Attempt:
    size = expected_int8_bytes(model, baseline.size_bytes)
    return Attempt(
        (_make("quantize"),),
        "8-bit integers",
        "weights in a byte instead of four, and kernels that compute on bytes",
        f"about {human('size', size)} ({size / baseline.size_bytes:.2f}x); 1 to 3 times as fast "
        "where layers are large enough",
    )


def expected_int8_bytes(model: Model, size_bytes: int) -> float:
    """The file's size with each quantizable weight at a byte, and what the integers bring along."""
    layers = {s.weight: s for s in sites(model.graph) if s.kind in QUANTIZABLE}
    weights = {id(t): t for t in (tensor_of(model.graph, name) for name in layers)}
    saved = sum(t.numel() * (t.element_size() - 1) for t in weights.values())
    channels = sum(tensor_of(model.graph, n).shape[s.axis] for n, s in layers.items())
    added = CHANNEL_BYTES * channels + LAYER_BYTES * len(layers)
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
