"""The nouns of paredown: what a user brings (task, goals, target) and what a run hands back."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

from torch import Tensor
from torch.utils.data import Dataset

if TYPE_CHECKING:
    from paredown.graph.model import Model

SPLITS = ("train", "calibration", "validation", "test")


class UserError(Exception):
    """A mistake of the user's, told in plain sentences and shown without a traceback."""


@dataclass(frozen=True)
class Task:
    """What a step may look at besides the model.

    A split is a map-style ``torch.utils.data.Dataset`` of ``(inputs, target)`` pairs without a
    batch dimension, as ``TensorDataset(x, y)`` gives; ``inputs`` is one tensor, a tuple or a dict.

    Args:
        example: inputs as deployed, batch dimension first: a tuple of positional inputs, or a
            dict of keyword inputs. Latency is measured on exactly these shapes.
        score: ``score(output, target) -> (B,)``, one number per example, higher is better.
        loss: ``loss(output, target) -> ()``, needed by the steps that train.
        train, calibration, validation, test: the splits. Steps learn from ``train``, gather
            ranges from ``calibration`` (default: the start of ``train``), decisions are made on
            ``validation`` and the final claim on ``test``, which no decision has seen.
        dynamic: dimensions besides the batch that vary, in the shape of ``example``: for each
            input ``{dim: "name"}`` or None.
        classes: names of the classes, for the report.
        batch_size: examples per batch wherever the data is run.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> images, labels = torch.zeros(8, 3, 32, 32), torch.zeros(8, dtype=torch.long)
        >>> data = TensorDataset(images, labels)
        >>> task = Task(example=(images[:1],), score=lambda out, y: (out.argmax(1) == y).float(),
        ...             validation=data, test=data)
        >>> task.missing({"validation", "loss"})
        ['loss']
    """

    example: tuple[Any, ...] | dict[str, Any]
    score: Callable[[Any, Any], Tensor]
    loss: Callable[[Any, Any], Tensor] | None = None
    train: Dataset[Any] | None = None
    calibration: Dataset[Any] | None = None
    validation: Dataset[Any] | None = None
    test: Dataset[Any] | None = None
    preprocess: Callable[[Any], Any] | None = None
    postprocess: Callable[[Any], Any] | None = None
    dynamic: tuple[Any, ...] | dict[str, Any] | None = None
    classes: tuple[str, ...] = ()
    batch_size: int = 64

    def missing(self, needs: set[str] | frozenset[str]) -> list[str]:
        """The fields among ``needs`` that this task does not provide, sorted."""
        return sorted(need for need in needs if not self._provides(need))

    def _provides(self, need: str) -> bool:
        if need == "calibration":
            return self.calibration is not None or self.train is not None
        return getattr(self, need) is not None


@dataclass(frozen=True)
class Limit:
    """A bound on a quantity: absolute in its base unit, or relative to the baseline's."""

    value: float
    relative: bool = False

    def absolute(self, baseline: float) -> float:
        return self.value * baseline if self.relative else self.value


_BYTES = {"b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_MILLISECONDS = {"ns": 1e-6, "us": 1e-3, "µs": 1e-3, "ms": 1.0, "s": 1e3}
_PER_SECOND = {"/s": 1.0, "/min": 1 / 60}
_MILLIJOULES = {"uj": 1e-3, "µj": 1e-3, "mj": 1.0, "j": 1e3}
_UNITS: dict[str, tuple[dict[str, float], str]] = {
    "size": (_BYTES, '"60KB", "500 KiB", "1.5 MB" or "0.3x" of the original'),
    "memory": (_BYTES, '"20MB", "64 MiB" or "0.5x" of the original'),
    "latency": (_MILLISECONDS, '"2ms", "150us" or "0.7x" of the original'),
    "throughput": (_PER_SECOND, '"500/s" or "2x" of the original'),
    "energy": (_MILLIJOULES, '"5mJ", "0.1 J" or "0.5x" of the original, per inference'),
}
GOALS = ("size", "latency", "memory", "throughput", "energy")


def parse_limit(goal: str, text: str | float | Limit) -> Limit:
    """A limit from human units; plain numbers are refused, since their unit would be a guess.

    Raises:
        UserError: the text is not a positive finite quantity in a known unit.

    Example:
        >>> parse_limit("size", "500 KiB")
        Limit(value=512000.0, relative=False)
        >>> parse_limit("latency", "0.7x")
        Limit(value=0.7, relative=True)
    """
    if isinstance(text, Limit):
        return text
    units, forms = _UNITS[goal]
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)(e[+-]?\d+)?\s*([a-zµ/]+)\s*", str(text).lower())
    if match:
        number = float(match[1] + (match[2] or ""))
        if 0 < number < math.inf and match[3] == "x":
            return Limit(number, relative=True)
        if 0 < number < math.inf and match[3] in units:
            return Limit(number * units[match[3]])
    raise UserError(f"{goal}: cannot read {text!r}; write it as {forms}.")


def parse_drop(text: str | float) -> float:
    """The allowed drop of the score as a fraction: "1%" and "0.01" both mean one point.

    Example:
        >>> parse_drop("2%"), parse_drop("0.5 points"), parse_drop(0.01)
        (0.02, 0.005, 0.01)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)(e-?\d+)?\s*(%|points?|)\s*", str(text).lower())
    if match:
        value = float(match[1] + (match[2] or "")) * (0.01 if match[3] else 1.0)
        if value < 1:
            return value
    raise UserError(
        f'max_drop: cannot read {text!r}; write it as "1%", "0.5 points" or "0.01", below 100%.'
    )


@dataclass(frozen=True)
class Goals:
    """What the compressed artifact must meet; each goal is optional.

    ``max_drop`` is in points of a score between 0 and 1 (accuracy); for any other score it is a
    share of the baseline's mean score. ``throughput`` is a floor, the others are ceilings.

    Raises:
        UserError: a goal that cannot be read, with the forms that can.

    Example:
        >>> Goals(max_drop="1%", size="0.3x", latency="2ms").size
        Limit(value=0.3, relative=True)
    """

    max_drop: float | str | None = None
    size: Limit | str | None = None
    latency: Limit | str | None = None
    memory: Limit | str | None = None
    throughput: Limit | str | None = None
    energy: Limit | str | None = None

    def __post_init__(self) -> None:
        if self.max_drop is not None:
            object.__setattr__(self, "max_drop", parse_drop(self.max_drop))
        for goal in GOALS:
            if getattr(self, goal) is not None:
                object.__setattr__(self, goal, parse_limit(goal, getattr(self, goal)))

    def allowed_drop(self, baseline: Measurement) -> float | None:
        """The drop in the score's own unit, or None without such a goal."""
        if self.max_drop is None:
            return None
        drop = float(self.max_drop)
        return drop if baseline.score_in_points else drop * abs(baseline.score or 0.0)

    def missed(self, measurement: Measurement, baseline: Measurement) -> list[str]:
        """One plain sentence for each goal that the measurement does not meet; empty means done."""
        sentences = [
            row.sentence for row in self.check(measurement, baseline) if row.met is not True
        ]
        return sentences

    def check(self, measurement: Measurement, baseline: Measurement) -> list[GoalCheck]:
        """Each goal against what was measured; an unmeasured quantity never counts as met."""
        rows = []
        allowed = self.allowed_drop(baseline)
        if allowed is not None:
            rows.append(_check_drop(allowed, measurement, baseline))
        for goal in GOALS:
            limit = getattr(self, goal)
            if limit is not None:
                rows.append(_check_limit(goal, limit, measurement, baseline))
        return rows


@dataclass(frozen=True)
class GoalCheck:
    """One goal, the bound it means here, what was measured, and whether that meets it."""

    goal: str
    bound: float
    value: float | None
    met: bool
    sentence: str


def _check_drop(allowed: float, measurement: Measurement, baseline: Measurement) -> GoalCheck:
    if measurement.score is None or baseline.score is None:
        return GoalCheck("max_drop", allowed, None, False, "The score was not measured.")
    drop = baseline.score - measurement.score
    met = drop <= allowed + 1e-12
    scale, unit = (100, " points") if baseline.score_in_points else (1, "")
    moved = f"{'fell' if drop > 0 else 'rose'} by {abs(drop) * scale:.3g}{unit}"
    moved = moved if drop else "did not change"
    text = f"The score {moved}; the goal allows a fall of {allowed * scale:.3g}{unit}."
    return GoalCheck("max_drop", allowed, drop, met, text)


def _check_limit(
    goal: str, limit: Limit, measurement: Measurement, baseline: Measurement
) -> GoalCheck:
    value, original = measurement.quantity(goal), baseline.quantity(goal)
    if value is None or (limit.relative and original is None):
        text = f"{goal.capitalize()} could not be measured here, so its goal cannot be met."
        return GoalCheck(goal, limit.value, None, False, text)
    bound = limit.absolute(original or 0.0)
    met = value >= bound if goal == "throughput" else value <= bound
    relation = "at least" if goal == "throughput" else "at most"
    asked = f" ({limit.value:g}x of the original)" if limit.relative else ""
    text = (
        f"{goal.capitalize()} is {human(goal, value)}; "
        f"the goal is {relation} {human(goal, bound)}{asked}."
    )
    return GoalCheck(goal, bound, value, met, text)


def human(goal: str, value: float) -> str:
    """A quantity with its unit, three significant digits.

    Example:
        >>> human("size", 1234567), human("latency", 0.0421), human("throughput", 1530.2)
        ('1.23 MB', '42.1 us', '1530 /s')
        >>> human("count", 85200), human("count", 960)
        ('85.2 k', '960')
    """
    if goal == "count":
        for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
            if value >= scale:
                return f"{value / scale:.3g} {unit}"
        return f"{value:.0f}"
    if goal in ("size", "memory"):
        for unit, scale in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
            if value >= scale:
                return f"{value / scale:.3g} {unit}"
        return f"{value:.0f} B"
    if goal == "latency":
        return f"{value:.3g} ms" if value >= 0.1 else f"{value * 1e3:.3g} us"
    if goal == "throughput":
        return f"{value:.0f} /s" if value >= 100 else f"{value:.3g} /s"
    return f"{value:.3g} mJ"


@dataclass(frozen=True)
class Target:
    """Where the artifact runs: a runtime of ``RUNTIMES``, a device, and its threads.

    Example:
        >>> Target().runtime, Target(threads=2).threads
        ('onnxruntime', 2)
    """

    runtime: str = "onnxruntime"
    device: str = "local"
    threads: int = 1

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise UserError(f"threads: expected a whole number from 1 up, got {self.threads}.")


# What weights and activations can be besides float32, and the step that makes it.
FORMS = {
    "int8": 'Quantize("int8")',
    "int4": 'Quantize("int4")',
    "int8-dynamic": 'Quantize("int8-dynamic")',
    "int8-weights": "QuantizeWeights(8)",
    "int4-weights": "QuantizeWeights(4)",
    "binary": 'Binarize("binary")',
    "ternary": 'Binarize("ternary")',
    "fp16": 'Cast("fp16")',
    "bf16": 'Cast("bf16")',
}


@runtime_checkable
class Step(Protocol):
    """A technique: a frozen dataclass whose fields are its settings.

    ``needs`` names the Task fields it cannot work without. ``apply`` leaves its input untouched,
    returns a changed copy, and raises `UserError` when there is nothing to change.

    A step after which weights or activations are no longer float32 says so in a property ``form``,
    one of the keys of `FORMS`; a runtime names in its own ``FORMS`` those that it can write. One
    that reads files names them in ``files()``, and says in ``problems()`` what stops it.
    """

    needs: ClassVar[frozenset[str]]

    def apply(self, model: Model, task: Task) -> Model: ...


@dataclass(frozen=True)
class Measurement:
    """What was measured of one exported file, and where.

    ``score`` is the mean over ``examples`` examples of ``split`` with its interval; sizes and
    memory are bytes, latencies milliseconds per inference at the deployed batch, throughput
    examples per second, energy millijoules per inference.
    """

    size_bytes: int
    score: float | None = None
    score_low: float | None = None
    score_high: float | None = None
    score_in_points: bool = True
    examples: int = 0
    split: str = ""
    latency_ms_p50: float | None = None
    latency_ms_p90: float | None = None
    latency_ms_p99: float | None = None
    latency_samples: int = 0
    throughput_per_s: float | None = None
    memory_bytes: int | None = None
    energy_mj: float | None = None
    energy_source: Literal["measured", "estimated", "unavailable"] = "unavailable"
    where: dict[str, str] = field(default_factory=dict)

    def quantity(self, goal: str) -> float | None:
        """The figure a goal speaks of: size, latency (the median), memory, throughput, energy."""
        names = {
            "size": "size_bytes",
            "latency": "latency_ms_p50",
            "memory": "memory_bytes",
            "throughput": "throughput_per_s",
            "energy": "energy_mj",
        }
        value: float | None = getattr(self, names[goal])
        return value


@dataclass(frozen=True)
class Artifact:
    """An exported file: what to ship."""

    path: str
    runtime: str
    sha256: str
    size_bytes: int
    recipe: str  # the recipe that made it, as TOML


@dataclass(frozen=True)
class Census:
    """What a runtime makes of a file: the ops it runs and the file's bytes.

    ``unfused`` names the ops that could run on integers but stay in float between a dequantize
    and a quantize op; ``notes`` are plain sentences on what the rest does not tell.
    """

    integer_ops: dict[str, int]
    float_ops: dict[str, int]
    bytes_by_dtype: dict[str, int]
    unfused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """A candidate beside the original, measured interleaved on the same examples."""

    score_difference: float | None = None  # candidate - original, paired
    score_difference_low: float | None = None
    score_difference_high: float | None = None
    speedup: float | None = None  # median latency of the original over the candidate's
    speedup_low: float | None = None
    speedup_high: float | None = None
    verdict: str = ""  # the claim about the score, one sentence
    speed: str = ""  # the claim about the latency, one sentence


@dataclass(frozen=True)
class Trial:
    """One attempt: the steps it added, what was expected of them, what came, and the decision."""

    steps: list[str]  # one line of TOML each
    title: str
    reason: str
    expected: str
    kept: bool
    decision: str  # why it was kept or undone, one sentence
    measurement: Measurement | None  # None where the step could not be applied
    comparison: Comparison | None
    seconds: float
    stage: str  # SHA-256 of the stage it produced, "" where it could not be applied
    findings: list[dict[str, Any]] = field(default_factory=list)  # what its steps tell the report


@dataclass(frozen=True)
class Run:
    """Everything a report says; `run.json` holds exactly this."""

    name: str
    created: str
    command: str
    goals: dict[str, Any]
    target: dict[str, Any]
    versions: dict[str, str]
    data: dict[str, Any]  # split -> {"examples": n, "fingerprint": sha256}
    seed: int
    plan: list[dict[str, Any]]  # ranked recipes: {"title", "reason", "expected", "steps"}
    baseline: Measurement  # on validation, as every trial
    trials: list[Trial]
    artifact: Artifact | None
    original: Artifact | None
    on_device: dict[str, Measurement]  # "original" and "compressed", on the test split
    comparison: Comparison | None  # of those two
    checks: list[GoalCheck]  # the goals against on_device
    met: bool
    verdict: str
    details: dict[str, Any]  # layers, histograms, per-class scores, flips, latency samples, notes

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True, allow_nan=False)

    @staticmethod
    def from_json(text: str) -> Run:
        raw = json.loads(text)
        raw["baseline"] = Measurement(**raw["baseline"])
        raw["trials"] = [_trial(trial) for trial in raw["trials"]]
        for name in ("artifact", "original"):
            raw[name] = raw[name] and Artifact(**raw[name])
        raw["on_device"] = {name: Measurement(**m) for name, m in raw["on_device"].items()}
        raw["comparison"] = raw["comparison"] and Comparison(**raw["comparison"])
        raw["checks"] = [GoalCheck(**check) for check in raw["checks"]]
        return Run(**raw)


def _trial(raw: dict[str, Any]) -> Trial:
    raw = dict(raw)
    raw["measurement"] = raw["measurement"] and Measurement(**raw["measurement"])
    raw["comparison"] = raw["comparison"] and Comparison(**raw["comparison"])
    return Trial(**raw)
