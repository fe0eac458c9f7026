"""Copies of tensors that take memory only once they, or what they were copied from, change.

PyTorch's storages know copy on write: a copy shares the memory of its source, and whatever
operation first writes to either, in place, through a view, ``.data`` or an optimiser, gives it
memory of its own. So a user's module, its capture and the models that steps make of it hold each
weight once, and none of them ever sees what is done to another.

Some ops, such as an LSTM's, and ``tensor.numpy()``, ask for memory that they could write to: a
tensor that they read gets its own. What PyTorch does not know of, this does not hold for: arrays
that NumPy had of a tensor before it was copied write to the copy too. And, as any first write, that
of two threads at once to one tensor is not safe: call a module with an LSTM once before threads do.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)
BLOCK = 1 << 20  # numbers that are read at once


def copied(tensor: Tensor) -> Tensor:
    """The tensor's values, without gradients, in memory of their own as soon as it matters.

    What does not lie in plain memory of its own (on another device, in a larger tensor, in a file,
    an array, or memory that processes share) is copied at once.

    Example:
        >>> weight = torch.zeros(2)
        >>> copy = copied(weight)
        >>> weight += 1
        >>> weight, copy
        (tensor([1., 1.]), tensor([0., 0.]))
    """
    plain = tensor.detach()
    if type(plain) is Tensor and _owns_its_memory(plain):
        try:
            return torch._lazy_clone(plain)
        except RuntimeError:  # memory that PyTorch did not allocate
            pass
    return plain.clone(memory_format=torch.preserve_format)


def copies(tensors: Iterable[Tensor]) -> dict[int, Tensor]:
    """Copies of parameters and buffers by the ``id`` of each, as ``copy.deepcopy`` wants its memo.

    Left out, so that it copies them itself and keeps them together, are those of which others
    share the memory.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> made = copies(layer.parameters())[id(layer.bias)]
        >>> type(made).__name__, made is layer.bias, torch.equal(made, layer.bias)
        ('Parameter', False, True)
    """
    each = {id(tensor): tensor for tensor in tensors}
    holders = Counter(_place(tensor) for tensor in each.values())
    return {
        key: _like(tensor, copied(tensor))
        for key, tensor in each.items()
        if holders[_place(tensor)] == 1
        and tensor.is_leaf
        and type(tensor) in (Tensor, nn.Parameter)
    }


def parts(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor's numbers in order, as files hold them, some at a time; it gets no
    memory by that.

    Example:
        >>> [bytes(part) for part in parts(torch.tensor([1, 258], dtype=torch.int16))]
        [b'\\x01\\x00\\x02\\x01']
    """
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    for part in flat.split(BLOCK):
        yield part.clone().view(torch.uint8).numpy().data


def extremes(tensor: Tensor) -> Tensor:
    """The smallest and the largest number (2,), NaN where there is one: whether all are finite,
    without a tensor of answers. Zeros where there are no numbers.

    Example:
        >>> extremes(torch.tensor([1.0, torch.inf, -3.0]))
        tensor([-3., inf])
    """
    numbers = tensor.detach()
    numbers = numbers.float() if numbers.itemsize == 1 else numbers  # 8 bits are stored alone
    return torch.stack(torch.aminmax(numbers)) if numbers.numel() else numbers.new_zeros(2)


def finite(tensor: Tensor) -> bool:
    """Whether none of its numbers is NaN or infinite."""
    return not tensor.is_floating_point() or bool(extremes(tensor).isfinite().all())


def duplicate(module: M) -> M:
    """A deep copy of a module."""
    return copy.deepcopy(module, dict(copies([*module.parameters(), *module.buffers()])))


def _like(tensor: Tensor, values: Tensor) -> Tensor:
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(values, tensor.requires_grad)
    return values.requires_grad_(tensor.requires_grad)


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _owns_its_memory(tensor: Tensor) -> bool:
    whole = tensor.untyped_storage().nbytes() == tensor.nbytes
    return whole and tensor.layout is torch.strided and tensor.device.type == "cpu"
