"""Layer pruning: whole residual blocks go, those without which the outputs change least."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import math
import operator
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.utils.data import Subset

from paredown import calibrate, data, progress
from paredown.graph.edit import getattr_or_none, keep_meta, refresh_values, remove_state
from paredown.graph.mode import is_counter
from paredown.graph.model import Model
from paredown.graph.quantized import quantizers
from paredown.graph.sites import sites
from paredown.types import Task, UserError

aten = torch.ops.aten

# --- mathematics -----------------------------------------------------------------------------


def squared_norms(before: Tensor, after: Tensor) -> Tensor:
    """``|after - before|^2`` and ``|before|^2``, which add up over batches.

    What is NaN or infinite before (a masked logit) counts for nothing.

    Shapes: before, after (...) -> (2,) float64.

    Example:
        >>> squared_norms(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 5.0]))
        tensor([ 1., 25.], dtype=torch.float64)
    """
    known = torch.isfinite(before)
    old, new = before[known].double(), after[known].double()
    return torch.stack([(new - old).square().sum(), old.square().sum()])


def relative_change(sums: Tensor) -> float:
    """``|after - before| / |before|``, the mean over a model's outputs.

    It asks nothing of what the outputs mean; the KL divergence would take them for logits.

    Shapes: sums (outputs, 2), rows of `squared_norms`.

    Example:
        >>> relative_change(torch.tensor([[1.0, 25.0]]))
        0.2
    """
    changed, norm = sums.double().unbind(1)
    share = (changed / norm).sqrt().where(changed > 0, 0.0)  # nothing of nothing is no change
    return float(share.mean()) if not changed.isnan().any() else math.inf


def block_influence(x: Tensor, y: Tensor) -> Tensor:
    """One minus the cosine of a block's input and output: ShortGPT's BI (arXiv 2403.03853).

    Shapes: x, y (..., C) -> (...).

    Example:
        >>> block_influence(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]]))
        tensor([0.2929])
    """
    return 1 - torch.cosine_similarity(x.float(), y.float(), dim=-1)


# --- which values share memory ---------------------------------------------------------------

# They may return their input itself, which their schema does not tell.
_MAY_RETURN_INPUT = frozenset(
    {
        *("aten::dropout", "aten::feature_dropout", "aten::alpha_dropout"),
        *("aten::feature_alpha_dropout", "aten::type_as", "aten::broadcast_tensors"),
    }
)


def _marked(node: fx.Node, written: bool) -> list[fx.Node]:
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


def _aliases(node: fx.Node, without: fx.Node | None = None) -> set[fx.Node]:
    """All values that may lie in the same memory, found without passing through one of them."""
    found, todo = {node}, [node]
    while todo:
        one = todo.pop()
        near = [*_marked(one, False), *(u for u in one.users if one in _marked(u, False))]
        fresh = [n for n in dict.fromkeys(near) if n not in found and n is not without]
        found.update(fresh)
        todo += fresh
    return found


def _users_after(values: Iterable[fx.Node], position: fx.Node) -> Iterator[fx.Node]:
    return (user for value in values for user in value.users if position < user)


# --- residual branches -----------------------------------------------------------------------


@dataclass(frozen=True)
class Branch:
    """One ``x + f(x)``: the addition, and which of its two operands is x."""

    add: fx.Node
    place: int

    @property
    def shortcut(self) -> fx.Node:
        found: Any = self.add.args[self.place]
        assert isinstance(found, fx.Node)
        return found

    @property
    def inner(self) -> fx.Node:
        found: Any = self.add.args[1 - self.place]
        assert isinstance(found, fx.Node)
        return found


def branches(graph: fx.GraphModule) -> list[Branch]:
    """Every addition whose one operand has the result's shape and leads to the other operand.

    Also the second of ``x + f(x) + g(x)``, whose shortcut is itself a residual addition.

    Example:
        >>> import paredown
        >>> class Net(torch.nn.Linear):
        ...     def forward(self, x):
        ...         return x + super().forward(x).relu()
        >>> model = paredown.capture(Net(4, 4), (torch.zeros(1, 4),))
        >>> [(branch.shortcut.name, branch.inner.name) for branch in branches(model.graph)]
        [('tensors_0', 'relu')]
    """
    above: dict[fx.Node, int] = {}  # a bit for each node that leads to this one, and its own
    bit: dict[fx.Node, int] = {}
    found: dict[fx.Node, Branch] = {}
    for index, node in enumerate(graph.graph.nodes):
        bit[node] = above[node] = 1 << index
        for operand in node.all_input_nodes:
            above[node] |= above[operand]
        for branch in _readings(node):
            leads = any(above[branch.inner] & bit[x] for x in _sources(branch, found))
            if leads and node not in found:
                found[node] = branch
    return list(found.values())


_SAME_VALUES = frozenset(
    {
        *("aten::to", "aten::_to_copy", "aten::clone", "aten::contiguous", "aten::dropout"),
        *("aten::view", "aten::reshape", "aten::permute", "aten::transpose", "aten::flatten"),
    }
)


def _sources(branch: Branch, known: dict[fx.Node, Branch]) -> set[fx.Node]:
    """The x of ``x + f(x)``: under another dtype or shape too, and that of ``x + f(x) + g(x)``."""
    node = branch.shortcut
    found = {node}
    while getattr(getattr(node.target, "_schema", None), "name", "") in _SAME_VALUES:
        node = node.all_input_nodes[0]
        found.add(node)
    return found | ({known[node].shortcut} if node in known else set())


def _readings(node: fx.Node) -> list[Branch]:
    """The one or two ways to read an addition as ``x + f``, by shapes and dtypes alone."""
    if node.target not in (aten.add.Tensor, aten.add_.Tensor) or node.kwargs or is_counter(node):
        return []
    if len(node.args) != 2 or not all(isinstance(arg, fx.Node) for arg in node.args):
        return []
    form, both = _form(node), [Branch(node, place) for place in (0, 1)]
    fitting = [b for b in both if form is not None and _form(b.shortcut) == form]
    return [b for b in fitting if not _is_reused(b)]


def _form(node: fx.Node) -> tuple[str, torch.dtype] | None:
    value = node.meta.get("val")
    return (str(tuple(value.shape)), value.dtype) if isinstance(value, Tensor) else None


def _is_reused(branch: Branch) -> bool:
    """Whether the sum is written over f(x), which then is read as the sum under its own name."""
    written = branch.inner in _marked(branch.add, True)
    own = _aliases(branch.inner, without=branch.add)
    return written and any(_users_after(own, branch.add))


def cut(graph: fx.Graph, branch: Branch) -> None:
    """Put x in the place of ``x + f(x)`` and erase what only f(x) needed."""
    shortcut, add = branch.shortcut, branch.add
    same_memory = shortcut in _marked(add, True)
    with graph.inserting_before(add):
        kept = graph.call_function(aten.clone.default, (shortcut,))
    keep_meta(kept, add)
    add.replace_all_uses_with(kept)
    graph.erase_node(add)
    for user in list(kept.users):
        if _repeats(user, shortcut):
            user.replace_all_uses_with(kept)
            graph.erase_node(user)
    later = _users_after(_aliases(kept) | _aliases(shortcut), kept)
    if same_memory or not any(_marked(user, True) for user in later):
        kept.replace_all_uses_with(shortcut)  # the copy is needed only where one is written to
        graph.erase_node(kept)
    _sweep(graph)


_IDEMPOTENT: dict[Any, str] = {
    **dict.fromkeys((aten.relu.default, aten.relu_.default), "relu"),
    **dict.fromkeys((aten.relu6.default, aten.relu6_.default), "relu6"),
    **dict.fromkeys((aten.hardtanh.default, aten.hardtanh_.default), "hardtanh"),
}


def _repeats(user: fx.Node, value: fx.Node) -> bool:
    """Whether the op does again what made the value: relu(relu(x)) is relu(x).

    Not where one of the two is written to later: then they are not the same.
    """
    name = _IDEMPOTENT.get(user.target)
    if name is None or name != _IDEMPOTENT.get(value.target) or user.args[1:] != value.args[1:]:
        return False
    later = _users_after(_aliases(user) | _aliases(value), value)
    return not any(_marked(other, True) for other in later if other is not user)


def _sweep(graph: fx.Graph) -> None:
    """Erase what nothing uses; an op that writes to a value stays where that is read later."""
    for node in reversed(list(graph.nodes)):
        if node.users or node.op in ("placeholder", "output"):
            continue
        idle = not _norm_runs(node) if is_counter(node) else not _is_seen(node)
        if idle:
            graph.erase_node(node)


def _is_seen(node: fx.Node) -> bool:
    """Whether what an op writes is read by another, in this call or, if a buffer, the next."""
    for value in _marked(node, True):
        shared = _aliases(value)
        state = any(one.op == "get_attr" for one in shared)
        readers = {user for one in shared for user in one.users} - shared if state else set()
        if any(_users_after(shared, node)) or readers - {node}:
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
    still = _read(graph)
    state: dict[str, Tensor] = dict(graph.named_parameters(remove_duplicate=False))
    state |= dict(graph.named_buffers(remove_duplicate=False))
    owners = {_owner(n) for n in read - still} - {_owner(n) for n in still} - {""}
    unread = {id(state[n]) for n in state if n in read - still or _owner(n) in owners}
    unread -= {id(state[n]) for n in still if n in state}
    for name in [n for n, tensor in state.items() if id(tensor) in unread]:
        remove_state(graph, name)
        model.masks.pop(name, None)
        model.kept.pop(name, None)


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _read(graph: fx.GraphModule) -> set[str]:
    return {str(n.target) for n in graph.graph.nodes if n.op == "get_attr" and n.users}


# --- units: what is removed together ---------------------------------------------------------


@dataclass(frozen=True)
class Unit:
    """Branches that go together, by the user's name, and all that goes with them."""

    name: str
    branches: tuple[Branch, ...]
    lost: frozenset[fx.Node]
    weights: frozenset[str]


def units(graph: fx.GraphModule, by: str) -> list[Unit]:
    """What can be removed: single branches, or all those of one repeated module of the user's.

    Args:
        by: "branch", or "block": the deepest item of a list of modules of one class that holds a
            branch's weights (``layers.3``), else a module numbered in its name (``layer3``).
            Where there is neither, branches stay apart. A module is a unit each time it runs.
    """
    kinds, known = _kinds(graph), {branch.add: branch for branch in branches(graph)}
    groups: list[tuple[str, list[Branch], set[str]]] = []
    for branch in known.values():
        gone = lost(graph, (branch,))
        weights, below = _weights(graph, gone), _below(graph, branch, gone, known)
        if branch.inner not in below or (not weights and all(map(_is_pointwise, gone))):
            continue  # such as an activation's x + 0.04 x^3
        paths = [_module_path(node, kinds) for node in _reading(graph, gone, below)]
        path = _common(paths)
        ends = [path for path in (paths[0], paths[-1]) if path]
        home = _repeated(path, kinds) if by == "block" else None
        last = next((g for g in reversed(groups) if home and g[0] == home), None)
        if last is None or (last[2] & weights and not all(b.add in gone for b in last[1])):
            groups.append((home or path or "..".join(ends) or branch.add.name, [branch], weights))
        else:
            last[1].append(branch)
            last[2].update(weights)
    return list(_named(graph, groups))


def _named(
    graph: fx.GraphModule, groups: list[tuple[str, list[Branch], set[str]]]
) -> Iterator[Unit]:
    """The groups that have weights and can go as a whole; a name that comes again is numbered."""
    used: dict[str, int] = {}
    for name, group, weights in groups:
        gone = lost(graph, group) if weights else frozenset()
        if gone:
            used[name] = used.get(name, 0) + 1
            full = name if used[name] == 1 else f"{name} (use {used[name]})"
            yield Unit(full, tuple(group), gone, frozenset(_weights(graph, gone)))


def lost(graph: fx.GraphModule, group: Sequence[Branch]) -> frozenset[fx.Node]:
    """The nodes that go with these branches; none where the model would not be one any more.

    That is where all weights would go, or an input would not be read any more.
    """
    copied, place = _without(graph, group)
    alive = set(copied.nodes)
    gone = frozenset(old for old, new in place.items() if new not in alive)
    inputs = [node for node in place if node.op == "placeholder" and node.users]
    whole = all(place[node].users for node in inputs)
    return gone if whole and any(site.node not in gone for site in sites(graph)) else frozenset()


def _weights(graph: fx.GraphModule, nodes: Set[fx.Node]) -> set[str]:
    """The weights that these nodes use: those of sites, and matrices that an op computes with."""
    found = {site.weight for site in sites(graph) if site.node in nodes}
    return found | {str(node.target) for node in nodes if _is_matrix(graph, node)}


def _is_matrix(graph: fx.GraphModule, node: fx.Node) -> bool:
    """A standardised or reparameterised weight has no site, and a layer's scale is no weight."""
    value = getattr_or_none(graph, str(node.target)) if node.op == "get_attr" else None
    return isinstance(value, torch.nn.Parameter) and sum(size > 1 for size in value.shape) > 1


def _is_pointwise(node: fx.Node) -> bool:
    return node.op != "call_function" or torch.Tag.pointwise in getattr(node.target, "tags", ())


def _below(
    graph: fx.GraphModule, branch: Branch, gone: Set[fx.Node], known: dict[fx.Node, Branch]
) -> set[fx.Node]:
    """What x leads to, but not by way of another residual addition that would stay.

    Attention scores, to which each layer adds one positional bias, are no branch of that bias,
    although its use in the layer before leads to them.
    """
    below = _sources(branch, known)
    for node in graph.graph.nodes:
        passes = node in gone or node not in known
        if passes and not below.isdisjoint(node.all_input_nodes):
            below.add(node)
    return below


def _reading(graph: fx.GraphModule, gone: Set[fx.Node], below: Set[fx.Node]) -> list[fx.Node]:
    """The ops of a branch that use its weights, or where it has none, all of them, in order.

    Those between x and f(x), if there are any: an encoder that only this branch reads goes with
    it, but is not part of it.
    """
    reading = {site.node for site in sites(graph)}
    reading |= {user for node in gone if _is_matrix(graph, node) for user in node.users}
    chosen = gone & reading & below or gone & reading or gone & below
    return [node for node in graph.graph.nodes if node in chosen]


def _module_path(node: fx.Node, kinds: dict[str, str]) -> str:
    """The user's module that runs the op; where that is not known, the owner of its weight."""
    stack = node.meta.get("nn_module_stack") or {}
    path = str(list(stack.values())[-1][0]).partition("@")[0] if stack else ""
    while path and path not in kinds:
        path = _owner(path)
    operands = (str(n.target) for n in node.all_input_nodes if n.op == "get_attr")
    return path or next((_owner(name) for name in operands), "")


def _without(
    graph: fx.GraphModule, group: Sequence[Branch]
) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """A copy of the graph without these branches, and node -> its copy, erased or not."""
    copied, place = fx.Graph(), dict[fx.Node, fx.Node]()
    copied.output(copied.graph_copy(graph.graph, place))  # type: ignore[arg-type]
    _cut_all(copied, [Branch(place[branch.add], branch.place) for branch in group])
    return copied, place


def _cut_all(graph: fx.Graph, group: Sequence[Branch]) -> None:
    for branch in reversed(group):  # an outer branch comes last, and takes those inside it along
        if branch.add in set(graph.nodes):
            cut(graph, branch)


def _common(paths: Sequence[str]) -> str:
    """The deepest module that holds them all.

    Example:
        >>> _common(["layers.0.attention.query", "layers.0.attention.output"])
        'layers.0.attention'
    """
    pairs = zip(min(paths).split("."), max(paths).split("."), strict=False)
    return ".".join(a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _kinds(graph: fx.GraphModule) -> dict[str, str]:
    """The path of each of the user's modules -> its class, "" for one that is only a container."""
    kinds = dict.fromkeys((_owner(name) for name in _read(graph)), "")
    for path in list(kinds):
        parts = path.split(".")
        kinds |= {".".join(parts[:end]): "" for end in range(1, len(parts))}
    for node in graph.graph.nodes:
        for path, kind in (node.meta.get("nn_module_stack") or {}).values():
            if path in kinds:
                kinds[path] = kind if isinstance(kind, str) else kind.__qualname__
    return kinds


def _repeated(path: str, kinds: dict[str, str]) -> str | None:
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


# --- how much each matters -------------------------------------------------------------------


def _changes(model: Model, original: fx.GraphModule, found: list[Unit], task: Task) -> list[float]:
    """Without each unit, the `relative_change` of the original's outputs."""
    graphs = [_module(model.graph, unit.branches) for unit in found]
    sums: list[Any] = [0.0] * len(graphs)
    batches = list(_batches(model, task))
    with torch.no_grad():
        work = _outputs(original, graphs, batches)
        total = len(batches) * len(graphs)
        for index, before, after in progress.track(work, "try without a block", total):
            rows = [squared_norms(old, new) for old, new in zip(before, after, strict=True)]
            sums[index] = sums[index] + torch.stack(rows)
    if not any(sum_[:, 1].any() for sum_ in sums):
        raise UserError(
            "calibration: the model's outputs are zero, NaN or infinite on all examples; check "
            "the calibration data."
        )
    return [relative_change(sum_) for sum_ in sums]


def _outputs(
    original: fx.GraphModule, graphs: list[fx.GraphModule], batches: list[list[Tensor]]
) -> Iterator[tuple[int, list[Tensor], list[Tensor]]]:
    """For each batch and graph: its number, the original's outputs and its own."""
    for batch in batches:
        before = original(*[leaf.clone() for leaf in batch])
        floats = [place for place, t in enumerate(before) if t.is_floating_point()]
        for index, graph in enumerate(graphs):
            after = graph(*[leaf.clone() for leaf in batch])  # an op may write to its input
            chosen = floats or range(len(before))
            yield index, [before[p] for p in chosen], [after[p] for p in chosen]


def _batches(model: Model, task: Task) -> Iterator[list[Tensor]]:
    """The calibration split as the graph takes it, on the device of the model."""
    split = data.split(task, "calibration")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    size, batch = data.size(split), model.fixed_batch or task.batch_size
    if model.fixed_batch and size < batch:
        raise UserError(f"calibration: {size} examples do not fill the model's batch of {batch}.")
    whole = size // batch if model.fixed_batch else None
    for inputs, _ in itertools.islice(data.batches(split, batch), whole):
        yield [leaf.to(device) for leaf in model.bind(*data.arguments(inputs))]


def _first(task: Task, count: int) -> Task:
    """The task with at most so many calibration examples."""
    split = data.split(task, "calibration")
    kept = Subset(split, range(min(count, data.size(split))))
    return dataclasses.replace(task, calibration=kept)


def _module(graph: fx.GraphModule, group: Sequence[Branch]) -> fx.GraphModule:
    """The graph without these branches; it shares its tensors with the one given."""
    return fx.GraphModule(graph, _without(graph, group)[0])


def _influences(model: Model, found: list[Unit], task: Task) -> list[float]:
    """The mean `block_influence` of each unit, from one pass over the calibration data.

    It is that of each token, or where the unit has convolutions, of each example's whole map.
    """
    spans = [(index, *span) for index, unit in enumerate(found) for span in _spans(unit)]
    starts = {start for _, start, _ in spans}
    maps = {site.weight for site in sites(model.graph) if site.kind.startswith("conv")}
    held: dict[str, Tensor] = {}
    totals = [[0.0, 0] for _ in found]

    def note(name: str, tensor: Tensor) -> None:
        for index, start, end in spans:
            if end == name:
                pair = (held[start], tensor)
                x, y = (t.flatten(1) for t in pair) if maps & found[index].weights else pair
                each = block_influence(x, y)
                totals[index][0] += float(each.double().sum())
                totals[index][1] += each.numel()
        if name in starts:
            held[name] = tensor.clone()  # a later op may write to it

    calibrate.run(model, task, starts | {end for _, _, end in spans}, note)
    return [total / max(count, 1) for total, count in totals]


def _spans(unit: Unit) -> list[tuple[str, str]]:
    """From the unit's input to its output, or where their shapes differ, of each branch."""
    first, last = unit.branches[0].shortcut, unit.branches[-1].add
    if _form(first) == _form(last):
        return [(first.name, last.name)]
    return [(branch.shortcut.name, branch.add.name) for branch in unit.branches]


# --- the step --------------------------------------------------------------------------------


@dataclass(frozen=True)
class PruneLayers:
    """Remove whole residual blocks: in ``x + f(x)``, f goes and x stays (layer or depth pruning).

    It pays on every runtime and device, since what is removed is neither stored nor run. It needs
    residual connections, and most deep models need fine-tuning after it.

    Args:
        count: how many blocks to remove.
        ratio: in place of ``count``, the share of the blocks that can be removed, below 1.
        unit: "block" removes all branches of one of the user's modules (attention and MLP of
            ``layers.3``); "branch" each by itself.
        criterion: "output_change" removes the block without which the model's outputs change
            least (`relative_change`), then measures the others again without it, since one
            block can stand in for another; "cosine" ranks all blocks in one pass by how little
            they turn their input (`block_influence`, arXiv 2403.03853).
        exclude: names or globs of blocks, modules or weights to leave alone: "layer1.*".
        examples: at most so many of the calibration split are run.

    Raises:
        UserError: a setting is out of its range; the model has no residual block or fewer than
            asked; a name in ``exclude`` fits nothing; no calibration data; or it is quantized.

    Example:
        >>> import paredown
        >>> from torch.utils.data import TensorDataset
        >>> class Net(torch.nn.Sequential):
        ...     def forward(self, x):
        ...         for layer in self:
        ...             x = x + layer(x).relu()
        ...         return x
        >>> net = Net(*[torch.nn.Linear(4, 4) for _ in range(3)])
        >>> _ = torch.nn.init.constant_(net[1].bias, -9.0)  # the second never adds anything
        >>> rows = TensorDataset(torch.rand(8, 4), torch.zeros(8))
        >>> task = Task((torch.zeros(1, 4),), score=lambda out, y: out[:, 0], calibration=rows)
        >>> pruned = PruneLayers(1).apply(paredown.capture(net, task.example), task)
        >>> sorted(pruned.state_dict())
        ['0.bias', '0.weight', '2.bias', '2.weight']
    """

    needs: ClassVar[frozenset[str]] = frozenset({"calibration"})

    count: int | None = 1
    ratio: float | None = None
    unit: str = "block"
    criterion: str = "output_change"
    exclude: tuple[str, ...] = ()
    examples: int = 64

    def __post_init__(self) -> None:
        if isinstance(self.exclude, str):
            raise UserError(f"exclude: expected a tuple of names, got the text {self.exclude!r}.")
        object.__setattr__(self, "exclude", tuple(self.exclude))
        _check_count("examples", self.examples)
        if self.unit not in ("block", "branch"):
            raise UserError(f'unit: expected "block" or "branch", got {self.unit!r}.')
        if self.criterion not in ("output_change", "cosine"):
            raise UserError(
                f'criterion: expected "output_change" or "cosine", got {self.criterion!r}.'
            )
        if self.ratio is None:
            _check_count("count", self.count)
        elif not isinstance(self.ratio, (int, float)) or not 0 < self.ratio < 1:
            raise UserError(f"ratio: expected above 0 and below 1, got {self.ratio!r}.")
        elif self.count not in (None, 1):
            raise UserError(f"count: got {self.count!r} beside ratio={self.ratio!r}; give one.")

    def apply(self, model: Model, task: Task) -> Model:
        """A copy without the blocks, and without the parameters that only they used."""
        pruned = prepared(model)
        few = _first(task, max(self.examples, pruned.fixed_batch or 0))
        found = _included(units(pruned.graph, self.unit), self.exclude)
        choose = _by_cosine if self.criterion == "cosine" else _by_output
        for unit, why in choose(pruned, found, few, self._how_many(found)):
            remove(pruned, unit)
            progress.say(f"  removed {unit.name} ({why})")
        return pruned

    def _how_many(self, found: list[Unit]) -> int:
        there = len(_innermost(found))
        if self.ratio is None:
            if self.count is not None and self.count <= there:
                return self.count
            raise UserError(
                f"count: expected at most {there}, the {_KINDS[self.unit]} that can be removed, "
                f"got {self.count}; ask for fewer."
            )
        count = round(self.ratio * there)
        if count == 0:
            raise UserError(
                f"ratio: {self.ratio!r} of the {there} {_KINDS[self.unit]} that can be removed is "
                f"none; ask for {0.5 / there:.3g} or more, or for count=1."
            )
        return count


_KINDS = {"block": "blocks", "branch": "branches"}


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{name}: expected a whole number from 1 up, got {value!r}.")


def prepared(model: Model) -> Model:
    """A copy in evaluation mode without dead code, whose nodes know their shapes.

    Raises:
        UserError: the model is quantized: the scales of what follows a block are those with it.
    """
    if quantizers(model.graph):
        raise UserError(
            "PruneLayers: the model is quantized, with scales for the values it has with all its "
            "blocks; remove blocks before Quantize."
        )
    copied = model.copy().eval()
    adds = [n for n in copied.graph.graph.nodes if n.target in (aten.add.Tensor, aten.add_.Tensor)]
    if any("val" not in node.meta for node in adds):
        refresh_values(copied)
    _sweep(copied.graph.graph)
    copied.graph.recompile()
    return copied


def _included(found: list[Unit], exclude: tuple[str, ...]) -> list[Unit]:
    """The units that may go.

    Raises:
        UserError: there is none, a pattern fits nothing, or nothing is left.
    """
    if not found:
        raise UserError(
            "PruneLayers: the model has no residual block to remove; it needs an addition "
            "x + f(x) in which f has weights and its output the shape of x. "
            "PruneChannels works without one."
        )
    names = {unit: _names(unit) for unit in found}
    everything = sorted(set().union(*names.values()))
    for pattern in exclude:
        if not any(fnmatchcase(name, pattern) for name in everything):
            near = difflib.get_close_matches(pattern, everything, 1, 0.0)[0]
            raise UserError(f"exclude: no block is called {pattern!r}; did you mean {near!r}?")
    left = [u for u in found if not any(fnmatchcase(n, p) for n in names[u] for p in exclude)]
    if not left:
        raise UserError(f"exclude: leaves none of the {len(found)} residual blocks to remove.")
    return left


def _names(unit: Unit) -> set[str]:
    """The unit's own, those of its weights, and of the modules that hold them."""
    paths = {unit.name, *unit.weights}
    for weight in unit.weights:
        parts = weight.split(".")
        paths |= {".".join(parts[:end]) for end in range(1, len(parts))}
    return paths


def _innermost(found: list[Unit]) -> list[Unit]:
    """The units that hold no other: that many can be removed."""
    return [u for u in found if not any(_inside(v, u) for v in found if v is not u)]


def _inside(inner: Unit, outer: Unit) -> bool:
    return any(branch.add in outer.lost for branch in inner.branches)


def _removable(graph: fx.GraphModule, found: list[Unit], left: int) -> list[Unit]:
    """The units that are still there and whose removal leaves ``left - 1`` more to remove."""
    alive = set(graph.graph.nodes)
    there = [u for u in found if all(branch.add in alive for branch in u.branches)]
    inner = _innermost(there)
    fitting = [
        u
        for u in there
        if sum(v is not u and not _inside(v, u) for v in inner) >= left - 1
        and lost(graph, u.branches)
    ]
    if not fitting:
        raise UserError(
            f"count: {left} of the blocks cannot be removed after the others, since an input or "
            "all weights would go with them; ask for fewer."
        )
    return fitting


def _by_output(
    model: Model, found: list[Unit], task: Task, count: int
) -> Iterator[tuple[Unit, str]]:
    """The unit without which the outputs change least, then the next, in the model so far."""
    original = _module(model.graph, ())
    for left in range(count, 0, -1):
        found = _removable(model.graph, found, left)
        changes = _changes(model, original, found, task)
        best = min(range(len(found)), key=changes.__getitem__)
        if changes[best] == math.inf:
            raise UserError(
                "PruneLayers: without any one of its blocks, the model's outputs become NaN or "
                "infinite on the calibration data; ask for fewer."
            )
        yield found[best], f"output changes by {100 * changes[best]:.3g} %"


def _by_cosine(
    model: Model, found: list[Unit], task: Task, count: int
) -> Iterator[tuple[Unit, str]]:
    """The units of least influence, all measured in the whole model."""
    influence = dict(zip(found, _influences(model, found, task), strict=True))
    for left in range(count, 0, -1):
        best = min(_removable(model.graph, found, left), key=influence.__getitem__)
        yield best, f"influence {influence[best]:.3g}"


def remove(model: Model, unit: Unit) -> None:
    """Cut a unit's branches out of the model, in place, and the parameters that only they read."""
    read = _read(model.graph)
    _cut_all(model.graph.graph, unit.branches)
    remove_unread(model, read)
    model.graph.graph.lint()
    model.graph.recompile()
