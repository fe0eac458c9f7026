"""Where the score went: noise by layer, what restoring each wins, and the causes by name."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from paredown.core import progress
from paredown.core.errors import UserError
from paredown.core.task import Task
from paredown.data.feed import Batch, examples
from paredown.explain.cause import Cause
from paredown.explain.diagnose import Context, find_causes
from paredown.explain.layers import Layer, find_layers, folded
from paredown.explain.noise import PARTS, Meter
from paredown.explain.remedies import try_remedies
from paredown.explain.restore import Outcome, Pruning, Ranking, Rounding, rank
from paredown.explain.watch import Watch
from paredown.graph.model import Model, made_from
from paredown.graph.quantized.runner import Runner, all_quantizers
from paredown.steps.step import Step
from paredown.targets.runtimes import Inside, runtime

EXAMPLES = 256  # at most, of the validation split
SPLIT = "validation"


@dataclass(frozen=True)
class Explanation:
    """Where a compressed model's score went; decibels are signal over error, higher is better.

    Attributes:
        examples: of the validation split that the layers' noise was measured on.
        source: "file" where the inner values are the exported file's own, "graph" where the
            runtime cannot show them and those of the graph stand for them.
        agreement_db: of the file's outputs with the graph's.
        output_db: of the file's outputs beside the original's.
        rounding_db: of the file's outputs beside the same model's without rounding; None where
            nothing is rounded.
        layers: in the order they run, ``{"name", "op", "bits", "snr_db", "rounding_db", "own_db",
            "weights", "input", "output"}``: the noise so far beside the original and beside the
            model without rounding, what the layer adds alone, and the shares of that.
        ranking: what restoring each layer wins, most first; None where it was left out.
        causes: ``{"kind", "layers", "words", "remedy", "gain_db", "tried_db"}``.
    """

    examples: int
    source: str
    runtime: str
    agreement_db: float | None
    output_db: float | None
    rounding_db: float | None
    layers: list[dict[str, Any]]
    ranking: dict[str, Any] | None
    causes: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def within_run(
    original: Model,
    compressed: Model,
    file: Path,
    name: str,
    task: Task,
    steps: Sequence[Step],
    seconds: float,
) -> dict[str, Any]:
    """`explain_file` as JSON, no remedy tried; a run is as good without it, so this says why."""
    progress.say("Explain: the noise of each layer")
    try:
        made = explain_file(original, compressed, file, name, task, steps, seconds, False)
        return made.to_json()
    except Exception as error:
        problem = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        progress.say(f"  left out: {problem}")
        return {"problem": problem}


def explain_file(
    original: Model,
    compressed: Model,
    file: Path,
    name: str,
    task: Task,
    steps: Sequence[Step],
    seconds: float,
    remedies: bool = True,
) -> Explanation:
    """Explain what a compressed model lost.

    Args:
        file: the compressed model, exported for the runtime ``name``.
        steps: the recipe that made it.
        seconds: about how long it may take; one batch is run in any case.
        remedies: whether to try them.
    """
    _check_layers(compressed, original)
    began = time.monotonic()

    def left() -> float:
        return seconds - (time.monotonic() - began)

    base = folded(original)
    layers = find_layers(compressed.graph, base.graph)
    watch = Watch(compressed.graph, layers)
    meter = Meter(base, compressed, layers, _inside(compressed, file, name, layers), watch)
    found = list(examples(compressed, task, SPLIT, EXAMPLES))
    seen: list[Batch] = []
    for batch in progress.track(found, "noise of each layer"):
        if not seen or left() > seconds * 2 / 3:
            meter.add(batch.inputs)
            seen.append(batch)
    reach = _Reach(compressed, task, left() / 4)
    context = Context(compressed.graph, layers, meter.noise, watch, steps, reach, task)
    causes = find_causes(context)
    won: dict[str, float] = {}
    if remedies:
        won = try_remedies(compressed, task, steps, causes, seen, left() / 2)
    ranking = _ranking(original, compressed, layers, meter, found, task, left())
    return Explanation(
        examples=sum(batch.count for batch in seen),
        source="file" if any(noise.shown for noise in meter.noise.values()) else "graph",
        runtime=name,
        agreement_db=_round(meter.agreement.db),
        output_db=_round(meter.original.db),
        rounding_db=_round(meter.exact.db) if all_quantizers(compressed.graph) else None,
        layers=[_row(layer, meter) for layer in layers],
        ranking=None if ranking is None else _ranked(ranking),
        causes=[_cause(cause, won) for cause in causes],
    )


def _check_layers(compressed: Model, original: Model) -> None:
    if not made_from(compressed, original):
        raise UserError(
            "the file is a student's: its layers are others than the original's, so there is no "
            "noise of a layer to tell."
        )


def _inside(compressed: Model, file: Path, name: str, layers: Sequence[Layer]) -> Inside:
    """The exported file: its outputs, and the layers' results where its runtime can show them."""
    chosen = runtime(name)
    inside = chosen.open_inside(compressed, file, {each.result.name for each in layers})
    if inside is not None:
        return inside
    predictor = chosen.open(file)

    def outputs(leaves: Sequence[Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
        found = predictor(*[leaf.numpy() for leaf in leaves])
        return [torch.from_numpy(array) for array in found], {}

    return outputs


class _Reach:
    """The ranges that values have on calibration data, run when first asked for, in about so many
    seconds."""

    def __init__(self, compressed: Model, task: Task, seconds: float):
        self._compressed, self._task, self._seconds = compressed, task, seconds
        self._found: dict[str, tuple[float, float]] | None = None

    def __call__(self, names: Sequence[str]) -> Mapping[str, tuple[float, float]]:
        if self._found is None:
            self._found = self._run() if not self._task.missing({"calibration"}) else {}
        return {name: self._found[name] for name in names if name in self._found}

    def _run(self) -> dict[str, tuple[float, float]]:
        found: dict[str, tuple[float, float]] = {}

        def note(node: fx.Node, value: Any) -> None:
            if node.op != "get_attr" and isinstance(value, Tensor) and value.is_floating_point():
                low, high = (float(end) for end in torch.aminmax(value))
                least, most = found.get(node.name, (low, high))
                found[node.name] = min(low, least), max(high, most)

        runner, graph = Runner(self._compressed.graph), self._compressed.graph
        until = time.monotonic() + self._seconds
        for batch in examples(self._compressed, self._task, "calibration", EXAMPLES):
            runner.outputs(batch.inputs, all_quantizers(graph), note=note)
            if time.monotonic() > until:
                break
        return found


def _ranking(
    original: Model,
    compressed: Model,
    layers: Sequence[Layer],
    meter: Meter,
    found: Sequence[Batch],
    task: Task,
    seconds: float,
) -> Ranking | None:
    """What restoring each layer wins, the noisiest tried first; None where none can be."""
    taken: Rounding | Pruning
    names = [layer.name for layer in layers if layer.bits is not None]
    if names:
        taken = Rounding(compressed, layers)
    else:
        taken = Pruning(compressed, original, layers)
        names = taken.layers
    if not names or seconds <= 0:
        return None
    own = {name: meter.noise[name].own.db for name in names if name in meter.noise}
    names.sort(key=lambda name: (own.get(name) is None, own.get(name) or 0.0))
    runners = Runner(original.copy().eval().graph), Runner(compressed.graph)
    return rank(*runners, taken, names, found, task, compressed.outputs, seconds)


def _row(layer: Layer, meter: Meter) -> dict[str, Any]:
    noise = meter.noise[layer.name]
    own = noise.own.db
    row = {
        "name": layer.name,
        "op": layer.site.kind,
        "bits": layer.bits,
        "snr_db": _round(noise.original.db),
        "rounding_db": _round(noise.exact.db),
        "own_db": _round(own),
    }
    shares = noise.shares() if layer.bits is not None and own is not None else dict.fromkeys(PARTS)
    return row | {part: _round(share, 3) for part, share in shares.items()}


def _ranked(ranking: Ranking) -> dict[str, Any]:
    now = ranking.compressed
    return {
        "original": _outcome(ranking.original),
        "exact": _outcome(ranking.exact),
        "compressed": _outcome(now),
        "layers": ranking.layers,
        "examples": ranking.examples,
        "restored": [
            {
                "layers": list(one.layers),
                "bytes": one.cost_bytes,
                "won_db": _round(_difference(outcome.output_db, now.output_db)),
                **_outcome(outcome),
            }
            for one, outcome in ranking.restored
        ],
    }


def _outcome(outcome: Outcome) -> dict[str, float | None]:
    return {
        "output_db": _round(outcome.output_db),
        "score": _round(outcome.score, 6),
        "loss": _round(outcome.loss, 6),
    }


def _difference(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def _cause(cause: Cause, won: Mapping[str, float]) -> dict[str, Any]:
    return {
        "kind": cause.kind,
        "layers": list(cause.layers),
        "words": cause.words,
        "remedy": str(cause.remedy),
        "gain_db": _round(cause.gain_db),
        "tried_db": _round(won.get(str(cause.remedy))),
    }


def _round(value: float | None, digits: int = 2) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, digits)
