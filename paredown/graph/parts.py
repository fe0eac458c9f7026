"""What a model is made of: its inputs, and all that a file of it holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, fx

from paredown.graph.holds.sharing import Sharing
from paredown.graph.structure import Structure


@dataclass(frozen=True)
class Input:
    """One tensor input: its name, its example as deployed, and which dimensions vary."""

    name: str
    example: Tensor
    dynamic: dict[int, str] = field(default_factory=dict)  # dimension -> name


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
