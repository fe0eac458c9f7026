"""GPTQ (Frantar et al. 2210.17323): round a layer's weights one input at a time, and let the inputs
still to come make up for the error.

In the form of LDLQ (Chee et al. 2307.13304), which their theorem 6 shows to be the same: each input
makes up for the errors of those before it, by the Hessian's own factor in place of its inverse's.

Shapes: N independent parts of a layer (a grouped convolution has several, other layers one) of R
outputs and F inputs. What a part's outputs lose by a change D (R, F) of its weights is
``trace(D H D')``, with H (F, F) the second moment of its inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128  # inputs whose error is passed on together: fewer passes over the weights
MOST_DAMPING = 1e3  # times the mean of the diagonal; a matrix this damped is all diagonal


def triangular_factor(hessian: Tensor, damping: float) -> Tensor:
    """Lower triangular L (N, F, F) with ``L L'`` the damped Hessian.

    Where there is none, since inputs are too few or depend on each other, more damping is tried.

    Example:
        >>> hessian = torch.tensor([[[2.0, 1.0], [1.0, 2.0]]])
        >>> lower = triangular_factor(hessian, 0.0)
        >>> torch.allclose(lower @ lower.mT, hessian)
        True
    """
    level = hessian.diagonal(dim1=1, dim2=2).mean(1, keepdim=True)  # (N, 1)
    level = level.clamp(min=torch.finfo(hessian.dtype).tiny)
    while True:
        damped = hessian.clone()
        damped.diagonal(dim1=1, dim2=2).add_(damping * level)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed.any() or damping > MOST_DAMPING:
            return lower
        damping = max(10 * damping, 1e-4)


def gptq(
    weight: Tensor,
    hessian: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    low: int,
    high: int,
    damping: float = 0.01,
    order: bool = True,
) -> Tensor:
    """The weight (N, R, F) on its grid, rounded for the least error of the layer's outputs.

    Zeros stay zero: they are pruned weights. An input that never was anything but zero (a dead
    one) takes no part, and its weights are rounded to nearest.

    With L from `triangular_factor`, the inputs in the order of its rows, the error E (R, F) loses
    ``sum_k L[k, k] ** 2 * |E[:, k] + sum_j E[:, j] L[j, k] / L[k, k]| ** 2`` over ``j > k``: from
    the last input to the first, each is rounded where its own term is least.

    Args:
        hessian: (N, F, F), the second moment of the inputs.
        scale, zero_point: of each weight, (N, R, F); found beforehand, so that groups may be
            rounded in any order.
        damping: added to the diagonal, as a share of its mean.
        order: round the inputs of the largest moment first, so that most of the others can
            still make up for their error ("activation order").

    Example:
        >>> weight, scale = torch.tensor([[[0.4, 0.4]]]), torch.ones(1, 1, 2)
        >>> together = torch.tensor([[[1.0, 0.99], [0.99, 1.0]]])  # the inputs are almost equal
        >>> gptq(weight, together, scale, 0 * scale, -8, 7), weight.round()
        (tensor([[[0., 1.]]]), tensor([[[0., 0.]]]))
    """
    outputs, inputs = weight.shape[1:]
    places, lower = _in_order(hessian, damping, order)
    rows = places[:, :, None].expand(-1, -1, outputs)  # (N, F, R)
    w = weight.mT.take_along_dim(rows, 1)
    errors = torch.empty_like(w)
    for stop in range(inputs, 0, -BLOCK):
        block = slice(max(0, stop - BLOCK), stop)
        steps, zeros = (each.mT.take_along_dim(rows[:, block], 1) for each in (scale, zero_point))
        passed = lower[:, block, block].diagonal(dim1=1, dim2=2)[:, None]  # (N, 1, B)
        moved = (lower[:, stop:, block] / passed).mT @ errors[:, stop:]
        within = lower[:, block, block] / passed
        _round_block(w[:, block], moved, errors[:, block], within, steps, zeros, low, high)
    return torch.empty_like(w).scatter_(1, rows, w).mT


def _in_order(hessian: Tensor, damping: float, order: bool) -> tuple[Tensor, Tensor]:
    """The inputs (N, F), the last of which is rounded first, and the factor in that order."""
    diagonal = hessian.diagonal(dim1=1, dim2=2)  # (N, F)
    if order:
        places = diagonal.argsort(dim=1, descending=True, stable=True).flip(1)  # (N, F)
    else:
        places = torch.arange(diagonal.shape[1]).flip(0).expand(len(diagonal), -1)
    dead = (diagonal == 0).take_along_dim(places, 1)
    pairs = zip(hessian, places, strict=True)
    hessian = torch.stack([each.index_select(0, p).index_select(1, p) for each, p in pairs])
    hessian.diagonal(dim1=1, dim2=2)[dead] = 1.0
    return places, triangular_factor(hessian, damping)


def _round_block(
    w: Tensor,
    moved: Tensor,
    errors: Tensor,
    within: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    low: int,
    high: int,
) -> None:
    """Round inputs (N, B, R), the last of them first, in place; what that changes is ``errors``.

    ``moved`` (N, B, R) is what the errors of the inputs before the block ask for, ``within``
    (N, B, B) what an error (rows) asks of another input (columns).
    """
    pruned = w == 0
    for k in range(w.shape[1] - 1, -1, -1):
        asked = within[:, None, k + 1 :, k] @ errors[:, k + 1 :]  # (N, 1, R)
        made = _round(w[:, k] + moved[:, k] + asked[:, 0], scale[:, k], zero_point[:, k], low, high)
        made[pruned[:, k]] = 0
        errors[:, k] = w[:, k] - made
        w[:, k] = made


def _round(w: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
    steps = torch.round(w / scale).add_(zero_point).clamp_(low, high)
    return steps.sub_(zero_point).mul_(scale)
