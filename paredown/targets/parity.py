"""Whether an exported file computes what the model computes.

It is run on the example, on inputs of zeros and on large ones, and on real data where there are
some: a constant that keeps a quotient from dividing by zero changes nothing on the example. And it
is run at other sizes than the example's where they vary: what writes a file may take the size of
the example for a constant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from paredown.core.errors import UserError
from paredown.core.progress import say
from paredown.graph.bounded import between_0_and_1
from paredown.graph.doors.sizes import TRIED_ELEMENTS, resized
from paredown.graph.interpret import Pass
from paredown.graph.model import Model
from paredown.graph.quantized import saturation
from paredown.graph.quantized.forms import form_of
from paredown.graph.quantized.quantizers import ACTIVATION_QUANTIZERS, PER_TENSOR, quantizers
from paredown.targets.runtimes import Batches

FLOAT_TOLERANCE = 1e-3  # of the output's size
HALF_TOLERANCE = 5e-2
QUANTIZED_DB = 20.0  # rounding ties fall differently in two implementations
TIE = 0.02  # of a step: what lies as near to the middle of two steps may be rounded either way
ROUNDING = 2.0  # of a float's last place: what sums added in another order differ by, and more
UNIT_ERROR = 5e-7  # of a sigmoid or softmax, whatever it gives: some kernels approximate it
TINIEST = 1e-30  # what may stand for a zero: equal values may be ranked either way
LARGE = 1e3  # of the example's values
# Where ties alone move the outputs by more than this, outputs tell nothing of a file.
TELLING_DB, SLACK_DB = 10.0, 1.0
SATURATED = (
    "on x86 without VNNI, where two products are added in 16 bits, outputs{} agree with these to "
    '{:.0f} dB; Quantize(saturation="safe") makes them the same.'
)
FLOAT_SLACK_DB = 6.0  # kernels that compute a convolution otherwise round more often

Redraw = Callable[[fx.GraphModule, Sequence[Tensor], int], list[Tensor]]
WorstTensor = Callable[[Model, Path], "tuple[float, str] | None"]


@dataclass(frozen=True)
class Trial:
    """Inputs that a file is run on."""

    leaves: list[Tensor]
    said: str  # in an error, behind what differs
    edge: bool  # made up: there a model may give no numbers, or nothing but rounding
    resized: bool = False  # of other sizes than the example, which model and file may refuse


def confirm(
    model: Model,
    path: Path,
    predictor: Any,
    worst_tensor: WorstTensor | None = None,
    data: Batches = (),
    pairs: str | None = None,
) -> None:
    """Assert that an open file agrees with the model it was made of.

    Args:
        worst_tensor: what finds the inner tensor that differs most on the example, its agreement
            in dB and its name, where the runtime can tell. In a deep quantized model rounding ties
            add up; there the outputs may differ as much as other ties make them differ, or as long
            as no stretch between two quantizers does.
        data: real inputs to compare on too, of the example's shapes.
        pairs: how the runtime's kernels for x86 without VNNI pair products that they add in 16
            bits; None where they never do. Where such a sum saturates on the example, it is told.

    Raises:
        UserError: the outputs differ; names the tensor that differs most.
    """
    for trial in _trials(model, data):
        shown = _with_example(model, trial.leaves)
        _confirm_on(shown, path, predictor, worst_tensor, trial, pairs)


def _trials(model: Model, data: Batches) -> Iterator[Trial]:
    example = [item.example for item in model.inputs]
    yield Trial(example, "", edge=False)
    for leaves in data:
        yield Trial(list(leaves), " on the task's data", edge=False)
    yield from _other_sizes(model)
    if not any(leaf.is_floating_point() for leaf in example):
        return
    yield Trial([_times(leaf, 0.0) for leaf in example], " on inputs of zeros", edge=True)
    if not _is_half(model):  # 16 bits end at 65504, inside the model as well
        large = [_times(leaf, LARGE) for leaf in example]
        yield Trial(large, f" on {LARGE:.0f} times the example's values", edge=True)


def _other_sizes(model: Model) -> Iterator[Trial]:
    """The example with all that varies larger, and smaller; dimensions of one name are of one
    size."""
    example = [item.example for item in model.inputs]
    for grow in (lambda size: size + max(1, size // 3), lambda size: max(1, size // 2)):
        sizes = {}
        for place, item in enumerate(model.inputs):
            for dim in item.dynamic:
                least, most = item.limits.get(dim, (1, None))
                size = max(least, grow(item.example.shape[dim]))
                sizes[place, dim] = size if most is None else min(size, most)
        made = resized(example, sizes)
        if any(a.shape != b.shape for a, b in zip(made, example, strict=True)):
            shapes = ", ".join(str(tuple(leaf.shape)) for leaf in made)
            elements = sum(leaf.numel() for leaf in made)
            if elements <= TRIED_ELEMENTS:
                yield Trial(made, f" on inputs of {shapes}", edge=False, resized=True)


def _times(leaf: Tensor, factor: float) -> Tensor:
    return leaf * factor if leaf.is_floating_point() else leaf


def _with_example(model: Model, leaves: Sequence[Tensor]) -> Model:
    pairs = zip(model.inputs, leaves, strict=True)
    return replace(model, inputs=tuple(replace(i, example=leaf) for i, leaf in pairs))


def _confirm_on(
    model: Model,
    path: Path,
    predictor: Any,
    worst_tensor: WorstTensor | None,
    trial: Trial,
    pairs: str | None,
) -> None:
    """Assert that the file agrees with the model on the model's example."""
    try:
        expected = _run_graph(model, trial.leaves)
    except (RuntimeError, IndexError, ValueError):
        if trial.edge or trial.resized:  # no input for this model
            return
        raise
    try:
        given = predictor(*[leaf.numpy() for leaf in trial.leaves])
    except UserError:
        if trial.resized:  # which the file says of itself, to whoever runs it
            return
        raise
    got = [np.asarray(each) for each in given]
    quantized = any(_rounds_values(node) for node in quantizers(model.graph))
    least_db = QUANTIZED_DB if quantized else _float_tolerance_db(model)
    errors = [UNIT_ERROR * unit for unit in between_0_and_1(model.graph)]
    ranked = _ranked(expected, got, predictor.output_names, errors)
    agrees = ranked[0][0] >= least_db
    if not (agrees and (trial.edge or trial.resized)) and pairs and quantized:
        agrees |= _saturates(model, path, trial, pairs, expected, got if not agrees else None)
    if agrees:
        return
    redraw = other_ties if quantized else other_roundings
    others = _redrawn(model, trial.leaves, redraw)
    if trial.edge:
        expected, got = _where_all_are_finite([expected, *others], got)
        ranked = _ranked(expected, got, predictor.output_names, errors)
    if ranked[0][0] >= _redrawn_db(expected, others, quantized, trial.edge):
        return
    inner = worst_tensor(model, path) if worst_tensor and not trial.edge else None
    if quantized and inner and inner[0] >= least_db:
        return
    where = f"; the tensor that differs most is {inner[1]!r} at {inner[0]:.0f} dB" if inner else ""
    raise UserError(
        f"{path.name}: output {ranked[0][1]!r} differs from the model's{trial.said} (agreement "
        f"{ranked[0][0]:.0f} dB, expected at least {least_db:.0f} dB){where}."
    )


def _ranked(
    expected: Sequence[Tensor],
    got: Sequence[np.ndarray],
    names: Sequence[str],
    errors: Sequence[float],
) -> list[tuple[float, str]]:
    return sorted(
        (
            np.inf if _within(ours.numpy(), theirs, error) else agreement_db(ours.numpy(), theirs),
            name,
        )
        for ours, theirs, name, error in zip(expected, got, names, errors, strict=True)
    )


def _within(ours: np.ndarray, theirs: np.ndarray, error: float) -> bool:
    """Whether no value is further from the other than that."""
    alike = error > 0 and ours.shape == theirs.shape
    return alike and bool(np.abs(ours.astype(np.float64) - theirs).max(initial=0.0) <= error)


def _redrawn(model: Model, leaves: Sequence[Tensor], redraw: Redraw) -> list[list[Tensor]]:
    return [redraw(_on_cpu(model), leaves, seed) for seed in range(2)]


def _redrawn_db(
    expected: Sequence[Tensor], others: list[list[Tensor]], quantized: bool, edge: bool
) -> float:
    """The least agreement in dB that is enough: that of the model with itself where roundings fall
    otherwise. Where that is too low to judge by, nothing is, but made-up inputs ask for numbers
    alone."""
    found = min(
        agreement_db(ours.numpy(), other.numpy())
        for each in others
        for ours, other in zip(expected, each, strict=True)
    )
    if found >= TELLING_DB and not (edge and quantized):
        return found - (SLACK_DB if quantized else FLOAT_SLACK_DB)
    return -float(np.finfo(np.float64).max) if edge else np.inf


def _where_all_are_finite(
    drawn: list[list[Tensor]], got: Sequence[np.ndarray]
) -> tuple[list[Tensor], list[np.ndarray]]:
    """The model's outputs and the file's, with zeros where the model gives no number in a draw."""
    pairs = zip(*drawn, strict=True)
    sure = [torch.stack([each.isfinite() for each in outputs]).all(0) for outputs in pairs]
    ours = [value.where(mask, 0) for value, mask in zip(drawn[0], sure, strict=True)]
    theirs = [
        np.where(mask.numpy(), each, np.zeros_like(each)) if each.shape == mask.shape else each
        for each, mask in zip(got, sure, strict=True)
    ]
    return ours, theirs


def _saturates(
    model: Model,
    path: Path,
    trial: Trial,
    pairs: str,
    expected: Sequence[Tensor],
    got: Sequence[np.ndarray] | None,
) -> bool:
    """Tell where sums of two products that are added in 16 bits saturate, as x86 processors without
    VNNI add them; of made-up inputs, whether that is why the outputs differ.

    Args:
        got: the file's outputs where they differ from the model's; None where they agree.

    Raises:
        UserError: this processor is such a one, and real outputs differ by it.
    """
    graph = _on_cpu(model)
    watch = saturation.Watch(graph)
    if not watch.done:
        watch.run(trial.leaves)
    if not watch.found:
        return False
    lost = [value.numpy() for value in saturation.simulate(graph, trial.leaves, pairs)]
    db = min(agreement_db(a.numpy(), b) for a, b in zip(expected, lost, strict=True))
    if got is None:
        say(f"  {path.name}: {SATURATED.format(trial.said, db)}")
        return True
    if min(agreement_db(a, b) for a, b in zip(lost, got, strict=True)) < QUANTIZED_DB:
        return False
    if not trial.edge:
        raise UserError(
            f"{path.name}: this processor adds two products in 16 bits, which saturate: outputs"
            f"{trial.said} agree with the model's to {db:.0f} dB, expected at least "
            f'{QUANTIZED_DB:.0f} dB; use Quantize(saturation="safe").'
        )
    return True


def _rounds_values(quantizer: fx.Node) -> bool:
    """Of activations too: kernels for weights that are rounded alone may round them to 8 bits,
    block by block, as they go."""
    form = form_of(quantizer)
    return quantizer.target in ACTIVATION_QUANTIZERS or (form is not None and form.alone)


def _float_tolerance_db(model: Model) -> float:
    return -20 * float(np.log10(HALF_TOLERANCE if _is_half(model) else FLOAT_TOLERANCE))


def _is_half(model: Model) -> bool:
    return any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters())


def _run_graph(model: Model, leaves: list[Tensor]) -> list[Tensor]:
    graph = _on_cpu(model)
    with torch.no_grad():
        return [value.detach() for value in graph(*[leaf.clone() for leaf in leaves])]


def other_ties(graph: fx.GraphModule, leaves: Sequence[Tensor], seed: int) -> list[Tensor]:
    """The outputs of a graph with what is rounded moved by up to `TIE` of a step."""
    generator = torch.Generator().manual_seed(seed)

    def rule(run: Pass, node: fx.Node) -> Any:
        if node.target is not PER_TENSOR:
            return run.compute(node)
        (value, scale, *grid), _ = run.arguments(node)
        moves = torch.rand(value.shape, generator=generator, dtype=value.dtype) * 2 - 1
        return run.compute(node, ((value + moves * TIE * scale, scale, *grid), {}))

    return Pass(graph, rule).outputs(leaves)


def other_roundings(graph: fx.GraphModule, leaves: Sequence[Tensor], seed: int) -> list[Tensor]:
    """The outputs of a graph with each float that it computes moved by up to `ROUNDING` of its
    last place."""
    generator = torch.Generator().manual_seed(seed)

    def moved(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        moves = torch.rand(value.shape, generator=generator, dtype=torch.float32) * 2 - 1
        moves = moves.to(value.dtype)
        return value * (1 + moves * ROUNDING * torch.finfo(value.dtype).eps) + moves * TINIEST

    def rule(run: Pass, node: fx.Node) -> Any:
        result = run.compute(node)
        if node.op != "call_function":
            return result
        read = {_place(each) for each in pytree.tree_leaves(run.arguments(node))} - {None}
        new = _place(result) not in read  # else the same numbers in another shape
        return pytree.tree_map(moved, result) if new else result

    return Pass(graph, rule).outputs(leaves)


def _place(value: Any) -> int | None:
    """Where a tensor's values lie in memory."""
    return value.untyped_storage().data_ptr() if isinstance(value, Tensor) else None


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
        if not isinstance(result, Tensor):  # a size
            return result
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
