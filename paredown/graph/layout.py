"""Where the channels of pictures stand in a model's inputs and outputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten

CONVOLUTIONS = {aten.conv2d.default, aten.conv2d.padding, aten.convolution.default}
MOVES = {aten.permute.default, aten.movedim.int, aten.movedim.intlist, aten.transpose.int}
RESHAPES = {aten.view.default, aten.reshape.default}
FIRST, LAST = (0, 3, 1, 2), (0, 2, 3, 1)  # from channels last to first, and back


def takes_channels_last(graph: fx.GraphModule) -> bool:
    """Whether the first input is pictures (B, H, W, C): whatever convolution reads them, reads them
    with their channels put first.

    Example:
        >>> class Last(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.conv = torch.nn.Conv2d(3, 4, 3)
        ...
        ...     def forward(self, x):
        ...         return self.conv(x.permute(0, 3, 1, 2) / 255).permute(0, 2, 3, 1)
        >>> from paredown import capture
        >>> model = capture(Last(), (torch.zeros(1, 8, 8, 3),))
        >>> takes_channels_last(model.graph), gives_channels_last(model.graph)
        (True, True)
    """
    start = next(node for node in graph.graph.nodes if node.op == "placeholder")
    if len(_shape(start)) != 4:
        return False
    orders = list(_read_by_convolutions(start, (0, 1, 2, 3), set()))
    return bool(orders) and all(order == FIRST for order in orders)


def gives_channels_last(graph: fx.GraphModule) -> bool:
    """Whether the first output is maps (B, H, W, C), which were computed with their channels
    first."""
    [end] = [node for node in graph.graph.nodes if node.op == "output"]
    node = next(iter(end.all_input_nodes), None)
    moves: list[fx.Node] = []
    while node is not None and len(_shape(node)) == 4:
        before = node.all_input_nodes
        if node.target in MOVES | RESHAPES:
            moves.append(node)
            order: tuple[int, ...] | None = (0, 1, 2, 3)
            for move in reversed(moves):
                order = order and _moved(move, order)
            if order in (LAST, None):
                return order == LAST
        else:
            before = [each for each in before if _shape(each) == _shape(node)]
        node = before[0] if len(before) == 1 else None
    return False


def _read_by_convolutions(
    node: fx.Node, order: tuple[int, ...], seen: set[fx.Node]
) -> Iterator[tuple[int, ...]]:
    """The order of dimensions in which each convolution reads a value; nothing is known behind an
    op that changes the sizes otherwise."""
    for user in node.users:
        if user in seen:
            continue
        seen.add(user)
        if user.target in CONVOLUTIONS and user.args[0] is node:
            yield order
        elif user.target in MOVES | RESHAPES:
            moved = _moved(user, order)
            if moved is not None:
                yield from _read_by_convolutions(user, moved, seen)
        elif _shape(user) == _shape(node):
            yield from _read_by_convolutions(user, order, seen)


def _moved(node: fx.Node, order: tuple[int, ...]) -> tuple[int, ...] | None:
    """The order behind an op that moves dimensions; None where it does something else."""
    old, new = _shape(node.all_input_nodes[0]), _shape(node)
    if len(old) != 4 or len(new) != 4:
        return None
    if node.target in MOVES:
        target: Any = node.target
        labelled = torch.empty(2, 3, 5, 7, device="meta")  # a size tells which dimension it was
        moved = target(labelled, *node.args[1:], **node.kwargs).shape
        return tuple(order[(2, 3, 5, 7).index(size)] for size in moved)
    for turn in (FIRST, LAST):  # of one channel, a reshape does the same
        alone = old[3 if turn == FIRST else 1] == 1
        if alone and old[1:] != new[1:] and new[1:] == [old[dim] for dim in turn][1:]:
            return tuple(order[dim] for dim in turn)
    return order if old[1:] == new[1:] else None


def _shape(node: fx.Node) -> Sequence[int | str]:
    """The sizes, one that varies as its symbol: comparing symbols might settle them."""
    value = node.meta.get("val")
    sizes = value.shape if isinstance(value, Tensor) else ()
    return [size if isinstance(size, int) else str(size) for size in sizes]
