"""Weight-only quantization: weights of 8 or 4 bits, activations in float."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from paredown import progress
from paredown.graph.group_scales import Grid, choose_grid
from paredown.graph.grouped import rows
from paredown.graph.model import Model
from paredown.steps.gptq_layers import round_in_order, solvable
from paredown.steps.weight_layers import Rounding, WeightLayer, insert, weight_layers
from paredown.types import Task, UserError

GROUPS = {8: 0, 4: 32}  # bits -> weights to a scale, 0 being a whole channel
METHODS = ("gptq", "rtn")


@dataclass(frozen=True)
class QuantizeWeights:
    """Weights to 8 or 4 bits, each group of them with a scale of its own; activations stay float.

    Args:
        bits: 4 or 8.
        group: neighbouring weights of an output channel that share a scale: 32, 64, 128 or another
            power of 2 from 16 up; 0 for the whole channel. By default 32 at 4 bits, 0 at 8.
        method: "gptq" (2210.17323) rounds one input after the other and lets those still to come
            make up for the error, on calibration data; "rtn" rounds to nearest, without data.
        zero_point: whether the grids may lie off centre (asymmetric); None tries both on each layer
            and takes zero points where they save more error than their bits would.
        embeddings: whether tables that are looked up are quantized too.
        first, last: whether the first and the last layer are quantized too.
        exclude: names or globs of weights or layers that stay in float.
        damping: of "gptq", added to the Hessian's diagonal as a share of its mean.
        order: of "gptq", whether inputs are rounded in the order of their activations' size.
        examples: of the calibration split that "gptq" runs, at most.

    Raises:
        UserError: a setting is out of its range; a name in ``exclude`` fits nothing; a weight holds
            NaN; nothing is left to quantize; calibration data with NaN or infinite values.

    Example:
        >>> import torch, paredown
        >>> model = paredown.capture(torch.nn.Linear(64, 32), (torch.zeros(1, 64),))
        >>> quantized = QuantizeWeights(4, method="rtn").apply(model, None)
        >>> sorted(quantized.state_dict())
        ['bias', 'weight', 'weight_scale']
    """

    # What is needed depends on the method, and stands on the instance; see `PruneChannels`.
    needs: ClassVar[frozenset[str]] = frozenset()

    bits: int = 4
    group: int | None = None
    method: str = "gptq"
    zero_point: bool | None = None
    embeddings: bool = True
    first: bool = True
    last: bool = True
    exclude: tuple[str, ...] = ()
    damping: float = 0.01
    order: bool = True
    examples: int = 512

    def __post_init__(self) -> None:
        _require("bits", self.bits, self.bits in GROUPS, "4 or 8")
        power = self.group is not None and self.group >= 16 and self.group.bit_count() == 1
        fits = self.group is None or self.group == 0 or power
        _require("group", self.group, fits, "a power of 2 from 16 up, or 0 for whole channels")
        _require("method", self.method, self.method in METHODS, '"gptq" or "rtn"')
        _require("damping", self.damping, 0 <= self.damping < math.inf, "a share from 0 up")
        _require("examples", self.examples, self.examples >= 1, "a whole number from 1 up")
        if isinstance(self.exclude, str):
            raise UserError(f"exclude: expected a tuple of names, got the text {self.exclude!r}.")
        object.__setattr__(self, "exclude", tuple(self.exclude))
        needs = {"calibration"} if self.method == "gptq" else set()
        object.__setattr__(self, "needs", frozenset(needs))

    @property
    def form(self) -> str:
        return f"int{self.bits}-weights"

    def apply(self, model: Model, task: Task) -> Model:
        made = model.copy().eval()
        group = GROUPS[self.bits] if self.group is None else self.group
        rounding = Rounding(self.bits, group, self.zero_point, self.damping, self.order)
        ends = {name for name in ("first", "last") if not getattr(self, name)}
        chosen = weight_layers(made, rounding, self.exclude, self.embeddings, ends)
        solved = [each for each in chosen if self.method == "gptq" and solvable(each)]
        names = {each.name for each in solved}
        grids = {
            each.name: self._nearest(each, rounding) for each in chosen if each.name not in names
        }
        if solved:
            grids = round_in_order(made, task, chosen, grids, rounding, self.examples)
        for each in chosen:
            insert(made, each, grids[each.name], rounding)
        made.graph.graph.lint()
        made.graph.recompile()
        progress.say(self._told(chosen, len(solved)))
        return made

    def _nearest(self, layer: WeightLayer, rounding: Rounding) -> Grid:
        flat = rows(layer.weight.detach(), layer.axis)
        group = layer.group_of(rounding)
        return choose_grid(flat, group, rounding.low, rounding.high, zero_point=self.zero_point)

    def _told(self, chosen: list[WeightLayer], solved: int) -> str:
        nearest = len(chosen) - solved
        how = [f"{solved} by GPTQ"] * bool(solved) + [f"{nearest} to nearest"] * bool(nearest)
        return f"  {len(chosen)} weights rounded to {self.bits} bits: {', '.join(how)}"


def _require(name: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        raise UserError(f"{name}: expected {expected}, got {value!r}.")
