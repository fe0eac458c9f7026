"""Whether cutting a model was the same as setting what was cut to zero."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from paredown.core.errors import UserError
from paredown.core.settings import check_arguments
from paredown.graph.capture import capture
from paredown.graph.coupling.coupling import analyze
from paredown.graph.model import Model, kept_since
from paredown.graph.state import tensor_of


@dataclass(frozen=True)
class Exactness:
    """How a cut model compares with its original masked, on the same inputs.

    Attributes:
        error: largest relative error of an output, ``|cut - masked| / |masked|``.
        change: the same between the masked and the unmasked original; where it is 0 the check
            says nothing, since what was cut had no effect.
    """

    error: float
    change: float

    def __str__(self) -> str:
        return f"masked against cut: relative error {self.error:.1e} (change {self.change:.1e})"


def verify(
    before: Model | nn.Module, after: Model, inputs: tuple[Tensor, ...] | None = None
) -> Exactness:
    """Compare a structurally pruned model with its original, what was cut being zero there.

    The cut is what is compared: weights that were trained or refitted since are those of
    ``before`` here. Groups that an op reduces over (layer norm, softmax) cannot be exact.

    Args:
        after: made from ``before`` by `PruneChannels`, and nothing that renames parameters.
        inputs: the input tensors in order; by default the example inputs of ``before``.

    Raises:
        UserError: ``after`` was not made from ``before`` by cutting.

    Example:
        >>> import torch, paredown
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> model = paredown.capture(net, (torch.randn(3, 4),))
        >>> task = paredown.Task(example=(torch.zeros(1, 4),), score=None)
        >>> small = paredown.PruneChannels(0.5, reconstruct=False).apply(model, task)
        >>> verify(model, small).error < 1e-5
        True
    """
    check_arguments(after=(after, Model), inputs=(inputs, tuple | list | None))
    check_arguments(before=(before, Model | nn.Module))
    original = before
    if not isinstance(original, Model):
        original = capture(original, tuple(item.example for item in after.inputs))
    leaves = list(inputs) if inputs else [item.example for item in original.inputs]
    kept = _cut_since(original, after)
    masked, cut = _masked(original, kept), _cut(original, after, kept)
    outputs = [_run(model, leaves) for model in (original, masked, cut)]
    return Exactness(_error(outputs[2], outputs[1]), _error(outputs[1], outputs[0]))


def _cut_since(before: Model, after: Model) -> dict[str, dict[int, Tensor]]:
    """What ``after`` keeps of each parameter, in the indices of ``before``."""
    state, found = _named(before), kept_since(before, after)
    for name, tensor in _named(after).items():
        if name not in state:
            raise UserError(f"verify: {name!r} is no parameter of the model before the cut.")
        was, dims = state[name].shape, found.get(name, {})
        shape = [len(dims[dim]) if dim in dims else size for dim, size in enumerate(was)]
        inside = all(len(i) == 0 or int(i[-1]) < was[dim] for dim, i in dims.items())
        if list(tensor.shape) != shape or not inside:
            raise UserError(
                f"verify: {name!r} is {tuple(tensor.shape)} and was {tuple(was)}, "
                "which is not a cut that this model tells of."
            )
    return found


def _named(model: Model) -> dict[str, Tensor]:
    found: dict[str, Tensor] = dict(model.graph.named_parameters(remove_duplicate=False))
    return found | dict(model.graph.named_buffers(remove_duplicate=False))


def _masked(before: Model, kept: dict[str, dict[int, Tensor]]) -> Model:
    made = before.copy()
    never_zero = analyze(before).never_zero
    for name, dims in kept.items():
        tensor = tensor_of(made.graph, name)
        for dim, indices in dims.items():
            gone = torch.ones(tensor.shape[dim], dtype=torch.bool)
            gone[indices] = False
            if tensor.is_floating_point() and (name, dim) not in never_zero:
                with torch.no_grad():
                    tensor.index_fill_(dim, gone.nonzero().flatten(), 0.0)
    return made


def _cut(before: Model, after: Model, kept: dict[str, dict[int, Tensor]]) -> Model:
    """The graph of ``after`` with the weights of ``before``."""
    made = replace(after.copy(), masks={})
    values = _named(before)
    for name, tensor in _named(made).items():
        value = values[name]
        for dim, indices in kept.get(name, {}).items():
            value = value.index_select(dim, indices)
        with torch.no_grad():
            tensor.copy_(value)
    return made


def _run(model: Model, inputs: list[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return list(model.eval().graph(*[leaf.clone() for leaf in inputs]))


def _error(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative error over the outputs that are floats; not finite where one is."""
    errors = [0.0]
    for ours, theirs in zip(found, expected, strict=True):
        if ours.shape != theirs.shape:
            raise UserError(
                f"verify: an output is {tuple(ours.shape)} and was {tuple(theirs.shape)}."
            )
        if theirs.is_floating_point():
            both = theirs.isfinite() | ours.isfinite()  # a mask of attention may be infinite
            difference = float((ours - theirs)[both].double().norm())
            errors.append(difference / max(float(theirs[both].double().norm()), 1e-30))
    return max(errors)
