"""Second moments of rows: sums over many places of products of what a layer reads and gives.

Shapes: N independent parts of a layer (a grouped convolution has several, other layers one), P
places, F inputs and O outputs of a part.
"""

from __future__ import annotations

import torch
from torch import Tensor

PANEL = 512  # inputs whose moments are computed together
PLACES = 2048  # whose products are summed in the rows' own precision, before they go to float64


def moment_sum(rows: Tensor) -> Tensor:
    """The products of all pairs of inputs, summed over places: (N, P, F) -> (N, F, F).

    What lies below the diagonal is copied from above it.

    Example:
        >>> moment_sum(torch.tensor([[[1.0, 2.0], [3.0, 0.0]]]))
        tensor([[[10.,  2.],
                 [ 2.,  4.]]])
    """
    features = rows.shape[2]
    if features <= PANEL:
        return rows.mT @ rows
    made = rows.new_empty(len(rows), features, features)
    for start in range(0, features, PANEL):
        stop = start + PANEL
        panel = rows[:, :, start:stop].mT @ rows[:, :, start:]  # (N, PANEL, F - start)
        made[:, start:stop, start:] = panel
        made[:, stop:, start:stop] = panel[:, :, PANEL:].mT
    return made


def exact_moment_sum(rows: Tensor) -> Tensor:
    """The same in float64, of rows in float32, some places at a time: (N, P, F) -> (N, F, F).

    Example:
        >>> exact_moment_sum(torch.ones(1, 4, 1))
        tensor([[[4.]]], dtype=torch.float64)
    """
    total = torch.zeros((), dtype=torch.float64)
    for part in rows.split(PLACES, 1):
        total = moment_sum(part).double().add_(total)
    return total


def exact_cross_sum(rows: Tensor, outputs: Tensor) -> Tensor:
    """The products of inputs and outputs likewise: (N, P, F), (N, P, O) -> (N, F, O) in float64.

    Example:
        >>> exact_cross_sum(torch.ones(1, 4, 1), torch.full((1, 4, 1), 2.0))
        tensor([[[8.]]], dtype=torch.float64)
    """
    total = torch.zeros((), dtype=torch.float64)
    for part, given in zip(rows.split(PLACES, 1), outputs.split(PLACES, 1), strict=True):
        total = (part.mT @ given).double().add_(total)
    return total
