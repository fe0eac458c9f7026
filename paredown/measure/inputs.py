"""Inputs as deployed, in the arrays that a runtime takes."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from paredown.core.errors import UserError
from paredown.core.task import Task
from paredown.data import batches, feed, splits
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
    for each in feed.every(model, examples, batch, CYCLE):
        tensors = leaves(model, batches.padded(each.inputs, batch), of_split(split))
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


def of_split(name: str) -> str:
    """Where the batches of a split come from, in words."""
    return f"task: its {name} split"


def leaves(model: Model, inputs: Any, source: str) -> list[Tensor]:
    """The tensors of a batch in the model's order; ``source`` says where it comes from.

    Raises:
        UserError: other shapes or dtypes than the captured ones.
    """
    args, kwargs = splits.arguments(inputs)
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


def real_inputs(model: Model, task: Task) -> list[list[Tensor]]:
    """A batch of the task's calibration data for a file to be checked on, of the example's shapes;
    none where there is none."""
    if task.missing({"calibration"}):
        return []
    example = [item.example for item in model.inputs]
    data = splits.split(task, "calibration")
    found = feed.whole(model, data, "calibration", deployed_batch(model), most=1)
    leaves = [leaf.cpu() for batch in found.bound() for leaf in batch.inputs]
    return [leaves] if [i.shape for i in leaves] == [i.shape for i in example] else []
