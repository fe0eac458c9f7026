"""A model's example inputs: their names, and which of their dimensions vary."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from paredown.core.errors import UserError
from paredown.graph import structure
from paredown.graph.parts import Input, told

Example = tuple[Any, ...] | dict[str, Any]


def input_names(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
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


def dynamic_leaves(
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
        raise UserError(
            f'dynamic: expected {shape}, as the example is, each {{dimension: "name"}} or None; '
            f"got {dynamic!r}."
        )
    for _, spec in pairs:
        if spec is not None and not isinstance(spec, dict):
            raise UserError(f'dynamic: expected {{dimension: "name"}} or None, got {spec!r}.')
    return pairs


def fixed_notes(inputs: tuple[Input, ...], specs: list[dict[int, str]]) -> list[str]:
    """Sentences on the dimensions that were asked to vary and do not, or not freely."""
    notes = []
    for item, spec in zip(inputs, specs, strict=True):
        for dim, name in {0: "batch", **spec}.items():
            which = f"dimension {dim} ({name}) of input {item.name!r}"
            if dim in item.limits:
                notes.append(
                    f"{which} may be {told(item.limits[dim])}: at other sizes the model computes "
                    "something else than was captured"
                )
            elif dim not in item.dynamic and dim < item.example.dim():
                notes.append(
                    f"{which} became fixed at {item.example.shape[dim]}: "
                    "something in the model depends on its exact size"
                )
    return notes
