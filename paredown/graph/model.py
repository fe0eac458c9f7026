"""A captured model: one ATen graph that runs, trains, is edited, saved and exported."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from paredown.core.errors import UserError
from paredown.core.files import write_atomically
from paredown.core.settings import check_arguments
from paredown.graph import lazily, mode, store, structure
from paredown.graph.holds.sharing import Sharing
from paredown.graph.parts import Input, told
from paredown.graph.sites import RECURRENT
from paredown.graph.state import owner_of


@dataclass(frozen=True)
class Model:
    """A model captured by `paredown.capture`; call it as you called the module.

    The graph takes the tensors of the inputs in order and returns a tuple of the outputs' tensors;
    parameters keep the names they had in the module.

    Attributes:
        graph: the ATen-level graph, in evaluation mode unless `train` was called.
        inputs: the tensor inputs, in the order the graph takes them.
        arguments, outputs: the nesting of ``(args, kwargs)`` and of the output.
        masks: parameter name -> bool tensor of its shape, False where a pruned weight stays zero.
        kept: parameter or buffer name -> {dimension: the original's indices that it still has},
            for what structured pruning has cut.
        notes: what a user should know of the capture, in plain sentences.
        shared: parameter name -> which of its elements are one value, and stay so.

    Example:
        >>> import torch, paredown
        >>> model = paredown.capture(torch.nn.Linear(4, 2), (torch.zeros(1, 4),))
        >>> model(torch.zeros(3, 4)).shape, sorted(model.state_dict())
        (torch.Size([3, 2]), ['bias', 'weight'])
    """

    graph: fx.GraphModule
    inputs: tuple[Input, ...]
    arguments: structure.Structure
    outputs: structure.Structure
    masks: dict[str, Tensor] = field(default_factory=dict)
    kept: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    shared: dict[str, Sharing] = field(default_factory=dict)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return structure.unflatten(list(self.graph(*self.bind(args, kwargs))), self.outputs)

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """The tensors of a call in the graph's order.

        Raises:
            UserError: the call does not have the inputs that were captured.
        """
        expected = self.arguments["tuple"][1]["dict"]
        ordered = {name: kwargs[name] for name in expected if name in kwargs}
        ordered |= {name: value for name, value in kwargs.items() if name not in ordered}
        leaves, found = structure.flatten((args, ordered))
        if found != self.arguments:
            names = ", ".join(item.name for item in self.inputs)
            got = ", ".join(structure.names(found)) or "nothing"
            raise UserError(
                f"inputs: the model was captured with ({names}); this call has ({got})."
            )
        for item, leaf in zip(self.inputs, leaves, strict=True):
            check_shape(item, leaf)
        if len(leaves) > 1 and any(n.target in RECURRENT for n in self.graph.graph.nodes):
            check_alike(self.inputs, leaves)
        return leaves

    @property
    def fixed_batch(self) -> int | None:
        """The only batch size the model takes; None where it varies."""
        fixed = [item.example for item in self.inputs if 0 not in item.dynamic]
        return len(fixed[0]) if fixed and fixed[0].dim() else None

    @property
    def size_bytes(self) -> int:
        """Of its parameters and buffers."""
        return sum(tensor.nbytes for tensor in self.state_dict().values())

    def copy(self) -> Model:
        """A copy, whose tensors take memory once they change: nothing done to it reaches this
        model."""
        kept = {name: dict(dims) for name, dims in self.kept.items()}
        graph, masks, shared = copy_graph(self.graph), dict(self.masks), dict(self.shared)
        return replace(self, graph=graph, masks=masks, kept=kept, shared=shared)

    def frozen(self) -> Model:
        """A copy to run and export, not to train: in evaluation mode, without gradients."""
        graph = copy_graph(self.graph)
        for parameter in graph.parameters():
            parameter.requires_grad_(False)
        return replace(self, graph=graph).eval()

    def train(self, training: bool = True) -> Model:
        """Switch to training mode in place (batch norm, dropout, drop-path); returns itself."""
        mode.set_training(self.graph, training)
        return self

    def eval(self) -> Model:
        """Switch to evaluation mode in place; returns itself."""
        return self.train(False)

    def to(self, device: torch.device | str) -> Model:
        """Move parameters and the devices named inside the graph, in place; returns itself."""
        self.graph.to(device)
        for node in self.graph.graph.nodes:
            if "device" in node.kwargs and node.kwargs["device"] is not None:
                node.update_kwarg("device", torch.device(device))
        self.graph.recompile()
        return self

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.graph.parameters()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self.graph.named_parameters()

    def state_dict(self) -> dict[str, Tensor]:
        return self.graph.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.graph.load_state_dict(state)

    def save(self, path: str | Path) -> None:
        """Write the model to one safetensors file, atomically."""
        write_atomically(Path(path), store.encoded(self))

    @staticmethod
    def load(path: str | Path) -> Model:
        """Read what `save` wrote. Nothing in the file is executed.

        Raises:
            UserError: the file is missing, damaged, or not a paredown model.
        """
        check_arguments(path=(path, str | Path))
        return store.load(Path(path), Model)

    @staticmethod
    def decode(data: bytes, where: str) -> Model:
        """The model in the bytes of such a file, which came from ``where``.

        Raises:
            UserError: they are damaged, or not a paredown model.
        """
        return store.decode(data, where, Model)


def check_alike(inputs: tuple[Input, ...], tensors: list[Tensor]) -> None:
    """Refuse sizes of one name that differ: recurrent ops read beyond a state of fewer examples
    than their input has, and take the process with them.

    Raises:
        UserError: says which inputs, and their sizes.
    """
    seen: dict[str, tuple[str, int]] = {}
    for item, tensor in zip(inputs, tensors, strict=True):
        for dim, name in item.dynamic.items():
            first, size = seen.setdefault(name, (item.name, tensor.shape[dim]))
            if size != tensor.shape[dim]:
                raise UserError(
                    f"input {item.name!r}: its dimension {dim} ({name}) is {tensor.shape[dim]}, "
                    f"and {size} in {first!r}; recurrent layers need them alike."
                )


def check_shape(item: Input, tensor: Tensor) -> None:
    """Refuse a tensor of another shape than an input takes.

    Raises:
        UserError: says which shape was expected, and within which limits.
    """
    wanted = ["?" if dim in item.dynamic else size for dim, size in enumerate(item.example.shape)]
    same = len(wanted) == tensor.dim() and all(
        size in ("?", got) for size, got in zip(wanted, tensor.shape, strict=True)
    )
    if not same:
        shape = ", ".join(map(str, wanted))
        raise UserError(
            f"input {item.name!r}: expected shape ({shape}), got {tuple(tensor.shape)}"
            + (" (? varies)." if "?" in wanted else "; its dimensions were captured as fixed.")
        )
    for dim, (least, most) in item.limits.items():
        size = tensor.shape[dim]
        if size < least or (most is not None and size > most):
            raise UserError(
                f"input {item.name!r}: dimension {dim} ({item.dynamic[dim]}) is {size}, and the "
                f"model was captured for {told((least, most))}; give such a size, or capture the "
                "model at this one."
            )


def copy_graph(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy with all of the state: FX leaves out what no op reads, and what is transient. Tensors
    take memory once they change, see `paredown.graph.lazily`."""
    named = [
        *graph.named_parameters(remove_duplicate=False),
        *graph.named_buffers(remove_duplicate=False),
    ]
    memo: dict[int, Any] = dict(lazily.copies(tensor for _, tensor in named))
    made = copy.deepcopy(graph, memo)
    have: dict[str, Tensor] = dict(made.named_parameters(remove_duplicate=False))
    have |= dict(made.named_buffers(remove_duplicate=False))
    memo |= {id(old): have[name] for name, old in named if name in have}
    persistent = set(graph.state_dict())
    for name, old in named:
        owner, leaf, tensor = (
            owner_of(made, name),
            name.rpartition(".")[2],
            copy.deepcopy(old, memo),
        )
        if isinstance(tensor, nn.Parameter):
            owner.register_parameter(leaf, tensor)
        else:
            owner.register_buffer(leaf, tensor, persistent=name in persistent)
    return made


def made_from(model: Model, original: Model) -> bool:
    """Whether a model was made from the original by steps: most parameters of the same name have
    the same shape but for what was cut. A student put in its place was not.

    Example:
        >>> import torch, paredown
        >>> example = (torch.zeros(1, 4),)
        >>> wide, narrow = (paredown.capture(torch.nn.Linear(4, n), example) for n in (3, 2))
        >>> made_from(wide.copy(), wide), made_from(narrow, wide)
        (True, False)
    """
    ours, theirs = dict(model.named_parameters()), dict(original.named_parameters())
    common = [name for name in ours if name in theirs]
    same = [_shape_left(model, name, theirs[name]) == list(ours[name].shape) for name in common]
    return 2 * sum(same) > len(same)


def _shape_left(model: Model, name: str, tensor: Tensor) -> list[int]:
    """The shape of an original's tensor once it is cut as the model says."""
    kept = model.kept.get(name, {})
    return [len(kept[dim]) if dim in kept else size for dim, size in enumerate(tensor.shape)]


def kept_since(before: Model, after: Model) -> dict[str, dict[int, Tensor]]:
    """What ``after``, cut from ``before``, keeps of it: as ``Model.kept``, in its indices."""
    found: dict[str, dict[int, Tensor]] = {}
    for name, dims in after.kept.items():
        for dim, indices in dims.items():
            earlier = before.kept.get(name, {}).get(dim)
            if earlier is not None:
                indices = torch.searchsorted(earlier, indices)
            if earlier is None or len(indices) < len(earlier):
                found.setdefault(name, {})[dim] = indices
    return found
