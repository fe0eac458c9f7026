"""Layer pruning: whole residual blocks go, those without which the outputs change least."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.utils.data import Subset

from paredown.core import progress
from paredown.core.errors import UserError
from paredown.core.settings import check_count, check_fields, names_of
from paredown.core.task import Task
from paredown.data import feed, observe, splits
from paredown.graph.memory import sweep
from paredown.graph.model import Model
from paredown.graph.names import check_exclude, fits
from paredown.graph.quantized.quantizers import quantizers
from paredown.graph.sites import sites
from paredown.graph.values import refresh_values
from paredown.steps.pruning.residual import (
    Unit,
    at_most,
    form,
    go_together,
    in_turn,
    innermost,
    inside,
    lost,
    remove,
    units,
    without,
)
from paredown.steps.step import ALONE, Entry, Setting, Step

aten = torch.ops.aten


# --- mathematics -----------------------------------------------------------------------------


def squared_norms(before: Tensor, after: Tensor) -> Tensor:
    """``|after - before|^2`` and ``|before|^2``, which add up over batches.

    What is NaN or infinite before (a masked logit) counts for nothing.

    Shapes: before, after (...) -> (2,) float64.

    Example:
        >>> squared_norms(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 5.0]))
        tensor([ 1., 25.], dtype=torch.float64)
    """
    known = torch.isfinite(before)
    old, new = before[known].double(), after[known].double()
    return torch.stack([(new - old).square().sum(), old.square().sum()])


def relative_change(sums: Tensor) -> float:
    """``|after - before| / |before|``, the mean over a model's outputs.

    It asks nothing of what the outputs mean; the KL divergence would take them for logits.

    Shapes: sums (outputs, 2), rows of `squared_norms`.

    Example:
        >>> relative_change(torch.tensor([[1.0, 25.0]]))
        0.2
    """
    changed, norm = sums.double().unbind(1)
    share = (changed / norm).sqrt().where(changed > 0, 0.0)  # nothing of nothing is no change
    return float(share.mean()) if not changed.isnan().any() else math.inf


def block_influence(x: Tensor, y: Tensor) -> Tensor:
    """One minus the cosine of a block's input and output: ShortGPT's BI (arXiv 2403.03853).

    Shapes: x, y (..., C) -> (...).

    Example:
        >>> block_influence(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]]))
        tensor([0.2929])
    """
    return 1 - torch.cosine_similarity(x.float(), y.float(), dim=-1)


# --- how much each matters -------------------------------------------------------------------


def _changes(model: Model, original: fx.GraphModule, found: list[Unit], task: Task) -> list[float]:
    """Without each unit, the `relative_change` of the original's outputs."""
    graphs = [without(model.graph, unit.branches) for unit in found]
    sums: list[Any] = [0.0] * len(graphs)
    batches = list(_batches(model, task))
    with torch.no_grad():
        work = _outputs(original, graphs, batches)
        total = len(batches) * len(graphs)
        for index, before, after in progress.track(work, "try without a block", total):
            rows = [squared_norms(old, new) for old, new in zip(before, after, strict=True)]
            sums[index] = sums[index] + torch.stack(rows)
    if not any(sum_[:, 1].any() for sum_ in sums):
        raise UserError(
            "calibration: the model's outputs are zero, NaN or infinite on all examples; check "
            "the calibration data."
        )
    return [relative_change(sum_) for sum_ in sums]


def _outputs(
    original: fx.GraphModule, graphs: list[fx.GraphModule], batches: list[list[Tensor]]
) -> Iterator[tuple[int, list[Tensor], list[Tensor]]]:
    """For each batch and graph: its number, the original's outputs and its own."""
    for batch in batches:
        before = original(*[leaf.clone() for leaf in batch])
        floats = [place for place, t in enumerate(before) if t.is_floating_point()]
        for index, graph in enumerate(graphs):
            after = graph(*[leaf.clone() for leaf in batch])  # an op may write to its input
            chosen = floats or range(len(before))
            yield index, [before[p] for p in chosen], [after[p] for p in chosen]


def _batches(model: Model, task: Task) -> Iterator[list[Tensor]]:
    """The calibration split as the graph takes it."""
    data, size = splits.split(task, "calibration"), feed.size(model, task.batch_size)
    for batch in feed.whole(model, data, "calibration", size).bound():
        yield batch.inputs


def _first(task: Task, count: int) -> Task:
    """The task with at most so many calibration examples."""
    split = splits.split(task, "calibration")
    kept = Subset(split, range(min(count, splits.size(split))))
    return dataclasses.replace(task, calibration=kept)


def _influences(model: Model, found: list[Unit], task: Task) -> list[float]:
    """The mean `block_influence` of each unit, from one pass over the calibration data.

    It is that of each token, or where the unit has convolutions, of each example's whole map.
    """
    spans = [(index, *span) for index, unit in enumerate(found) for span in _spans(unit)]
    starts = {start for _, start, _ in spans}
    maps = {site.weight for site in sites(model.graph) if site.kind.startswith("conv")}
    held: dict[str, Tensor] = {}
    totals = [[0.0, 0] for _ in found]

    def note(name: str, tensor: Tensor) -> None:
        for index, start, end in spans:
            if end == name:
                pair = (held[start], tensor)
                x, y = (t.flatten(1) for t in pair) if maps & found[index].weights else pair
                each = block_influence(x, y)
                totals[index][0] += float(each.double().sum())
                totals[index][1] += each.numel()
        if name in starts:
            held[name] = tensor.clone()  # a later op may write to it

    observe.run(model, task, starts | {end for _, _, end in spans}, note)
    return [total / max(count, 1) for total, count in totals]


def _spans(unit: Unit) -> list[tuple[str, str]]:
    """From the unit's input to its output, or where their shapes differ, of each branch."""
    first, last = unit.branches[0].shortcut, unit.branches[-1].add
    if form(first) == form(last):
        return [(first.name, last.name)]
    return [(branch.shortcut.name, branch.add.name) for branch in unit.branches]


# --- the step --------------------------------------------------------------------------------


@dataclass(frozen=True)
class PruneLayers(Step):
    """Remove whole residual blocks: in ``x + f(x)``, f goes and x stays (layer or depth pruning).

    It pays on every runtime and device, since what is removed is neither stored nor run. It needs
    residual connections, and most deep models need fine-tuning after it.

    Args:
        count: how many blocks to remove.
        ratio: in place of ``count``, the share of the blocks that can be removed, below 1.
        unit: "block" removes all branches of one of the user's modules (attention and MLP of
            ``layers.3``); "branch" each by itself.
        criterion: "output_change" removes the block without which the model's outputs change
            least (`relative_change`), then measures the others again without it, since one
            block can stand in for another; "cosine" ranks all blocks in one pass by how little
            they turn their input (`block_influence`, arXiv 2403.03853).
        exclude: names or globs of blocks, modules or weights to leave alone: "layer1.*".
        examples: at most so many of the calibration split are run.

    Raises:
        UserError: a setting is out of its range; the model has no residual block, or fewer than
            asked can go; a name in ``exclude`` fits nothing; no calibration data; or it is
            quantized.

    Example:
        >>> import paredown
        >>> from torch.utils.data import TensorDataset
        >>> class Net(torch.nn.Sequential):
        ...     def forward(self, x):
        ...         for layer in self:
        ...             x = x + layer(x).relu()
        ...         return x
        >>> net = Net(*[torch.nn.Linear(4, 4) for _ in range(3)])
        >>> _ = torch.nn.init.constant_(net[1].bias, -9.0)  # the second never adds anything
        >>> rows = TensorDataset(torch.rand(8, 4), torch.zeros(8))
        >>> task = Task((torch.zeros(1, 4),), score=lambda out, y: out[:, 0], calibration=rows)
        >>> pruned = PruneLayers(1).apply(paredown.capture(net, task.example), task)
        >>> sorted(pruned.state_dict())
        ['0.bias', '0.weight', '2.bias', '2.weight']
    """

    needs: ClassVar[frozenset[str]] = frozenset({"calibration"})
    table: ClassVar[tuple[Entry, ...]] = (
        Entry(
            call="PruneLayers(1)",
            does="removes the residual blocks that change the output least",
            pays="deep models, for latency",
            does_not="a few blocks that each matter",
        ),
    )

    count: int | None = 1
    ratio: float | None = None
    unit: str = "block"
    criterion: str = "output_change"
    exclude: tuple[str, ...] = ()
    examples: int = 64

    def __post_init__(self) -> None:
        check_fields(self)
        object.__setattr__(self, "exclude", names_of("exclude", self.exclude))
        check_count("examples", self.examples)
        if self.unit not in ("block", "branch"):
            raise UserError(f'unit: expected "block" or "branch", got {self.unit!r}.')
        if self.criterion not in ("output_change", "cosine"):
            raise UserError(
                f'criterion: expected "output_change" or "cosine", got {self.criterion!r}.'
            )
        if self.ratio is None:
            check_count("count", self.count)
        elif not isinstance(self.ratio, (int, float)) or not 0 < self.ratio < 1:
            raise UserError(f"ratio: expected above 0 and below 1, got {self.ratio!r}.")
        elif self.count not in (None, 1):
            raise UserError(f"count: got {self.count!r} beside ratio={self.ratio!r}; give one.")

    def apply(self, model: Model, task: Task, setting: Setting = ALONE) -> Model:
        """A copy without the blocks, and without the parameters that only they used."""
        pruned = prepared(model)
        few = _first(task, max(self.examples, feed.size(pruned, 1)))
        found = _included(units(pruned.graph, self.unit), self.exclude)
        count = self._how_many(pruned.graph, found)
        choose = _by_cosine if self.criterion == "cosine" else _by_output
        for unit, why in choose(pruned, found, few, count):
            remove(pruned, unit)
            progress.say(f"  removed {unit.name} ({why})")
        return pruned

    def _how_many(self, graph: fx.GraphModule, found: list[Unit]) -> int:
        """The count asked, which the graph allows; told before anything is measured."""
        there, kinds = len(innermost(found)), _KINDS[self.unit]
        asked = round(self.ratio * there) if self.ratio is not None else self.count
        assert asked is not None  # __post_init__ wants one of the two
        if asked == 0:
            raise UserError(
                f"ratio: {self.ratio!r} of the {there} {kinds} that can be removed is none; ask "
                f"for {0.5 / there:.3g} or more, or for count=1."
            )
        most = at_most(graph, found, min(asked, there))
        if asked <= most:
            return asked
        why = "" if most == there else " (an input or all weights would go with one more)"
        if self.ratio is not None:
            raise UserError(
                f"ratio: {self.ratio!r} of the {there} {kinds} is {asked}, and {most} can be "
                f"removed{why}; ask for {most / there:.3g} or less."
            )
        raise UserError(
            f"count: expected at most {most}, the {kinds} that can be removed{why}, got {asked}; "
            "ask for fewer."
        )


_KINDS = {"block": "blocks", "branch": "branches"}


def prepared(model: Model) -> Model:
    """A copy in evaluation mode without dead code, whose nodes know their shapes.

    Raises:
        UserError: the model is quantized: the scales of what follows a block are those with it.
    """
    if quantizers(model.graph):
        raise UserError(
            "PruneLayers: the model is quantized, with scales for the values it has with all its "
            "blocks; remove blocks before Quantize."
        )
    copied = model.copy().eval()
    adds = [n for n in copied.graph.graph.nodes if n.target in (aten.add.Tensor, aten.add_.Tensor)]
    if any("val" not in node.meta for node in adds):
        refresh_values(copied)
    sweep(copied.graph.graph)
    copied.graph.recompile()
    return copied


def _included(found: list[Unit], exclude: tuple[str, ...]) -> list[Unit]:
    """The units that may go.

    Raises:
        UserError: there is none, a pattern fits nothing, or nothing is left.
    """
    if not found:
        raise UserError(
            "PruneLayers: the model has no residual block to remove; it needs an addition "
            "x + f(x) in which f has weights and its output the shape of x. "
            "PruneChannels works without one."
        )
    names = {unit: _names(unit) for unit in found}
    check_exclude(exclude, set().union(*names.values()), "block")
    left = [unit for unit in found if not fits(names[unit], exclude)]
    if not left:
        raise UserError(f"exclude: leaves none of the {len(found)} residual blocks to remove.")
    return left


def _names(unit: Unit) -> set[str]:
    """The unit's own, those of its weights, and of the modules that hold them."""
    paths = {unit.name, *unit.weights}
    for weight in unit.weights:
        parts = weight.split(".")
        paths |= {".".join(parts[:end]) for end in range(1, len(parts))}
    return paths


def _removable(graph: fx.GraphModule, found: list[Unit], left: int) -> list[Unit]:
    """The units that are still there and whose removal leaves ``left - 1`` more to remove."""
    alive = set(graph.graph.nodes)
    there = [u for u in found if all(branch.add in alive for branch in u.branches)]
    inner = innermost(there)
    fitting = [
        u
        for u in there
        if sum(v is not u and not inside(v, u) for v in inner) >= left - 1
        and lost(graph, u.branches)
    ]
    if not go_together(graph, inner):  # which of them goes first may decide how many can
        fitting = [u for u in fitting if in_turn(graph, there, left, u) >= left]
    if not fitting:
        raise UserError(
            f"PruneLayers: {left} of the blocks cannot be removed after the others, since an input "
            "or all weights would go with them; ask for fewer."
        )
    return fitting


def _by_output(
    model: Model, found: list[Unit], task: Task, count: int
) -> Iterator[tuple[Unit, str]]:
    """The unit without which the outputs change least, then the next, in the model so far."""
    original = without(model.graph, ())
    for left in range(count, 0, -1):
        found = _removable(model.graph, found, left)
        changes = _changes(model, original, found, task)
        best = min(range(len(found)), key=changes.__getitem__)
        if changes[best] == math.inf:
            raise UserError(
                "PruneLayers: without any one of its blocks, the model's outputs become NaN or "
                "infinite on the calibration data; ask for fewer."
            )
        yield found[best], f"output changes by {100 * changes[best]:.3g} %"


def _by_cosine(
    model: Model, found: list[Unit], task: Task, count: int
) -> Iterator[tuple[Unit, str]]:
    """The units of least influence, all measured in the whole model."""
    influence = dict(zip(found, _influences(model, found, task), strict=True))
    for left in range(count, 0, -1):
        best = min(_removable(model.graph, found, left), key=influence.__getitem__)
        yield best, f"influence {influence[best]:.3g}"
