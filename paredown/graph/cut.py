"""Cut a model for good, or mask it: the units that a choice leaves out."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from paredown.graph.coupling import Choice, Coupling
from paredown.graph.edit import refresh_values
from paredown.graph.labels import Value
from paredown.graph.model import Model, owner_of
from paredown.graph.rules import rewrite_of
from paredown.graph.rules.values import values_of
from paredown.graph.sites import tensor_of
from paredown.types import UserError


class Cut:
    """What stays of every value of the graph: what the rules rewrite sizes by."""

    def __init__(self, coupling: Coupling, choice: Choice) -> None:
        self._values = coupling.values
        self._alive = coupling.alive(choice)

    def value(self, node: Any) -> Value:
        """The value as it was before the cut."""
        found = self._values[node.name]
        assert isinstance(found, Value)
        return found

    def parts(self, node: Any) -> list[Value]:
        """The values of an op that gives several."""
        found = self._values[node.name]
        assert isinstance(found, list)
        return [part for part in found if isinstance(part, Value)]

    def kept(self, node: Any, axis: int) -> np.ndarray | None:
        """(size,) bool: which indices of the axis stay; None where all do."""
        value = self.value(node)
        axis %= max(1, len(value.shape))
        block = value.block(axis)
        if block is None:
            return None
        alive = self._alive[block.labels]
        others = tuple(d for d in range(alive.ndim) if block.axes[d] != axis)
        kept = alive.any(others)
        if not kept.any():
            raise UserError(
                f"{node.name}: nothing would be left of its dimension {axis}; keep more units."
            )
        return None if kept.all() else kept

    def count(self, node: Any, axis: int) -> int | None:
        """How many indices stay; None where all do."""
        kept = self.kept(node, axis)
        return None if kept is None else int(kept.sum())

    def size(self, node: Any, axis: int) -> int:
        count = self.count(node, axis)
        return self.value(node).shape[axis] if count is None else count

    def whole_rows(self, node: Any, axis: int, rows: int) -> bool:
        """Whether the axis, seen as so many rows, keeps or loses each as a whole."""
        kept = self.kept(node, axis)
        if kept is None:
            return True
        table = kept.reshape(rows, -1)
        return bool((table == table[:, :1]).all())


def cut(model: Model, coupling: Coupling, choice: Choice) -> Model:
    """A copy without the units that ``choice`` leaves out: smaller tensors, constants rewritten.

    ``coupling`` must be that of this model. ``kept`` of the result says which indices of the
    original's parameters are left.

    Raises:
        UserError: a group would vanish, or the cut graph would not run; names the op.
    """
    made = model.copy()
    state = Cut(coupling, choice)
    for node in made.graph.graph.nodes:
        rewrite = rewrite_of(node) if node.op == "call_function" else None
        if rewrite is not None and coupling.values[node.name] and node.name not in coupling.whole:
            rewrite(state, node)
    _slice(made, coupling, choice)
    made.graph.graph.lint()
    made.graph.recompile()
    give_values(made)
    return made


def give_values(made: Model) -> None:
    """Give every op its new shape; where the data decides one, by running the model."""
    try:
        try:
            refresh_values(made)
        except Exception:  # fake tensors cannot tell; if the graph is wrong, running it says so
            values = values_of(made)
            for node in made.graph.graph.nodes:
                node.meta["val"] = values[node.name]
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"the edited graph does not run: {reason}") from error


def mask(model: Model, coupling: Coupling, choice: Choice) -> Model:
    """A copy of the same shape, with the units that ``choice`` leaves out at zero."""
    made = model.copy()
    for group in coupling.groups:
        kept = choice.get(group.name, np.ones(group.size, dtype=bool))
        for member in group.members if not kept.all() else ():
            tensor = tensor_of(made.graph, member.name)
            if tensor.is_floating_point() and (member.name, member.dim) not in coupling.never_zero:
                gone = torch.from_numpy(member.indices[~kept].ravel())
                with torch.no_grad():
                    tensor.index_fill_(member.dim, gone.to(tensor.device), 0.0)
    return made


def _slice(model: Model, coupling: Coupling, choice: Choice) -> None:
    """Parameters, buffers and masks without what is cut; tied ones stay tied."""
    alive = coupling.alive(choice)
    aliases = _aliases(model.graph)
    for tensor in coupling.tensors:
        keep = {
            dim: torch.from_numpy(np.flatnonzero(alive[roots]))
            for dim, roots in enumerate(tensor.roots)
            if roots is not None and not alive[roots].all()
        }
        if not keep:
            continue
        old = tensor_of(model.graph, tensor.name)
        new = _taken(old.detach(), keep)
        placed = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
        for name in aliases[id(old)]:
            _place(model.graph, name, placed)
            _note(model, name, keep)


def _taken(tensor: Tensor, keep: dict[int, Tensor]) -> Tensor:
    for dim, indices in keep.items():
        tensor = tensor.index_select(dim, indices.to(tensor.device))
    return tensor.contiguous()


def _aliases(graph: nn.Module) -> dict[int, list[str]]:
    """Each tensor's names."""
    found: dict[int, list[str]] = {}
    for name, tensor in [
        *graph.named_parameters(remove_duplicate=False),
        *graph.named_buffers(remove_duplicate=False),
    ]:
        found.setdefault(id(tensor), []).append(name)
    return found


def _place(graph: nn.Module, name: str, tensor: Tensor) -> None:
    owner, leaf = owner_of(graph, name), name.rpartition(".")[2]
    if isinstance(tensor, nn.Parameter):
        owner._parameters[leaf] = tensor
    else:
        owner._buffers[leaf] = tensor


def _note(model: Model, name: str, keep: dict[int, Tensor]) -> None:
    """Masks are cut as their weights are; what is kept counts in the original's indices."""
    model.shared.pop(name, None)  # blocks and hashes do not outlive a cut
    if name in model.masks:
        model.masks[name] = _taken(model.masks[name], keep)
    before = model.kept.setdefault(name, {})
    for dim, indices in keep.items():
        before[dim] = before[dim][indices] if dim in before else indices
