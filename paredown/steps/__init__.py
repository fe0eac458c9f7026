"""Techniques by name; adding one is a new file in a folder here and a line in this dict."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

from paredown.core.errors import UserError
from paredown.core.named import named

if TYPE_CHECKING:
    from paredown.steps.step import Step

STEPS = {  # in the order of the README's table
    "quantize": "paredown.steps.quantization.quantize:Quantize",
    "prune_channels": "paredown.steps.pruning.prune_channels:PruneChannels",
    "prune_layers": "paredown.steps.pruning.prune_layers:PruneLayers",
    "low_rank": "paredown.steps.low_rank.low_rank:LowRank",
    "prune_weights": "paredown.steps.pruning.prune_weights:PruneWeights",
    "fine_tune": "paredown.steps.training.fine_tune:FineTune",
    "distill": "paredown.steps.training.distill:Distill",
    "quantize_weights": "paredown.steps.quantization.quantize_weights:QuantizeWeights",
    "binarize": "paredown.steps.quantization.binarize:Binarize",
    "share_weights": "paredown.steps.sharing.share_weights:ShareWeights",
    "hash_weights": "paredown.steps.sharing.hash_weights:HashWeights",
    "cast": "paredown.steps.quantization.cast:Cast",
}


def public_names() -> dict[str, str]:
    """The name of each step's class -> its name here.

    Example:
        >>> public_names()["PruneLayers"]
        'prune_layers'
    """
    return {value.rpartition(":")[2]: name for name, value in STEPS.items()}


def step_class(name: str) -> type[Step]:
    """The class of a step by its name.

    Raises:
        UserError: no such step; suggests the nearest.

    Example:
        >>> step_class("quantize").__name__
        'Quantize'
    """
    if name not in STEPS:
        near = difflib.get_close_matches(name, STEPS, 1, 0.0)[0]
        raise UserError(f"step: {name!r} is not one of {', '.join(STEPS)}; did you mean {near!r}?")
    return named(STEPS[name])  # type: ignore[no-any-return]
