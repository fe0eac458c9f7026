"""PyTorch itself: ``lower`` writes the captured model, ``open`` runs it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

    from paredown.core.measurement import Census
    from paredown.graph.model import Model
    from paredown.graph.parts import Input
    from paredown.targets.runtimes import Batches, Inside


SUFFIX, COMPANIONS = ".safetensors", ()
# besides float32, all run as simulated; see paredown.graph.quantized.forms
FORMS = frozenset(
    {
        *("int8", "int8-dynamic", "int4", "int8-weights", "int4-weights"),
        *("binary", "ternary", "fp16", "bf16"),
    }
)
SYMMETRIC: frozenset[int] = frozenset()
PAIRS = None  # products are added in 32 bits
INT8_BYTES = None  # weights stay float
PACKAGES = ("torch", "safetensors")
IMPORTS = (
    "torch",
    "paredown.graph.model",
    "paredown.graph.quantized.packed",
)  # by `open`; they start no threads that compute
UNPACKED = "PyTorch unpacks {} weights when it opens the file, and runs them in float."


class Predictor:
    """An open model file: call it with one array per input, get a tuple of arrays."""

    def __init__(self, model: Model) -> None:
        from paredown.graph import structure

        self._model = model
        self.input_names = [item.name for item in model.inputs]
        self.signature = [_described(item) for item in model.inputs]
        self.output_names = structure.output_names(model.outputs)

    def __call__(self, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        import torch

        leaves = [torch.from_numpy(array) for array in arrays]
        with torch.inference_mode():
            outputs = self._model.graph(*leaves)
        return tuple(_plain(output) for output in outputs)


def _described(item: Input) -> dict[str, Any]:
    sizes = [
        [item.dynamic[dim], *item.limits.get(dim, (1, None))] if dim in item.dynamic else size
        for dim, size in enumerate(item.example.shape)
    ]
    dtype = str(item.example.dtype).removeprefix("torch.")
    return {"name": item.name, "dtype": dtype, "shape": sizes}


def _plain(tensor: Any) -> np.ndarray:
    import torch

    wide = tensor.float() if tensor.dtype is torch.bfloat16 else tensor
    return wide.numpy()  # type: ignore[no-any-return]


def lower(model: Model, path: Path | str, data: Batches = ()) -> Path:
    """Write the model in evaluation mode as one safetensors file, low-bit weights packed.

    Raises:
        UserError: the file cannot be written, or holds something that cannot be saved.
    """
    from paredown.graph.edit import erase_counters
    from paredown.graph.quantized.packed import pack_weights

    shipped = model.copy().eval()
    erase_counters(shipped.graph)
    pack_weights(shipped)
    for node in shipped.graph.graph.nodes:  # lines of the user's sources, and where they lie
        node.meta.pop("stack_trace", None)
    shipped.save(path)
    return Path(path)


def open(path: Path | str, threads: int = 1) -> Predictor:
    """Open a model file on the CPU with that many threads."""
    import torch

    from paredown.graph.model import Model
    from paredown.graph.quantized.packed import unpack_weights

    torch.set_num_threads(threads)
    model = Model.load(path)
    unpack_weights(model)
    return Predictor(model)


def census(path: Path | str) -> Census:
    """Count the ATen ops of the graph, all in float, and the bytes of its tensors."""
    from collections import Counter

    from paredown.core.measurement import Census
    from paredown.graph.holds.shared_store import stored
    from paredown.graph.model import Model
    from paredown.graph.quantized.packed import UNPACK, packed_form
    from paredown.graph.state import getattr_or_none

    model = Model.load(path)
    nodes = model.graph.graph.nodes
    ops = Counter(n.target.__name__ for n in nodes if n.op == "call_function")
    low = {n.args[0].target: packed_form(n.args[3]).word for n in nodes if n.target is UNPACK}
    weights: Counter[str] = Counter()
    state = {id(tensor): (name, tensor) for name, tensor in model.state_dict().items()}
    tied = {id(getattr_or_none(model.graph, name)) for name in model.shared}
    for name, tensor in state.values():
        if id(tensor) not in tied:
            weights[low.get(name, _kind(tensor))] += tensor.nbytes
    for tensor in stored(model)[1].values():
        weights[_kind(tensor)] += tensor.nbytes
    notes = (UNPACKED.format(" and ".join(sorted(set(low.values())))),) if low else ()
    return Census({}, dict(ops), dict(weights), notes=notes)


def _kind(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def open_inside(model: Model, path: Path | str, names: Collection[str]) -> Inside:
    """What runs a file made of ``model`` and gives its outputs and the values of those nodes."""
    import torch
    from torch import fx

    from paredown.graph.interpret import Pass, noting
    from paredown.graph.model import Model

    found: dict[str, torch.Tensor] = {}

    def note(node: fx.Node, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found[node.name] = value.clone()

    whole = Pass(Model.load(path).graph, noting(note, names))

    def values(leaves: Sequence[torch.Tensor]) -> Any:
        return whole.outputs(leaves), dict(found)

    return values


def version() -> str:
    import torch

    return f"torch {torch.__version__}"
