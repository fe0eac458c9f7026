"""A net of the zoo with the inputs and outputs of another model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from paredown.core.errors import UserError
from paredown.zoo import ZOO, Entry, entry, make


@dataclass(frozen=True)
class Shape:
    """What a model takes and gives.

    Attributes:
        inputs, outputs: examples of both.
        vocabulary: how many tokens there are, where its input is looked up in a table, else 0.
        length: tokens at most.
    """

    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]
    vocabulary: int = 0
    length: int = 512


def like(
    name: str, shape: Shape, width: float = 1.0, depth: float = 1.0, resolution: float = 1.0
) -> nn.Module:
    """The net of that name for these inputs and outputs.

    Raises:
        UserError: it takes or gives something else; names those of the zoo that would do.

    Example:
        >>> import torch
        >>> shape = Shape([torch.zeros(1, 3, 32, 32)], [torch.zeros(1, 10)])
        >>> like("resnet_8", shape)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
        >>> fitting(shape)[:2], fitting(Shape([torch.zeros(1, 5)], [torch.zeros(1, 2)]))
        (['mobilenet_v1', 'mobilenet_v2'], ['mlp', 'autoencoder'])
    """
    found = entry(name)
    if not _fits(found, shape):
        others = fitting(shape)
        instead = f"; those that would do: {', '.join(others)}" if others else ""
        raise UserError(
            f"zoo:{name} takes {found.takes} and gives {found.gives}; the original takes "
            f"{_told(shape.inputs)} and gives {_told(shape.outputs)}{instead}."
        )
    settings = _settings(found, shape)
    return make(name, resolution=resolution, width=width, depth=depth, **settings)


def fitting(shape: Shape) -> list[str]:
    """The names of the nets that take and give the same."""
    return [name for name, found in ZOO.items() if _fits(found, shape)]


def _fits(found: Entry, shape: Shape) -> bool:
    if len(shape.outputs) != 1 or not shape.outputs[0].is_floating_point():
        return False
    first, out = shape.inputs[0], shape.outputs[0]
    if found.takes == "tokens":
        tokens = first.dim() == 2 and not first.is_floating_point() and shape.vocabulary > 0
        masked = [each.shape == first.shape for each in shape.inputs[1:]]
        each = out.dim() == 3 and out.shape[1] == first.shape[1]
        gives = out.dim() == 2 if not each else True
        return tokens and all(masked) and len(masked) <= 1 and gives and _gives(found, each)
    if len(shape.inputs) != 1 or not first.is_floating_point():
        return False
    if found.takes == "rows":
        return first.dim() == 2 and out.dim() == 2
    maps = out.dim() == 4 and out.shape[2:] == first.shape[2:]
    return first.dim() == 4 and (maps if found.gives == "maps" else out.dim() == 2)


def _gives(found: Entry, each: bool) -> bool:
    return found.gives == "classes or each" or each


def _settings(found: Entry, shape: Shape) -> dict[str, Any]:
    first, out = shape.inputs[0], shape.outputs[0]
    if found.takes == "rows":
        return {"features": first.shape[1], "out": out.shape[1]}
    if found.takes == "images":
        size = (first.shape[2], first.shape[3])
        return {"classes": out.shape[1], "channels": first.shape[1], "size": size}
    made = {"vocabulary": shape.vocabulary, "classes": out.shape[-1], "length": shape.length}
    return made | ({"pooled": out.dim() == 2} if found.gives != "each" else {})


def _told(tensors: Sequence[Tensor]) -> str:
    return ", ".join(
        f"{tuple(each.shape)} {str(each.dtype).removeprefix('torch.')}" for each in tensors
    )
