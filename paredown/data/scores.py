"""Scores for a task: one number per example, higher is better."""

from __future__ import annotations

import torch
from torch import Tensor

from paredown.core.settings import check_arguments

IGNORE = -100  # a target that does not count, as in torch's cross entropy


def _check(output: Tensor, target: Tensor) -> None:
    check_arguments(output=(output, Tensor), target=(target, Tensor))


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    """1 where the largest of the classes (B, C) is the target (B,), else 0; (B,).

    Example:
        >>> accuracy(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([1, 1])).tolist()
        [1.0, 0.0]
    """
    _check(output, target)
    return (output.argmax(1) == target).float()


def squared_error(output: Tensor, target: Tensor) -> Tensor:
    """Minus the mean squared error of each example, for regression; (B, ...) twice -> (B,).

    Example:
        >>> squared_error(torch.tensor([[1.0, 3.0]]), torch.tensor([[1.0, 1.0]])).tolist()
        [-2.0]
    """
    _check(output, target)
    error = (output - target.reshape(output.shape)) ** 2
    return -error.reshape(len(output), -1).mean(1)


def multilabel_accuracy(output: Tensor, target: Tensor) -> Tensor:
    """The share of labels that are right at a logit above 0; (B, L) twice -> (B,).

    Example:
        >>> multilabel_accuracy(torch.tensor([[2.0, -1.0]]), torch.tensor([[1, 1]])).tolist()
        [0.5]
    """
    _check(output, target)
    return ((output > 0) == (target > 0.5)).float().reshape(len(output), -1).mean(1)


def token_accuracy(output: Tensor, target: Tensor, ignore: int = IGNORE) -> Tensor:
    """The share of tokens that are right; logits (B, T, C) and targets (B, T) -> (B,).

    Targets of ``ignore`` do not count; an example of none but those scores 1.

    Example:
        >>> logits = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
        >>> token_accuracy(logits, torch.tensor([[1, 1]])).tolist()
        [0.5]
    """
    _check(output, target)
    check_arguments(ignore=(ignore, int))
    counts = target != ignore
    right = ((output.argmax(-1) == target) & counts).sum(-1).float()
    total = counts.sum(-1).float()
    return torch.where(total > 0, right / total.clamp(min=1), torch.ones_like(right))
