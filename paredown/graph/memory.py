"""Which values of a graph share memory, and what of it nothing reads any more."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator

from torch import Tensor, fx

from paredown.graph.holds.every import forget
from paredown.graph.mode import is_counter
from paredown.graph.model import Model
from paredown.graph.names import owner, read_by
from paredown.graph.state import remove_state

# --- which values share memory ---------------------------------------------------------------

# They may return their input itself, which their schema does not tell.
_MAY_RETURN_INPUT = frozenset(
    {
        *("aten::dropout", "aten::feature_dropout", "aten::alpha_dropout"),
        *("aten::feature_alpha_dropout", "aten::type_as", "aten::broadcast_tensors"),
    }
)


def marked(node: fx.Node, written: bool) -> list[fx.Node]:
    """The operands that an op writes to, or those whose memory its result may share."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None:
        return node.all_input_nodes if node.target is operator.getitem and not written else []
    if not written and schema.name in _MAY_RETURN_INPUT:
        return node.all_input_nodes
    if not written and not any(result.alias_info for result in schema.returns):
        return []
    found: list[fx.Node] = []
    for position, argument in enumerate(schema.arguments):
        info = argument.alias_info
        if info is not None and (info.is_write or not written):
            given = node.kwargs.get(argument.name)
            value = node.args[position] if position < len(node.args) else given
            items = value if isinstance(value, (list, tuple)) else [value]
            found += [item for item in items if isinstance(item, fx.Node)]
    return found


def aliases(node: fx.Node, without: fx.Node | None = None) -> set[fx.Node]:
    """All values that may lie in the same memory, found without passing through one of them."""
    found, todo = {node}, [node]
    while todo:
        one = todo.pop()
        near = [*marked(one, False), *(u for u in one.users if one in marked(u, False))]
        fresh = [n for n in dict.fromkeys(near) if n not in found and n is not without]
        found.update(fresh)
        todo += fresh
    return found


def users_after(values: Iterable[fx.Node], position: fx.Node) -> Iterator[fx.Node]:
    """The ops behind a position that take one of the values."""
    return (user for value in values for user in value.users if position < user)


# --- what nothing reads ----------------------------------------------------------------------


def sweep(graph: fx.Graph) -> None:
    """Erase what nothing uses; an op that writes to a value stays where that is read later."""
    for node in reversed(list(graph.nodes)):
        if node.users or node.op in ("placeholder", "output"):
            continue
        idle = not _norm_runs(node) if is_counter(node) else not _is_seen(node)
        if idle:
            graph.erase_node(node)


def _is_seen(node: fx.Node) -> bool:
    """Whether what an op writes is read by another, in this call or, if a buffer, the next."""
    for value in marked(node, True):
        shared = aliases(value)
        state = any(one.op == "get_attr" for one in shared)
        readers = {user for one in shared for user in one.users} - shared if state else set()
        if any(users_after(shared, node)) or readers - {node}:
            return True
    return False


def _norm_runs(counter: fx.Node) -> bool:
    """Whether the norm of this counter of batches still does."""
    root = counter.all_input_nodes[0]
    while root.op != "get_attr" and root.all_input_nodes:
        root = root.all_input_nodes[0]
    owner = str(root.target).rpartition(".")[0]
    state = (n for n in root.graph.nodes if n.op == "get_attr" and n is not root)
    return any(n.users and str(n.target).rpartition(".")[0] == owner for n in state)


def remove_unread(model: Model, read: set[str]) -> None:
    """Delete the parameters and buffers that ``read`` names and no op reads any more.

    A tensor that is tied to another name goes when no op reads it under any. A module that has
    lost all it reads loses the rest too, as a norm's counter of batches.
    """
    graph = model.graph
    still = read_by(graph)
    state: dict[str, Tensor] = dict(graph.named_parameters(remove_duplicate=False))
    state |= dict(graph.named_buffers(remove_duplicate=False))
    owners = {owner(n) for n in read - still} - {owner(n) for n in still} - {""}
    unread = {id(state[n]) for n in state if n in read - still or owner(n) in owners}
    unread -= {id(state[n]) for n in still if n in state}
    for name in [n for n, tensor in state.items() if id(tensor) in unread]:
        remove_state(graph, name)
        forget(model, name)
        model.kept.pop(name, None)
