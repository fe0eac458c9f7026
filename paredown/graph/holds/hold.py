"""What a step leaves behind for all later ones to hold, and how each part of the house does."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, Protocol

from torch import Tensor, nn

from paredown.graph.parts import Parts


class Keeper(Protocol):
    """Holds it while a model trains; made anew for each epoch."""

    def gradients(self, weights: list[nn.Parameter]) -> tuple[list[nn.Parameter], list[Tensor]]:
        """Bend the gradients, in place.

        Returns:
            those of the weights that train by themselves, and, for the others, the gradients of
            what trains in their place.
        """

    def hold(self) -> None:
        """Put the weights back to where it holds, after a step has moved them."""


class Hold(Protocol):
    """Something that a model keeps from one of its steps on.

    It stands in a field of the model that maps the names of parameters to what is held of each.
    """

    field: str

    def broken(self, model: Parts) -> Iterator[str]:
        """A sentence for each weight of which it does not hold any more."""

    def keeper(self, model: Parts) -> Keeper:
        """What holds it while the model trains."""

    def mark(self, model: Parts) -> Iterator[tuple[str, Tensor]]:
        """What a training that goes on must find the same, by name."""

    def cut(self, model: Parts, name: str, keep: dict[int, Tensor]) -> None:
        """What is left of it, in place, where a parameter keeps only these indices by dimension."""

    def stored(self, model: Parts) -> tuple[Any, dict[str, Tensor], Collection[str]]:
        """What a file holds: what JSON can say of it, tensors by name, and the names of weights
        that need not be stored besides."""

    def restored(self, told: Any, ties: dict[str, str], tensors: dict[str, Tensor]) -> Any:
        """The field of the model again; weights that were not stored are put among the tensors at
        ``state:...``, under the name that tied ones go by.

        Raises:
            ValueError: the parts do not belong together.
        """
