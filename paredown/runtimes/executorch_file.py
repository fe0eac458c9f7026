"""Model -> ExecuTorch file: export, hand what it takes to XNNPACK, plan the memory of the rest."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from paredown.graph import structure
from paredown.graph.edit import reexport
from paredown.graph.model import Model
from paredown.types import UserError

SIGNATURE = "paredown"  # the constant method that holds names and shapes as JSON
MOST = {"batch": 64}  # sizes that a dynamic dimension may take at most, for memory is planned ahead
MOST_ELSE = 512


def encode(model: Model) -> bytes:
    """The ExecuTorch file's bytes; the same model gives the same bytes."""
    from paredown.runtimes.executorch_graph import shape_for_xnnpack

    program = reexport(shape_for_xnnpack(model))
    with quiet():
        return _lower(program, signature(model, program))


def bound(program: Any) -> None:
    from torch.utils._sympy.value_ranges import ValueRanges

    for symbol, allowed in program.range_constraints.items():
        env = _shape_env(program)
        most = 64 if allowed.upper > 64 else int(allowed.upper)
        env.var_to_range[symbol] = ValueRanges(allowed.lower, most)


def _shape_env(program):
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            for size in value.shape:
                if isinstance(size, torch.SymInt):
                    return size.node.shape_env


def signature(model: Model, program: Any) -> dict:
    return {"inputs": [item.name for item in model.inputs], "outputs": [n.replace(".", "_") or "output" for n in structure.names(model.outputs)]}


def _lower(program: Any, signature: dict) -> bytes:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
    from executorch.exir.passes import MemoryPlanningPass

    bound(program)
    edge = to_edge_transform_and_lower(
        program,
        transform_passes=[infer_dimension],
        partitioner=[XnnpackPartitioner()],
        compile_config=EdgeCompileConfig(_check_ir_validity=False),
        constant_methods={SIGNATURE: json.dumps(signature)},
    )
    made = edge.exported_program()
    bound(made)
    global LAST
    LAST = edge
    planning = MemoryPlanningPass(alloc_graph_input=False, alloc_graph_output=False)
    return edge.to_executorch(ExecutorchBackendConfig(memory_planning_pass=planning)).buffer


def infer_dimension(graph: fx.GraphModule):
    """Edge-level clean-up."""
    from executorch.exir.dialects._ops import ops as edge_ops
    from torch.fx.passes.infra.pass_base import PassResult
    edge = edge_ops.edge.aten
    reshapes = (edge.view_copy.default, edge.squeeze_copy.dims, edge.squeeze_copy.dim, edge.unsqueeze_copy.default)
    for node in list(graph.graph.nodes):
        if node.target in (edge.expand_copy.default, edge.alias_copy.default):
            source = node.args[0]
            if same_shape(source.meta["val"].shape, node.meta["val"].shape):
                node.replace_all_uses_with(source)
        if node.target in reshapes:
            shape = list(node.meta["val"].shape)
            symbolic = [n for n, size in enumerate(shape) if not isinstance(size, int)]
            if len(symbolic) <= 1:
                if symbolic: shape[symbolic[0]] = -1
                node.target = edge.view_copy.default
                node.args = (node.args[0], shape)
                node.kwargs = {}
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return PassResult(graph, True)


def same_shape(a, b):
    return len(a) == len(b) and all(str(x) == str(y) for x, y in zip(a, b))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No warnings, no logs, nothing printed; the root logger is left as it was."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        root.handlers[:] = handlers
        root.setLevel(level)
