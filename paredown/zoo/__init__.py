"""Small architectures by name: adding one is a function in a file here and a line in this dict."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from paredown.core.errors import UserError
from paredown.core.named import named
from paredown.core.settings import check_above_zero, check_count

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Entry:
    """A net of the zoo.

    Attributes:
        where: the function that makes it, as ``"module:attribute"``.
        takes: "images" (B, C, H, W), "rows" (B, features) or "tokens" (B, T).
        gives: "classes" (B, classes), "maps" (B, classes, H, W), "each" (B, T, classes), or
            "classes or each", by its setting ``pooled``.
        fixed: settings of the function that the name stands for.
    """

    where: str
    takes: str
    gives: str
    fixed: dict[str, Any]


def _entry(where: str, takes: str, gives: str, **fixed: Any) -> Entry:
    return Entry(f"paredown.zoo.{where}", takes, gives, fixed)


DESIGNS = (  # of `paredown.zoo.convolutional`
    *("mobilenet_v1", "mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large"),
    *("mobilenet_v4_small", "efficientnet_v2_s"),
    *(f"efficientnet_b{n}" for n in range(8)),
)
_image = partial(_entry, takes="images", gives="classes")
ZOO = {
    **{name: _image("convolutional:designed", design=name) for name in DESIGNS},
    "resnet_8": _image("tiny:ResNet8"),
    "ds_cnn": _image("tiny:DSCNN"),
    "unet": _entry("tiny:UNet", "images", "maps"),
    "mlp": _entry("tiny:mlp", "rows", "classes"),
    "autoencoder": _entry("tiny:autoencoder", "rows", "classes"),
    **{
        f"{kind}_{size}": _entry("transformers:transformer", "tokens", gives, kind=size, **how)
        for kind, gives, how in (
            ("encoder", "classes or each", {"causal": False}),
            ("decoder", "each", {"causal": True, "pooled": False}),
        )
        for size in ("tiny", "mini", "small", "medium")
    },
}


COUNTS = {"classes", "channels", "features", "out", "vocabulary", "length"}


def entry(name: str) -> Entry:
    """Raises:
    UserError: there is none of that name; names the nearest.
    """
    if name not in ZOO:
        near = difflib.get_close_matches(name, ZOO, 1, 0.4)
        meant = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(ZOO)}."
        raise UserError(f"zoo: there is no {name!r}; {meant}")
    return ZOO[name]


def make(name: str, resolution: float = 1.0, **settings: Any) -> nn.Module:
    """A net of the zoo with random weights, as `torch.manual_seed` has them.

    Args:
        name: one of `ZOO`.
        resolution: the images are first resized to this share of their rows and columns.
        settings: what the net takes. Of images ``classes``, ``channels`` and ``size``, a number or
            (rows, columns); of rows ``features`` and ``out``; of tokens ``vocabulary``,
            ``classes``, ``length``, and ``pooled`` of an encoder. All take ``width`` and
            ``depth``, which multiply channels and blocks.

    Raises:
        UserError: there is no such net, or it has no such setting.

    Example:
        >>> import torch
        >>> net = make("mobilenet_v2", classes=10, channels=1, size=28, width=0.35).eval()
        >>> net(torch.zeros(1, 1, 28, 28)).shape, sum(p.numel() for p in net.parameters())
        (torch.Size([1, 10]), 408650)
        >>> make("mobilnet", classes=10)
        Traceback (most recent call last):
            ...
        paredown.core.errors.UserError: zoo: there is no 'mobilnet'; did you mean 'mobilenet_v2'?
    """
    found = entry(name)
    function: Callable[..., nn.Module] = named(found.where)
    settings = dict(settings)
    _check(name, function, found, settings)
    for whole in COUNTS & set(settings):
        check_count(whole, settings[whole])
    for share in ("width", "depth"):
        check_above_zero(share, settings.get(share, 1.0))
    check_above_zero("resolution", resolution)
    if resolution != 1 and found.takes != "images":
        raise UserError(f"zoo: {name} takes {found.takes}; resolution is of images alone.")
    size = settings.get("size", 224)
    if resolution != 1:
        size = settings["size"] = sides(size, resolution)
    takes = inspect.signature(function).parameters
    made = function(**found.fixed, **{n: each for n, each in settings.items() if n in takes})
    if resolution == 1:
        return made
    from paredown.zoo.resized import Resized

    return Resized(made, size)


def sides(size: int | tuple[int, int], resolution: float) -> tuple[int, int]:
    """Rows and columns at a share of a size, at least one of each.

    Example:
        >>> sides(224, 0.5), sides((9, 30), 0.34)
        ((112, 112), (3, 10))
    """
    both = (size, size) if isinstance(size, int) else size
    return max(1, round(both[0] * resolution)), max(1, round(both[1] * resolution))


def _check(name: str, function: Callable[..., Any], found: Entry, settings: dict[str, Any]) -> None:
    """Refuse a setting that it has not, and one that is missing."""
    known = {
        n: p for n, p in inspect.signature(function).parameters.items() if n not in found.fixed
    }
    wrong = [n for n in settings if n not in known and (n, found.takes) != ("size", "images")]
    lacking = [n for n, p in known.items() if p.default is p.empty and n not in settings]
    if wrong or lacking:
        more = " and resolution" if found.takes == "images" else ""
        what = f"has no {', '.join(wrong)}" if wrong else f"needs {', '.join(lacking)}"
        raise UserError(f"zoo: {name} {what}; it takes {', '.join(known)}{more}.")
