"""The gradients of a batch's loss where the batch does not fit into memory: in parts, two passes.

A loss need not be a mean over examples: it divides by the labels that are not ignored or by the
weights of their classes, and some compare examples with each other. So the parts are run once for
what they give, the loss of all that together says what its gradients are, and the parts are run
again to pass them on (Gao et al., arXiv 2101.06983).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from paredown.core.errors import UserError
from paredown.data import batches
from paredown.graph import machine
from paredown.graph.model import Model
from paredown.graph.quantized.quantizers import quantizers
from paredown.train import qat
from paredown.train.objective import Objective

ALIKE = 1e-3  # of the largest value: what two ways to round one number may differ by


def gradients(
    model: Model, objective: Objective, batch: Any, chunk: int, device: torch.device
) -> float:
    """Add the gradients of a batch's loss to the parameters', ``chunk`` examples at a time; the
    loss.

    Raises:
        UserError: something that the loss reads has neither a dimension of examples nor one shape.
    """
    parts = [batches.to(part, device) for part in batches.chunks(batch, chunk)]
    if len(parts) == 1:
        loss = objective(model, *parts[0])
        loss.sum().backward()
        return float(loss.detach())
    drawn, given = [], []
    before = [buffer.clone() for buffer in model.graph.buffers()]
    with torch.no_grad():
        for part in parts:
            drawn.append(machine.random_state(device))
            given.append(objective.values(model, *part))
    put_back(model, before)  # moving statistics move in the second pass
    counts = [batches.count(part) for part in parts]
    dims = [_dim_of(values, counts) for values in zip(*given, strict=True)]
    whole = [
        _joined(values, counts, dim)
        for values, dim in zip(zip(*given, strict=True), dims, strict=True)
    ]
    del given
    total, slopes = _slopes(model, objective, whole, batches.to(batch, device)[1])
    shares = zip(
        *(_shared_out(s, counts, d) for s, d in zip(slopes, dims, strict=True)), strict=True
    )
    for part, state, share in zip(parts, drawn, shares, strict=True):
        machine.set_random_state(state, device)
        _backward(objective.values(model, *part), share)
    return total


def put_back(model: Model, before: Sequence[Tensor]) -> None:
    """Give the graph's buffers these values, in place."""
    for buffer, value in zip(model.graph.buffers(), before, strict=True):
        buffer.copy_(value)


def _slopes(
    model: Model, objective: Objective, values: list[Tensor], target: Any
) -> tuple[float, list[Tensor | None]]:
    """The loss of these values, and its gradient by each; None where it does not read it."""
    leaves = [v.requires_grad_() if v.is_floating_point() else v for v in values]
    loss = objective.loss(model, [leaf.clone() for leaf in leaves], target)  # a loss may overwrite
    loss.sum().backward()
    return float(loss.detach()), [leaf.grad for leaf in leaves]


def _backward(values: Sequence[Tensor], slopes: Sequence[Tensor | None]) -> None:
    pairs = zip(values, slopes, strict=True)
    moved = [(value, slope) for value, slope in pairs if slope is not None and value.requires_grad]
    if moved:
        torch.autograd.backward([v for v, _ in moved], [slope for _, slope in moved])


# --- parts of a value ------------------------------------------------------------------------


def _dim_of(values: Sequence[Tensor], counts: Sequence[int]) -> int | None:
    """The dimension of the examples; None of what is one number for all of a part's examples.

    Example:
        >>> _dim_of([torch.zeros(7, 3), torch.zeros(7, 2)], [3, 2])
        1
    """
    for dim in range(values[0].dim()):
        if all(v.dim() > dim and v.shape[dim] == n for v, n in zip(values, counts, strict=True)):
            return dim
    if any(value.shape != values[0].shape for value in values):
        raise UserError(
            f"training: out of memory, and an output of shape {tuple(values[0].shape)} cannot be "
            f"put together from parts of {counts[0]} examples; use a smaller batch_size."
        )
    return None


def _joined(values: Sequence[Tensor], counts: Sequence[int], dim: int | None) -> Tensor:
    """The value of all examples: of what has none of them apart, the mean over them.

    Example:
        >>> _joined([torch.tensor(1.0), torch.tensor(4.0)], [2, 1], None)
        tensor(2.)
    """
    if dim is not None:
        return torch.cat(list(values), dim)
    if not values[0].is_floating_point():
        return values[0]
    total = sum(counts)
    return torch.stack([v * (n / total) for v, n in zip(values, counts, strict=True)]).sum(0)


def _shared_out(
    slope: Tensor | None, counts: Sequence[int], dim: int | None
) -> Iterator[Tensor | None]:
    """The gradient by each part's value of what `_joined` makes of them."""
    if slope is None:
        yield from [None] * len(counts)
    elif dim is not None:
        yield from slope.split(list(counts), dim)
    else:
        yield from (slope * (count / sum(counts)) for count in counts)


# --- what parts cannot give ------------------------------------------------------------------


def differences(model: Model, objective: Objective, batch: Any, chunk: int) -> list[str]:
    """Why training with so many examples at a time is not that with whole batches."""
    found = []
    nodes = model.graph.graph.nodes
    if any("batch_norm" in str(node.target) for node in nodes):
        found.append(f"batch norm takes its statistics of {chunk} examples")
    if quantizers(model.graph) or qat.trains(model):
        found.append(f"the quantizers' scales follow {chunk} examples")
    if chunk > 1 and _mixes(model, objective, batch):
        found.append("an example's output depends on the others beside it")
    return found


def _mixes(model: Model, objective: Objective, batch: Any) -> bool:
    """Whether two examples give something else together than each alone, in evaluation mode."""
    device = machine.device_of(model)
    pair = batches.to(batches.chunks(batch, 2)[0], device)
    alone = batches.chunks(pair, 1)
    if len(alone) != 2:
        return False
    model.eval()
    try:
        with torch.no_grad():
            together = objective.values(model, *pair)
            apart = [objective.values(model, *each) for each in alone]
    except Exception as error:
        if not machine.no_memory(error):
            raise
        return False  # not even two at a time: training will say so
    finally:
        model.train()
    return any(
        not _close(value, _joined(values, [1, 1], _dim_of(values, [1, 1])))
        for value, values in zip(together, zip(*apart, strict=True), strict=True)
        if value.is_floating_point()
    )


def _close(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return True  # nothing that can be compared
    finite = one.isfinite() & other.isfinite()
    largest = one[finite].abs().amax() if bool(finite.any()) else one.new_zeros(())
    return bool(((one - other)[finite].abs() <= ALIKE * largest).all())
