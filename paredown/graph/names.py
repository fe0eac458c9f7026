"""The user's names of weights and modules: what a pattern fits, which module runs an op."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import fx

from paredown.core.errors import UserError


def check_exclude(
    patterns: Sequence[str], names: Iterable[str], kind: str, setting: str = "exclude"
) -> None:
    """Refuse a pattern that fits none of the names; ``kind`` says what they are.

    Raises:
        UserError: there is one, with the name that comes nearest.

    Example:
        >>> check_exclude(("layer?", "fc"), ["layer1", "fc"], "layer")
        >>> check_exclude(("layer3",), ["layer1", "fc"], "layer")
        Traceback (most recent call last):
            ...
        paredown.core.errors.UserError: exclude: no layer is called 'layer3'; did you mean 'layer1'?
    """
    known = sorted(set(names))
    for pattern in patterns:
        if not fits(known, (pattern,)):
            near = difflib.get_close_matches(pattern, known, 1, 0.0)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise UserError(f"{setting}: no {kind} is called {pattern!r}{hint}")


def fits(names: Iterable[str], patterns: Sequence[str]) -> bool:
    """Whether one of the patterns fits one of the names.

    Example:
        >>> fits(["layer1.conv", "layer1.conv.weight"], ("*.conv",)), fits(["fc"], ())
        (True, False)
    """
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def with_layer(weight: str) -> list[str]:
    """The names by which a user may mean a weight: its layer's and its own.

    Example:
        >>> with_layer("fc.weight"), with_layer("scale")
        (['fc', 'fc.weight'], ['scale', 'scale'])
    """
    return [owner(weight) or weight, weight]


def owner(name: str) -> str:
    """The path of the module that holds a parameter or buffer, "" for the model itself."""
    return name.rpartition(".")[0]


def read_by(graph: fx.GraphModule) -> set[str]:
    """The names of the parameters and buffers that ops of the graph read."""
    return {str(n.target) for n in graph.graph.nodes if n.op == "get_attr" and n.users}


def classes(graph: fx.GraphModule) -> dict[str, str]:
    """The path of each of the user's modules -> its class, "" for one that is only a container."""
    kinds = dict.fromkeys((owner(name) for name in read_by(graph)), "")
    for path in list(kinds):
        parts = path.split(".")
        kinds |= {".".join(parts[:end]): "" for end in range(1, len(parts))}
    for node in graph.graph.nodes:
        for path, kind in (node.meta.get("nn_module_stack") or {}).values():
            if path in kinds:
                kinds[path] = kind if isinstance(kind, str) else kind.__qualname__
    return kinds


def module_path(node: fx.Node, kinds: dict[str, str]) -> str:
    """The user's module that runs the op; where that is not known, the owner of its weight."""
    stack = node.meta.get("nn_module_stack") or {}
    path = str(list(stack.values())[-1][0]).partition("@")[0] if stack else ""
    while path and path not in kinds:
        path = owner(path)
    operands = (str(n.target) for n in node.all_input_nodes if n.op == "get_attr")
    return path or next((owner(name) for name in operands), "")


def common(paths: Sequence[str]) -> str:
    """The deepest module that holds them all.

    Example:
        >>> common(["layers.0.attention.query", "layers.0.attention.output"])
        'layers.0.attention'
    """
    pairs = zip(min(paths).split("."), max(paths).split("."), strict=False)
    return ".".join(a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def repeated(path: str, kinds: dict[str, str]) -> str | None:
    """The deepest module on the path that is an item of a list, else one numbered in its name."""
    parts = path.split(".")
    ways = [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
    for numbered in (str.isdigit, lambda leaf: leaf[-1:].isdigit()):
        for way in ways:
            leaf = way.rpartition(".")[2]
            if way in kinds and numbered(leaf) and _has_sibling(way, kinds):
                return way
    return None


def _has_sibling(path: str, kinds: dict[str, str]) -> bool:
    stem = path.rstrip("0123456789")
    return any(
        other != path and other.rstrip("0123456789") == stem and kind == kinds[path]
        for other, kind in kinds.items()
    )
