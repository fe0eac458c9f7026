"""Half precision: every float32 weight and every float32 operation in 16 bits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from paredown.graph import mode
from paredown.graph.model import Model
from paredown.graph.sites import tensor_of
from paredown.types import Task, UserError

aten = torch.ops.aten
_INDEXING = (
    *(aten.index.Tensor, aten.index_select.default, aten.gather.default),
    *(aten.embedding.default, aten.take.default, aten.take_along_dim.default),
)
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}

# --- mathematics -----------------------------------------------------------------------------


def out_of_range(tensor: Tensor, dtype: torch.dtype) -> int:
    """How many finite numbers would become infinite in ``dtype``.

    float32's own largest number, with which masks are filled, does not count: `narrow` maps it.

    Shapes: tensor (...) -> a count.

    Example:
        >>> out_of_range(torch.tensor([1.0, 7e4, float("inf")]), torch.float16)
        1
    """
    found = tensor[_overflows(tensor, dtype)]
    return int((found.abs() != torch.finfo(tensor.dtype).max).sum())


def narrow(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to the nearest number of ``dtype``; what overflows becomes its largest (IEEE 754).

    Shapes: tensor (...) -> (...).

    Example:
        >>> narrow(torch.tensor([0.1, -3.4e38]), torch.float16)
        tensor([ 9.9976e-02, -6.5504e+04], dtype=torch.float16)
    """
    largest = torch.finfo(dtype).max
    bounded = tensor.clamp(-largest, largest).where(_overflows(tensor, dtype), tensor)
    return bounded.to(dtype)


def _overflows(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype).isinf() & tensor.isfinite()


# --- the step --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cast:
    """Run the whole model in float16 or bfloat16; its inputs and outputs stay float32.

    It halves the file everywhere. It is faster on GPUs and on CPUs with 16-bit units (ARMv8.2,
    AMX); other CPUs convert back and forth and get slower. "bf16" keeps float32's range at 8
    bits of precision, "fp16" has 11 bits but ends at 65504. ONNX Runtime on a CPU has
    no bfloat16 kernels: there, "fp16" it is. Cast last: train before.

    What is computed from whole numbers alone, such as the angles of rotary positions, stays
    float32 up to where it meets a 16-bit tensor: position 1001 has no place in bfloat16.

    Raises:
        UserError: the dtype is unknown; the model is 16-bit or quantized already; a weight or
            the output on the example leaves the range.

    Example:
        >>> import paredown
        >>> model = paredown.capture(nn.Linear(8, 4), (torch.zeros(1, 8),))
        >>> half = paredown.Cast("fp16").apply(model, None)
        >>> half.state_dict()["weight"].dtype, half(torch.zeros(1, 8)).dtype
        (torch.float16, torch.float32)
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    dtype: str = "fp16"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UserError(f'dtype: expected "fp16" or "bf16", got {self.dtype!r}.')

    @property
    def form(self) -> str:
        return self.dtype

    def apply(self, model: Model, task: Task) -> Model:
        """A copy whose graph computes in 16 bits between float32 inputs and outputs."""
        dtype = DTYPES[self.dtype]
        _check(model, dtype)
        half = model.copy()
        with torch.no_grad():
            facts = _Facts(model.copy().graph)
            before = facts.run(*_example(model))
            plan = _Plan.of(half.graph, facts)
            _narrow_state(half.graph, plan, dtype)
            lost = plan.narrowed_outputs(half.graph)
            _Narrower(half.graph, plan, dtype).rewrite(_example(model))
            _widen_outputs(half.graph, lost)
            after = half.graph(*_example(model))
        _check_outputs(before, after, self.dtype)
        return half


def _example(model: Model) -> list[Tensor]:
    """Copies of the example on the model's device, which the graph may write into."""
    device = next(_floats(model.graph))[1].device
    return [item.example.to(device, copy=True) for item in model.inputs]


def _floats(graph: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The floating-point parameters and buffers, each once."""
    for name, tensor in [*graph.named_parameters(), *graph.named_buffers()]:
        if tensor.is_floating_point():
            yield name, tensor


def _check(model: Model, dtype: torch.dtype) -> None:
    low = "fake_quantize_binary", "fake_quantize_ternary"
    named = [str(node.target) for node in model.graph.graph.nodes]
    if any("quantize" in name and not any(kind in name for kind in low) for name in named):
        raise UserError("Cast: the model is quantized, so its weights are 8 bits already.")
    kinds = {parameter.dtype for parameter in model.parameters()}
    if torch.float32 not in kinds:
        found = ", ".join(sorted(str(k).removeprefix("torch.") for k in kinds)) or "none at all"
        raise UserError(f"Cast: changed nothing; the model has no float32 weights ({found}).")
    single = [(name, t) for name, t in _floats(model.graph) if t.dtype == torch.float32]
    bad = {name: out_of_range(t, dtype) for name, t in single}
    worst = [f"{name} ({count})" for name, count in bad.items() if count]
    if worst:
        raise UserError(
            f"Cast: weights beyond {torch.finfo(dtype).max:g}, where {dtype} ends: "
            f"{', '.join(worst[:5])}{', ...' if len(worst) > 5 else ''}; "
            'use Cast("bf16"), which has the range of float32.'
        )


def _check_outputs(before: Any, after: Any, name: str) -> None:
    for old, new in zip(before, after, strict=True):
        if old.is_floating_point() and old.isfinite().all() and not new.isfinite().all():
            bad = int((~new.isfinite()).sum())
            advice = "leave this model in float32."
            if name == "fp16":
                advice = 'use Cast("bf16"), which has the range of float32.'
            raise UserError(
                f"Cast: {bad} of {new.numel()} outputs on the example are NaN or infinite in "
                f"{name}; {advice}"
            )


# --- which nodes stay float32 ----------------------------------------------------------------


class _Facts(fx.Interpreter):
    """Runs a graph and notes, by node name, what holds float32 and what whole numbers."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.single: set[str] = set()
        self.whole: set[str] = set()
        self.inner: dict[str, _Facts] = {}  # of the graphs within the graph

    def run_node(self, n: fx.Node) -> Any:
        if isinstance(n.target, torch._ops.HigherOrderOperator):
            args, _ = self.fetch_args_kwargs_from_env(n)
            place = _inner_graph(args)
            facts = self.inner[n.name] = _Facts(args[place])
            value = facts.run(*args[place + 1 :])
        else:
            value = super().run_node(n)
        leaves = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
        if any(leaf.dtype == torch.float32 for leaf in leaves):
            self.single.add(n.name)
        elif leaves and not any(leaf.is_floating_point() for leaf in leaves):
            self.whole.add(n.name)
        return value


@dataclass
class _Plan:
    """The nodes that give float32 now, and those of them that stay so."""

    single: set[fx.Node]
    wide: set[fx.Node] = field(default_factory=set)
    inner: dict[str, _Facts] = field(default_factory=dict)

    @staticmethod
    def of(graph: fx.GraphModule, facts: _Facts) -> _Plan:
        nodes = list(graph.graph.nodes)
        plan = _Plan({n for n in nodes if n.name in facts.single}, inner=facts.inner)
        loose: set[fx.Node] = set()  # buffers and constants: as wide as what uses them
        for node in nodes:
            if node in plan.single and node.op not in ("placeholder", "output"):
                kind = plan._kind(graph, node, loose, facts)
                (plan.wide if kind == "wide" else loose if kind == "loose" else set()).add(node)
        for node in reversed(nodes):
            if node in plan.wide:
                plan.wide |= loose & set(node.all_input_nodes)
        return plan

    def _kind(
        self, graph: fx.GraphModule, node: fx.Node, loose: set[fx.Node], facts: _Facts
    ) -> str:
        if node.op == "get_attr":
            parameter = isinstance(tensor_of(graph, str(node.target)), nn.Parameter)
            return "narrow" if parameter else "loose"
        floats = [n for n in node.all_input_nodes if n in self.single]
        if any(n not in self.wide and n not in loose for n in floats):
            return "narrow"
        if any(n in self.wide for n in floats):
            return "wide"
        counts = any(n.name in facts.whole for n in node.all_input_nodes)
        if floats and node.target in _INDEXING:
            counts = False
        return "wide" if counts or "arange" in str(node.target) else "loose"

    def narrowed_outputs(self, graph: fx.GraphModule) -> list[bool]:
        (end,) = graph.graph.find_nodes(op="output")
        return [node in self.single and node not in self.wide for node in end.args[0]]


def _inner_graph(args: Any) -> int:
    return next(i for i, item in enumerate(args) if isinstance(item, fx.GraphModule))


# --- the rewriting ---------------------------------------------------------------------------


def _narrow_state(graph: fx.GraphModule, plan: _Plan, dtype: torch.dtype) -> None:
    kept = {str(node.target) for node in plan.wide if node.op == "get_attr"}
    spared = {id(tensor_of(graph, name)) for name in kept}
    for _, tensor in _floats(graph):
        if tensor.dtype == torch.float32 and id(tensor) not in spared:
            tensor.data = narrow(tensor.data, dtype)


class _Narrower:
    """Runs a graph on the example and rewrites each node on the way.

    Dtypes named in arguments are replaced. What is float32 all the same (an input, a default
    dtype) is cast right after, and what stays wide before its narrow uses. An op that has no
    16-bit kernel here runs in float32 between casts.
    """

    def __init__(self, module: fx.GraphModule, plan: _Plan, dtype: torch.dtype) -> None:
        self.module, self.plan, self.dtype = module, plan, dtype
        self.values: dict[fx.Node, Any] = {}
        self.casts: dict[fx.Node, fx.Node] = {}  # a wide node -> its 16-bit copy

    def rewrite(self, inputs: list[Tensor]) -> Any:
        rest = iter(inputs)
        result = None
        for node in list(self.module.graph.nodes):
            if node.op == "placeholder":
                self.values[node] = next(rest)
            elif node.op == "get_attr":
                self.values[node] = _attribute(self.module, str(node.target))
            elif node.op == "output":
                result = fx.node.map_arg(node.args[0], self.values.__getitem__)
                break
            elif node in self.plan.wide:
                self.values[node] = self._value(node)
            else:
                self._narrow_inputs(node)
                self.values[node] = self._narrow_value(node)
            if node not in self.plan.wide:
                self._narrow_result(node)
        self.module.graph.lint()
        self.module.recompile()
        return result

    def _value(self, node: fx.Node) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.values.__getitem__)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _narrow_inputs(self, node: fx.Node) -> None:
        _rename(node, torch.float32, self.dtype)
        for source in node.all_input_nodes:
            if source in self.plan.wide and isinstance(self.values[source], Tensor):
                if source not in self.casts:
                    self.casts[source] = self._cast(source)
                node.replace_input_with(source, self.casts[source])

    def _narrow_value(self, node: fx.Node) -> Any:
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            args: Any = fx.node.map_arg(node.args, self.values.__getitem__)
            place = _inner_graph(args)
            plan = _Plan.of(args[place], self.plan.inner[node.name])
            return _Narrower(args[place], plan, self.dtype).rewrite(list(args[place + 1 :]))
        try:
            return self._value(node)
        except (RuntimeError, NotImplementedError):
            return self._float32_value(node)

    def _float32_value(self, node: fx.Node) -> Any:
        schema = getattr(node.target, "_schema", None)
        try:
            if schema is None or schema.is_mutable:
                return self._value(node)
            for source in node.all_input_nodes:
                value = self.values[source]
                if isinstance(value, Tensor) and value.dtype == self.dtype:
                    wide = _insert(node, aten.to.dtype, source, torch.float32)
                    self.values[wide] = value.float()
                    node.replace_input_with(source, wide)
            _rename(node, self.dtype, torch.float32)
            return self._value(node)
        except (RuntimeError, NotImplementedError) as error:
            raise UserError(f"Cast: {node.target} does not run in {self.dtype}: {error}") from error

    def _narrow_result(self, node: fx.Node) -> None:
        value = self.values[node]
        if isinstance(value, Tensor) and value.dtype == torch.float32:
            users = list(node.users)
            cast = self._cast(node)
            for user in users:
                user.replace_input_with(node, cast)
        elif "val" in node.meta:
            node.meta["val"] = _as_dtype(node.meta["val"], self.dtype)

    def _cast(self, node: fx.Node) -> fx.Node:
        """A 16-bit copy of what the node gives, bounded where it would become infinite."""
        value, source = self.values[node], node
        place = node.next
        while place.op == "placeholder":
            place = place.next
        if _overflows(value, self.dtype).any():
            largest = torch.finfo(self.dtype).max
            source = _insert(place, aten.clamp.default, source, -largest, largest)
        cast = _insert(place, aten.to.dtype, source, self.dtype)
        self.values[cast] = narrow(value, self.dtype)
        if "val" in node.meta:
            source.meta["val"] = node.meta["val"]
            cast.meta["val"] = _as_dtype(node.meta["val"], self.dtype)
        return cast


def _insert(place: fx.Node, target: Any, *args: Any) -> fx.Node:
    with place.graph.inserting_before(place):
        return place.graph.call_function(target, args)


def _attribute(module: nn.Module, name: str) -> Any:
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _as_dtype(value: Any, dtype: torch.dtype) -> Any:
    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.dtype == torch.float32 else tensor

    return pytree.tree_map_only(Tensor, cast, value)


def _rename(node: fx.Node, old: torch.dtype, new: torch.dtype) -> None:
    """Another dtype in the arguments, those for training too, and numbers within its range."""
    largest = torch.finfo(new).max

    def change(item: Any) -> Any:
        if isinstance(item, torch.dtype):
            return new if item == old else item
        if isinstance(item, float) and largest < abs(item) < float("inf"):
            return largest if item > 0 else -largest
        return item

    node.args = fx.node.map_aggregate(node.args, change)  # type: ignore[assignment]
    node.kwargs = fx.node.map_aggregate(node.kwargs, change)  # type: ignore[assignment]
    if mode.KEY in node.meta:
        kept = node.meta[mode.KEY]
        node.meta[mode.KEY] = {k: fx.node.map_aggregate(v, change) for k, v in kept.items()}


def _widen_outputs(graph: fx.GraphModule, lost: list[bool]) -> None:
    """Outputs that were float32 are so again."""
    (end,) = graph.graph.find_nodes(op="output")
    pairs = list(zip(end.args[0], lost, strict=True))
    wide = [_insert(end, aten.to.dtype, n, torch.float32) if was else n for n, was in pairs]
    end.args = (tuple(wide),)
    graph.recompile()
