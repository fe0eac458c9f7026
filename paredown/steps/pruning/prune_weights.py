"""Weight pruning: the weights of least magnitude become zero and stay zero."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from paredown.core import progress
from paredown.core.errors import UserError
from paredown.core.settings import check_fields, names_of
from paredown.core.task import Task
from paredown.graph.computed import fold_computed_weights
from paredown.graph.holds import own_zeros
from paredown.graph.model import Model
from paredown.graph.names import check_exclude, fits, with_layer
from paredown.graph.quantized.quantizers import weight_forms
from paredown.graph.sites import Site, sites
from paredown.graph.state import tensor_of
from paredown.steps.step import ALONE, Entry, Setting, Step

# --- mathematics -----------------------------------------------------------------------------


def magnitude_mask(weight: Tensor, sparsity: float, kept: Tensor | None = None) -> Tensor:
    """False for the ``round(sparsity * numel)`` weights of least magnitude (arXiv 1506.02626).

    Of equal weights those of the lower index go first. Where ``kept`` is given, what it has
    pruned already goes before everything else, and stays pruned beyond that count too.

    Shapes: weight (...), kept (...) bool -> (...) bool.

    Example:
        >>> magnitude_mask(torch.tensor([[0.1, -3.0], [-0.2, 2.0]]), 0.5)
        tensor([[False,  True],
                [False,  True]])
    """
    return global_masks([weight], sparsity, None if kept is None else [kept])[0]


def global_masks(
    weights: Sequence[Tensor], sparsity: float, kept: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """Masks for all weights together: the smallest go wherever they are (arXiv 1506.02626).

    Shapes: each weight and ``kept`` (...) -> (...) bool.

    Example:
        >>> global_masks([torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])], 0.5)
        [tensor([False, False]), tensor([True, True])]
    """
    before = [torch.ones_like(w, dtype=torch.bool) for w in weights] if kept is None else kept
    pairs = zip(weights, before, strict=True)
    scores = torch.cat([w.detach().abs().float().where(k, -1.0).flatten() for w, k in pairs])
    mask = ~_smallest(scores, round(sparsity * scores.numel()))  # (N,)
    parts = mask.split([w.numel() for w in weights])
    return [p.view_as(k) & k for p, k in zip(parts, before, strict=True)]


def _smallest(scores: Tensor, count: int) -> Tensor:
    """True for exactly ``count`` of the smallest of (N,), the first ones among equals."""
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    limit = scores.kthvalue(count).values
    chosen = scores < limit
    ties = (scores == limit).nonzero().flatten()
    chosen[ties[: count - int(chosen.sum())]] = True
    return chosen


def n_m_mask(weight: Tensor, n: int, m: int, axis: int) -> Tensor:
    """Keep the ``n`` largest of every ``m`` neighbours along ``axis`` (arXiv 2104.08378).

    A last group of fewer than ``m`` keeps at most ``n`` too. Of equal weights the later stay.

    Shapes: weight (...) -> (...) bool.

    Example:
        >>> n_m_mask(torch.tensor([[4.0, 1.0, -3.0, 2.0]]), 2, 4, axis=1)
        tensor([[ True, False,  True, False]])
    """
    rows = weight.detach().abs().float().movedim(axis, -1)  # (..., K)
    size = rows.shape[-1]
    padding = rows.new_full((*rows.shape[:-1], -size % m), -1.0)
    groups = torch.cat([rows, padding], -1).unflatten(-1, (-1, m))  # (..., G, m)
    dropped = groups.argsort(dim=-1, stable=True)[..., : m - n]
    mask = torch.ones_like(groups, dtype=torch.bool).scatter(-1, dropped, False)
    return mask.flatten(-2)[..., :size].movedim(-1, axis)


def cubic_sparsity(final: float, steps: int, initial: float = 0.0) -> list[float]:
    """Rising sparsities, quick at first: ``final + (initial - final)(1 - t/n)^3`` (1710.01878).

    Example:
        >>> [round(s, 4) for s in cubic_sparsity(0.8, 4)]
        [0.4625, 0.7, 0.7875, 0.8]
    """
    return [final + (initial - final) * (1 - step / steps) ** 3 for step in range(1, steps + 1)]


# --- the step --------------------------------------------------------------------------------


@dataclass(frozen=True)
class PruneWeights(Step):
    """Set the smallest weights of convolutions and linear layers to zero (unstructured).

    It pays where the file is packed (`paredown pack` codes a zero in a fraction of a bit) and,
    as 2:4, on GPUs with sparse tensor cores. It does not pay in a plain ONNX file, which stores
    a zero as any other number: neither size nor latency falls. There, use `PruneChannels`.

    Args:
        sparsity: share of zeros, above 0 and below 1; what is pruned already counts.
        scope: "layer" prunes each weight to that share, "global" all of them together.
        pattern: "2:4", or another "N:M": at most N of every M neighbours along the input
            dimension are kept; it sets the sparsity.
        exclude: names or globs of weights or layers to leave alone: "fc", "layer1.*".

    Raises:
        UserError: a setting is out of its range; a name in ``exclude`` fits nothing; or every
            weight is that sparse already.

    Example:
        >>> import paredown
        >>> model = paredown.capture(torch.nn.Linear(8, 4), (torch.zeros(1, 8),))
        >>> pruned = paredown.PruneWeights(0.75).apply(model, None)
        >>> int((pruned.state_dict()["weight"] == 0).sum())
        24
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    table: ClassVar[tuple[Entry, ...]] = (
        Entry(
            call="PruneWeights(0.5)",
            does="magnitude pruning, per layer or global, N:M such as 2:4, gradual schedule",
            pays="entropy-coded delivery, kernels that skip zeros",
            does_not="an ONNX file stores zeros as any other number: neither smaller nor faster",
        ),
    )

    sparsity: float = 0.5
    scope: str = "layer"
    pattern: str | None = None
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)
        object.__setattr__(self, "exclude", names_of("exclude", self.exclude))
        if not 0 < self.sparsity < 1:
            raise UserError(f"sparsity: expected above 0 and below 1, got {self.sparsity!r}.")
        if self.scope not in ("layer", "global"):
            raise UserError(f'scope: expected "layer" or "global", got {self.scope!r}.')
        if self.pattern is not None:
            self._check_pattern(*_parse(self.pattern))

    def _check_pattern(self, n: int, m: int) -> None:
        if self.scope == "global":
            raise UserError('scope: a pattern prunes every layer alike; use scope="layer".')
        if self.sparsity not in (0.5, 1 - n / m):
            raise UserError(
                f"sparsity: pattern {self.pattern} prunes {1 - n / m:g}, which contradicts "
                f"{self.sparsity!r}; leave sparsity out."
            )
        object.__setattr__(self, "sparsity", 1 - n / m)

    def apply(self, model: Model, task: Task, setting: Setting = ALONE) -> Model:
        """A copy with the weights at zero and their masks in ``masks``."""
        pruned = model.copy()
        fold_computed_weights(pruned)
        found = _prunable(pruned, self.exclude)
        _refuse_without_zero(pruned, found)
        told = own_zeros.adopt(pruned, setting.original or model)
        kept = [_kept(pruned, uses) for uses in found]
        masks = self.new_masks([tensor_of(pruned.graph, u[0].weight) for u in found], found, kept)
        if not _set_zero(pruned, found, masks) and not told:
            raise UserError(
                f"PruneWeights: changed nothing; all {len(found)} weights have a share of "
                f"{self.sparsity:.4g} zeros or more already. Ask for a higher sparsity."
            )
        if told:
            progress.say(f"  note: {told}")
        return pruned

    def new_masks(
        self, weights: list[Tensor], uses: list[list[Site]], kept: list[Tensor]
    ) -> list[Tensor]:
        if self.scope == "global":
            return global_masks(weights, self.sparsity, kept)
        if self.pattern is None:
            pairs = zip(weights, kept, strict=True)
            return [magnitude_mask(weight, self.sparsity, mask) for weight, mask in pairs]
        n, m = _parse(self.pattern)
        rows = zip(weights, uses, kept, strict=True)
        return [n_m_mask(w * k, n, m, axis=1 - u[0].axis) & k for w, u, k in rows]

    @staticmethod
    def gradual(
        final: float,
        steps: int,
        between: Sequence[Step] = (),
        scope: str = "layer",
        exclude: tuple[str, ...] = (),
    ) -> list[Step]:
        """A rising sparsity with ``between`` after each rise (Zhu & Gupta, arXiv 1710.01878).

        Example:
            >>> [step.sparsity for step in PruneWeights.gradual(0.8, 2)]
            [0.7000000000000001, 0.8]
        """
        if steps < 1:
            raise UserError(f"steps: expected a whole number from 1 up, got {steps!r}.")
        recipe: list[Step] = []
        for sparsity in cubic_sparsity(final, steps):
            recipe += [PruneWeights(sparsity, scope, exclude=exclude), *between]
        return recipe


def _parse(pattern: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+):(\d+)", str(pattern))
    if match is None or not 0 < int(match[1]) < int(match[2]):
        raise UserError(
            f'pattern: expected "N:M" with N from 1 up and below M, such as "2:4", got {pattern!r}.'
        )
    return int(match[1]), int(match[2])


def _prunable(model: Model, exclude: tuple[str, ...]) -> list[list[Site]]:
    """The uses of each weight that may be pruned, a tied weight being one."""
    groups: dict[int, list[Site]] = {}
    spared = set()
    for site in sites(model.graph):
        weight = tensor_of(model.graph, site.weight)
        groups.setdefault(id(weight), []).append(site)
        if site.kind == "embedding" or not weight.is_floating_point():
            spared.add(id(weight))
    names = (n for uses in groups.values() for site in uses for n in with_layer(site.weight))
    check_exclude(exclude, names, "layer or weight")
    found = [
        uses
        for key, uses in groups.items()
        if key not in spared and not any(fits(with_layer(site.weight), exclude) for site in uses)
    ]
    if not found:
        raise UserError(
            "PruneWeights: the model has no convolution or linear weight to prune"
            + (" besides those excluded." if exclude else ".")
        )
    return found


def _refuse_without_zero(model: Model, found: list[list[Site]]) -> None:
    forms = weight_forms(model.graph)
    for site in (site for uses in found for site in uses):
        form = forms.get(site.weight)
        if form is not None and 0 not in form.grid:
            bits = "one bit has" if form.bits == 1 else f"its {form.bits} bits have"
            raise UserError(
                f"PruneWeights: {site.weight} is {form.word}, and {bits} no zero; exclude it, or "
                'use Binarize("ternary").'
            )


def _kept(model: Model, uses: list[Site]) -> Tensor:
    """What earlier pruning has left of a weight."""
    weight = tensor_of(model.graph, uses[0].weight)
    kept = torch.ones_like(weight, dtype=torch.bool)
    for name in {site.weight for site in uses}:
        if name in model.masks:
            kept = kept & model.masks[name].to(weight.device)
    return kept


def _set_zero(model: Model, found: list[list[Site]], masks: list[Tensor]) -> bool:
    """Zero the weights and note the masks; whether any weight changed."""
    changed = False
    for uses, mask in zip(found, masks, strict=True):
        weight = tensor_of(model.graph, uses[0].weight)
        changed = changed or bool((weight[~mask] != 0).any())
        with torch.no_grad():
            weight.masked_fill_(~mask, 0.0)
        for site in uses:
            model.masks[site.weight] = mask
    return changed
