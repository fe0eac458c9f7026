"""Batch norms whose momentum is None: the average over all batches, by a count in Python.

Such a count is a tensor's value, which no graph can hold, and the whole model would be captured
without its training.
"""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

MOMENTUM = 0.1  # torch's own default


def cumulative(module: nn.Module) -> dict[str, _BatchNorm]:
    """Name -> the batch norms that average over all batches."""
    return {
        name: each
        for name, each in module.named_modules()
        if isinstance(each, _BatchNorm) and each.momentum is None and each.track_running_stats
    }


def note(module: nn.Module) -> str:
    """What becomes of them, in a sentence.

    Example:
        >>> note(nn.Sequential(nn.BatchNorm1d(4, momentum=None)))
        "batch norm '0' has momentum=None: in training its statistics move by 0.1 a batch here"
    """
    names = list(cumulative(module))
    more = f" and {len(names) - 1} more have" if names[1:] else " has"
    whose = "their" if names[1:] else "its"
    return (
        f"batch norm {names[0]!r}{more} momentum=None: in training {whose} statistics move by "
        f"{MOMENTUM} a batch here"
    )
