"""The door for ONNX files: what `capture` needs to make a model of one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from paredown.core.errors import UserError
from paredown.graph import structure
from paredown.graph.doors.onnx import examples
from paredown.graph.doors.onnx.fold import fold
from paredown.graph.doors.onnx.module import Failed, OnnxModule
from paredown.graph.doors.onnx.patterns import PATTERNS, linear, quantized
from paredown.graph.doors.onnx.patterns.match import put_together
from paredown.graph.doors.onnx.program import Array, Node, Program, inner
from paredown.graph.doors.onnx.read import Read, read
from paredown.graph.doors.onnx.ties import tied
from paredown.graph.doors.opened import Opened, Wanted


def open_onnx(path: Path) -> Opened:
    """An ONNX file as a module that runs and trains.

    The file's own weights are its parameters, by their names there. What stays of its dimensions
    that vary is found by `capture`.

    Raises:
        UserError: it is no ONNX file, or holds what cannot be taken; says which node, and what
            usually helps.
    """
    return opened(read(path), path)


def opened(found: Read, path: Path) -> Opened:
    """The same of a file that is read."""
    program, names = tied(normalised(found.program))
    if not program.nodes:
        raise UserError(f"{path}: its outputs depend on no input; there is nothing to compress.")
    module = OnnxModule(program)
    example = _settled(module, found.inputs, path)
    notes = [*found.notes, *quantized.notes(found.program, program), *_tie_notes(names)]
    if example is not None:
        notes += _fix_batch(module, found.inputs, example)
    return Opened(
        module.eval(),
        found.inputs,
        example,
        examples.dynamic(found.inputs),
        program.outputs,
        card=found.card,
        notes=tuple(notes),
    )


def normalised(program: Program) -> Program:
    """Weights turned as PyTorch has them, constants folded, patterns put together."""
    program = put_together(program.without_unused(), quantized.PATTERNS)
    program = put_together(program, linear.PATTERNS)
    program = put_together(fold(program), PATTERNS)
    if not any(map(inner, program.nodes)):
        return program
    return program.with_nodes([_with_branches(node, program.known) for node in program.nodes])


def _with_branches(node: Node, known: Mapping[str, Array]) -> Node:
    """The same for the graphs within a node, which read the arrays around them."""
    attributes = {
        name: _branch(value, known) if isinstance(value, Program) else value
        for name, value in node.attributes.items()
    }
    return replace(node, attributes=attributes)


def _branch(program: Program, known: Mapping[str, Array]) -> Program:
    made = normalised(replace(program, known={**known, **program.known}))
    # What was turned here alone has a name of its own.
    other = {
        name: f"{name}_inside"
        for name, array in made.known.items()
        if name in known and array is not known[name]
    }
    nodes = [
        replace(node, inputs=tuple(other.get(name, name) for name in node.inputs))
        for node in made.nodes
    ]
    arrays = {other.get(name, name): array for name, array in made.known.items()}
    outputs = tuple(other.get(name, name) for name in made.outputs)
    return replace(made, nodes=tuple(nodes), known=arrays, outputs=outputs)


def _tie_notes(names: list[tuple[str, str]]) -> list[str]:
    """Which weights became one."""
    if not names:
        return []
    return [
        f"{len(names)} weights are in the file twice, such as {names[0][0]!r} and {names[0][1]!r}: "
        "each is one parameter here"
    ]


def _settled(module: OnnxModule, inputs: tuple[Wanted, ...], path: Path) -> dict[str, Tensor]:
    """The first example that the module runs at, by which its parameters are found."""
    failed: Exception | None = None
    for example in examples.tries(inputs):
        try:
            module.settle(**example)
        except Failed as error:
            failed = failed or error
            continue
        return example
    if failed is None:
        sizes = ", ".join(f"{each.name} {each.shape}" for each in inputs)
        raise UserError(f"{path}: declares inputs of a size that no example can have: {sizes}.")
    raise UserError(
        f"{path}: runs at none of the sizes that were tried for its inputs: {failed}; what usually "
        "helps: fix its input shapes (python -m onnxruntime.tools.make_dynamic_shape_fixed)."
    )


def _fix_batch(
    module: OnnxModule, inputs: tuple[Wanted, ...], example: dict[str, Tensor]
) -> list[str]:
    """A file for one batch alone may mix its examples where there are more: then it stays one."""
    sizes = {each.shape[0] for each in inputs if each.shape}
    if len(sizes) != 1 or not all(isinstance(size, int) for size in sizes):
        return []
    (batch,) = sizes
    assert isinstance(batch, int)
    other = {name: value.roll(1, -1) if value.dim() else value for name, value in example.items()}
    both = {
        name: torch.cat([example[name], other[name]]) if example[name].dim() else example[name]
        for name in example
    }
    alone, beside = _run(module, example), _run(module, other)
    joined = _run(module, both)
    if alone is None or beside is None:
        return []
    if joined is not None and _is_joined(joined, alone, beside):
        return []
    module.only_batch = batch
    return [f"the file is made for a batch of {batch}, and computes something else at others"]


def _run(module: OnnxModule, inputs: dict[str, Tensor]) -> list[Tensor] | None:
    try:
        with torch.no_grad():
            return structure.flatten(module.eval()(**inputs))[0]
    except (Failed, UserError):
        return None


def _is_joined(joined: list[Tensor], alone: list[Tensor], beside: list[Tensor]) -> bool:
    """Whether each example's output is what it is alone."""
    for made, first, second in zip(joined, alone, beside, strict=True):
        if not first.dim() or made.shape[0] != 2 * first.shape[0]:
            return False
        wanted = torch.cat([first, second])
        if made.shape != wanted.shape or not _close(made, wanted):
            return False
    return True


def _close(made: Tensor, wanted: Tensor) -> bool:
    if not wanted.is_floating_point():
        return torch.equal(made, wanted)
    scale = float(wanted.abs().nan_to_num(0, 0, 0).max()) if wanted.numel() else 0.0
    return torch.allclose(made, wanted, 1e-3, 1e-4 * max(scale, 1e-6), equal_nan=True)
