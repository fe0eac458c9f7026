"""Goals -> ranked recipes, each with its reason and what is expected of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from paredown import recipe
from paredown.graph.model import Model
from paredown.graph.sites import sites, tensor_of
from paredown.steps import step_class
from paredown.types import Goals, Measurement, Step, Task, human

RECOVERING = ("fine_tune",)  # steps that win back accuracy for the one before them
SPARSITY = 0.5
RECOVERY_EPOCHS = 3


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


def plan(model: Model, task: Task, goals: Goals, baseline: Measurement) -> list[Recipe]:
    """Recipes for these goals, the most promising first.

    Size alone and nothing to train with asks for post-training quantization; where the task can
    train, pruning with fine-tuning is tried before it, since quantization comes last. Later
    recipes are tried only where the earlier ones miss a goal.
    """
    trains = not task.missing({"train", "loss"})
    recipes = []
    if not task.missing({"calibration"}) and _quantizable(model):
        if trains:
            recipes.append(_pruned_and_quantized(model, goals, baseline))
        recipes.append(_quantized(model, goals, baseline, trains))
    recipes.append(_sixteen_bit(model, baseline))
    return recipes


def _pruned_and_quantized(model: Model, goals: Goals, baseline: Measurement) -> Recipe:
    bottleneck = "latency" if goals.latency else "size"
    reason = (
        f"{bottleneck} is asked for and the task can train: prune first, fine-tune, and quantize "
        "last, so that the integer ranges are those of the final weights"
    )
    prune = Attempt(
        (_make("prune_weights", sparsity=SPARSITY), _make("fine_tune", epochs=RECOVERY_EPOCHS)),
        "Prune half of the weights",
        "half of a trained network's weights can usually go; whether zeros pay is up to the "
        "runtime's file format and kernels, so it is measured",
        "accuracy about kept; smaller only if the file stores zeros compactly, faster only if "
        "the kernels skip them",
    )
    return Recipe("Prune, then int8", reason, (prune, _int8(model, baseline)))


def _quantized(model: Model, goals: Goals, baseline: Measurement, trains: bool) -> Recipe:
    if not trains:
        reason = "nothing to train with: post-training quantization needs calibration data alone"
        return Recipe("int8", reason, (_int8(model, baseline),))
    attempt = Attempt(
        (_make("quantize"), _make("fine_tune", epochs=RECOVERY_EPOCHS, lr=1e-4)),
        "int8, then fine-tune through the rounding",
        "where int8 alone loses too much, training through the rounding wins accuracy back",
        _int8(model, baseline).expected,
    )
    return Recipe(
        "int8 with fine-tuning", "the fallback where accuracy is the goal missed", (attempt,)
    )


def _sixteen_bit(model: Model, baseline: Measurement) -> Recipe:
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
    """The file's size with each quantizable weight at a byte instead of its present size."""
    names = {s.weight for s in sites(model.graph) if s.kind in ("conv", "linear", "matmul")}
    weights = {id(t): t for t in (tensor_of(model.graph, name) for name in names)}
    saved = sum(t.numel() * (t.element_size() - 1) for t in weights.values())
    return float(max(size_bytes - saved, size_bytes * 0.05))


def _quantizable(model: Model) -> bool:
    return any(site.kind in ("conv", "linear", "matmul") for site in sites(model.graph))


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
