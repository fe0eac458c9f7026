"""Weight-only quantization: weights of 8 or 4 bits, activations in float."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from paredown.core import progress
from paredown.core.settings import check_fields, names_of, require
from paredown.core.task import Task
from paredown.graph.computed import fold_computed_weights
from paredown.graph.holds.shared import refuse_shared
from paredown.graph.model import Model
from paredown.graph.quantized.forms import of_op
from paredown.graph.quantized.grouped import PER_GROUP
from paredown.steps.quantization.gptq_layers import round_in_order, solvable
from paredown.steps.quantization.weight_layers import (
    Rounding,
    WeightLayer,
    insert,
    nearest,
    weight_layers,
)
from paredown.steps.step import ALONE, Entry, Setting, Step
from paredown.targets.runtimes import runtime

GROUPS = {8: 0, 4: 32}  # bits -> weights to a scale, 0 being a whole channel
METHODS = ("gptq", "rtn")


@dataclass(frozen=True)
class QuantizeWeights(Step):
    """Weights to 8 or 4 bits, each group of them with a scale of its own; activations stay float.

    Args:
        bits: 4 or 8.
        group: neighbouring weights of an output channel that share a scale: 32, 64, 128 or another
            power of 2 from 16 up; 0 for the whole channel. By default 32 at 4 bits, 0 at 8.
        method: "gptq" (2210.17323) rounds one input after the other and lets those still to come
            make up for the error, on calibration data; "rtn" rounds to nearest, without data.
        zero_point: whether the grids may lie off centre (asymmetric); None tries both on each layer
            and takes zero points where they save more error than their bits would.
        embedding_bits: of tables that are looked up: 8, 4, or 0 for float. What is lost in them no
            later layer makes up for.
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
    table: ClassVar[tuple[Entry, ...]] = (
        Entry(
            call="QuantizeWeights(4)",
            does="weights of 4 or 8 bits, by groups, rounded by GPTQ on calibration data or to "
            "nearest without data; activations stay float",
            pays="embeddings and large linear layers: 1/7 or 1/4 of the file",
            does_not="convolutions and recurrent layers: the file shrinks, what runs is float",
        ),
    )

    bits: int = 4
    group: int | None = None
    method: str = "gptq"
    zero_point: bool | None = None
    embedding_bits: int = 8
    first: bool = True
    last: bool = True
    exclude: tuple[str, ...] = ()
    damping: float = 0.01
    order: bool = True
    examples: int = 512

    def __post_init__(self) -> None:
        check_fields(self)
        require("bits", self.bits, self.bits in GROUPS, "4 or 8")
        power = self.group is not None and self.group >= 16 and self.group.bit_count() == 1
        fits = self.group is None or self.group == 0 or power
        require("group", self.group, fits, "a power of 2 from 16 up, or 0 for whole channels")
        tables = self.embedding_bits
        require("embedding_bits", tables, tables in (*GROUPS, 0), "8, 4, or 0 for float")
        require("method", self.method, self.method in METHODS, '"gptq" or "rtn"')
        require("damping", self.damping, 0 <= self.damping < math.inf, "a share from 0 up")
        require("examples", self.examples, self.examples >= 1, "a whole number from 1 up")
        object.__setattr__(self, "exclude", names_of("exclude", self.exclude))
        needs = {"calibration"} if self.method == "gptq" else set()
        object.__setattr__(self, "needs", frozenset(needs))

    @property
    def form(self) -> str:
        return of_op(PER_GROUP, self.bits).name

    def apply(self, model: Model, task: Task, setting: Setting = ALONE) -> Model:
        made = model.copy().eval()
        fold_computed_weights(made)
        rounding = self._rounding(self.bits, self.group)
        tables = self._rounding(self.embedding_bits, None) if self.embedding_bits else None
        ends = {name for name in ("first", "last") if not getattr(self, name)}
        chosen = weight_layers(made, rounding, tables, self.exclude, ends)
        names = [each.name for each in chosen]
        refuse_shared(made, names, "QuantizeWeights: {}, which groups do not keep; exclude them.")
        solved = {each.name for each in chosen if self.method == "gptq" and solvable(each)}
        grids = {each.name: nearest(each) for each in chosen if each.name not in solved}
        if solved:
            grids = round_in_order(made, task, chosen, grids, self.examples)
        for each in chosen:
            insert(made, each, grids[each.name])
        made.graph.graph.lint()
        made.graph.recompile()
        progress.say(self._told(chosen, len(solved)))
        return made

    def settle(self, model: Model, task: Task, setting: Setting) -> QuantizeWeights:
        """The same step without zero points, where the runtime's kernels take none."""
        symmetric = runtime(setting.target.runtime).SYMMETRIC
        if self.zero_point is None and self.bits in symmetric:
            return replace(self, zero_point=False)
        return self

    def _rounding(self, bits: int, group: int | None) -> Rounding:
        size = GROUPS[bits] if group is None else group
        return Rounding(bits, size, self.zero_point, self.damping, self.order)

    def _told(self, chosen: list[WeightLayer], solved: int) -> str:
        nearest = len(chosen) - solved
        how = [f"{solved} by GPTQ"] * bool(solved) + [f"{nearest} to nearest"] * bool(nearest)
        tables = sum(each.rounding.bits != self.bits for each in chosen)
        more = f"; {tables} looked up, to {self.embedding_bits} bits" if tables else ""
        return f"  {len(chosen)} weights to {self.bits} bits, {', '.join(how)}{more}"
