"""An nn.Module, captured in training or evaluation mode."""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import warnings
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim

from paredown.core.errors import UserError
from paredown.graph import mode, structure
from paredown.graph.doors.python_file import users_line
from paredown.graph.model import Model
from paredown.graph.parts import Input
from paredown.graph.state import keep_state

Example = tuple[Any, ...] | dict[str, Any]

ONLY_EVALUATION = (
    "the model computes something else in training than in evaluation; it was captured in "
    "evaluation, so fine-tuning runs without its dropout and drop-path"
)
HINTS = {
    "data-dependent": "replace the branch on a tensor's value by torch.where or torch.cond, and "
    "take sizes from shapes instead of .item() or .tolist()",
    "Could not guard": "replace the branch on a tensor's value by torch.where or torch.cond",
    "Could not extract specialized integer": "keep sizes in shapes instead of .item() or .tolist()",
    "Cannot branch": "replace the branch on a tensor's value by torch.where or torch.cond",
    "Tensor-likes are not close": "make the model's output depend on its inputs alone",
    "shape": "check that the example inputs have the shapes the model expects",
    "size": "check that the example inputs have the shapes the model expects",
    "expected scalar type": "check the dtypes of the example inputs",
    "argument": "check that the example has one value for each input of forward()",
}


def check_parameters(module: nn.Module) -> None:
    if isinstance(module, torch.jit.ScriptModule):
        raise UserError("model: is TorchScript; bring the nn.Module that it was scripted from.")
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if torch.nn.parameter.is_lazy(tensor):
            raise UserError(f"{name}: has no shape yet; run the module once before capture.")
        if tensor.device.type == "meta":
            raise UserError(f"{name}: is on the meta device; load the weights before capture.")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise UserError(f"{name}: {bad} of {tensor.numel()} weights are NaN or infinite.")


def capture_module(module: nn.Module, example: Example, dynamic: Any) -> Model:
    if not isinstance(example, (tuple, list, dict)):
        kind = type(example).__name__
        raise UserError(f"example: expected a tuple of inputs or a dict of keywords, got {kind}.")
    args, kwargs = ((), dict(example)) if isinstance(example, dict) else (tuple(example), {})
    leaves, arguments = structure.flatten((args, kwargs))
    if not leaves:
        raise UserError("example: holds no tensor; give the inputs as deployed.")
    names = _input_names(module, args, kwargs)
    specs = _dynamic_leaves(args, kwargs, dynamic)
    graph, outputs, notes = _dynamic_or_fixed(module, arguments, leaves, specs)
    notes += [
        f"output {where!r} is a {kind}, not a tensor, and is left out"
        for where, kind in structure.opaque(outputs).items()
    ]
    inputs = _inputs(graph, names, leaves, specs)
    notes += _fixed_notes(inputs, specs)
    return Model(graph, inputs, arguments, outputs, notes=tuple(notes))


def _dynamic_or_fixed(
    module: nn.Module,
    arguments: structure.Structure,
    leaves: list[Tensor],
    specs: list[dict[int, str]],
) -> tuple[fx.GraphModule, structure.Structure, list[str]]:
    """The graph with a batch that varies; at the example's exact shapes where it cannot."""
    wide = _at_least_two(leaves)
    try:
        eager, outputs = _run(module, arguments, wide)
    except UserError:
        if wide is leaves:
            raise
    else:
        graph, notes = _export_either(module, arguments, outputs, wide, specs, eager)
        if _batch_varies(module, graph, arguments, wide):
            return graph, outputs, notes
    eager, outputs = _run(module, arguments, leaves)
    graph, notes = _export_either(module, arguments, outputs, leaves, None, eager)
    return graph, outputs, notes


def _batch_varies(
    module: nn.Module,
    graph: fx.GraphModule,
    arguments: structure.Structure,
    leaves: list[Tensor],
) -> bool:
    """Whether the graph agrees with the module at other batch sizes than it was captured with.

    A branch on the batch size, or a size that is written out, shows only there.
    """
    nodes = [node for node in graph.graph.nodes if node.op == "placeholder"]
    if not all(_varies(node, 0) for node in nodes) or len({len(leaf) for leaf in leaves}) > 1:
        return True  # nothing was promised, or there is no one batch dimension to try
    for size in {1, 2, 3} - {len(leaves[0])}:
        resized = [leaf[torch.arange(size) % len(leaf)] for leaf in leaves]
        try:
            eager, _ = _run(module, arguments, resized)
            if not _agrees(graph, resized, eager):
                return False
        except (UserError, RuntimeError, AssertionError):
            return False
    return True


def _export_either(
    module: nn.Module,
    arguments: structure.Structure,
    outputs: structure.Structure,
    leaves: list[Tensor],
    specs: list[dict[int, str]] | None,
    eager: list[Tensor],
) -> tuple[fx.GraphModule, list[str]]:
    """Captured in training mode, or in evaluation where training computes something else.

    Dimensions are dynamic where the exporter can: all that were asked, else the batch, else none;
    with ``specs`` None, none.
    """
    wished = [[set[int]() for _ in leaves]]
    if specs is not None:
        wished = [[{0, *spec} for spec in specs], [{0} for _ in specs], *wished]
    failed: UserError | None = None
    for dims in wished:
        shapes = [
            {d: Dim.AUTO for d in chosen if d < leaf.dim()}
            for leaf, chosen in zip(leaves, dims, strict=True)
        ]
        graph = _export(module, arguments, outputs, leaves, shapes, training=True)
        if graph is not None and _agrees(graph, leaves, eager):
            return graph, []
        try:
            graph = _export(module, arguments, outputs, leaves, shapes, training=False)
        except UserError as error:
            failed = failed or error
            continue
        if graph is not None and _agrees(graph, leaves, eager):
            return graph, [ONLY_EVALUATION]
    raise failed or UserError(
        "model: its output differs from one call to the next on the same input in evaluation "
        "mode; make it depend on its inputs alone."
    )


def _input_names(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """A name for each tensor input, from the parameters of ``forward``."""
    try:
        bound = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    except TypeError as error:
        raise UserError(
            f"example: does not fit {type(module).__name__}.forward(): {error}; "
            "check that the example has one value for each input."
        ) from error
    flat: dict[str, Any] = {}
    for name, value in bound.items():
        kind = inspect.signature(module.forward).parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            flat |= value
        elif kind is inspect.Parameter.VAR_POSITIONAL:
            flat |= {f"{name}_{index}": item for index, item in enumerate(value)}
        else:
            flat[name] = value
    ordered = [*list(flat)[: len(args)], *kwargs]  # keywords keep the order of the call
    return structure.names(structure.flatten({name: flat[name] for name in ordered})[1])


def _at_least_two(leaves: list[Tensor]) -> list[Tensor]:
    """The example with a batch of 2 where it is 1: a size of 1 would be captured as fixed."""
    if all(leaf.dim() > 0 and leaf.shape[0] == 1 for leaf in leaves):
        return [torch.cat([leaf, leaf]) for leaf in leaves]
    return leaves


def _dynamic_leaves(
    args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: Any
) -> list[dict[int, str]]:
    """For each tensor input, its dynamic dimensions besides the batch."""
    if dynamic is None:
        return [{} for _ in structure.flatten((args, kwargs))[0]]
    pairs = _dynamic_pairs(args, kwargs, dynamic)
    found: list[dict[int, str]] = []
    for value, spec in pairs:
        for leaf in structure.flatten(value)[0]:
            wrong = [dim for dim in spec or {} if not 0 <= dim < leaf.dim()]
            if wrong:
                raise UserError(f"dynamic: dimension {wrong[0]} is not one of {tuple(leaf.shape)}.")
            found.append(dict(spec or {}))
    return found


def _dynamic_pairs(
    args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: Any
) -> list[tuple[Any, dict[int, str] | None]]:
    """Each input with its entry of ``dynamic``, which has the shape of the example."""
    if kwargs and isinstance(dynamic, dict) and set(dynamic) <= set(kwargs):
        pairs = [(value, dynamic.get(name)) for name, value in kwargs.items()]
    elif not kwargs and isinstance(dynamic, (tuple, list)) and len(dynamic) == len(args):
        pairs = list(zip(args, dynamic, strict=True))
    else:
        shape = f"a dict of {', '.join(kwargs)}" if kwargs else f"a tuple of {len(args)}"
        raise UserError(f"dynamic: expected {shape}, as the example is; got {dynamic!r}.")
    for _, spec in pairs:
        if spec is not None and not isinstance(spec, dict):
            raise UserError(f'dynamic: expected {{dimension: "name"}} or None, got {spec!r}.')
    return pairs


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
    """A copy with the module's own parameters; buffers, which a run may change, are copied too.

    Tensors that a run leaves in the module, such as the weight that ``torch.nn.utils.weight_norm``
    makes, cannot be copied with their gradient.
    """
    memo: dict[int, Any] = {id(each): each for each in module.parameters()}
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
) -> fx.GraphModule | None:
    """The captured graph in evaluation mode; None where only this mode's output is another."""
    copied = _borrowed(module)
    _set_module_mode(copied, training)
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
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")  # the exporter's deprecations, and pages of its graph
            program = torch.export.export(
                copied,
                tuple(leaf.clone() for leaf in leaves),
                dynamic_shapes={"tensors": tuple(shapes)},
                strict=False,
            )
            graph = copy.deepcopy(program.module(check_guards=False))
    except Exception as error:
        if training:
            return None
        raise UserError(_explain("the model cannot be captured", error)) from error
    if nesting[-1] != outputs:
        return None
    return _tidy(graph, set(module.state_dict()))


def _bare(module: nn.Module) -> nn.Module:
    """A plain module that shares the state of ``module``."""
    bare = nn.Module()
    for kind in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        bare.__dict__[kind] = module.__dict__[kind]
    return bare


def _tidy(graph: Any, persistent: set[str]) -> fx.GraphModule:
    """Plain flat signature, parameters that can be trained, no assertions; evaluation mode."""
    graph.graph.set_codegen(fx.graph.CodeGen())
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


def _agrees(graph: fx.GraphModule, leaves: list[Tensor], eager: list[Tensor]) -> bool:
    with torch.no_grad():
        got = graph(*[leaf.clone() for leaf in leaves])
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
            ours, theirs, rtol=tolerance, atol=tolerance * max(scale, 1e-6), equal_nan=True
        ):
            return False
    return True


def _inputs(
    graph: fx.GraphModule, names: list[str], leaves: list[Tensor], specs: list[dict[int, str]]
) -> tuple[Input, ...]:
    """The tensor inputs, with the dimensions that stayed dynamic through the capture."""
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    found = []
    for node, name, leaf, spec in zip(placeholders, names, leaves, specs, strict=True):
        asked = {0: "batch", **spec}
        kept = {d: asked[d] for d in sorted(asked) if _varies(node, d)}
        found.append(Input(name, leaf.detach().clone(), kept))
    return tuple(found)


def _varies(placeholder: fx.Node, dim: int) -> bool:
    shape = placeholder.meta["val"].shape
    return dim < len(shape) and not isinstance(shape[dim], int)


def _fixed_notes(inputs: tuple[Input, ...], specs: list[dict[int, str]]) -> list[str]:
    notes = []
    for item, spec in zip(inputs, specs, strict=True):
        for dim, name in {0: "batch", **spec}.items():
            if dim not in item.dynamic and dim < item.example.dim():
                size = item.example.shape[dim]
                notes.append(
                    f"dimension {dim} ({name}) of input {item.name!r} became fixed at {size}: "
                    "something in the model depends on its exact size"
                )
    return notes


def _explain(what: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    hint = next((hint for key, hint in HINTS.items() if key.lower() in str(error).lower()), None)
    if hint is None:
        hint = "run the module on the same example in eager mode; if that works, report the model"
    reason = f"{users_line(error)}{type(error).__name__}: {reason}"
    return f"model: {what}: {reason} What usually helps: {hint}."
