"""How far outputs are those of the original: one number per example, 1 where they are the same."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

OVERLAP = 0.5  # intersection over union from which two boxes are the same
SURE = 0.5  # the least score of a box that counts
NEIGHBOURS = 10
TINY = 1e-12


def classes_of(output: Tensor, dim: int = 1, threshold: float = 0.0) -> Tensor:
    """The class of each place: the largest along ``dim``, or of one number whether it is above a
    threshold; that dimension goes.

    Example:
        >>> classes_of(torch.tensor([[0.1, 0.9], [0.8, 0.2]])).tolist()
        [1, 0]
        >>> classes_of(torch.tensor([[0.4], [-2.0]])).tolist()
        [1, 0]
    """
    if output.shape[dim] == 1:
        return (output.select(dim, 0) > threshold).long()
    return output.argmax(dim)


def class_agreement(
    output: Tensor,
    target: Tensor,
    dim: int = 1,
    mask: Tensor | None = None,
    threshold: float = 0.0,
) -> Tensor:
    """The share of places whose class is the original's: 0 or 1 of a classification, else the
    share of its pixels or tokens; (B, ...) twice -> (B,).

    Args:
        dim: that of the classes.
        mask: (B, ...) without ``dim``, 0 where a place does not count, as in padding.

    Example:
        >>> class_agreement(torch.eye(2), torch.tensor([[2.0, 1.0], [2.0, 1.0]])).tolist()
        [1.0, 0.0]
    """
    same = classes_of(output, dim, threshold) == classes_of(target, dim, threshold)
    flat = same.reshape(len(same), -1).float()
    if mask is None:
        return flat.mean(1)
    counts = (mask.reshape(len(same), -1) != 0).float()
    total = counts.sum(1)
    return torch.where(total > 0, (flat * counts).sum(1) / total.clamp(min=1), 1.0)


def cosine_agreement(output: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """The cosine of the angle between embedding and original, 0 where it is below; (B, ..., D)
    twice -> (B,), the mean over places where there are several.

    Example:
        >>> cosine_agreement(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0]]))
        tensor([0.6000])
    """
    cosine = F.cosine_similarity(output.float(), target.float(), dim=-1, eps=TINY)
    flat = cosine.reshape(len(cosine), -1).clamp(0.0, 1.0)
    if mask is None:
        return flat.mean(1)
    counts = (mask.reshape(len(flat), -1) != 0).float()
    return (flat * counts).sum(1) / counts.sum(1).clamp(min=1)


def closeness(output: Tensor, target: Tensor, scale: float) -> Tensor:
    """1 less the relative error, 0 where it is above 1; (B, ...) twice -> (B,).

    The error is the root of the mean square difference over the root mean square of the original's
    output, or over ``scale`` where that is larger: near zero no error would be small.

    Example:
        >>> closeness(torch.tensor([[2.2], [0.1]]), torch.tensor([[2.0], [0.0]]), 1.0)
        tensor([0.9000, 0.9000])
    """
    size = target.float().reshape(len(target), -1).square().mean(1).sqrt().clamp(min=scale)
    error = (output.float() - target.float()).reshape(len(target), -1).square().mean(1).sqrt()
    return (1 - error / size.clamp(min=TINY)).clamp(0.0, 1.0)


def overlap(one: Tensor, other: Tensor) -> Tensor:
    """Intersection over union of boxes (N, 4) and (M, 4), by corners (x, y, x, y); (N, M).

    Example:
        >>> overlap(torch.tensor([[0.0, 0, 2, 1]]), torch.tensor([[0.0, 0, 4, 1]]))
        tensor([[0.5000]])
    """
    low = torch.maximum(one[:, None, :2], other[None, :, :2])
    high = torch.minimum(one[:, None, 2:], other[None, :, 2:])
    both = (high - low).clamp(min=0).prod(-1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(-1) for boxes in (one, other)]
    return both / (areas[0][:, None] + areas[1][None] - both).clamp(min=TINY)


Found = tuple[Tensor, Tensor, Tensor]  # boxes (N, 4), scores (N,), classes (N,)


def box_agreement(output: Sequence[Found], target: Sequence[Found]) -> Tensor:
    """How many boxes are the original's: twice the matched over all of both; (B,).

    Boxes whose score is at least 0.5 count. Each is matched, those of the largest scores first,
    with the box of the same class that it overlaps most, by half of their union at least.

    Example:
        >>> box = torch.tensor([[0.0, 0, 2, 2]]), torch.tensor([0.9]), torch.tensor([1])
        >>> none = torch.zeros(0, 4), torch.zeros(0), torch.zeros(0)
        >>> box_agreement([box, box, none], [box, none, none]).tolist()
        [1.0, 0.0, 1.0]
    """
    return torch.tensor([_matched(*each) for each in zip(output, target, strict=True)])


def _matched(output: Found, target: Found) -> float:
    sure = [[part[found[1] >= SURE] for part in found] for found in (output, target)]
    (boxes, scores, classes), (wanted, _, known) = sure
    total = len(boxes) + len(wanted)
    if not total:
        return 1.0
    both = overlap(boxes, wanted) * (classes[:, None] == known[None])
    matched = 0
    for row in scores.argsort(descending=True):
        if len(wanted) and float(both[row].max()) >= OVERLAP:
            matched += 1
            both[:, both[row].argmax()] = 0.0
    return 2 * matched / total


def neighbour_overlap(before: Tensor, after: Tensor, count: int = NEIGHBOURS) -> float:
    """The share of the nearest neighbours of each embedding, by cosine, that stay so; (N, D) twice.

    Example:
        >>> points = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
        >>> neighbour_overlap(points, points, 1), neighbour_overlap(points, points[[0, 2, 1]], 1)
        (1.0, 0.0)
    """
    count = min(count, len(before) - 1)
    found = []
    for points in (before, after):
        unit = F.normalize(points.float().reshape(len(points), -1), dim=1)
        near = unit @ unit.T
        near.fill_diagonal_(-torch.inf)
        found.append(near.topk(count, dim=1).indices)
    same = (found[0][:, :, None] == found[1][:, None, :]).any(2)
    return float(same.float().mean())


def margins(output: Tensor, dim: int = 1, threshold: float = 0.0) -> Tensor:
    """By how much the largest class leads before the second; (B, ..., C, ...) -> (B, ...).

    Example:
        >>> margins(torch.tensor([[3.0, 1.0, 2.5]])).tolist()
        [0.5]
    """
    if output.shape[dim] == 1:
        return (output.select(dim, 0) - threshold).abs()
    first, second = output.float().topk(2, dim=dim).values.unbind(dim)
    return first - second


def largest_change(before: Tensor, after: Tensor, dim: int = 1) -> float:
    """The most by which the difference of any two classes of a place has moved: where the largest
    leads by more, a change of so much leaves it the largest.

    Example:
        >>> largest_change(torch.tensor([[3.0, 1.0]]), torch.tensor([[2.5, 1.25]]))
        0.75
    """
    moved = after.float() - before.float()
    if moved.shape[dim] == 1:
        return float(moved.abs().max())
    return float((moved.amax(dim) - moved.amin(dim)).max())


# --- losses ----------------------------------------------------------------------------------


def divergence(
    output: Tensor,
    target: Tensor,
    dim: int = 1,
    probabilities: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """The Kullback-Leibler divergence of the classes from the original's, a mean over places; ().

    Args:
        probabilities: whether outputs are these already, not logits.

    Example:
        >>> float(divergence(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 2.0]])))
        0.0
    """
    told, wanted = (logs(each, dim, probabilities) for each in (output, target))
    each = (wanted.exp() * (wanted - told)).sum(dim)
    if mask is None:
        return each.mean()
    counts = (mask != 0).float()
    return (each * counts).sum() / counts.sum().clamp(min=1)


def logs(output: Tensor, dim: int, probabilities: bool) -> Tensor:
    """Logarithms of the classes' probabilities; of one number those of both answers.

    Example:
        >>> logs(torch.tensor([[0.0]]), 1, False).exp().tolist()
        [[0.5, 0.5]]
    """
    output = output.float()
    if output.shape[dim] == 1 and probabilities:
        output = torch.cat([1 - output, output], dim)
    elif output.shape[dim] == 1:
        output = torch.cat([torch.zeros_like(output), output], dim)
    return output.clamp(min=1e-7).log() if probabilities else output.log_softmax(dim)
