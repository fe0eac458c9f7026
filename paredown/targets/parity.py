"""Whether an exported file computes what the model computes, on the example inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx

from paredown.core.errors import UserError
from paredown.graph.interpret import Pass
from paredown.graph.model import Model
from paredown.graph.quantized.forms import form_of
from paredown.graph.quantized.quantizers import ACTIVATION_QUANTIZERS, PER_TENSOR, quantizers

FLOAT_TOLERANCE = 1e-3  # of the output's size
HALF_TOLERANCE = 5e-2
QUANTIZED_DB = 20.0  # rounding ties fall differently in two implementations
TIE = 0.02  # of a step: what lies as near to the middle of two steps may be rounded either way
# Where ties alone move the outputs by more than this, outputs tell nothing of a file.
TELLING_DB, SLACK_DB = 10.0, 1.0


def confirm(
    model: Model,
    path: Path,
    predictor: Any,
    worst_tensor: Callable[[Model, Path], tuple[float, str] | None] | None = None,
) -> None:
    """Assert that an open file agrees with the model it was made of.

    Args:
        worst_tensor: what finds the inner tensor that differs most, its agreement in dB and its
            name, where the runtime can tell. In a deep quantized model rounding ties add up; there
            the outputs may differ as much as other ties make them differ, or as long as no stretch
            between two quantizers does.

    Raises:
        UserError: the outputs differ; names the tensor that differs most.
    """
    leaves = [item.example for item in model.inputs]
    expected = _run_graph(model, leaves)
    got = predictor(*[leaf.numpy() for leaf in leaves])
    quantized = any(_rounds_values(node) for node in quantizers(model.graph))
    least_db = QUANTIZED_DB if quantized else _float_tolerance_db(model)
    ranked = sorted(
        (agreement_db(ours.numpy(), theirs), name)
        for ours, theirs, name in zip(expected, got, predictor.output_names, strict=True)
    )
    if ranked[0][0] >= least_db:
        return
    if quantized and ranked[0][0] >= _tie_db(model, leaves, expected) - SLACK_DB:
        return
    inner = worst_tensor(model, path) if worst_tensor else None
    if quantized and inner and inner[0] >= least_db:
        return
    where = f"; the tensor that differs most is {inner[1]!r} at {inner[0]:.0f} dB" if inner else ""
    raise UserError(
        f"{path.name}: output {ranked[0][1]!r} differs from the model's (agreement "
        f"{ranked[0][0]:.0f} dB, expected at least {least_db:.0f} dB){where}."
    )


def _rounds_values(quantizer: fx.Node) -> bool:
    """Of activations too: kernels for weights that are rounded alone may round them to 8 bits,
    block by block, as they go."""
    form = form_of(quantizer)
    return quantizer.target in ACTIVATION_QUANTIZERS or (form is not None and form.alone)


def _float_tolerance_db(model: Model) -> float:
    half = any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters())
    return -20 * float(np.log10(HALF_TOLERANCE if half else FLOAT_TOLERANCE))


def _run_graph(model: Model, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    graph = _on_cpu(model)
    with torch.no_grad():
        return [value.detach() for value in graph(*[leaf.clone() for leaf in leaves])]


def _tie_db(model: Model, leaves: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Agreement in dB of a quantized model with itself where rounding ties fall otherwise, the
    lowest of two draws; infinite where that is too low to judge by."""
    found = []
    for seed in range(2):
        got = other_ties(_on_cpu(model), leaves, seed)
        pairs = zip(expected, got, strict=True)
        found.append(min(agreement_db(ours.numpy(), other.numpy()) for ours, other in pairs))
    return min(found) if min(found) >= TELLING_DB else np.inf


def other_ties(graph: fx.GraphModule, leaves: Sequence[torch.Tensor], seed: int) -> Any:
    """The outputs of a graph with what is rounded moved by up to `TIE` of a step."""
    generator = torch.Generator().manual_seed(seed)

    def rule(run: Pass, node: fx.Node) -> Any:
        if node.target is not PER_TENSOR:
            return run.compute(node)
        (value, scale, *grid), _ = run.arguments(node)
        moves = torch.rand(value.shape, generator=generator, dtype=value.dtype) * 2 - 1
        return run.compute(node, ((value + moves * TIE * scale, scale, *grid), {}))

    return Pass(graph, rule).outputs(leaves)


def _on_cpu(model: Model) -> fx.GraphModule:
    """The graph in evaluation mode on the CPU; the model stays where it is."""
    there = all(tensor.device.type == "cpu" for tensor in model.state_dict().values())
    return model.frozen().graph if there else model.copy().to("cpu").eval().graph


def worst_tensor(
    model: Model, run: Callable[[Model], Sequence[np.ndarray]]
) -> tuple[float, str] | None:
    """Agreement in dB and name of the inner tensor that differs most between two quantizers; None
    where there are none.

    Args:
        run: makes a file of another model, which returns what passes through each quantizer, and
            gives the file's outputs for the example inputs.
    """
    nodes = [node for node in quantizers(model.graph) if node.target is PER_TENSOR]
    if not nodes:
        return None
    shown = model.copy()
    names = {node.name for node in nodes}
    graph = shown.graph.graph
    for node in graph.nodes:
        if node.op == "output":
            node.args = (tuple(each for each in graph.nodes if each.name in names),)
    shown.graph.recompile()
    values = run(replace(shown, outputs={"tuple": ["*"] * len(nodes)}))
    return stretches(model, dict(zip((n.name for n in nodes), values, strict=True)))[0]


def stretches(model: Model, values: dict[str, np.ndarray]) -> list[tuple[float, str]]:
    """Agreement in dB and name of each inner tensor on the example inputs, worst first.

    Each is computed from the file's own values before it, so that what happens between two
    quantizers is told apart from what those before them passed on.

    Args:
        values: a graph node's name -> what the file computes there.
    """
    found: list[tuple[float, str]] = []

    def rule(run: Pass, node: fx.Node) -> Any:
        result = run.compute(node)
        if node.name not in values:
            return result
        theirs = values[node.name]
        found.append((agreement_db(result.detach().numpy(), theirs), node.name))
        return torch.from_numpy(theirs.copy()) if result.shape == theirs.shape else result

    Pass(_on_cpu(model), rule).outputs([item.example for item in model.inputs])
    return sorted(found)


def agreement_db(expected: np.ndarray, got: np.ndarray) -> float:
    """Signal over error in decibels; infinite where equal, minus infinity where not comparable.

    Example:
        >>> round(agreement_db(np.array([3.0, 4.0]), np.array([3.0, 4.5])))
        20
    """
    if expected.shape != got.shape:
        return -np.inf
    a, b = expected.astype(np.float64), got.astype(np.float64)
    finite = np.isfinite(a)
    if not np.array_equal(finite, np.isfinite(b)):
        return -np.inf
    error = float(np.sum((a[finite] - b[finite]) ** 2))
    signal = float(np.sum(a[finite] ** 2))
    if error == 0:
        return np.inf
    return float(10 * np.log10(max(signal, 1e-24) / error))
