"""Zeros that came with the model: of a sparse weight they stay zero, as those of a step do."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from paredown.graph.parts import Parts
from paredown.graph.quantized.quantizers import weight_forms
from paredown.graph.sites import sites
from paredown.graph.state import tensor_of

SPARSE = 0.01  # of a weight, from which on its zeros are taken for pruned ones
KEEP, FREE = "keep", "free"


def kept(weight: Tensor) -> Tensor:
    """False for each zero of a sparse weight: of one of which a hundredth is zero, but not all, and
    not all of the rest one value, as in an identity that is to train; (...) -> (...) bool.

    Example:
        >>> kept(torch.tensor([0.0, 1.0, 2.0])), kept(torch.eye(2)).all()
        (tensor([False,  True,  True]), tensor(True))
    """
    there = weight.detach() != 0
    count = int(there.sum())
    few = weight.numel() - count < SPARSE * weight.numel()
    if few or not count or bool((weight[there] == weight[there][0]).all()):
        return torch.ones_like(there)
    return there


def found(model: Parts, original: Parts | None = None) -> dict[str, Tensor]:
    """Name -> `kept` of each trainable weight whose zeros nothing holds yet, in the order they run:
    of those that were sparse in ``original``, where one is given, so that zeros which a step has
    made in passing are no such ones.

    Where a weight is rounded to a grid without a zero, it has none.
    """
    forms, made = weight_forms(model.graph), {}
    tables = {site.weight for site in sites(model.graph) if site.kind == "embedding"}
    for name, weight in _weights(model).items():
        form = forms.get(name)
        if form is not None and 0 not in form.grid:
            continue
        mask = kept(_without_padding(weight) if name in tables else weight)
        held = model.masks.get(name)
        if held is not None:
            mask = mask & held.to(mask.device)
        if not bool(mask.all()) and (held is None or not torch.equal(mask.cpu(), held.cpu())):
            made[name] = mask
    if made and original is not None:
        earlier = _weights(original)
        made = {n: m for n, m in made.items() if n in earlier and not bool(kept(earlier[n]).all())}
    return made


def _without_padding(table: Tensor) -> Tensor:
    """The table with ones in rows that are all zero: those of its padding, which nobody pruned."""
    return torch.where(table.detach().any(1, keepdim=True), table.detach(), 1.0)


def _weights(model: Parts) -> dict[str, nn.Parameter]:
    """The weights that ops multiply with or look up, that train, by name."""
    names = dict.fromkeys(site.weight for site in sites(model.graph))
    named = {name: tensor_of(model.graph, name) for name in names}
    return {
        name: weight
        for name, weight in named.items()
        if isinstance(weight, nn.Parameter) and weight.is_floating_point()
    }


def adopt(model: Parts, original: Parts) -> str:
    """Hold the zeros of weights that were sparse in ``original`` from now on, in place; a sentence
    that says so, or ""."""
    masks = found(model, original)
    model.masks.update(masks)
    return told(masks)


def free(model: Parts) -> None:
    """Let all zeros train, in place, but those of shared weights, whose values have no zero."""
    for name in [name for name in model.masks if name not in model.shared]:
        del model.masks[name]


def told(masks: dict[str, Tensor]) -> str:
    """What is said of weights whose zeros stay.

    Example:
        >>> told({"fc.weight": torch.tensor([True, False])})
        'fc.weight (50 % zeros) came sparse: its zeros stay; FineTune(zeros="free") trains them'
    """
    if not masks:
        return ""
    shares = [f"{name} ({_share(mask)} zeros)" for name, mask in masks.items()]
    more = f" and {len(shares) - 3} more" if len(shares) > 3 else ""
    whose = "its" if len(shares) == 1 else "their"
    return (
        f"{', '.join(shares[:3])}{more} came sparse: {whose} zeros stay; "
        f'FineTune(zeros="{FREE}") trains them'
    )


def _share(mask: Tensor) -> str:
    return f"{100 * float((~mask).double().mean()):.0f} %"
