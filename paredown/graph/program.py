"""Model -> exported program, without tracing the graph anew.

A captured graph is already made of ATen ops. Tracing it again, for the program and once more for
each set of decompositions, is most of the time that writing a file takes; here only the ops that
a decomposition is asked for are traced, one by one.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._export.utils import _is_preservable_cia_op
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils import _pytree as pytree

from paredown.core.errors import UserError
from paredown.graph import pools
from paredown.graph.edit import copy_ops, erase_counters, hand_over, is_unpacked
from paredown.graph.functional import MUTATED, PLAIN, Untraceable, is_composite, make_functional
from paredown.graph.model import Model
from paredown.graph.parts import Input
from paredown.graph.state import tensor_of
from paredown.graph.values import wide

aten = torch.ops.aten
T = TypeVar("T")
Table = dict[Any, Callable[..., Any]]


def reexport(model: Model) -> ExportedProgram:
    """The model as a fresh exported program in evaluation mode, its dynamic dimensions kept.

    Raises:
        UserError: the edited graph does not export any more.
    """
    try:
        with torch.no_grad():
            return _lifted(_still(model))
    except Untraceable:
        return _traced(_still(model))


def lowered(model: Model, lower: Callable[[ExportedProgram], T]) -> T:
    """What ``lower`` makes of the model's program: where it fails, of one that is traced anew."""
    program = reexport(model)
    try:
        return lower(program)
    except Exception:
        if not isinstance(program, Program):
            raise
    return lower(_traced(_still(model)))


def _still(model: Model) -> Model:
    """A copy in evaluation mode that counts nothing."""
    copied = model.frozen()
    erase_counters(copied.graph)
    return copied


def _traced(model: Model) -> ExportedProgram:
    leaves = tuple(wide(item.example, 0 in item.dynamic) for item in model.inputs)
    shapes = tuple(dict.fromkeys(item.dynamic, Dim.AUTO) for item in model.inputs)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(model.graph, leaves, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"model: the edited graph cannot be exported: {reason}") from error


# --- the program -----------------------------------------------------------------------------


class Program(ExportedProgram):
    """An exported program in which a decomposition changes, in place, only what it is asked for."""

    def run_decompositions(
        self, decomp_table: Table | None = None, decompose_custom_triton_ops: bool = False
    ) -> ExportedProgram:
        table = torch.export.default_decompositions() if decomp_table is None else decomp_table
        try:
            _decompose(self, dict(table))
        except Untraceable:
            return super().run_decompositions(decomp_table, decompose_custom_triton_ops)
        return self


def _lifted(model: Model) -> Program:
    """The program whose parameters and buffers are inputs of its graph, as exporters want it."""
    source = model.graph
    make_functional(source)
    source.graph.eliminate_dead_code()
    sizes = ShapeEnv()
    fake = FakeTensorMode(shape_env=sizes, export=True, allow_non_fake_inputs=True)
    graph, state, specs = _lift_state(source, fake)
    inputs = [node for node in graph.nodes if node.op == "placeholder"][len(specs) :]
    for node, item in zip(inputs, model.inputs, strict=True):
        node.meta["val"] = _symbolic(fake, item.example, set(item.dynamic), node.name)
        specs.append(InputSpec(InputKind.USER_INPUT, TensorArgument(node.name), None))
    _propagate(graph, fake)
    if any(not _varies(node, item) for node, item in zip(inputs, model.inputs, strict=True)):
        raise Untraceable
    results: Any = graph.output_node().args[0]
    outputs = [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(n.name), None) for n in results]
    call = ModuleCallSignature(
        inputs=[],
        outputs=[],
        in_spec=pytree.tree_structure((tuple(0 for _ in inputs), {})),
        out_spec=pytree.tree_structure(tuple(0 for _ in results)),
    )
    ranges = {
        symbol: sizes.var_to_range[symbol]
        for node in inputs
        for size in node.meta["val"].shape
        if isinstance(size, torch.SymInt)
        for symbol in size.node.expr.free_symbols
    }
    return Program(
        source,
        graph,
        ExportGraphSignature(specs, outputs),
        state,
        ranges,
        [ModuleCallEntry("", call)],
    )


def _lift_state(
    source: fx.GraphModule, fake: FakeTensorMode
) -> tuple[fx.Graph, dict[str, Tensor], list[InputSpec]]:
    """The graph with an input for each tensor it reads, before its own; tied ones are one."""
    names: dict[int, str] = {}  # a tensor's, under which it is read first
    graph = fx.Graph()
    state: dict[str, Tensor] = {}
    specs: list[InputSpec] = []
    placed: dict[str, fx.Node] = {}
    copied: dict[fx.Node, fx.Node] = {}
    for node in source.graph.nodes:
        if node.op == "get_attr":
            tensor = tensor_of(source, str(node.target))
            name = names.setdefault(id(tensor), str(node.target))
            if name not in placed:
                parameter = isinstance(tensor, nn.Parameter)
                kind = InputKind.PARAMETER if parameter else InputKind.BUFFER
                placed[name] = graph.placeholder(f"{kind.name.lower()}_{name.replace('.', '_')}")
                placed[name].meta["val"] = fake.from_tensor(tensor, static_shapes=True)
                argument = TensorArgument(placed[name].name)
                specs.append(InputSpec(kind, argument, name, None if parameter else True))
                state[name] = tensor
            copied[node] = placed[name]
    for node in source.graph.nodes:
        if node.op == "output":
            graph.output(tuple(copied[each] for each in node.args[0]))
        elif node.op != "get_attr":
            copied[node] = graph.node_copy(node, copied.__getitem__)
    for node in graph.nodes:
        if node.op == "placeholder":
            node.target = node.name
    return graph, state, specs


def _symbolic(fake: FakeTensorMode, example: Tensor, dynamic: set[int], name: str) -> Tensor:
    """An input's value, without its numbers: a symbol for each of its sizes that vary."""
    from torch._dynamo.source import ConstantSource

    kinds = [
        DimDynamic.DYNAMIC if dim in dynamic else DimDynamic.STATIC for dim in range(example.dim())
    ]
    context: Any = StatelessSymbolicContext(
        dynamic_sizes=kinds, constraint_sizes=[None] * len(kinds)
    )
    widened = wide(example, 0 in dynamic)
    return fake.from_tensor(widened, symbolic_context=context, source=ConstantSource(name))


def _varies(node: fx.Node, item: Input) -> bool:
    """Whether the sizes of an input that vary are still symbols, nothing having fixed them."""
    sizes = _value(node).shape
    return all(
        isinstance(sizes[dim], torch.SymInt) and not sizes[dim].node.expr.is_Integer
        for dim in item.dynamic
    )


def _propagate(graph: fx.Graph, fake: FakeTensorMode) -> None:
    """Give every node its value, without numbers."""
    with _shapes_alone(fake):
        for node in graph.nodes:
            if node.op == "call_function":
                _evaluate(node)
                if node.meta.pop(MUTATED, False) and not _alike(node, node.args[0]):
                    raise Untraceable


@contextlib.contextmanager
def _shapes_alone(fake: FakeTensorMode) -> Iterator[None]:
    """Compute no numbers, take no size as fixed, and ask no backend which sizes it likes."""
    nnpack = torch.backends.nnpack.flags(enabled=False)
    with fake, enable_python_dispatcher(), torch.no_grad(), _onednn(False), nnpack:
        yield


@contextlib.contextmanager
def _onednn(enabled: bool) -> Iterator[None]:
    """Switch oneDNN and nothing else, which PyTorch's own context manager would reset too."""
    switch: Any = torch.backends.mkldnn.set_flags
    before, *_ = switch(enabled, _fp32_precision=None)
    try:
        yield
    finally:
        switch(before, _fp32_precision=None)


def _evaluate(node: fx.Node) -> None:
    args, kwargs = fx.map_arg((node.args, node.kwargs), _value)
    # An LSTM on oneDNN is one op at any length; else it would be unrolled over this one's.
    try:
        with _onednn(node.target is aten.lstm.input):
            node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]
    except Exception as error:
        raise Untraceable from error


def _value(node: fx.Node) -> Any:
    return node.meta["val"]


def _alike(node: fx.Node, other: Any) -> bool:
    one, two = _value(node), _value(other)
    return one.dtype == two.dtype and tuple(map(str, one.shape)) == tuple(map(str, two.shape))


# --- decompositions --------------------------------------------------------------------------


def _decompose(program: Program, table: Table) -> None:
    """Put in the place of each op that the table names what it is made of.

    Raises:
        Untraceable: an op cannot be traced by itself; the graph still computes what it did.
    """
    graph = program.graph
    fake = _value(next(iter(graph.nodes))).fake_mode
    placed: dict[fx.Node, fx.Node] = {}  # what went, and what stands in its place
    moved: set[fx.Node] = set()  # whose values lie in memory otherwise than they did
    try:
        with _shapes_alone(fake):
            for node in list(graph.nodes):
                if node in placed:
                    continue
                if _is_asked(node, table):
                    inner, arguments = _trace(node, table)
                    with graph.inserting_before(node):
                        made = hand_over(node, copy_ops(graph, inner, arguments))
                    moved |= {new for old, new in made.items() if _layout(new) != _layout(old)}
                    placed |= made
                elif node.op == "call_function" and not moved.isdisjoint(node.all_input_nodes):
                    before = _layout(node)
                    _evaluate(node)
                    moved |= {node} if _layout(node) != before else set()
    finally:
        for old, new in placed.items():
            program.graph_signature.replace_all_uses(old.name, new.name)
        _merge_sizes(graph)
        graph.eliminate_dead_code()
        program.graph_module.recompile()


def _layout(node: fx.Node) -> list[str]:
    """The strides of a node's tensors."""
    leaves = pytree.tree_leaves(_value(node))
    return [str(leaf.stride()) for leaf in leaves if isinstance(leaf, Tensor)]


def _merge_sizes(graph: fx.Graph) -> None:
    """Each size is taken once, from the first tensor that has it, and a fixed one is a number."""
    known: dict[Any, fx.Node] = {}
    for node in graph.nodes:
        size = node.meta.get("val")
        if not isinstance(size, torch.SymInt):
            continue
        expression = size.node.expr
        if expression.is_Integer:
            for user in list(node.users):
                number = functools.partial(_swap, node, int(expression))
                user.args, user.kwargs = fx.map_arg((user.args, user.kwargs), number)
        elif known.setdefault(expression, node) is not node:
            node.replace_all_uses_with(known[expression])


def _swap(old: fx.Node, new: Any, found: fx.Node) -> Any:
    return new if found is old else found


def _is_asked(node: fx.Node, table: Table) -> bool:
    op = node.target
    if not isinstance(op, OpOverload) or isinstance(_value(node), torch.SymInt):
        return False
    return (
        op in table
        or pools.function_of(node) is not None
        or (is_composite(op) and not _is_preservable_cia_op(op))
    )


def _trace(node: fx.Node, table: Table) -> tuple[fx.Graph, list[fx.Node]]:
    """What a node is made of, and the nodes that it reads."""
    function: Any = pools.function_of(node) or node.target
    leaves, spec = pytree.tree_flatten((node.args, node.kwargs))
    arguments = list(dict.fromkeys(leaf for leaf in leaves if isinstance(leaf, fx.Node)))

    def run(*values: Any) -> Any:
        known = dict(zip(arguments, values, strict=True))
        args, kwargs = pytree.tree_unflatten(
            [known[leaf] if isinstance(leaf, fx.Node) else leaf for leaf in leaves], spec
        )
        return function(*args, **kwargs)

    try:
        traced = make_fx(run, decomposition_table=table)(*map(_value, arguments))
    except Exception as error:
        raise Untraceable from error
    for each in list(traced.graph.nodes):
        if each.target is aten.as_strided_.default and _alike(each, each.args[0]):
            hand_over(each, each.args[0])  # it lays out the same values otherwise
        elif each.target is aten.sym_numel.default:
            hand_over(each, _product_of_sizes(each))
    plain = all(map(_is_plain, traced.graph.nodes))
    several = not isinstance(traced.graph.output_node().args[0], fx.Node)
    if not plain or (several and not is_unpacked(node)):
        raise Untraceable
    return traced.graph, arguments


def _product_of_sizes(numel: fx.Node) -> fx.Node:
    """The number of a tensor's elements from its sizes, of which exporters know more."""
    (source,) = numel.all_input_nodes
    graph = numel.graph
    total: Any = None
    with graph.inserting_before(numel):
        for dim, size in enumerate(_value(source).shape):
            factor, value = size, size
            if isinstance(size, torch.SymInt):
                factor = graph.call_function(aten.sym_size.int, (source, dim))
                factor.meta["val"] = size
            if total is None:
                total, so_far = factor, value
            else:
                total = graph.call_function(operator.mul, (total, factor))
                so_far = total.meta["val"] = so_far * value
    return total  # type: ignore[no-any-return]


def _is_plain(node: fx.Node) -> bool:
    """Whether a node calls an op that changes none of its arguments, or is an end of the graph."""
    mutable = isinstance(node.target, OpOverload) and node.target._schema.is_mutable
    return node.op in PLAIN and not mutable and node.target is not aten.sym_stride.int
