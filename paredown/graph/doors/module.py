"""An nn.Module, captured in training or evaluation mode."""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim

from paredown.core.errors import UserError
from paredown.graph import lazily, mode, structure
from paredown.graph.doors import norms, recurrent, regions, sizes
from paredown.graph.doors.example import Example, dynamic_leaves, fixed_notes, input_names
from paredown.graph.doors.python_file import users_line
from paredown.graph.model import Model, copy_graph
from paredown.graph.parts import Input, Limit
from paredown.graph.state import keep_state

ONLY_EVALUATION = (
    "the model computes something else in training than in evaluation; it was captured in "
    "evaluation, so fine-tuning runs without its dropout and drop-path, and no statistics move"
)
AUTOCAST = (
    "what runs under torch.autocast computes in full precision here; Cast makes 16 bits of it again"
)
HIDDEN = (
    "what runs under torch.autocast stays in 16 bits, and no step sees it; take autocast out of "
    "the module, or cast by hand"
)
HINTS = {
    "data-dependent": "replace the branch on a tensor's value by torch.where, and "
    "take sizes from shapes instead of .item() or .tolist()",
    "Could not guard": "replace the branch on a tensor's value by torch.where",
    "Could not extract specialized integer": "keep sizes in shapes instead of .item() or .tolist()",
    "Cannot branch": "replace the branch on a tensor's value by torch.where",
    "Tensor-likes are not close": "make the model's output depend on its inputs alone",
    "shape": "check that the example inputs have the shapes the model expects",
    "size": "check that the example inputs have the shapes the model expects",
    "expected scalar type": "check the dtypes of the example inputs",
    "argument": "check that the example has one value for each input of forward()",
}


@dataclass(frozen=True)
class _Captured:
    """A graph, and what was taken for true of its inputs' sizes."""

    graph: fx.GraphModule
    guards: sizes.Guards


def check_parameters(module: nn.Module) -> None:
    if isinstance(module, torch.jit.ScriptModule):
        raise UserError("model: is TorchScript; bring the nn.Module that it was scripted from.")
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if torch.nn.parameter.is_lazy(tensor):
            raise UserError(f"{name}: has no shape yet; run the module once before capture.")
        if tensor.device.type == "meta":
            raise UserError(f"{name}: is on the meta device; load the weights before capture.")
        if isinstance(tensor, nn.Parameter) and _is_other_float(tensor):
            raise UserError(
                f"{name}: is {tensor.dtype}; expected torch.float32: call .float() on the module "
                'and on its inputs, and let Cast("fp16") make 16 bits in the file.'
            )
        if not lazily.finite(tensor):
            bad = int((~torch.isfinite(tensor)).sum())
            raise UserError(f"{name}: {bad} of {tensor.numel()} weights are NaN or infinite.")


def _is_other_float(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype is not torch.float32


def capture_module(module: nn.Module, example: Example, dynamic: Any) -> Model:
    if not isinstance(example, (tuple, list, dict)):
        kind = type(example).__name__
        raise UserError(f"example: expected a tuple of inputs or a dict of keywords, got {kind}.")
    args, kwargs = ((), dict(example)) if isinstance(example, dict) else (tuple(example), {})
    leaves, arguments = structure.flatten((args, kwargs))
    if not leaves:
        raise UserError("example: holds no tensor; give the inputs as deployed, as torch tensors.")
    names = input_names(module, args, kwargs)
    for name, leaf in zip(names, leaves, strict=True):
        if leaf.dtype is torch.bfloat16:
            raise UserError(
                f"example: input {name!r} is {leaf.dtype}, which arrays for a runtime cannot be; "
                "call .float() on it, in the data too."
            )
    specs = dynamic_leaves(args, kwargs, dynamic)
    graph, outputs, notes, limits = _dynamic_or_fixed(module, arguments, leaves, specs)
    if ONLY_EVALUATION not in notes and norms.cumulative(module):
        notes.append(norms.note(module))
    if regions.has_regions(graph):
        graph, note = _without_autocast(graph, leaves)
        notes.append(note)
    notes += [
        f"output {where!r} is a {kind}, not a tensor, and is left out"
        for where, kind in structure.opaque(outputs).items()
    ]
    inputs = _inputs(names, leaves, specs, limits)
    notes += fixed_notes(inputs, specs)
    return Model(graph, inputs, arguments, outputs, notes=tuple(notes))


def _without_autocast(graph: fx.GraphModule, leaves: list[Tensor]) -> tuple[fx.GraphModule, str]:
    """The graph whose autocast regions compute in full precision; as it is where they cannot."""
    plain = copy_graph(graph)
    regions.inline_regions(plain, casts=True)
    plain = _tidy(plain, set(graph.state_dict()))
    if not regions.has_regions(plain) and _runs(plain, leaves):
        with torch.no_grad():
            eager = list(graph(*[leaf.clone() for leaf in leaves]))
        if _agrees(plain, leaves, [_lowered(each) for each in eager]):
            return plain, AUTOCAST
    return graph, HIDDEN


def _lowered(tensor: Tensor) -> Tensor:
    """As a value of 16 bits, which is compared as such."""
    return tensor.bfloat16() if tensor.is_floating_point() else tensor


def _dynamic_or_fixed(
    module: nn.Module,
    arguments: structure.Structure,
    leaves: list[Tensor],
    specs: list[dict[int, str]],
) -> tuple[fx.GraphModule, structure.Structure, list[str], list[dict[int, Limit]]]:
    """The graph with a batch that varies, and its sizes' limits.

    Where it cannot, it is captured at the example's own batch, which is fixed.
    """
    wide = _at_least_two(leaves)
    named = [{0: "batch", **spec} for spec in specs]
    try:
        eager, outputs = _run(module, arguments, wide)
    except UserError:
        if wide is leaves:
            raise
    else:
        found, notes = _export_either(module, arguments, outputs, wide, named, eager)
        limits = _limits(module, found, arguments, wide, named)
        if all(limit.get(0) == (1, None) for limit in limits):
            return found.graph, outputs, notes, limits
    named = [{dim: name for dim, name in each.items() if dim} for each in named]
    eager, outputs = _run(module, arguments, leaves)
    found, notes = _export_either(module, arguments, outputs, leaves, named, eager)
    return found.graph, outputs, notes, _limits(module, found, arguments, leaves, named)


def _limits(
    module: nn.Module,
    found: _Captured,
    arguments: structure.Structure,
    leaves: list[Tensor],
    named: list[dict[int, str]],
) -> list[dict[int, Limit]]:
    """For each input the dimensions that vary: graph and module are compared at other sizes."""

    def agrees(resized: list[Tensor]) -> bool | None:
        try:
            eager, _ = _run(module, arguments, resized)
        except UserError:
            return False if _runs(found.graph, resized) else None
        return _runs(found.graph, resized) and _agrees(found.graph, resized, eager)

    nodes = [node for node in found.graph.graph.nodes if node.op == "placeholder"]
    return sizes.limits(nodes, found.guards, leaves, named, agrees)


def _export_either(
    module: nn.Module,
    arguments: structure.Structure,
    outputs: structure.Structure,
    leaves: list[Tensor],
    named: list[dict[int, str]],
    eager: list[Tensor],
) -> tuple[_Captured, list[str]]:
    """Captured in training mode, or in evaluation where training computes something else.

    Dimensions are dynamic where the exporter can: all that are named, else the batch, else those
    besides it, else none.
    """
    kinds: tuple[Callable[[int], bool], ...] = (
        lambda dim: True,
        lambda dim: dim == 0,
        lambda dim: dim != 0,
        lambda dim: False,
    )
    wished: list[list[dict[int, Any]]] = []
    for kind in kinds:
        shapes = [
            {dim: Dim.AUTO for dim in chosen if kind(dim) and dim < leaf.dim()}
            for leaf, chosen in zip(leaves, named, strict=True)
        ]
        wished += [] if shapes in wished else [shapes]
    failed: UserError | None = None
    for shapes in wished:
        captured = _export(module, arguments, outputs, leaves, shapes, training=True)
        if captured is not None and _agrees(captured.graph, leaves, eager):
            return captured, []
        try:
            captured = _export(module, arguments, outputs, leaves, shapes, training=False)
        except UserError as error:
            failed = failed or error
            continue
        if captured is not None and _agrees(captured.graph, leaves, eager):
            return captured, [ONLY_EVALUATION]
    raise failed or UserError(
        "model: its output differs from one call to the next on the same input in evaluation "
        "mode; make it depend on its inputs alone."
    )


def _at_least_two(leaves: list[Tensor]) -> list[Tensor]:
    """The example with a batch of 2 where it is 1: a size of 1 would be captured as fixed."""
    if all(leaf.dim() > 0 and leaf.shape[0] == 1 for leaf in leaves):
        return [torch.cat([leaf, leaf]) for leaf in leaves]
    return leaves


def _run(
    module: nn.Module, arguments: structure.Structure, leaves: list[Tensor]
) -> tuple[list[Tensor], structure.Structure]:
    """The eager output in evaluation mode, before anything is captured."""
    runner = _borrowed(module)
    _set_module_mode(runner, training=False)
    args, kwargs = structure.unflatten([leaf.clone() for leaf in leaves], arguments)
    try:
        with torch.no_grad():
            outputs, nesting = structure.flatten(runner(*args, **kwargs))
    except Exception as error:
        raise UserError(_explain("the model fails on its example inputs", error)) from error
    if not outputs:
        raise UserError("model: its output holds no tensor.")
    return outputs, nesting


def _borrowed(module: nn.Module) -> nn.Module:
    """A copy with the module's own parameters; buffers, which a run may change, are copied too,
    and take memory where it does.

    Tensors that a run leaves in the module, such as the weight that ``torch.nn.utils.weight_norm``
    makes, cannot be copied with their gradient.
    """
    memo: dict[int, Any] = dict(lazily.copies(module.buffers()))
    memo |= {id(each): each for each in module.parameters()}
    for owner in module.modules():
        for value in vars(owner).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach()
    return copy.deepcopy(module, memo)


def _set_module_mode(module: nn.Module, training: bool) -> None:
    if not isinstance(module, fx.GraphModule) or not hasattr(module, "_guards_fn"):
        try:
            module.train(training)
            return
        except NotImplementedError:  # an exported program's module: its graph is switched instead
            pass
    assert isinstance(module, fx.GraphModule)
    mode.set_training(module, training)


def _export(
    module: nn.Module,
    arguments: structure.Structure,
    outputs: structure.Structure,
    leaves: list[Tensor],
    shapes: list[dict[int, Any]],
    training: bool,
) -> _Captured | None:
    """The captured graph in evaluation mode; None where only this mode's output is another."""
    copied = _borrowed(module)
    _set_module_mode(copied, training)
    for norm in norms.cumulative(copied).values() if training else ():
        norm.momentum = norms.MOMENTUM
    inner = copied.forward
    if isinstance(copied, fx.GraphModule):  # the exporter would take its graph, not its forward
        copied = _bare(copied)
    nesting: list[structure.Structure] = []

    def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
        args, kwargs = structure.unflatten(list(tensors), arguments)
        found, nested = structure.flatten(inner(*args, **kwargs))
        nesting.append(nested)
        return tuple(found)

    copied.forward = flat
    try:
        with _quiet(), recurrent.any_length():
            program = torch.export.export(
                copied,
                tuple(leaf.clone() for leaf in leaves),
                dynamic_shapes={"tensors": tuple(shapes)},
                strict=False,
            )
            graph: Any = lazily.duplicate(program.module(check_guards=False))
    except Exception as error:
        if training:
            return None
        raise UserError(_explain("the model cannot be captured", error)) from error
    if nesting[-1] != outputs:
        return None
    made = _tidy(graph, set(module.state_dict()))
    regions.refuse_graphs_apart(made)
    return _Captured(made, sizes.Guards.of(program))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's deprecations, and pages of its graph."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _bare(module: nn.Module) -> nn.Module:
    """A plain module that shares the state of ``module``."""
    bare = nn.Module()
    for kind in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        bare.__dict__[kind] = module.__dict__[kind]
    return bare


def _tidy(graph: Any, persistent: set[str]) -> fx.GraphModule:
    """Plain flat signature, parameters that can be trained, no assertions; evaluation mode."""
    graph.graph.set_codegen(fx.graph.CodeGen())
    regions.inline_regions(graph)
    for node in list(graph.graph.nodes):
        if "_assert" in str(node.target) and not node.users:
            graph.graph.erase_node(node)
        node.meta = {
            k: node.meta[k] for k in ("val", "nn_module_stack", "stack_trace") if k in node.meta
        }
    graph.recompile()
    mode.set_training(graph, False)
    plain = fx.GraphModule(graph, graph.graph, class_name="Captured")
    keep_state(graph, plain, persistent)
    return plain


def _runs(graph: fx.GraphModule, leaves: list[Tensor]) -> bool:
    try:
        with torch.no_grad(), _quiet():  # a graph tells where it failed, before it raises
            graph(*[leaf.clone() for leaf in leaves])
    except Exception:  # whatever an op says of a size that is not its own
        return False
    return True


def _agrees(graph: fx.GraphModule, leaves: list[Tensor], eager: list[Tensor]) -> bool:
    with torch.no_grad():
        got = graph(*[leaf.clone() for leaf in leaves])
    if len(got) != len(eager):
        return False
    if any(ours.shape != theirs.shape for ours, theirs in zip(got, eager, strict=True)):
        return False
    for ours, theirs in zip(got, eager, strict=True):
        if not theirs.is_floating_point():
            if not torch.equal(ours, theirs):
                return False
            continue
        tolerance = {torch.float16: 1e-2, torch.bfloat16: 5e-2}.get(theirs.dtype, 1e-4)
        scale = float(theirs.abs().nan_to_num(0, 0, 0).max()) if theirs.numel() else 0.0
        if not torch.allclose(
            ours.to(theirs.dtype),
            theirs,
            rtol=tolerance,
            atol=tolerance * max(scale, 1e-6),
            equal_nan=True,
        ):
            return False
    return True


def _inputs(
    names: list[str],
    leaves: list[Tensor],
    specs: list[dict[int, str]],
    limits: list[dict[int, Limit]],
) -> tuple[Input, ...]:
    """The tensor inputs, with the dimensions that vary, and within which limits."""
    found = []
    for name, leaf, spec, kept in zip(names, leaves, specs, limits, strict=True):
        asked = {0: "batch", **spec}
        dynamic = {dim: asked[dim] for dim in sorted(kept)}
        limited = {dim: limit for dim, limit in sorted(kept.items()) if limit != (1, None)}
        found.append(Input(name, leaf.detach().clone(), dynamic, limited))
    return tuple(found)


def _explain(what: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    hint = next((hint for key, hint in HINTS.items() if key.lower() in str(error).lower()), None)
    if hint is None:
        hint = "run the module on the same example in eager mode; if that works, report the model"
    reason = f"{users_line(error)}{type(error).__name__}: {reason}"
    return f"model: {what}: {reason} What usually helps: {hint}."
