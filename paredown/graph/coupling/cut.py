"""Cut a model for good, or mask it: the units that a choice leaves out."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from paredown.graph.coupling.coupling import Choice, Coupling
from paredown.graph.coupling.rules import rewrite_of
from paredown.graph.coupling.sizes import Cut
from paredown.graph.holds.every import HOLDS
from paredown.graph.model import Model
from paredown.graph.state import owner_of, taken, tensor_of
from paredown.graph.values import give_values


def cut(model: Model, coupling: Coupling, choice: Choice) -> Model:
    """A copy without the units that ``choice`` leaves out: smaller tensors, constants rewritten.

    ``coupling`` must be that of this model. ``kept`` of the result says which indices of the
    original's parameters are left.

    Raises:
        UserError: a group would vanish, or the cut graph would not run; names the op.
    """
    made = model.copy()
    state = Cut(coupling.values, coupling.alive(choice))
    for node in made.graph.graph.nodes:
        rewrite = rewrite_of(node) if node.op == "call_function" else None
        if rewrite is not None and coupling.values[node.name] and node.name not in coupling.whole:
            rewrite(state, node)
    _slice(made, coupling, choice)
    made.graph.graph.lint()
    made.graph.recompile()
    give_values(made)
    return made


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
        new = taken(old.detach(), keep)
        placed = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
        for name in aliases[id(old)]:
            _place(model.graph, name, placed)
            _note(model, name, keep)


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
    """What is held of a weight is cut with it; what is kept counts in the original's indices."""
    for hold in HOLDS:
        hold.cut(model, name, keep)
    before = model.kept.setdefault(name, {})
    for dim, indices in keep.items():
        before[dim] = before[dim][indices] if dim in before else indices
