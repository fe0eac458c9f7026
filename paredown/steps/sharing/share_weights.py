"""Weight sharing: a few values for each weight tensor, or a few blocks of values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from paredown.core import progress
from paredown.core.errors import UserError
from paredown.core.settings import check_count, check_fields, names_of
from paredown.core.task import Task
from paredown.data import observe
from paredown.graph.computed import fold_computed_weights
from paredown.graph.holds.sharing import Sharing, small
from paredown.graph.model import Model
from paredown.graph.quantized.regions import INTEGER_KINDS
from paredown.graph.rows import from_rows, rows
from paredown.steps.sharing.kmeans import cluster_blocks, cluster_line, nearest
from paredown.steps.sharing.shareable import Shareable, flat, keep_zeros, shareable
from paredown.steps.step import ALONE, Entry, Setting, Step

SCOPES = ("layer", "channels", "global")
FLOOR = 0.01  # of the mean importance: inputs that calibration never saw count a little too


@dataclass(frozen=True)
class ShareWeights(Step):
    """Give each weight one of a few values, found by k-means (Deep Compression, arXiv 1510.00149),
    or each block of a row one of a few codewords (product quantization, arXiv 1907.05686).

    Weights of one value stay equal through `FineTune`, which moves the value along the sum of their
    gradients. Pruned weights stay zero, which is no value of a codebook. Biases and norms are left
    alone.

    It pays where the file is packed (`paredown pack` codes the few values at their entropy) and in
    the PyTorch runtime's file, which holds the values and their numbers: the LeNet examples pack to
    1/8 of float32 by it alone, to 1/72 behind pruning, with no loss to be seen (docs/sharing.md).
    It does not pay in a plain ONNX file, which stores a shared value as any other, nor in latency
    or memory anywhere.

    Args:
        k: values of a codebook, from 2 up; 16 are 4 bits a weight before entropy coding.
        scope: "layer", a codebook for each weight tensor; "channels", one for each group of
            ``channels`` output channels; "global", one for all.
        channels: output channels in a group of ``scope="channels"``.
        block: how many neighbours of a row (what makes an output channel) share one codeword of
            as many values; the largest such number that divides the row. 1 is a value a weight.
        weighted: count each weight's error as the mean square of the inputs it is multiplied with,
            where the task has calibration data.
        exclude: names or globs of weights or layers to leave alone: "fc", "layer1.*".

    Raises:
        UserError: a setting is out of its range; a name in ``exclude`` fits nothing; the model is
            quantized, shared already or has no weights; or none has more than ``k`` values.

    Example:
        >>> import paredown
        >>> model = paredown.capture(torch.nn.Linear(8, 4), (torch.zeros(1, 8),))
        >>> shared = paredown.ShareWeights(k=4).apply(model, None)
        >>> len(shared.state_dict()["weight"].unique())
        4
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    table: ClassVar[tuple[Entry, ...]] = (
        Entry(
            call="ShareWeights(k=16)",
            does="k-means codebooks for each layer, group of channels or all layers, or "
            "codewords for blocks; values stay shared through `FineTune`",
            pays="entropy-coded delivery: alone 8x, behind pruning 72x smaller on LeNet's "
            "digits; the PyTorch runtime's file",
            does_not="an ONNX file stores a shared value as any other: neither smaller nor faster",
        ),
    )

    k: int = 16
    scope: str = "layer"
    channels: int = 16
    block: int = 1
    weighted: bool = False
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)
        for name, value, least in (("k", self.k, 2), ("channels", self.channels, 1)):
            check_count(name, value, least)
        check_count("block", self.block, 1)
        if self.scope not in SCOPES:
            known = ", ".join(f'"{scope}"' for scope in SCOPES)
            raise UserError(f"scope: expected one of {known}, got {self.scope!r}.")
        if self.block > 1 and self.scope != "layer":
            raise UserError(
                f"block: blocks have a codebook for each layer; {self.scope!r} needs block=1, or "
                'use scope="layer".'
            )
        object.__setattr__(self, "exclude", names_of("exclude", self.exclude))

    def apply(self, model: Model, task: Task, setting: Setting = ALONE) -> Model:
        """A copy whose weights are those of the codebooks, with ``shared`` saying which."""
        made = model.copy().eval()
        fold_computed_weights(made)
        found = shareable(made, self.exclude, "ShareWeights")
        self._check_distinct(found)
        counts = importances(made, task, found) if self.weighted else {}
        shares = [_Rows.of(each, counts.get(each.name)) for each in found]
        for each in found:
            keep_zeros(made, each)
        if self.scope == "global":
            _share_all(made, shares, self.k)
        else:
            for share in progress.track(shares, "share weights", len(shares)):
                self._share(made, share)
        return made

    def _check_distinct(self, found: list[Shareable]) -> None:
        """That something changes: some codebook has more than ``k`` values to stand for."""
        if self.scope == "global":
            most, where = len(torch.cat([flat(each) for each in found]).unique()), "all weights"
        else:
            sizes = {each.name: self._distinct(each) for each in found}
            most, where = max(sizes.values()), repr(max(sizes, key=lambda name: sizes[name]))
        if most <= self.k:
            what = "blocks" if self.block > 1 else "values"
            raise UserError(
                f"ShareWeights: changed nothing; k is {self.k}, and no codebook would stand for "
                f"more than {most} distinct {what} ({where}). Ask for a k below that."
            )

    def _distinct(self, found: Shareable) -> int:
        """The most values or blocks that one codebook of this weight would stand for."""
        each = _Rows.of(found, None)
        if self.block > 1:
            blocks = each.values.reshape(-1, each.divisor(self.block))
            return len(torch.unique(blocks, dim=0))
        group = self.channels if self.scope == "channels" else len(each.values)
        return max(len(values.unique()) for values, _ in each.groups(group))

    def _share(self, model: Model, each: _Rows) -> None:
        if self.block > 1:
            size = each.divisor(self.block)
            values, counts = (part.reshape(-1, size) for part in (each.values, each.counts))
            words, codes = cluster_blocks(values, counts, self.k)
            _put(model, each, each.name, words, codes.reshape(len(each.values), -1))
            return
        group = self.channels if self.scope == "channels" else len(each.values)
        books = [cluster_line(values, self.k, counts) for values, counts in each.groups(group)]
        starts = torch.tensor([0, *(len(book) for book in books)]).cumsum(0)
        codes = torch.cat(
            [
                start + nearest(part, book)
                for part, book, start in zip(each.values.split(group), books, starts, strict=False)
            ]
        )
        _put(model, each, each.name, torch.cat(books)[:, None], codes)


@dataclass(frozen=True)
class _Rows:
    """A weight as rows (R, F) of single precision, which of it counts, and how much."""

    found: Shareable
    values: Tensor
    kept: Tensor
    counts: Tensor  # 0 where nothing is kept

    @staticmethod
    def of(found: Shareable, counts: Tensor | None) -> _Rows:
        axis = found.uses[0].axis
        values, kept = rows(found.weight.detach().float(), axis), rows(found.kept, axis)
        counted = kept.float() if counts is None else counts * kept
        return _Rows(found, values * kept, kept, counted)

    @property
    def name(self) -> str:
        return self.found.name

    def divisor(self, block: int) -> int:
        """The largest number up to ``block`` that divides a row."""
        features = self.values.shape[1]
        return next(d for d in range(min(block, features), 0, -1) if features % d == 0)

    def groups(self, size: int) -> list[tuple[Tensor, Tensor]]:
        """What is not zero of each ``size`` rows, and how much it counts."""
        parts = (each.split(size) for each in (self.values, self.counts, self.kept))
        return [(values[kept], counts[kept]) for values, counts, kept in zip(*parts, strict=True)]


def _share_all(model: Model, shares: list[_Rows], k: int) -> None:
    pairs = [pair for each in shares for pair in each.groups(len(each.values))]
    values, counts = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    book = cluster_line(values, k, counts)
    for each in shares:
        _put(model, each, f"*{shares[0].name}", book[:, None], nearest(each.values, book))


def _put(model: Model, each: _Rows, book: str, words: Tensor, codes: Tensor) -> None:
    """Write codewords (K, d) into the weight, by its codes (R, F / d), and note what is shared; a
    codebook with as many values as the weight has would share nothing."""
    axis, weight, block = each.found.uses[0].axis, each.found.weight, words.shape[1]
    codes = codes.where(each.kept.unflatten(1, (-1, block)).any(2), 0)
    made = words.to(weight.dtype)[codes].flatten(1) * each.kept  # (R, F)
    with torch.no_grad():
        weight.copy_(from_rows(made, weight, axis))
    if book != each.name or words.numel() < int(each.kept.sum()):
        model.shared[each.name] = Sharing(book, words.numel(), small(codes), axis, block)


# --- what a weight's error counts ------------------------------------------------------------


def importances(model: Model, task: Task | None, found: list[Shareable]) -> dict[str, Tensor]:
    """Weight -> rows (R, F) with the mean square of what each element is multiplied with, as the
    output's error asks for (Choi et al., arXiv 1612.01543), beside its mean over the layer.

    Convolutions, linear layers and products with one use alone have such an input; and nothing has
    where the task has no calibration data.
    """
    if task is None or task.missing({"calibration"}):
        return {}
    layers = {each.name: each for each in found if _multiplies(each)}
    squares: dict[str, Tensor] = {}
    names: dict[str, list[str]] = {}
    for name, each in layers.items():
        names.setdefault(each.uses[0].input.name, []).append(name)

    def note(value: str, x: Tensor) -> None:
        for name in names[value]:
            axis = _feature_axis(layers[name], x)
            dims = [dim for dim in range(x.dim()) if dim != axis]
            squares[name] = squares.get(name, torch.tensor(0.0)) + x.float().square().sum(dims)

    observe.run(model, task, set(names), note)
    return {name: _spread(layers[name], square) for name, square in squares.items()}


def _multiplies(found: Shareable) -> bool:
    plain = found.uses[0].kind != "matmul" or found.weight.dim() == 2
    return len(found.uses) == 1 and found.uses[0].kind in INTEGER_KINDS and plain


def _feature_axis(found: Shareable, x: Tensor) -> int:
    """Axis 1 of (B, C, ...) images, 0 of one image, the last of anything else."""
    conv = found.uses[0].kind == "conv"
    return x.dim() - found.weight.dim() + 1 if conv else x.dim() - 1


def _spread(found: Shareable, square: Tensor) -> Tensor:
    """(C,) of a layer's input -> rows (R, F) of its weight."""
    channels = found.weight.shape[found.uses[0].axis]
    if found.uses[0].kind != "conv":
        spread = square.expand(channels, -1)
    else:  # each group of output channels reads its own inputs
        inner, kernel = found.weight.shape[1], math.prod(found.weight.shape[2:])
        groups = square.reshape(-1, inner)
        spread = groups.repeat_interleave(channels // len(groups), 0).repeat_interleave(kernel, 1)
    return spread / spread.mean().clamp(min=1e-30) + FLOOR
