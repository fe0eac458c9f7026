"""GPTQ (Frantar et al. 2210.17323): round a layer's weights one input at a time, and let the inputs
still to come make up for the error.

Shapes: N independent parts of a layer (a grouped convolution has several, other layers one) of R
outputs and F inputs. What a part's outputs lose by a change D (R, F) of its weights is
``trace(D H D')``, with H (F, F) the second moment of its inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128  # inputs whose error is passed on together: fewer passes over the weights
MOST_DAMPING = 1e3  # times the mean of the diagonal; a matrix this damped is all diagonal


def second_moment(rows: Tensor) -> Tensor:
    """Of the inputs of each part, (N, P, F) at P places -> (N, F, F).

    Example:
        >>> second_moment(torch.tensor([[[1.0, 2.0], [3.0, 0.0]]]))
        tensor([[[5., 1.],
                 [1., 2.]]])
    """
    return rows.mT @ rows / rows.shape[1]


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Upper triangular U (N, F, F) with ``U' U`` the inverse of the damped Hessian.

    One factor of the Hessian, taken from the last input to the first, and its inverse; where that
    fails, since inputs are too few or depend on each other, more damping is tried.

    Example:
        >>> hessian = torch.tensor([[[2.0, 1.0], [1.0, 2.0]]])
        >>> upper = inverse_factor(hessian, 0.0)
        >>> torch.allclose(upper.mT @ upper, hessian.inverse())
        True
    """
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    level = diagonal.mean(1, keepdim=True).clamp(min=torch.finfo(hessian.dtype).tiny)  # (N, 1)
    while True:
        damped = hessian.clone()
        damped.diagonal(dim1=1, dim2=2).add_(damping * level)
        lower, failed = torch.linalg.cholesky_ex(damped.flip(1, 2))
        del damped
        if not failed.any() or damping > MOST_DAMPING:
            break
        damping = max(10 * damping, 1e-4)
    upper = lower.flip(1, 2)  # H = R R' with R upper triangular
    identity = torch.eye(upper.shape[1], dtype=upper.dtype).expand_as(upper)
    return torch.linalg.solve_triangular(upper, identity, upper=True)


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

    Args:
        hessian: (N, F, F), see `second_moment`.
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
    places, upper = _in_order(hessian, damping, order)
    columns = places[:, None].expand(-1, outputs, -1)  # (N, R, F)
    w = weight.take_along_dim(columns, 2)
    pruned = w == 0
    for start in range(0, inputs, BLOCK):
        block = slice(start, min(start + BLOCK, inputs))
        at = columns[:, :, block]
        grid = scale.take_along_dim(at, 2), zero_point.take_along_dim(at, 2)
        part = (w[:, :, block], pruned[:, :, block], upper[:, block, block])
        errors = _round_block(*part, *grid, low, high)
        w[:, :, block.stop :] -= errors @ upper[:, block, block.stop :]
    return torch.empty_like(w).scatter_(2, columns, w)


def _in_order(hessian: Tensor, damping: float, order: bool) -> tuple[Tensor, Tensor]:
    """The inputs (N, F) in the order in which they are rounded, and the factor in that order."""
    diagonal = hessian.diagonal(dim1=1, dim2=2)  # (N, F)
    dead = diagonal == 0
    if order:
        places = diagonal.argsort(dim=1, descending=True, stable=True)  # (N, F)
    else:
        places = torch.arange(diagonal.shape[1]).expand(len(diagonal), -1)
    hessian = hessian.take_along_dim(places[:, :, None], 1).take_along_dim(places[:, None], 2)
    hessian.diagonal(dim1=1, dim2=2)[dead.take_along_dim(places, 1)] = 1.0
    return places, inverse_factor(hessian, damping)


def _round_block(
    w: Tensor,
    pruned: Tensor,
    upper: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    low: int,
    high: int,
) -> Tensor:
    """Round inputs (N, R, B) one after the other, in place; the errors that those behind the block
    make up for, (N, R, B)."""
    errors = torch.empty_like(w)
    for j in range(w.shape[2]):
        made = _round(w[:, :, j], scale[:, :, j], zero_point[:, :, j], low, high)
        made[pruned[:, :, j]] = 0
        errors[:, :, j] = (w[:, :, j] - made) / upper[:, j, j, None]  # (N, R)
        w[:, :, j + 1 :] -= errors[:, :, j, None] * upper[:, None, j, j + 1 :]
        w[:, :, j] = made
    return errors


def _round(w: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
    steps = torch.round(w / scale).add_(zero_point).clamp_(low, high)
    return steps.sub_(zero_point).mul_(scale)
