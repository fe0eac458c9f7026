"""What a model is made of: its inputs, and all that a file of it holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, fx

from paredown.graph.holds.sharing import Sharing
from paredown.graph.structure import Structure

Limit = tuple[int, int | None]  # the least size that a dimension may have, and the most


@dataclass(frozen=True)
class Input:
    """One tensor input: its name, its example as deployed, and which dimensions vary.

    Attributes:
        limits: of the dimensions that vary, those that do so within limits alone.
    """

    name: str
    example: Tensor
    dynamic: dict[int, str] = field(default_factory=dict)  # dimension -> name
    limits: dict[int, Limit] = field(default_factory=dict)


def told(limit: Limit) -> str:
    """A limit in words.

    Example:
        >>> told((1, 24)), told((4, None)), told((4, 24))
        ('at most 24', 'at least 4', '4 to 24')
    """
    least, most = limit
    if most is None:
        return f"at least {least}"
    return f"at most {most}" if least <= 1 else f"{least} to {most}"


class Parts(Protocol):
    """What stands in the file of a model, see `paredown.Model`, which has these."""

    @property
    def graph(self) -> fx.GraphModule: ...
    @property
    def inputs(self) -> tuple[Input, ...]: ...
    @property
    def arguments(self) -> Structure: ...
    @property
    def outputs(self) -> Structure: ...
    @property
    def masks(self) -> dict[str, Tensor]: ...
    @property
    def kept(self) -> dict[str, dict[int, Tensor]]: ...
    @property
    def notes(self) -> tuple[str, ...]: ...
    @property
    def shared(self) -> dict[str, Sharing]: ...
