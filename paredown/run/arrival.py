"""Whether a file that came in computes, where its own runtime runs it, what was captured of it."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

from paredown.core.errors import UserError
from paredown.core.task import Target, Task
from paredown.data import feed, splits
from paredown.graph import structure
from paredown.graph.bounded import between_0_and_1
from paredown.graph.capture import capture
from paredown.graph.model import Model
from paredown.measure import timing
from paredown.measure.inputs import arrays, deployed_batch
from paredown.targets import foreign
from paredown.targets.devices.device import write_batches
from paredown.targets.parity import UNIT_ERROR

RUNS = {".onnx": "onnxruntime"}  # a file's ending -> the runtime that opens it by itself
MOST = 32  # examples
TOLERANCE = 1e-3  # of the size of an output
LOOSE = 5e-2  # of files whose own numbers are rounded
ROUNDED = ("quantiz", "float16", "bfloat16")  # in a note of the capture


def told(file: Path, module: nn.Module | Model, task: Task) -> str:
    """A sentence on how far the captured model and the file as its runtime runs it agree on
    samples; "" where no runtime opens such a file by itself.

    Raises:
        UserError: they differ, or the runtime cannot open the file.
    """
    name = RUNS.get(file.suffix)
    if name is None:
        return ""
    foreign.check(file, name)
    model, task = capture(module, task.example, task.dynamic).frozen(), splits.prepared(task)
    rounded = any(word in note for note in model.notes for word in ROUNDED)
    most = LOOSE if rounded else TOLERANCE
    worst, where, count = _compared(file, model, task, name)
    if worst > most:
        raise UserError(
            f"{file}: {where} of the captured model differs from what {name} makes of the file by "
            f"{worst:.2g} of its size on {count} samples; this is a fault of the capture, or an op "
            "whose results depend on the runtime: nothing is compressed."
        )
    return (
        f"on {count} samples the captured model and {name} running the file agree to {worst:.1g} "
        "of the outputs' size"
    )


def _compared(file: Path, model: Model, task: Task, name: str) -> tuple[float, str, int]:
    """The largest difference over the output's size, of which output, and over how many samples."""
    split = splits.split(task, "validation")
    size = deployed_batch(model)
    given = feed.whole(model, split, "validation", size, most=-(-MOST // size))
    worst, where, count = 0.0, "an output", 0
    names = [each or "" for each in structure.names(model.outputs)]
    least = [UNIT_ERROR / TOLERANCE * unit for unit in between_0_and_1(model.graph)]
    target, types = Target(runtime=name), _types(file)
    with (
        tempfile.TemporaryDirectory(prefix="paredown-") as folder,
        timing.opened({"file": file}, target, fresh=False) as probes,
    ):
        probe = probes["file"]
        order = _order([item.name for item in model.inputs], probe.input_names, file)
        for batch in given.bound():
            leaves = arrays(model, list(batch.inputs))
            given_to = zip(probe.input_names, (leaves[place] for place in order), strict=True)
            taken = [leaf.astype(types.get(name, leaf.dtype)) for name, leaf in given_to]
            read, made = Path(folder) / "inputs.npz", Path(folder) / "outputs.npz"
            write_batches(read, [taken])
            [got] = probe.run(read, made)
            with torch.no_grad():
                wanted = [tensor.numpy() for tensor in model.graph(*batch.inputs)]
            for place, at in enumerate(_places(names, probe.output_names)):
                error = _difference(wanted[place], got[at], least[place])
                if error > worst:
                    worst, where = error, f"output {names[place] or probe.output_names[at]!r}"
            count += batch.count
    return worst, where, count


def _types(file: Path) -> dict[str, np.dtype]:
    """The types of an ONNX file's inputs: the capture takes floats of 32 bits, the file others."""
    import onnx

    graph = onnx.load(file, load_external_data=False).graph
    told = onnx.helper.tensor_dtype_to_np_dtype
    return {item.name: told(item.type.tensor_type.elem_type) for item in graph.input}


def _order(ours: list[str], theirs: list[str], file: Path) -> list[int]:
    """The places of our inputs in the order in which the file takes them.

    Raises:
        UserError: it takes one that samples do not bring.
    """
    if len(ours) == len(theirs) == 1:
        return [0]
    lacking = [name for name in theirs if name not in ours]
    if lacking:
        raise UserError(f"{file}: its runtime needs the input {lacking[0]!r} as well.")
    return [ours.index(name) for name in theirs]


def _places(ours: list[str], theirs: list[str]) -> list[int]:
    """Where each of our outputs stands among the file's."""
    if not set(ours) <= set(theirs):
        return list(range(len(ours)))
    return [theirs.index(name) for name in ours]


def _difference(one: np.ndarray, other: np.ndarray, least: float = 0.0) -> float:
    """The largest difference over the largest value, which counts as that much at least.

    Example:
        >>> _difference(np.array([2.0, 1.0]), np.array([2.0, 1.5]))
        0.25
    """
    if one.shape != other.shape:
        return float("inf")
    if not one.size:
        return 0.0
    a, b = one.astype(np.float64), other.astype(np.float64)
    size = max(float(np.abs(a).max()), least, 1e-6)
    return float(np.abs(a - b).max()) / size
