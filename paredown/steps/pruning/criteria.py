"""How much each unit of a group matters: pure scores, and what gathers the tensors they take."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from paredown.core.errors import UserError
from paredown.core.settings import check_choice
from paredown.core.task import Task
from paredown.data import batches, feed, observe, splits
from paredown.data.feed import Batch
from paredown.graph.coupling.groups import Group, Member
from paredown.graph.model import Model
from paredown.graph.sites import Site, sites
from paredown.graph.state import tensor_of

# --- mathematics -----------------------------------------------------------------------------


def unit_slices(weight: Tensor, member: Member) -> Tensor:
    """What of a weight goes with each unit: dimension ``dim`` at the member's indices, in front.

    Shapes: weight (...), member.indices (units, m) -> (units, m, n), n being everything else.

    Example:
        >>> import numpy as np
        >>> member = Member("fc.weight", 1, np.array([[0, 1], [2, 3]]), "in")
        >>> unit_slices(torch.arange(8.0).reshape(2, 4), member)[1].tolist()
        [[2.0, 6.0], [3.0, 7.0]]
    """
    indices = torch.as_tensor(member.indices, device=weight.device)
    chosen = weight.detach().index_select(member.dim, indices.flatten().long())
    return chosen.movedim(member.dim, 0).reshape(*indices.shape, -1).float()


def l1(slices: Sequence[Tensor]) -> Tensor:
    """The sum of the magnitudes of all weights that go with a unit (arXiv 1608.08710).

    Shapes: each slice (units, ...) -> (units,).

    Example:
        >>> l1([torch.tensor([[1.0, -2.0], [0.0, 1.0]]), torch.tensor([[3.0], [0.5]])])
        tensor([6.0000, 1.5000])
    """
    return _joined(slices).abs().sum(1)


def l2(slices: Sequence[Tensor]) -> Tensor:
    """The norm of all weights that go with a unit, those that make it and those that read it.

    One norm over everything, so that a weight counts the same wherever it stands: the square
    is what removing the unit takes from the squared norm of the model (arXiv 1608.08710 with
    the coupled weights of arXiv 2301.12900).

    Shapes: each slice (units, ...) -> (units,).

    Example:
        >>> l2([torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.tensor([[4.0], [0.0]])])
        tensor([5., 1.])
    """
    return _joined(slices).norm(dim=1)


def geometric_median(filters: Sequence[Tensor]) -> Tensor:
    """The sum of a filter's distances to all others: the nearest to the median can be replaced by
    them (arXiv 1811.00250, equation 9).

    Shapes: each slice (units, ...) -> (units,).

    Example:
        >>> geometric_median([torch.tensor([[0.0], [1.0], [5.0]])])
        tensor([6., 5., 9.])
    """
    filters_ = _joined(filters).double()  # distances by a matrix product cancel in single precision
    return torch.cdist(filters_, filters_).sum(1).float()


def bn_scale(scales: Sequence[Tensor]) -> Tensor:
    """The magnitudes of a unit's norm scales, added up (Network Slimming, arXiv 1708.06519).

    Shapes: each slice (units, ...) -> (units,).

    Example:
        >>> bn_scale([torch.tensor([[-0.5], [2.0]])])
        tensor([0.5000, 2.0000])
    """
    return _joined(scales).abs().sum(1)


def taylor(products: Sequence[Tensor]) -> Tensor:
    """The square of the first-order change of the loss when a unit goes, of one batch: its weights
    times their gradients, added up, squared (arXiv 1906.10771, equation 8, for a whole group).

    Shapes: each slice of weight times gradient (units, ...) -> (units,).

    Example:
        >>> taylor([torch.tensor([[1.0, -3.0], [0.5, 0.5]]), torch.tensor([[1.0], [0.0]])])
        tensor([1., 1.])
    """
    return _joined(products).sum(1).square()


def weight_activation(weights: Sequence[Tensor], norms: Sequence[Tensor]) -> Tensor:
    """The norm of ``|w| * ||x||`` over the weights that read a unit, ``||x||`` being the norm of
    the input that each of them reads (Wanda, arXiv 2306.11695, for whole units).

    Shapes: weights (units, m, n) and norms (units, m), each -> (units,).

    Example:
        >>> weights = torch.tensor([[[3.0, 4.0]], [[1.0, 0.0]]])
        >>> weight_activation([weights], [torch.tensor([[2.0], [7.0]])])
        tensor([10.,  7.])
    """
    return l2([w * x.unsqueeze(-1) for w, x in zip(weights, norms, strict=True)])


def chance(units: int, generator: torch.Generator) -> Tensor:
    """Even draws, the control: a criterion that does no better is worth nothing.

    Shapes: -> (units,).

    Example:
        >>> chance(3, torch.Generator().manual_seed(0))
        tensor([0.4963, 0.7682, 0.0885])
    """
    return torch.rand(units, generator=generator)


def channel_norms(squares: Tensor, size: int) -> Tensor | None:
    """The input norm that each index of a weight's dimension reads, from its channels' squares.

    A grouped convolution reads the same index in each of its groups: their squares add up. None
    where the sizes do not go together.

    Shapes: squares (C,) -> (size,).

    Example:
        >>> channel_norms(torch.tensor([9.0, 1.0, 16.0, 0.0]), 2)
        tensor([5., 1.])
    """
    if len(squares) % size:
        return None
    return squares.reshape(-1, size).sum(0).sqrt()


def _joined(slices: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.flatten(1) for part in slices], 1)  # (units, N)


# --- what gathers the tensors ----------------------------------------------------------------

Scores = dict[str, Tensor]  # group name -> (units,)


@dataclass(frozen=True)
class Criterion:
    """A way to score units.

    Attributes:
        score: the pure function.
        gather: what brings it its tensors.
        roles: of the members it looks at; a group without such a member gets no score,
        any_weight: unless this is set, and it has a weight of another role (stacked experts, a
            weight behind a parametrization), which then stands for them.
        needs: fields of the task.
    """

    score: Callable[..., Tensor]
    gather: Callable[[Criterion, Model, Task, Sequence[Group], int], Scores]
    roles: tuple[str, ...] = ()
    any_weight: bool = False
    needs: frozenset[str] = frozenset()


def of_weights(
    criterion: Criterion, model: Model, task: Task, groups: Sequence[Group], seed: int
) -> Scores:
    named = dict(model.graph.named_parameters(remove_duplicate=False))
    found = {}
    for group in groups:
        weights = [m for m in group.members if m.name in named and named[m.name].dim() > 1]
        members = [m for m in group.members if m.role in criterion.roles and m.name in named]
        members = members or (weights if criterion.any_weight else [])
        if members:
            slices = [unit_slices(named[member.name], member) for member in members]
            found[group.name] = criterion.score(slices)
    return found


def of_gradients(
    criterion: Criterion, model: Model, task: Task, groups: Sequence[Group], seed: int
) -> Scores:
    """The mean over batches of the score of weight times gradient."""
    found: Scores = {}
    count = 0
    for products in _products(model.copy().eval(), task, seed):
        count += 1
        for group in groups:
            members = [m for m in group.members if m.role in criterion.roles]
            slices = [unit_slices(products[m.name], m) for m in members if m.name in products]
            if slices:
                score = criterion.score(slices).double()
                found[group.name] = found.get(group.name, 0.0) + score
    return {name: (total / count).float() for name, total in found.items()}


def _products(model: Model, task: Task, seed: int) -> Iterator[dict[str, Tensor]]:
    """Parameter name -> weight times gradient of the loss, for each batch; on a copy's graph."""
    named = dict(model.graph.named_parameters(remove_duplicate=False))
    named = {name: p for name, p in named.items() if p.is_floating_point()}
    for parameter in named.values():
        parameter.requires_grad_(True)  # a frozen layer can be cut as well
    for batch in _labelled(model, task, seed):
        assert task.loss is not None
        model.graph.zero_grad(set_to_none=True)
        task.loss(batches.call(model, batch.inputs), batch.target).sum().backward()
        yield {n: p.detach() * p.grad for n, p in named.items() if p.grad is not None}


def _labelled(model: Model, task: Task, seed: int) -> Iterator[Batch]:
    """Labelled batches, at most `data.CALIBRATION_EXAMPLES` examples together: drawn from the
    training data, or else the calibration data."""
    name = "train" if task.train is not None else "calibration"
    data = splits.split(task, name)
    examples = splits.size(data)
    size = feed.size(model, task.batch_size, examples)
    most = min(examples, max(size, splits.CALIBRATION_EXAMPLES)) // size
    for batch in feed.whole(model, data, name, size, most, shuffle=True, seed=seed):
        if batch.target is None:
            raise UserError(
                "criterion: 'taylor' takes the gradient of the loss, and the data has no targets; "
                "give the task labelled data, or use criterion='weight_activation', which needs "
                "none."
            )
        yield batch


def of_activations(
    criterion: Criterion, model: Model, task: Task, groups: Sequence[Group], seed: int
) -> Scores:
    """The score of the weights that read a unit and the norms of the inputs they read."""
    copied = model.copy().eval()
    wanted = {m.name for g in groups for m in g.members if m.role in criterion.roles}
    readers = {
        site.weight: (site.input.name, _channel_dim(site, tensor_of(copied.graph, site.weight)))
        for site in sites(copied.graph)
        if site.weight in wanted and _reads_its_input(site)
    }
    squares = _squares(copied, task, set(readers.values()))
    found = {}
    for group in groups:
        pairs = []
        for member in group.members:
            if member.role in criterion.roles and member.name in readers:
                weight = tensor_of(copied.graph, member.name)
                norms = channel_norms(squares[readers[member.name]], weight.shape[member.dim])
                if norms is not None:
                    chosen = norms[torch.as_tensor(member.indices).long()]  # (units, m)
                    pairs.append((unit_slices(weight, member), chosen))
        if pairs:
            found[group.name] = criterion.score(*zip(*pairs, strict=True))
    return found


def _reads_its_input(site: Site) -> bool:
    """Only the first layer's input weights of a recurrent op read what the op is given."""
    return site.kind != "recurrent" or site.weight.rpartition(".")[2].startswith("weight_ih_l0")


def _channel_dim(site: Site, weight: Tensor) -> int:
    """Where the channels of the site's input are, from the end: (B, C, ...) for a convolution."""
    return 1 - weight.dim() if site.kind in ("conv", "conv_transpose") else -1


def _squares(
    model: Model, task: Task, places: set[tuple[str, int]]
) -> dict[tuple[str, int], Tensor]:
    """The sum of squares of each channel (C,), over the calibration data, by value and dim."""
    found: dict[tuple[str, int], Tensor] = {}

    def note(name: str, tensor: Tensor) -> None:
        for place in places:
            if place[0] == name:
                rows = tensor.detach().double().movedim(place[1], 0).flatten(1)  # (C, N)
                found[place] = found.get(place, 0.0) + rows.square().sum(1)

    observe.run(model, task, {name for name, _ in places}, note)
    return {place: total.float() for place, total in found.items()}


def of_chance(
    criterion: Criterion, model: Model, task: Task, groups: Sequence[Group], seed: int
) -> Scores:
    generator = torch.Generator().manual_seed(seed)
    return {group.name: criterion.score(group.size, generator) for group in groups}


CRITERIA = {
    "l1": Criterion(l1, of_weights, ("out", "in"), any_weight=True),
    "l2": Criterion(l2, of_weights, ("out", "in"), any_weight=True),
    "geometric_median": Criterion(geometric_median, of_weights, ("out",)),
    "bn_scale": Criterion(bn_scale, of_weights, ("scale",)),
    "taylor": Criterion(
        taylor,
        of_gradients,
        ("out", "in", "scale", "other"),
        needs=frozenset({"calibration", "loss"}),
    ),
    "weight_activation": Criterion(
        weight_activation, of_activations, ("in",), needs=frozenset({"calibration"})
    ),
    "random": Criterion(chance, of_chance),
}


def criterion(name: str) -> Criterion:
    """The criterion of that name.

    Raises:
        UserError: no such criterion; suggests the nearest.

    Example:
        >>> sorted(criterion("taylor").needs)
        ['calibration', 'loss']
    """
    check_choice("criterion", name, tuple(CRITERIA))
    return CRITERIA[name]


def score(name: str, model: Model, task: Task, groups: Sequence[Group], seed: int) -> Scores:
    """The scores of each group that the criterion can judge; groups it cannot are left out.

    Raises:
        UserError: it can judge none, a score is NaN or infinite, or all of them are zero.
    """
    chosen = criterion(name)
    found = chosen.gather(chosen, model, task, groups, seed)
    if not found:
        raise UserError(
            f"criterion: no group has what {name!r} looks at ({' or '.join(chosen.roles)} "
            "weights); use criterion='l2'."
        )
    for group, values in found.items():
        if not bool(torch.isfinite(values).all()):
            bad = int((~torch.isfinite(values)).sum())
            raise UserError(
                f"criterion: {bad} of {len(values)} scores by {name!r} of {group!r} are NaN or "
                "infinite; check the model's weights and the data."
            )
    if not any(bool((values != 0).any()) for values in found.values()):
        raise UserError(
            f"criterion: {name!r} gives every unit a score of zero: the weights are all zero"
            + (" or their gradients are" if "loss" in chosen.needs else "")
            + (" or their inputs are" if chosen.needs == {"calibration"} else "")
            + '. Use a trained model, or criterion="random".'
        )
    return found
