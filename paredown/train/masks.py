"""Pruned weights stay zero while training."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from paredown.graph.model import Model


class Masks:
    """What keeps pruned weights at zero: no gradient bends their momentum, no step revives them."""

    def __init__(self, model: Model) -> None:
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

    def hold_gradients(self) -> None:
        pairs = zip(self.parameters, self.masks, strict=True)
        held = [(p.grad, mask) for p, mask in pairs if p.grad is not None]
        if held:
            torch._foreach_mul_([grad for grad, _ in held], [mask for _, mask in held])

    def hold_weights(self) -> None:
        if self.masks:
            with torch.no_grad():
                torch._foreach_mul_(self.parameters, self.masks)
