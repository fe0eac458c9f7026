"""Weights that share values stay equal; a file holds each value once, and the values' numbers."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor

from paredown.core.errors import UserError
from paredown.graph.holds.shared import Part, apart, books
from paredown.graph.holds.sharing import Sharing
from paredown.graph.holds.ties import Ties
from paredown.graph.parts import Parts

MOST_WEIGHTS = 2**31  # of a tensor, so that a file cannot ask for any amount of memory


def stored(model: Parts) -> tuple[dict[str, dict[str, Any]], dict[str, Tensor]]:
    """What a file holds in place of shared weights: for each its settings, and tensors by name.

    Raises:
        UserError: weights that share a value have come apart.
    """
    gone = next(apart(model), None)
    if gone is not None:
        raise UserError(
            f"model: the weights of {gone!r} that share a value have come apart; train with "
            "FineTune, which keeps them together."
        )
    described: dict[str, dict[str, Any]] = {}
    tensors: dict[str, Tensor] = {}
    for book in books(model):
        tensors[f"book:{book.name}"] = book.values().to(book.parts[0].weight.dtype)
        for part in book.parts:
            sharing = model.shared[part.name]
            described[part.name] = {
                **{"book": sharing.book, "size": sharing.size, "axis": sharing.axis},
                **{"block": sharing.block, "seed": sharing.seed, "values": book.name},
                "shape": list(part.weight.shape),
            }
            if sharing.codes is not None:
                tensors[f"codes:{part.name}"] = sharing.codes
    return described, tensors


def restored(
    described: dict[str, dict[str, Any]], ties: dict[str, str], tensors: dict[str, Tensor]
) -> dict[str, Sharing]:
    """The sharing that `stored` told of; each weight is put at ``state:...`` among the tensors,
    under the name that tied ones go by.

    Raises:
        ValueError: the parts do not belong together.
    """
    found: dict[str, Sharing] = {}
    for name, row in described.items():
        codes = tensors.get(f"codes:{name}")
        size, axis, block, seed = (int(row[key]) for key in ("size", "axis", "block", "seed"))
        shape = [int(each) for each in row["shape"]]
        values, mask = tensors[f"book:{row['values']}"], tensors.get(f"mask:{name}")
        _check(name, size, axis, block, shape, codes, values)
        sharing = Sharing(str(row["book"]), size, codes, axis, block, seed)
        part = Part(
            name,
            torch.empty(shape, dtype=values.dtype),
            sharing.members(shape),
            sharing.signs(shape),
            None if mask is None or bool(mask.all()) else mask.reshape(-1),
        )
        tensors[f"state:{ties.get(name, name)}"] = part.expanded(values)
        found[name] = sharing
    return found


def _check(
    name: str,
    size: int,
    axis: int,
    block: int,
    shape: list[int],
    codes: Tensor | None,
    values: Tensor,
) -> None:
    count = math.prod(shape)
    fits = values.shape == (size,) and size > 0 and 0 < count <= MOST_WEIGHTS and block > 0
    if codes is not None:
        fits = fits and codes.dim() == 2 and codes.numel() * block == count
        fits = fits and 0 <= axis < len(shape) and codes.shape[0] == shape[axis]
        fits = fits and not codes.is_floating_point() and int(codes.min()) >= 0
        fits = fits and (int(codes.max()) + 1) * block <= size
    if not fits:
        raise ValueError(f"what {name!r} shares does not fit it")


class SharedValues:
    """The `paredown.graph.holds.hold.Hold` of weights that are one value."""

    field = "shared"

    def broken(self, model: Parts) -> Iterator[str]:
        for name in apart(model):
            yield f"weights of {name!r} that shared a value came apart."

    def keeper(self, model: Parts) -> Ties:
        return Ties(model)

    def mark(self, model: Parts) -> Iterator[tuple[str, Tensor]]:
        for name, tied in sorted(model.shared.items()):
            told = f"{name}:{tied.book}:{tied.size}:{tied.seed}:{tied.block}"
            yield told, torch.empty(0) if tied.codes is None else tied.codes

    def cut(self, model: Parts, name: str, keep: dict[int, Tensor]) -> None:
        model.shared.pop(name, None)  # blocks and hashes do not outlive a cut

    def stored(self, model: Parts) -> tuple[Any, dict[str, Tensor], Collection[str]]:
        if not model.shared:
            return None, {}, ()
        told, tensors = stored(model)
        return told, tensors, told.keys()

    def restored(
        self, told: Any, ties: dict[str, str], tensors: dict[str, Tensor]
    ) -> dict[str, Sharing]:
        return restored(told or {}, ties, tensors)
