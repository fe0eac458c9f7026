"""Places of a layer's output, drawn at random, and what the weight is multiplied with there."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from paredown.graph.patches import groups_of, layer_inputs
from paredown.graph.sites import Site


def sampled(values: Tensor, inner: int, most: int, seed: int) -> Tensor:
    """At most ``most`` random places, the same ones for the same seed.

    Shapes: (*places, *rest) -> (P, *rest), ``inner`` being how many dimensions the rest has.
    """
    places = values.shape[: values.dim() - inner]
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(math.prod(places), generator=generator)[:most]
    return values[torch.unravel_index(chosen, places)]


def sampled_inputs(site: Site, weight: Tensor, x: Tensor, most: int, seed: int) -> Tensor:
    """At most ``most`` random places of a layer's input, as (groups, P, F)."""
    if "conv" in site.kind:
        x = x if x.dim() == weight.dim() else x[None]  # one image without a batch dimension
        seen = layer_inputs(site, weight, x) if site.kind == "conv" else x.movedim(1, -1)
        inner = weight.dim() - 1 if site.kind == "conv" else 1  # dimensions of one place
    else:
        seen, inner = x.reshape(-1, x.shape[-1]), 1
    taken = sampled(seen, inner, most, seed)  # (P, C, *kernel)
    return taken.reshape(len(taken), groups_of(site), -1).transpose(0, 1)
