"""A layer's weight as a product of two or three smaller ones that loses least of its outputs.

Shapes: N independent groups (a grouped convolution has several, other layers one) of O outputs and
C inputs with a kernel K, a list of sizes that is empty for a linear layer. A weight is
(N, O, C, *K), its inputs at P places are (N, P, C, *K), its outputs there (N, P, O). Factors come
in the order in which they run, the first (N, R, C, *K'), the last (N, O, R, *K'').

What counts is the change of the outputs on those inputs, not that of the weight. With the identity
as inputs both are the same, and what is found is the plain decomposition of the weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from paredown.data.moments import exact_cross_sum, exact_moment_sum

DAMPING = 0.01  # share of what all directions alike add to those that the inputs show
RIDGE = 1e-4
SWEEPS = 2  # of alternating least squares in a Tucker decomposition

Factors = tuple[Tensor, ...]


def product(factors: Sequence[Tensor]) -> Tensor:
    """The weight that the factors make together, (N, O, C, *K).

    In each dimension of the kernel at most one of them may be larger than one.

    Example:
        >>> product([torch.ones(1, 2, 3, 3, 1), torch.ones(1, 4, 2, 1, 5)]).shape
        torch.Size([1, 4, 3, 3, 5])
    """
    made = factors[0]
    for last in factors[1:]:
        pairs = zip(made.shape[3:], last.shape[3:], strict=True)
        kernel = [max(a, b) for a, b in pairs]
        left, right = (t.reshape(*t.shape[:3], -1) for t in (made, last))
        joined = torch.einsum("nrcy,norx->nocyx", left, right)
        made = joined.reshape(*joined.shape[:3], *kernel)
    return made


def balanced(factors: Sequence[Tensor]) -> Factors:
    """The same product with both sides of each inner channel of the same norm.

    Rounding to integers and training both want numbers of like size.

    Example:
        >>> [float(f) for f in balanced([torch.full((1, 1, 1), 8.0), torch.full((1, 1, 1), 0.5)])]
        [2.0, 2.0]
    """
    made = list(factors)
    for place in range(len(made) - 1):
        before, after = made[place], made[place + 1]
        left = before.flatten(2).norm(dim=2)  # (N, R)
        right = after.transpose(1, 2).flatten(2).norm(dim=2)
        scale = torch.where((left > 0) & (right > 0), (right / left).sqrt(), 1.0)
        scale = torch.where(scale.isfinite() & (scale > 0), scale, 1.0)
        ones = [1] * (before.dim() - 3)
        made[place] = before * scale.reshape(*scale.shape, 1, *ones)
        made[place + 1] = after / scale.reshape(len(scale), 1, -1, *ones)
    return tuple(made)


# --- channels: K to R channels, then 1 x 1 ---------------------------------------------------


def output_directions(weight: Tensor, y: Tensor, damping: float = DAMPING) -> Tensor:
    """Orthonormal directions of the outputs, those that carry most first: (N, O, O), one a column.

    The first R of them lose least of the outputs of all subspaces of R dimensions: with the
    identity as inputs that is the truncated SVD (Eckart & Young), with real ones the SVD of the
    weight whitened by its inputs' covariance (Zhang et al. 1505.06798, Wang et al. 2403.07378).

    Example:
        >>> y = torch.tensor([[[3.0, 0.0], [0.0, 1.0]]])
        >>> output_directions(torch.eye(2)[None], y).abs().round().tolist()
        [[[1.0, 0.0], [0.0, 1.0]]]
    """
    flat, y = weight.flatten(2).double(), y.double()
    seen, own = y.mT @ y, flat @ flat.mT  # (N, O, O)
    traces = [each.diagonal(dim1=1, dim2=2).sum(1)[:, None, None] for each in (seen, own)]
    level = torch.where(traces[0] > 0, damping * traces[0], 1.0) / traces[1].clamp(min=1e-300)
    return torch.linalg.eigh(seen + level * own).eigenvectors.flip(2)


def channel_losses(directions: Tensor, y: Tensor) -> Tensor:
    """``|y - y'|^2`` with the first R directions alone, for R from 0 to O: (O + 1,).

    Example:
        >>> channel_losses(torch.eye(2)[None].double(), torch.tensor([[[3.0, 1.0]]])).tolist()
        [10.0, 1.0, 0.0]
    """
    carried = (y.double() @ directions).square().sum((0, 1))  # (O,)
    rest = carried.flip(0).cumsum(0).flip(0)
    return torch.cat([rest, rest.new_zeros(1)])


def channel_factors(weight: Tensor, directions: Tensor, rank: int) -> Factors:
    """The kernel to ``rank`` channels, and 1 x 1 from those to the outputs (Zhang 1505.06798).

    Example:
        >>> weight = torch.randn(1, 4, 3, 3, 3)
        >>> directions = output_directions(weight, weight.flatten(2).mT)
        >>> factors = channel_factors(weight, directions, 4)
        >>> torch.allclose(product(factors), weight.double(), atol=1e-5)
        True
    """
    kept = directions[..., :rank]  # (N, O, R)
    first = (kept.mT @ weight.flatten(2).double()).reshape(-1, rank, *weight.shape[2:])
    return first, kept.reshape(*kept.shape, *[1] * (weight.dim() - 3))


# --- spatial: h x 1, then 1 x w ---------------------------------------------------------------


def root(rows: Tensor, damping: float = DAMPING) -> tuple[Tensor, Tensor]:
    """S (N, F, F) with ``S S'`` the second moment of the rows (N, P, F), and its inverse; of the
    matrices that are such a root the triangular one, which takes least to find.

    Example:
        >>> whole, inverse = root(torch.eye(2)[None], 0.0)
        >>> (whole @ whole.mT * 2).round().tolist()
        [[[1.0, 0.0], [0.0, 1.0]]]
    """
    moment = exact_moment_sum(rows.float()) / max(1, rows.shape[1])
    diagonal = moment.diagonal(dim1=1, dim2=2)
    level = diagonal.mean(1, keepdim=True)
    diagonal.add_(torch.where(level > 0, damping * level, 1.0))
    whole = _cholesky(moment)
    identity = torch.eye(moment.shape[1], dtype=moment.dtype).expand_as(moment)
    return whole, torch.linalg.solve_triangular(whole, identity, upper=False)


def _cholesky(moment: Tensor, damping: float = 1e-12) -> Tensor:
    """Lower triangular factors (N, F, F), of a matrix that rounding has made indefinite those of
    one damped a little."""
    lower, failed = torch.linalg.cholesky_ex(moment)
    if not failed.any():
        return lower
    level = moment.diagonal(dim1=1, dim2=2).mean(1)[:, None, None].clamp(min=1e-300)
    identity = torch.eye(moment.shape[1], dtype=moment.dtype)
    return _cholesky(moment + damping * level * identity, 100 * damping)


def spatial_directions(weight: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """All factors of a kernel h x w at once: of h x 1 (N, Q, C, h, 1), of 1 x w (N, O, Q, 1, w).

    The SVD of Jaderberg et al. (1405.3866, scheme 2) on the (O w, C h) matrix of the weight, here
    whitened by what columns of h pixels hold.

    Example:
        >>> weight, x = torch.randn(1, 4, 3, 3, 3), torch.randn(1, 200, 3, 3, 3)
        >>> torch.allclose(product(spatial_directions(weight, x)), weight, atol=1e-4)
        True
    """
    groups, outputs, inputs, height, width = weight.shape
    columns = x.permute(0, 1, 4, 2, 3).flatten(3).flatten(1, 2)  # (N, P w, C h)
    whole, inverse = (each.float() for each in root(columns))
    matrix = weight.float().permute(0, 1, 4, 2, 3).reshape(groups, -1, inputs * height)
    white = matrix @ whole
    if white.shape[1] <= white.shape[2]:  # the moment of the shorter side tells the same directions
        left = torch.linalg.eigh(white @ white.mT).eigenvectors.flip(2)
        right = left.mT @ white
    else:
        right = torch.linalg.eigh(white.mT @ white).eigenvectors.flip(2).mT
        left = white @ right.mT
    first = (right @ inverse).reshape(groups, -1, inputs, height, 1)
    last = left.reshape(groups, outputs, width, 1, -1)
    return first, last.permute(0, 1, 4, 3, 2)


def spatial_factors(first: Tensor, last: Tensor, rank: int) -> Factors:
    """The first ``rank`` of what `spatial_directions` found."""
    return first[:, :rank], last[:, :, :rank]


# --- Tucker-2: 1 x 1, the kernel, 1 x 1 -------------------------------------------------------


def channel_root(x: Tensor) -> tuple[Tensor, Tensor]:
    """`root` of the inputs' channels at all places of the kernel: (N, P, C, *K) -> (N, C, C)."""
    return root(x.flatten(3).transpose(2, 3).flatten(1, 2))


@dataclass(frozen=True)
class Modes:
    """A weight whitened by its input channels, and the directions that it has along each mode."""

    white: Tensor  # (N, O, C, k)
    inverse: Tensor  # (N, C, C), of the root that whitens
    outputs: Tensor  # (N, O, O), the left singular vectors of the unfolding, largest first
    inputs: Tensor  # (N, C, C)
    losses: tuple[Tensor, Tensor]  # (O + 1,), (C + 1,)

    @staticmethod
    def of(weight: Tensor, roots: tuple[Tensor, Tensor]) -> Modes:
        """The higher-order SVD (De Lathauwer 2000), from which all ranks are taken.

        ``losses`` are the shares of the whitened weight's energy that outputs and input channels
        each lose with their first R directions, for R from 0.
        """
        white = torch.einsum("nock,ncd->nodk", weight.double().flatten(3), roots[0])
        found = [_directions(unfolded) for unfolded in (white, white.transpose(1, 2))]
        (outputs, of_outputs), (inputs, of_inputs) = found
        return Modes(white, roots[1], outputs, inputs, (of_outputs, of_inputs))


def _directions(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """The left singular vectors of (N, M, ...) unfolded along M, largest first, and what is lost
    without the last of them: (N, M, M), (M + 1,)."""
    unfolded = tensor.flatten(2)
    values, vectors = torch.linalg.eigh(unfolded @ unfolded.mT)
    energy = values.clamp(min=0).flip(1).sum(0)
    rest = energy.flip(0).cumsum(0).flip(0)
    return vectors.flip(2), torch.cat([rest, rest.new_zeros(1)]) / rest[0].clamp(min=1e-300)


def tucker_factors(weight: Tensor, modes: Modes, outputs: int, inputs: int) -> Factors:
    """1 x 1 to ``inputs`` channels, the kernel to ``outputs``, 1 x 1 to all (Kim 1511.06530).

    Higher-order orthogonal iteration (De Lathauwer 2000), each half a step of subspace iteration
    (Golub & Van Loan, 8.2.4) from the directions of the higher-order SVD.

    Example:
        >>> weight = torch.randn(1, 4, 3, 3, 3)
        >>> modes = Modes.of(weight, channel_root(torch.randn(1, 99, 3, 3, 3)))
        >>> factors = tucker_factors(weight, modes, 4, 3)
        >>> torch.allclose(product(factors), weight, atol=1e-4)
        True
    """
    white = modes.white.float()
    left, right = modes.outputs[..., :outputs].float(), modes.inputs[..., :inputs].float()
    for _ in range(SWEEPS):
        left = _turned(torch.einsum("nock,nci->noik", white, right), left)
        right = _turned(torch.einsum("nock,nor->ncrk", white, left), right)
    core = torch.einsum("nock,nor,nci->nrik", white, left, right)
    ones = [1] * (weight.dim() - 3)
    kernel = weight.shape[3:]
    down = (right.mT @ modes.inverse.float()).reshape(len(weight), inputs, -1, *ones)
    return down, core.reshape(*core.shape[:3], *kernel), left.reshape(*left.shape, *ones)


def _turned(tensor: Tensor, subspace: Tensor) -> Tensor:
    """A subspace (N, M, R) nearer the first left singular vectors of (N, M, ...) unfolded."""
    unfolded = tensor.flatten(2)
    return torch.linalg.qr(unfolded @ (unfolded.mT @ subspace)).Q


# --- on the inputs that there are -------------------------------------------------------------


def seen_by_last(before: Sequence[Tensor], last: Tensor, x: Tensor) -> Tensor:
    """What the last factor (N, O, R, *K') reads of inputs (N, P, C, *K): (N, P, R * cells of K').

    Example:
        >>> first, last = torch.ones(1, 2, 3, 3, 1), torch.ones(1, 4, 2, 1, 3)
        >>> seen_by_last([first], last, torch.ones(1, 5, 3, 3, 3)).shape
        torch.Size([1, 5, 6])
    """
    made = product(before).to(x.dtype).flatten(2)  # (N, R, C * its own cells)
    own = last.shape[3:].numel()
    if own == 1:
        return x.flatten(2) @ made.mT
    cells = x.shape[3:].numel() // own  # of the kernel before, apart from the last one's
    split = x.reshape(*x.shape[:3], cells, own).movedim(4, 2)  # (N, P, own, C, cells)
    seen = split.flatten(3).flatten(1, 2) @ made.mT  # (N, P * own, R)
    return seen.unflatten(1, (-1, own)).transpose(2, 3).flatten(2)


def fitted_last(last: Tensor, seen: Tensor, y: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """The last factor (N, O, R, *K') anew, by least squares on what it reads with ridge towards
    what it is; for the first so many of its inputs alone, in ascending ``counts``, each.

    Leading inputs have the leading block of the normal equations, of its Cholesky factor and of
    what forward substitution gives, so that all of them take one factorization.

    Shapes: seen (N, P, R * cells of K'), y (N, P, O).

    Example:
        >>> x, weight = torch.randn(1, 50, 4), torch.randn(1, 3, 4)
        >>> [half, made] = fitted_last(torch.zeros(1, 3, 4), x, x @ weight.mT, [2, 4])
        >>> half.shape, torch.allclose(made, weight.double(), atol=1e-2)
        (torch.Size([1, 3, 2]), True)
    """
    cells = last.shape[3:].numel()
    inputs = counts[-1] * cells
    flat = last.double().flatten(2)[..., :inputs]  # (N, O, M)
    gram, cross = exact_moment_sum(seen[..., :inputs]), exact_cross_sum(seen[..., :inputs], y)
    diagonal = gram.diagonal(dim1=1, dim2=2)
    level = diagonal.mean(1, keepdim=True)
    level = torch.where(level > 0, RIDGE * level, 1.0)
    diagonal.add_(level)
    lower = _cholesky(gram)
    asked = cross + level[..., None] * flat.mT  # (N, M, O)
    halfway = torch.linalg.solve_triangular(lower, asked, upper=False)
    made = []
    for count in counts:
        part = slice(0, count * cells)
        upper = lower[:, part, part].mT
        found = torch.linalg.solve_triangular(upper, halfway[:, part], upper=True)
        made.append(found.mT.reshape(*last.shape[:2], count, *last.shape[3:]))
    return made


def missed(last: Tensor, seen: Tensor, y: Tensor) -> float:
    """``|y - y'|^2`` of what the last factor makes of its inputs (N, P, M).

    Example:
        >>> missed(torch.zeros(1, 1, 2), torch.ones(1, 3, 2), torch.full((1, 3, 1), 2.0))
        12.0
    """
    change = y - seen @ last.to(seen.dtype).flatten(2).mT
    return float(change.square().sum(dtype=torch.float64))
