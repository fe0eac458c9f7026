"""Inputs as deployed, in the arrays that a runtime takes."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paredown.core.errors import UserError
from paredown.data import splits
from paredown.graph import structure
from paredown.graph.model import Model

CYCLE = 8  # different inputs that the latency is measured on
CYCLE_BYTES = 2**28


# Inputs


def deployed_batch(model: Model) -> int:
    """Examples per inference as deployed."""
    tensor = model.inputs[0].example
    return tensor.shape[0] if tensor.dim() else 1


def deployed(model: Model, examples: Any, split: str) -> tuple[list[list[np.ndarray]], str]:
    """Several inputs of a split as deployed, at most 8, and what they are."""
    batch, total = deployed_batch(model), 0
    found: list[list[np.ndarray]] = []
    shapes = [item.example.shape for item in model.inputs]
    for inputs, _ in itertools.islice(splits.batches(examples, batch), CYCLE):
        tensors = leaves(model, inputs, f"task: its {split} split", batch)
        if [tensor.shape for tensor in tensors] == shapes:
            found.append(arrays(model, tensors))
            total += sum(array.nbytes for array in found[-1])
        if total > CYCLE_BYTES and len(found) > 1:
            break
    if found:
        count = min(len(found) * batch, splits.size(examples))
        return found, f"the first {count} examples of {split}, {batch} at a time"
    return [deployed_example(model)], f"the deployed example, as {split} holds none of its shapes"


def deployed_example(model: Model) -> list[np.ndarray]:
    """The example of each input, as deployed."""
    return arrays(model, [item.example for item in model.inputs])


def leaves(model: Model, inputs: Any, source: str, padded_to: int | None = None) -> list[Tensor]:
    """The tensors of a batch in the model's order, the last example repeated up to ``padded_to``.

    Raises:
        UserError: other shapes or dtypes than the captured ones; ``source`` says whose.
    """
    tensors, nesting = structure.flatten(inputs)
    padded = [_padded(tensor, padded_to) for tensor in tensors]
    args, kwargs = splits.arguments(structure.unflatten(padded, nesting))
    try:
        bound = model.bind(args, kwargs)
    except UserError as error:
        raise UserError(f"{source} does not fit the example: {error}") from error
    for item, leaf in zip(model.inputs, bound, strict=True):
        if leaf.dtype != item.example.dtype:
            raise UserError(
                f"{source} gives {leaf.dtype} for input {item.name!r}, the example "
                f"{item.example.dtype}; convert it there."
            )
    return bound


def _padded(tensor: Tensor, length: int | None) -> Tensor:
    if length is None or len(tensor) == length:
        return tensor
    return torch.cat([tensor, tensor[-1:].expand(length - len(tensor), *tensor.shape[1:])])


def arrays(model: Model, tensors: list[Tensor]) -> list[np.ndarray]:
    """The tensors as a runtime takes them.

    Raises:
        UserError: a dtype that NumPy does not have.
    """
    found = []
    for item, tensor in zip(model.inputs, tensors, strict=True):
        try:
            found.append(tensor.detach().cpu().contiguous().numpy())
        except TypeError as error:
            raise UserError(
                f"input {item.name!r}: {tensor.dtype} cannot be given to a runtime; take float32."
            ) from error
    return found
