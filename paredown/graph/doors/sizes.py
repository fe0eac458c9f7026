"""How far a captured graph holds: the sizes at which it computes what its module does.

The exporter follows one way through the module's code, at the sizes of the example, and notes what
it took for true of them on the way. Sizes at which one of that is not so, and the usual ones, are
tried on the module itself.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch
from torch import Tensor, fx

from paredown.graph.parts import Limit

# Whether graph and module agree on these sizes; None where both refuse them.
Agrees = Callable[[list[Tensor]], bool | None]
Place = tuple[int, int]  # an input's number, and a dimension of it

DENSE = 64  # sizes of which each is asked about, at least
LARGEST = 1 << 20  # sizes from here on are as this one
WAYS = 32  # other ways through the code that are tried on each side of the example
TRIED_ELEMENTS = 1 << 22  # of the inputs together; what is larger is not tried


@dataclass(frozen=True)
class Guards:
    """What the exporter took for true of the inputs' sizes, as it writes it out in Python.

    Attributes:
        inputs: the names of the inputs' tensors; together they are ``tensors`` too.
    """

    rules: tuple[CodeType, ...] = ()
    inputs: tuple[str, ...] = ()

    @staticmethod
    def of(program: Any) -> Guards:
        """Those of an exported program."""
        nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
        inputs = [
            name
            for name in program.graph_signature.user_inputs
            if name in nodes and isinstance(nodes[name].meta.get("val"), Tensor)
        ]
        texts = list(getattr(program, "_guards_code", ()))
        for place, name in enumerate(inputs):
            for dim, size in enumerate(nodes[name].meta["val"].shape):
                if _is_free(size):
                    least, most = _range_of(program, size)
                    where = f"L['tensors'][{place}].size()[{dim}]"
                    texts += [f"{where} >= {least}"] if least > 1 else []
                    texts += [f"{where} <= {most}"] if most is not None else []
        rules = tuple(compile(text, "<guard>", "eval") for text in dict.fromkeys(texts))
        return Guards(rules, tuple(inputs))

    def broken(self, shapes: Sequence[Sequence[int]]) -> tuple[int, ...]:
        """Which of them are not so at these shapes.

        Example:
            >>> rule = compile("L['tensors'][0].size()[1] <= 24", "<guard>", "eval")
            >>> Guards((rule,)).broken([(2, 24)]), Guards((rule,)).broken([(2, 25)])
            ((), (0,))
        """
        tensors = [_Shape(shape) for shape in shapes]
        named = dict(zip(self.inputs, tensors, strict=False))
        names = {"L": {**named, "tensors": tensors}, "math": math, "torch": torch}
        return tuple(n for n, rule in enumerate(self.rules) if not _holds(rule, names))


class _Shape(tuple[int, ...]):
    """A shape that is asked for as a tensor is."""

    def size(self) -> tuple[int, ...]:
        return self


def _holds(rule: CodeType, names: dict[str, Any]) -> bool:
    try:
        return bool(eval(rule, names))
    except ArithmeticError:  # a division by what is nothing at this size
        return False
    except (KeyError, TypeError):  # of an input within another, of which nothing is known here
        return True


def _is_free(size: Any) -> bool:
    """Whether it is a size of its own, not fixed and not made of another's."""
    return isinstance(size, torch.SymInt) and bool(size.node.expr.is_Symbol)


def _range_of(program: Any, size: torch.SymInt) -> Limit:
    """The sizes that an exported program was made for; 2 as the least is said of all."""
    known = program.range_constraints.get(size.node.expr)
    if known is None:
        return 1, None
    least = int(known.lower) if known.lower > 2 else 1
    return least, int(known.upper) if known.upper < LARGEST else None


def varies(placeholder: fx.Node, dim: int) -> bool:
    """Whether the capture has left a dimension open; a symbol may stand for one number too."""
    shape = placeholder.meta["val"].shape
    if dim >= len(shape) or isinstance(shape[dim], int):
        return False
    return not shape[dim].node.expr.is_Integer


@dataclass(frozen=True)
class _Axis:
    """Dimensions whose sizes go together: each is made of one size, most often as it is."""

    places: dict[Place, Any]  # place -> its size as an expression
    start: int  # the size it was captured with
    is_batch: bool

    def sizes(self, size: int) -> dict[Place, int]:
        """The size of each place where the axis has this one."""
        return {
            place: int(made.subs(dict.fromkeys(made.free_symbols, size)))
            for place, made in self.places.items()
        }


def limits(
    nodes: list[fx.Node],
    guards: Guards,
    leaves: list[Tensor],
    names: list[dict[int, str]],
    agrees: Agrees,
) -> list[dict[int, Limit]]:
    """For each input the dimensions that may vary, and within which limits the graph holds.

    Args:
        nodes: the graph's inputs.
        leaves: the inputs that the graph was captured with.
        names: for each input what the user calls its dimensions; those that have one name vary
            together.
    """
    found: list[dict[int, Limit]] = [{} for _ in leaves]
    kept: dict[int, tuple[_Axis, Limit]] = {}
    for number, axis in enumerate(_axes(nodes, leaves, names)):
        limit = _limit_of(axis, guards, leaves, agrees)
        if limit is not None:
            kept[number] = axis, limit
    if len(kept) > 1 and not _agree_together(list(kept.values()), leaves, agrees):
        kept = {n: (axis, limit) for n, (axis, limit) in kept.items() if axis.is_batch}
    for axis, limit in kept.values():
        for place, dim in axis.places:
            least, most = (None if size is None else axis.sizes(size)[place, dim] for size in limit)
            found[place][dim] = least or 1, most
    return found


def _axes(
    nodes: list[fx.Node], leaves: list[Tensor], names: list[dict[int, str]]
) -> Iterator[_Axis]:
    """The dimensions that are open, those together that must be or are called the same."""
    open_: dict[Place, Any] = {
        (place, dim): node.meta["val"].shape[dim].node.expr
        for place, node in enumerate(nodes)
        for dim in sorted(names[place])
        if varies(node, dim)
    }
    groups: list[set[Place]] = []
    for place, made in open_.items():
        key = names[place[0]][place[1]], leaves[place[0]].shape[place[1]]
        joined = {place}
        for group in list(groups):
            if any(
                open_[other].free_symbols & made.free_symbols
                or (names[other[0]][other[1]], leaves[other[0]].shape[other[1]]) == key
                for other in group
            ):
                groups.remove(group)
                joined |= group
        groups.append(joined)
    for group in groups:
        places = {place: open_[place] for place in sorted(group)}
        starts = {leaves[i].shape[d] for (i, d), made in places.items() if made.is_Symbol}
        if len(starts) == 1:  # else there is no one size to try
            yield _Axis(places, starts.pop(), any(dim == 0 for _, dim in group))


def _limit_of(axis: _Axis, guards: Guards, leaves: list[Tensor], agrees: Agrees) -> Limit | None:
    """The sizes around the captured one at which the graph holds; None where it is the only one."""

    @functools.cache
    def broken(size: int) -> tuple[int, ...]:
        return guards.broken(_shapes(leaves, axis.sizes(size)))

    @functools.cache
    def holds(size: int) -> bool | None:
        """Whether graph and module agree, or both refuse; None where that takes too much to try."""
        sizes = axis.sizes(size)
        if size > max(DENSE, 4 * axis.start) or _elements(leaves, sizes) > TRIED_ELEMENTS:
            return None
        found = agrees(resized(leaves, sizes))
        return found is True or (found is None and not axis.is_batch)

    start = axis.start
    least = _edge(_sizes_from(start, 1, broken), broken, holds) or 1
    most = _edge(_sizes_from(start, LARGEST, broken), broken, holds)
    usual = {1, 2, 3, start + 5}
    if not axis.is_batch:
        usual = {1, 2, 3, start + 1, 2 * start, 2 * start + 1, 3 * start}
    for size in sorted(usual - {start}):
        if size < least or (most is not None and size > most) or holds(size) is not False:
            continue
        if size > start:
            most = start  # somewhere between the two: where, nothing tells
        else:
            least = size + 1 if size < 3 else start
    return None if (least, most) == (start, start) else (least, most)


def _sizes_from(start: int, end: int, broken: Callable[[int], tuple[int, ...]]) -> list[int]:
    """Sizes from the captured one on: each at first, then those at which another way begins."""
    step = 1 if end > start else -1
    near = max(DENSE, start) + DENSE if step > 0 else start - 2 * DENSE
    sizes = list(range(start, max(near, 0) if step < 0 else near, step))
    while (end - sizes[-1]) * step > 0:
        here = sizes[-1]
        there = min(2 * here, end) if step > 0 else max(here // 2, end)
        while broken(here) != broken(there) and abs(there - here) > 1:
            middle = (here + there) // 2
            here, there = (middle, there) if broken(middle) == broken(here) else (here, middle)
        sizes.append(there)
    return sizes


def _edge(
    sizes: list[int], broken: Callable[[int], tuple[int, ...]], holds: Callable[[int], bool | None]
) -> int | None:
    """The last of these sizes, in order, up to which the graph holds; None where it always does.

    Where something is not so that was taken for true, the first and the last size are tried of
    those at which the same is not so.
    """
    known: set[tuple[int, ...]] = {()}
    step = 1 if sizes[-1] > sizes[0] else -1
    for size in sizes:
        if broken(size) in known:
            continue
        if len(known) > WAYS or not holds(size):
            return size - step
        same = (each for each in reversed(sizes) if broken(each) == broken(size))
        if not next(held for held in map(holds, same) if held is not None):
            return size - step
        known.add(broken(size))
    return None


def _agree_together(kept: list[tuple[_Axis, Limit]], leaves: list[Tensor], agrees: Agrees) -> bool:
    """Whether graph and module agree where all axes have another size at a time."""
    for factor in (2, 3):
        sizes: dict[Place, int] = {}
        for number, (axis, (least, most)) in enumerate(kept):
            wished = 3 if axis.is_batch else axis.start * factor + (number % 2) * axis.start
            sizes |= axis.sizes(max(least, min(wished, LARGEST if most is None else most)))
        if _elements(leaves, sizes) <= TRIED_ELEMENTS:
            if agrees(resized(leaves, sizes)) is False:
                return False
    return True


def _shapes(leaves: list[Tensor], sizes: dict[Place, int]) -> list[list[int]]:
    return [
        [sizes.get((place, dim), size) for dim, size in enumerate(leaf.shape)]
        for place, leaf in enumerate(leaves)
    ]


def _elements(leaves: list[Tensor], sizes: dict[Place, int]) -> int:
    return sum(map(math.prod, _shapes(leaves, sizes)))


def resized(leaves: list[Tensor], sizes: dict[Place, int]) -> list[Tensor]:
    """The inputs at other sizes, repeated or cut; numbers that are all one become different ones.

    Example:
        >>> resized([torch.tensor([[1.0, 2.0, 3.0]])], {(0, 1): 5})
        [tensor([[1., 2., 3., 1., 2.]])]
    """
    made = []
    for place, leaf in enumerate(leaves):
        for dim in range(leaf.dim()):
            size = sizes.get((place, dim), leaf.shape[dim])
            if size != leaf.shape[dim]:
                leaf = leaf.index_select(dim, torch.arange(size) % leaf.shape[dim])
        if leaf.is_floating_point() and leaf.numel() and bool((leaf == leaf.flatten()[0]).all()):
            noise = torch.rand(leaf.shape, generator=torch.Generator().manual_seed(0)) + 0.5
            leaf = (noise * (leaf.flatten()[0] or 1.0)).to(leaf.dtype)
        made.append(leaf)
    return made
