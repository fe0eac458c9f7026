"""Techniques by name; adding one is a new file here and a line in this dict."""

from __future__ import annotations

import difflib
import importlib

from paredown.core.errors import UserError
from paredown.steps.step import Step

STEPS = {
    "prune_weights": "paredown.steps.pruning.prune_weights:PruneWeights",
    "prune_channels": "paredown.steps.pruning.prune_channels:PruneChannels",
    "prune_layers": "paredown.steps.pruning.prune_layers:PruneLayers",
    "low_rank": "paredown.steps.low_rank.low_rank.low_rank:LowRank",
    "fine_tune": "paredown.steps.training.fine_tune:FineTune",
    "distill": "paredown.steps.training.distill:Distill",
    "quantize": "paredown.steps.quantization.quantize:Quantize",
    "binarize": "paredown.steps.quantization.binarize:Binarize",
    "quantize_weights": "paredown.steps.quantization.quantize_weights:QuantizeWeights",
    "share_weights": "paredown.steps.sharing.share_weights:ShareWeights",
    "hash_weights": "paredown.steps.sharing.hash_weights:HashWeights",
    "cast": "paredown.steps.quantization.cast:Cast",
}


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
    module, _, attribute = STEPS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)  # type: ignore[no-any-return]
