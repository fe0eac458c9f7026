"""Whether a remedy helps: the same model quantized again with it, on the same examples."""

from __future__ import annotations

import time
from collections.abc import Sequence

from paredown.core import progress
from paredown.core.errors import UserError
from paredown.core.task import Task
from paredown.data.feed import Batch
from paredown.explain.cause import Cause, Remedy
from paredown.explain.noise import Outputs
from paredown.graph.model import Model
from paredown.graph.quantized.runner import Runner, all_quantizers, without_quantizers
from paredown.steps.quantization.quantize import Quantize
from paredown.steps.step import Step

MOST = 4  # remedies; each calibrates and quantizes anew
PASSES = 8  # over the examples, that the first is taken to need; the next takes as long as the last


def try_remedies(
    compressed: Model,
    task: Task,
    steps: Sequence[Step],
    found: Sequence[Cause],
    examples: Sequence[Batch],
    seconds: float,
) -> dict[str, float]:
    """Remedy -> the decibels that the outputs win by it, as far as time allows: one that would not
    end in time is not begun.

    Only a recipe that ends in `Quantize` can be tried: what was trained after it would have to be
    trained again.
    """
    if not steps or not isinstance(steps[-1], Quantize):
        return {}
    remedies = {str(each.remedy): each.remedy for each in found if isinstance(each.remedy, Remedy)}
    chosen = [
        (words, each.step) for words, each in remedies.items() if isinstance(each.step, Quantize)
    ]
    began, won = time.monotonic(), {}
    plain, now = without_quantizers(compressed), _signal(compressed, compressed, examples)
    takes = (time.monotonic() - began) / 2 * PASSES
    for words, step in progress.track(chosen[:MOST], "try remedies"):
        start = time.monotonic()
        if now is None or start - began + takes > seconds:
            break
        try:
            then = _signal(step.apply(plain, task), compressed, examples)
        except UserError:
            continue
        if then is not None:
            won[words] = then - now
        takes = time.monotonic() - start
    return won


def _signal(model: Model, compressed: Model, examples: Sequence[Batch]) -> float | None:
    """Signal over error of a model's outputs beside the compressed one's without rounding."""
    exact, runner, outputs = Runner(compressed.graph), Runner(model.graph), Outputs()
    unrounded = all_quantizers(compressed.graph)
    for batch in examples:
        outputs.add(exact.outputs(batch.inputs, unrounded), runner.outputs(batch.inputs))
    return outputs.db
