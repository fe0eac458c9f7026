"""What of a model trains."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from paredown.graph.model import Model


def trainable(model: Model) -> dict[str, nn.Parameter]:
    """Each trainable parameter once, tied ones under their first name."""
    named = model.graph.named_parameters()
    return {n: p for n, p in named if p.requires_grad and p.is_floating_point()}


def tensors(graph: nn.Module) -> dict[str, Tensor]:
    """Each parameter and buffer once."""
    return {**dict(graph.named_parameters()), **dict(graph.named_buffers())}


def copy_into(targets: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in values.items():
            targets[name].copy_(value)
