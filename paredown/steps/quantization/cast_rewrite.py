"""Rewrite a graph to 16 bits, node by node, on the way of its example."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from paredown.core.errors import UserError
from paredown.graph import mode
from paredown.graph.model import Model
from paredown.graph.state import tensor_of
from paredown.steps.quantization.cast_plan import Plan, inner_graph

aten = torch.ops.aten


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


def floats(graph: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The floating-point parameters and buffers, each once."""
    for name, tensor in [*graph.named_parameters(), *graph.named_buffers()]:
        if tensor.is_floating_point():
            yield name, tensor


def rewrite(model: Model, plan: Plan, dtype: torch.dtype, example: list[Tensor]) -> None:
    """Make the model's graph one of ``dtype`` between float32 inputs and outputs, in place."""
    lost = plan.narrowed_outputs(model.graph)
    _narrow_state(model.graph, plan, dtype)
    _Narrower(model.graph, plan, dtype).rewrite(example)
    _widen_outputs(model.graph, lost)


def _narrow_state(graph: fx.GraphModule, plan: Plan, dtype: torch.dtype) -> None:
    kept = {str(node.target) for node in plan.wide if node.op == "get_attr"}
    spared = {id(tensor_of(graph, name)) for name in kept}
    for _, tensor in floats(graph):
        if tensor.dtype == torch.float32 and id(tensor) not in spared:
            tensor.data = narrow(tensor.data, dtype)


class _Narrower:
    """Runs a graph on the example and rewrites each node on the way.

    Dtypes named in arguments are replaced. What is float32 all the same (an input, a default
    dtype) is cast right after, and what stays wide before its narrow uses. An op that has no
    16-bit kernel here runs in float32 between casts.
    """

    def __init__(self, module: fx.GraphModule, plan: Plan, dtype: torch.dtype) -> None:
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
                self._widen_inputs(node)
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

    def _widen_inputs(self, node: fx.Node) -> None:
        for source in node.all_input_nodes:
            value = self.values[source]
            if isinstance(value, Tensor) and value.dtype == self.dtype:
                wide = _insert(node, aten.to.dtype, source, torch.float32)
                self.values[wide] = value.float()
                node.replace_input_with(source, wide)

    def _narrow_value(self, node: fx.Node) -> Any:
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            args: Any = fx.node.map_arg(node.args, self.values.__getitem__)
            place = inner_graph(args)
            plan = Plan.of(args[place], self.plan.inner[node.name], self.dtype)
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
            self._widen_inputs(node)
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
