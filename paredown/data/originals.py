"""What the original says of samples without labels: computed once, and the target from then on."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from paredown.core import progress
from paredown.core.errors import UserError
from paredown.data import batches, feed, splits
from paredown.data.answer import Answer
from paredown.graph import machine
from paredown.graph.model import Model

SHARE = 0.25  # of the free memory that outputs may take; more is kept on the disk


class Taught(Dataset[Any]):
    """Samples with the original's answers as targets.

    Args:
        samples: gives ``(inputs,)``.
        outputs: one array each (N, ...), and ``mask`` (N, ...) where places count apart.
        held: keeps the files of mapped arrays for as long as this lives.
    """

    derived = True  # targets follow from model and inputs

    def __init__(
        self,
        samples: Dataset[Any],
        answer: Answer,
        outputs: Sequence[np.ndarray],
        mask: np.ndarray | None = None,
        held: object = None,
    ) -> None:
        self.samples, self.answer, self.outputs = samples, answer, list(outputs)
        self.mask, self._held = mask, held

    def __len__(self) -> int:
        return len(self.outputs[0])

    def __getitem__(self, row: int) -> Any:
        rows = [torch.from_numpy(np.array(each[row])) for each in self.outputs]
        mask = None if self.mask is None else torch.from_numpy(np.array(self.mask[row]))
        return self.samples[row][0], self.answer.target(rows, mask)


def taught(model: Model, samples: Dataset[Any], split: Any, answer: Answer, batch: int) -> Taught:
    """Samples with what a model, in evaluation mode, says of them.

    Args:
        samples: as the data give them.
        split: the same as the model takes them, under the name of the split.

    Raises:
        UserError: an input or an output is NaN or infinite; names the example.
    """
    model.eval()
    kept: list[np.ndarray] = []
    masks: list[Tensor] = []
    total, start, folder = splits.size(split), 0, None
    with torch.no_grad():
        given = feed.every(model, split, feed.size(model, batch))
        for each in progress.track(given, f"the original on {split.name}"):
            inputs = model.bind(*splits.arguments(each.inputs))
            _check(split.name, "input", [i.name for i in model.inputs], inputs, start)
            output = answer.of(batches.call(model, each.inputs))
            found = each.cut([tensor.detach().cpu() for tensor in output])
            _check(split.name, "output", [""] * len(found), found, start)
            if not kept:
                kept, folder = _room(found, total)
            for array, tensor in zip(kept, found, strict=True):
                array[start : start + each.count] = tensor.numpy()
            if answer.mask:
                masks.append(each.inputs[answer.mask][: each.count].cpu())
            start += each.count
    mask = torch.cat(masks).numpy() if masks else None
    return Taught(samples, answer, kept, mask, folder)


def _room(found: Sequence[Tensor], total: int) -> tuple[list[np.ndarray], Any]:
    """Arrays for all examples; files where they would take much of the memory."""
    shapes = [(total, *tensor.shape[1:]) for tensor in found]
    types = [tensor.numpy().dtype for tensor in found]
    pairs = list(zip(shapes, types, strict=True))
    needed = sum(int(np.prod(shape)) * kind.itemsize for shape, kind in pairs)
    if needed <= SHARE * machine.free_bytes():
        return [np.empty(shape, kind) for shape, kind in pairs], None
    folder = tempfile.TemporaryDirectory(prefix="paredown-outputs-")
    made = [
        np.lib.format.open_memmap(Path(folder.name) / f"{n}.npy", "w+", kind, shape)
        for n, (shape, kind) in enumerate(pairs)
    ]
    return list(made), folder


def _check(
    split: str, kind: str, names: Sequence[str], tensors: Sequence[Tensor], start: int
) -> None:
    for name, tensor in zip(names, tensors, strict=True):
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            rows = (~torch.isfinite(tensor)).reshape(len(tensor), -1).any(1)
            raise UserError(
                f"{split}: example {start + int(rows.nonzero()[0])}: {kind} {name!r} holds NaN or "
                "infinite values."
            )
