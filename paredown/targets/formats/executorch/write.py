"""Model -> ExecuTorch file: export, hand what it takes to XNNPACK, plan the memory of the rest."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from paredown.core.errors import UserError
from paredown.graph import structure
from paredown.graph.model import Model
from paredown.graph.program import lowered
from paredown.targets.formats.executorch.lengths import widen_convolutions
from paredown.targets.formats.executorch.recurrent import at_one_length
from paredown.targets.formats.executorch.shape import shape_for_xnnpack
from paredown.targets.formats.quiet import quiet
from paredown.targets.formats.types import refuse_wide_unsigned

# Memory is planned ahead, for the most examples and the largest other dimensions there may be.
MOST_EXAMPLES, MOST_ELSE = 64, 512
PLANNED_BYTES = 2**28  # above this, smaller sizes are settled for
Bounds = dict[sympy.Symbol, int]


def encode(model: Model, method: str) -> bytes:
    """The ExecuTorch file's bytes; the same model gives the same bytes.

    Args:
        method: the name of a method that returns names and shapes, as JSON.

    Raises:
        UserError: neither XNNPACK nor ExecuTorch's own kernels have one of the ops, or an input's
            type.
    """
    refuse_wide_unsigned(model, "ExecuTorch")
    model = at_one_length(model)
    made = shape_for_xnnpack(model)
    widen_convolutions(made)
    try:
        with quiet(), torch.no_grad():
            return lowered(made, lambda program: _lower(model, program, method))
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"model: cannot be written for ExecuTorch: {_root_cause(error)}") from error


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0]


def _lower(model: Model, program: Any, method: str) -> bytes:
    from executorch.backends.xnnpack.partition.config import (
        ALL_PARTITIONER_CONFIGS,
        MaxDimConfig,
    )
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import (
        EdgeCompileConfig,
        ExecutorchBackendConfig,
        to_edge_transform_and_lower,
    )
    from executorch.exir.passes import MemoryPlanningPass

    sizes, most = _symbols(model, program), _largest(model, program)
    _bound(program, most)
    # The partitioner hands XNNPACK a maximum over any dimension, and XNNPACK takes only images'.
    taken = [each for each in ALL_PARTITIONER_CONFIGS if each is not MaxDimConfig]
    with _half_convolutions():
        edge = to_edge_transform_and_lower(
            program,
            transform_passes=[_simplify],
            partitioner=[XnnpackPartitioner(configs=taken)],
            compile_config=EdgeCompileConfig(_check_ir_validity=False),
            constant_methods={method: ""},
        )
    lowered = edge.exported_program()
    most = _affordable(lowered.graph, most, sizes)
    _bound(lowered, most)  # lowering takes what it learns of the example for bounds
    edge._config_methods[method] = json.dumps(_signature(model, lowered, most, sizes))
    planning = MemoryPlanningPass(alloc_graph_input=False, alloc_graph_output=False)
    made = edge.to_executorch(ExecutorchBackendConfig(memory_planning_pass=planning))
    return bytes(made.buffer)


# --- sizes that vary -------------------------------------------------------------------------


def _inputs(program: Any) -> list[Tensor]:
    """The values of the program's inputs, in order, shapes symbolic."""
    names = program.graph_signature.user_inputs
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    return [nodes[name].meta["val"] for name in names]


@dataclass(frozen=True)
class _Size:
    """A size that varies: what the user calls it, its dimension, its value as deployed, limits."""

    name: str
    dim: int
    deployed: int
    least: int
    most: int | None


def _symbols(model: Model, program: Any) -> dict[sympy.Symbol, _Size]:
    """The symbols among the inputs' sizes, batch first."""
    found: dict[sympy.Symbol, _Size] = {}
    for item, value in zip(model.inputs, _inputs(program), strict=True):
        for dim, size in enumerate(value.shape):
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                name = item.dynamic.get(dim, f"{item.name}_{dim}")
                limit = item.limits.get(dim, (1, None))
                found.setdefault(size.node.expr, _Size(name, dim, item.example.shape[dim], *limit))
    return dict(sorted(found.items(), key=lambda pair: pair[1].dim))


def _largest(model: Model, program: Any) -> Bounds:
    """The largest sizes that are offered, where the model itself allows as much."""
    sizes = _symbols(model, program)
    most: dict[str, int] = {}
    for symbol, size in sizes.items():
        offered = max(MOST_ELSE if size.dim else MOST_EXAMPLES, 2 * size.deployed)
        allowed = program.range_constraints[symbol].upper
        allowed = allowed if size.most is None else min(allowed, size.most)
        offered = int(allowed) if allowed < offered else offered
        most[size.name] = min(offered, most.get(size.name, offered))
    return {symbol: most[size.name] for symbol, size in sizes.items()}


def _affordable(graph: fx.Graph, most: Bounds, sizes: dict[sympy.Symbol, _Size]) -> Bounds:
    """Halve the largest sizes, that of the batch first, until their memory is within bounds."""
    bounds = dict(most)
    for name in dict.fromkeys(size.name for size in sizes.values()):
        same = [symbol for symbol, size in sizes.items() if size.name == name]
        least = max(2, *(sizes[symbol].deployed for symbol in same))
        while _planned_bytes(graph, bounds) > PLANNED_BYTES and bounds[same[0]] > least:
            bounds |= dict.fromkeys(same, max(bounds[same[0]] // 2, least))
    return bounds


def _planned_bytes(graph: fx.Graph, bounds: Bounds) -> int:
    """The most bytes that values between delegates take at a time."""
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    place = {node: n for n, node in enumerate(nodes)}
    change = [0] * (len(nodes) + 1)
    for node in nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            size = _size(value, bounds)
            last = max(
                (place.get(user, len(nodes) - 1) for user in node.users), default=place[node]
            )
            change[place[node]] += size
            change[last + 1] -= size
    total, peak = 0, 0
    for step in change:
        total += step
        peak = max(peak, total)
    return peak


def _size(value: Tensor, bounds: Bounds) -> int:
    count = value.element_size()
    for size in value.shape:
        count *= size if isinstance(size, int) else int(size.node.expr.subs(bounds))
    return count


def _bound(program: Any, bounds: Bounds) -> None:
    """Let the symbols' environment know their bounds; it is where ExecuTorch asks for them."""
    from torch.utils._sympy.value_ranges import ValueRanges

    for value in _inputs(program):
        for size in value.shape:
            if isinstance(size, torch.SymInt):
                known = size.node.shape_env.var_to_range
                for symbol, most in bounds.items():
                    found = program.range_constraints.get(symbol, known[symbol])
                    known[symbol] = ValueRanges(found.lower, most)
                return


def _signature(
    model: Model, program: Any, bounds: Bounds, sizes: dict[sympy.Symbol, _Size]
) -> dict[str, Any]:
    """Names of inputs and outputs, the inputs' shapes, and whether a batch may be run in parts."""
    values = _inputs(program)
    inputs = [
        {
            "name": item.name,
            "dtype": str(value.dtype).removeprefix("torch."),
            "shape": [_plain(size, bounds, sizes) for size in value.shape],
        }
        for item, value in zip(model.inputs, values, strict=True)
    ]
    names = structure.output_names(model.outputs)
    results = next(node for node in program.graph.nodes if node.op == "output").args[0]
    shapes = [value.shape for value in [*values, *(node.meta["val"] for node in results)]]
    return {"inputs": inputs, "outputs": names, "parts": _in_parts(shapes, sizes)}


def _plain(size: Any, bounds: Bounds, sizes: dict[sympy.Symbol, _Size]) -> int | list[Any]:
    """A size as JSON: a number, or a name, the most it may be, and the least if not 1."""
    if isinstance(size, int):
        return size
    expression = size.node.expr
    name = sizes[expression].name if expression in sizes else str(expression)
    least = sizes[expression].least if expression in sizes else 1
    return [name, int(expression.subs(bounds)), *([least] if least > 1 else [])]


def _in_parts(shapes: list[Any], sizes: dict[sympy.Symbol, _Size]) -> bool:
    """Whether inputs and outputs are all lists of examples, and nothing else is as long as one."""
    names = [[_names(size, sizes) for size in shape] for shape in shapes]
    if not all(names) or len(names[0][0]) != 1:
        return False
    (batch,) = names[0][0]
    inner = set().union(*(found for each in names for found in each[1:]))
    return batch not in inner and all(each[0] == {batch} for each in names)


def _names(size: Any, sizes: dict[sympy.Symbol, _Size]) -> set[str]:
    """What varies in a size."""
    symbols = set() if isinstance(size, int) else size.node.expr.free_symbols
    return {sizes[symbol].name if symbol in sizes else str(symbol) for symbol in symbols}


# --- ops -------------------------------------------------------------------------------------


@contextlib.contextmanager
def _half_convolutions() -> Iterator[None]:
    """Keep 16-bit weights of convolutions, which ExecuTorch would write in 32 bits."""
    from executorch.backends.xnnpack.operators import node_visitor, op_conv2d  # noqa: F401

    writers: dict[str, Any] = node_visitor._node_visitor_dict
    kept = writers["aten.convolution.default"]

    class Convolution(kept):  # type: ignore[misc, valid-type]
        def define_tensor(self, *args: Any, force_fp32: bool = False, **options: Any) -> None:
            super().define_tensor(*args, **options)

    writers["aten.convolution.default"] = Convolution
    try:
        yield
    finally:
        writers["aten.convolution.default"] = kept


def _simplify(graph: fx.GraphModule) -> Any:
    """Reshapes of one varying size in the only spelling that XNNPACK takes; no-ops go."""
    from executorch.exir.dialects._ops import ops
    from torch.fx.passes.infra.pass_base import PassResult

    aten = ops.edge.aten
    reshapes = (aten.view_copy.default, aten.squeeze_copy.dims, aten.unsqueeze_copy.default)
    for node in list(graph.graph.nodes):
        if node.target in (aten.expand_copy.default, aten.alias_copy.default):
            source = node.args[0]
            if tuple(map(str, source.meta["val"].shape)) == tuple(map(str, node.meta["val"].shape)):
                node.replace_all_uses_with(source)
        elif node.target in reshapes:
            shape = list(node.meta["val"].shape)
            symbolic = [n for n, size in enumerate(shape) if not isinstance(size, int)]
            if len(symbolic) < 2:
                shape = [size if isinstance(size, int) else -1 for size in shape]
                node.target, node.args, node.kwargs = (
                    aten.view_copy.default,
                    (node.args[0], shape),
                    {},
                )
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return PassResult(graph, True)
