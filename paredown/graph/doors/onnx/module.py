"""An ONNX graph as a PyTorch module: its weights under their own names, its nodes in order."""

from __future__ import annotations

import keyword
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from paredown.core.errors import UserError
from paredown.graph import lazily
from paredown.graph.doors.onnx.call import Call, Known, Value, as_tensor, is_host
from paredown.graph.doors.onnx.ops import HOST, OPS
from paredown.graph.doors.onnx.program import Node, Program, inner

INFINITE = "_infinite"
# Whatever PyTorch says of arguments that do not fit each other, of which a file may have any.
FAILURES = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError)
Env = dict[str, "Value | None"]


class OnnxModule(nn.Module):
    """Interprets a graph; its inputs are keywords, by their names in the file.

    Which of the file's arrays are tensors, its first run finds out (`settle`): those that an op
    asked for become parameters where they are floats, and buffers where they are not.
    """

    def __init__(self, program: Program, settled: bool = True) -> None:
        super().__init__()
        self.program = program
        self.places: dict[str, str] = {}  # name in the file -> name here
        self.only_batch: int | None = None
        self._statistics = _statistics(program)
        self._settled = settled

    def forward(self, **inputs: Tensor) -> Any:
        env: Env = {}
        for name in self.program.inputs:
            if name not in inputs:
                raise UserError(f"input {name!r} is missing; the file wants it.")
            value = inputs[name]
            other = value.is_floating_point() and value.dtype is not torch.float32
            env[name] = value.float() if other else value
        self._check_batch(env)
        run(self.program, env, self.tensor_of, self.training)
        made = [_told(env, name, self.tensor_of) for name in self.program.outputs]
        return made[0] if len(made) == 1 else dict(zip(self.program.outputs, made, strict=True))

    def tensor_of(self, known: Known) -> Tensor:
        """The parameter or buffer of a name in the file."""
        place = self.places.get(known.name)
        if place is None:
            if self._settled:
                return as_tensor(known.array)
            place = self._register(known)
        owner, _, last = place.rpartition(".")
        found: Tensor = getattr(self.get_submodule(owner), last)
        beyond = getattr(self.get_submodule(owner), f"{last}{INFINITE}", None)
        return found if beyond is None else torch.where(beyond == 0, found, math.inf * beyond)

    def _register(self, known: Known) -> str:
        place = free_name(known.name, set(self.places.values()))
        owner, _, last = place.rpartition(".")
        tensor = _tensor(known)
        module = _submodule(self, owner)
        if tensor.is_floating_point() and not lazily.finite(tensor):
            module.register_buffer(f"{last}{INFINITE}", _signs(known, tensor))
            module.register_buffer(last, torch.where(tensor.isfinite(), tensor, 0.0))
        elif tensor.is_floating_point() and known.name not in self._statistics:
            module.register_parameter(last, nn.Parameter(tensor))
        else:
            module.register_buffer(last, tensor)
        self.places[known.name] = place
        return place

    def settle(self, **inputs: Tensor) -> Any:
        """Run once, registering what is asked for; returns what it gives."""
        self._settled = False
        try:
            with torch.no_grad():
                return self.eval()(**inputs)
        finally:
            self._settled = True

    def _check_batch(self, env: Env) -> None:
        if self.only_batch is None:
            return
        for name in self.program.inputs:
            value = env[name]
            if isinstance(value, Tensor) and value.dim() and value.shape[0] != self.only_batch:
                raise UserError(
                    f"input {name!r} has a batch of {value.shape[0]}; the file is for "
                    f"{self.only_batch} alone."
                )


def run(
    program: Program, env: Env, tensor_of: Callable[[Known], Tensor], training: bool = False
) -> None:
    """Add what the nodes give to ``env``, and leave out what no later one reads."""
    left = program.uses()
    for node in program.nodes:
        values = [None if not name else _read(env, program, name, node) for name in node.inputs]
        around = _around(program, node, env)
        made = compute(node, tuple(values), tensor_of, training, around)
        for name, value in zip(node.outputs, made, strict=False):
            env[name] = value
        missing = [name for name in node.outputs[len(made) :] if left[name]]
        if missing:
            raise node.refused(f"its output {missing[0]!r} is read, and is none that can be taken")
        for name in node.inputs:
            left[name] -= 1
            if not left[name] and name in env:
                del env[name]


def _around(program: Program, node: Node, env: Env) -> Env:
    """What the graphs within a node may read."""
    names = {name for graph in inner(node) for name in graph.uses() if name in program.known}
    return {**{name: Known(name, program.known[name]) for name in names}, **env} if names else env


def _read(env: Env, program: Program, name: str, node: Node) -> Value | None:
    if name in env:
        return env[name]
    if name in program.known:
        return Known(name, program.known[name])
    raise node.refused(f"its input {name!r} is given by no node")


def compute(
    node: Node,
    values: tuple[Value | None, ...],
    tensor_of: Callable[[Known], Tensor],
    training: bool = False,
    env: Env | None = None,
) -> tuple[Value | None, ...]:
    """What one node gives."""
    if node.op == "If":
        return _branch(Call(node, values, tensor_of, training), env or {})
    call = Call(node, values, tensor_of, training)
    try:
        made = _made(call)
        call.check_all_asked()
    except UserError:
        raise
    except FAILURES as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise Failed(f"{node.told()}: {reason[0]}") from error
    return made if isinstance(made, tuple) else (made,)


def _made(call: Call) -> Any:
    """By the op on the host where that can, else by that of tensors."""
    op = call.node.op
    if op in HOST and call.values and all(map(is_host, call.values)):
        made = HOST[op](call)
        if made is not NotImplemented:
            return made
    if op not in OPS:
        raise _unknown(call.node)
    return OPS[op](call)


class Failed(RuntimeError):
    """An op that could not be computed for these inputs; says which node it was."""


def _branch(call: Call, env: Env) -> tuple[Value | None, ...]:
    """The branch that a condition known at capture takes."""
    if not is_host(call.value(0)):
        raise call.node.refused(
            "is control flow: its condition is computed from the data", "control"
        )
    chosen = call.attribute("then_branch" if bool(call.number(0)) else "else_branch")
    inside: Env = dict(env)
    run(chosen, inside, call.tensor_of, call.training)
    return tuple(
        inside[name] if name in inside else Known(name, chosen.known[name])
        for name in chosen.outputs
    )


def _unknown(node: Node) -> UserError:
    if node.op in ("Loop", "Scan"):
        return node.refused("is control flow on data", "control")
    if node.op.startswith(("Sequence", "SplitToSequence", "ConcatFromSequence", "Optional")):
        return node.refused("works on sequences or optional values, which no tensor is")
    if node.op.startswith(("String", "Regex", "Tfidf", "LabelEncoder", "ai.onnx.ml")):
        return node.refused("works on text or tables, which is no net")
    if "." in node.op:
        return node.refused("is an op of a domain that is not known here", "custom")
    return node.refused("is an op that cannot be taken")


def _told(env: Env, name: str, tensor_of: Callable[[Known], Tensor]) -> Tensor:
    value = env[name]
    if isinstance(value, Known):
        return tensor_of(value).clone()
    if value is None:
        raise UserError(f"output {name!r} is given by no node.")
    return value if isinstance(value, Tensor) else as_tensor(value)


def _tensor(known: Known) -> Tensor:
    """The array as a tensor that shares its memory, where that can be written to."""
    array = known.array
    if array.dtype.name not in _TORCH_KNOWS:
        raise UserError(f"{known.name!r}: is {array.dtype.name}, which PyTorch has no tensors of.")
    if not array.flags.writeable:
        array = array.copy()
    return torch.from_numpy(array)


_TORCH_KNOWS = {
    *("float32", "float64", "float16", "int8", "int16", "int32", "int64"),
    *("uint8", "uint16", "uint32", "uint64", "bool"),
}


def _signs(known: Known, tensor: Tensor) -> Tensor:
    """-1, 0 or 1: where a mask is infinite, which no weight may be."""
    if tensor.isnan().any():
        raise UserError(f"tensor {known.name!r}: holds NaN; the file is damaged.")
    return torch.where(tensor.isinf(), tensor.sign(), 0.0)


def _statistics(program: Program) -> set[str]:
    """The names of batch norms' means and variances, which move and are not trained."""
    norms = (node for node in program.nodes if node.op == "BatchNormalization")
    return {name for node in norms for name in node.inputs[3:5]}


def free_name(name: str, taken: set[str]) -> str:
    """A name of the file as one for a module's state: a path of words, none empty or taken.

    Example:
        >>> free_name("layer.0.weight", set()), free_name("/a/b:0", {"a.b:0"})
        ('layer.0.weight', 'a.b:0_1')
    """
    words = [word for word in name.replace("/", ".").replace("\\", ".").split(".") if word]
    reserved = set(dir(nn.Module)) | {"program", "places", "only_batch", "_statistics"}
    words = [
        f"{word}_" if word in reserved or keyword.iskeyword(word) else word for word in words
    ] or ["constant"]
    if len(words) == 1 and _is_made(words[0]):
        words = [f"{words[0]}_"]
    wished = made = ".".join(words)
    parents = Counter(".".join(each.split(".")[:n]) for each in taken for n in range(1, 20))
    number = 0
    while made in taken or parents[made] or any(made.startswith(f"{each}.") for each in taken):
        number += 1
        made = f"{wished}_{number}"
        if any(wished.startswith(f"{each}.") for each in taken):  # its owner is a tensor
            made = f"{wished.replace('.', '_')}" + (f"_{number}" if number > 1 else "")
    return made


def _is_made(word: str) -> bool:
    """Whether an exporter may give this name to a value of its own, when the model goes out."""
    base, _, number = word.rpartition("_")
    base = base if base and number.isdigit() else word
    return base in ("val", "node") or hasattr(torch.ops.aten, base)


def _submodule(module: nn.Module, path: str) -> nn.Module:
    for word in filter(None, path.split(".")):
        if word not in module._modules:
            module.add_module(word, nn.Module())
        module = module._modules[word]  # type: ignore[assignment]
    return module
