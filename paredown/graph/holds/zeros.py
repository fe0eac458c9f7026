"""Pruned weights stay zero: ``Model.masks``, parameter name -> bool, False where it is pruned."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from paredown.graph.parts import Parts
from paredown.graph.state import taken


class Masks:
    """No gradient bends the momentum of pruned weights, and no step revives them."""

    def __init__(self, model: Parts) -> None:
        named = dict(model.graph.named_parameters(remove_duplicate=False))
        both: dict[int, tuple[nn.Parameter, Tensor]] = {}
        for name, mask in model.masks.items():
            parameter = named.get(name)
            if parameter is not None and parameter.requires_grad:
                kept = mask.to(parameter.device, parameter.dtype)
                earlier = both.get(id(parameter))
                both[id(parameter)] = (parameter, kept if earlier is None else kept * earlier[1])
        self.parameters: list[Tensor] = [parameter for parameter, _ in both.values()]
        self.masks = [mask for _, mask in both.values()]

    def gradients(self, weights: list[nn.Parameter]) -> tuple[list[nn.Parameter], list[Tensor]]:
        pairs = zip(self.parameters, self.masks, strict=True)
        bent = [(p.grad, mask) for p, mask in pairs if p.grad is not None]
        if bent:
            torch._foreach_mul_([grad for grad, _ in bent], [mask for _, mask in bent])
        return weights, []

    def hold(self) -> None:
        if self.masks:
            with torch.no_grad():
                torch._foreach_mul_(self.parameters, self.masks)


class PrunedZeros:
    """The `paredown.graph.holds.hold.Hold` of pruned weights."""

    field = "masks"

    def broken(self, model: Parts) -> Iterator[str]:
        state = model.graph.state_dict()
        for name, mask in model.masks.items():
            if name in state and bool((state[name][~mask] != 0).any()):
                yield f"weights of {name!r} that were pruned came back."

    def keeper(self, model: Parts) -> Masks:
        return Masks(model)

    def mark(self, model: Parts) -> Iterator[tuple[str, Tensor]]:
        yield from model.masks.items()

    def cut(self, model: Parts, name: str, keep: dict[int, Tensor]) -> None:
        if name in model.masks:
            model.masks[name] = taken(model.masks[name], keep)

    def stored(self, model: Parts) -> tuple[Any, dict[str, Tensor], Collection[str]]:
        return None, {f"mask:{name}": mask for name, mask in model.masks.items()}, ()

    def restored(
        self, told: Any, ties: dict[str, str], tensors: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        return {k.removeprefix("mask:"): v for k, v in tensors.items() if k.startswith("mask:")}
