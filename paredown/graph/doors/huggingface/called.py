"""A model of transformers, called by the names of its inputs and giving plain tensors."""

from __future__ import annotations

import inspect
import types
from typing import Any

from torch import Tensor, nn

from paredown.graph.doors.huggingface.sentences import Pool

SENTENCE = "sentence_embedding"
BEHIND = "behind_pooling"  # the name of what follows
INSIDE = ("last_hidden_state", "encoder_last_hidden_state", "pooler_output")  # of a head's model
OF_A_BATCH = ("logits_per_image", "logits_per_text", "logits_per_audio")  # each with each


def takes(model: nn.Module) -> tuple[str, ...]:
    """The names of what a model can be called with."""
    return tuple(inspect.signature(type(model).forward).parameters)[1:]


def outputs(found: Any) -> dict[str, Tensor]:
    """The tensors among a model's outputs by name; what is for looking inside is left out.

    Example:
        >>> import torch
        >>> inside = torch.zeros(1, 2)
        >>> list(outputs({"logits": inside, "last_hidden_state": inside, "attentions": (inside,)}))
        ['logits']
    """
    items = found.items() if hasattr(found, "items") else vars(found).items()
    tensors = {
        name: value for name, value in items if isinstance(value, Tensor) and name not in OF_A_BATCH
    }
    heads = {name: value for name, value in tensors.items() if name not in INSIDE}
    return heads or tensors


def plainly(model: nn.Module, pool: Pool | None = None) -> nn.Module:
    """The same model, with its own names of parameters, giving one tensor or a dict of them."""

    def forward(self: Any, **inputs: Tensor) -> Any:
        found = outputs(type(self).forward(self, **inputs))
        if pool is not None:
            made = pool.of(found["last_hidden_state"], inputs.get("attention_mask"))
            return getattr(self, BEHIND)(made)
        return found if len(found) > 1 else next(iter(found.values()))

    if pool is not None:
        model.add_module(BEHIND, pool.layers)
    model.forward = types.MethodType(forward, model)  # copied with its module
    return model
