"""What keeps shared weights equal while they train."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from paredown.graph.holds.shared import Book, Part, books
from paredown.graph.holds.sharing import member_sums
from paredown.graph.parts import Parts


class Ties:
    """Weights that share a value move as that value would: along the sum of their gradients (Deep
    Compression, arXiv 1510.00149), with one momentum, to one place."""

    def __init__(self, model: Parts) -> None:
        self.books: list[Book] = [
            book for book in books(model) if any(part.weight.requires_grad for part in book.parts)
        ]

    def gradients(self, weights: list[nn.Parameter]) -> tuple[list[nn.Parameter], list[Tensor]]:
        """The weights that are not shared, and one gradient for each value of the others, which
        are left with the gradient of their value."""
        summed: list[Tensor] = []
        tied: set[int] = set()
        for book in self.books:
            parts = [part for part in book.parts if part.weight.grad is not None]
            if not parts:
                continue
            total = torch.stack([_sum(part, book.size) for part in parts]).sum(0)
            for part in parts:
                part.weight.grad = part.expanded(total)
            summed.append(total)
            tied |= {id(part.weight) for part in parts}
        return [p for p in weights if id(p) not in tied], summed

    def hold(self) -> None:
        """Equal to the last bit, whichever kernel has moved them."""
        with torch.no_grad():
            for book in self.books:
                values = book.values()
                for part in book.parts:
                    part.weight.copy_(part.expanded(values))


def _sum(part: Part, size: int) -> Tensor:
    assert part.weight.grad is not None
    return member_sums(part.signed(part.weight.grad.reshape(-1)), part.members, size)
