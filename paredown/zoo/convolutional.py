"""MobileNets and EfficientNets: rows of their papers' tables, and one way to build them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from paredown.zoo.blocks import (
    Activation,
    Block,
    ConvNorm,
    Norm,
    Row,
    Size,
    divisible,
    hard_swish,
    layers_of,
    relu,
    relu6,
    swish,
)

SMALLEST_MAP = 3  # rows and columns that are left at the end: smaller inputs are halved less often


@dataclass(frozen=True)
class Design:
    """A network as its paper has it, but for the multipliers.

    Attributes:
        stem: channels of the first convolution, which halves the image.
        head, head_times: channels of the last convolution, as a number or a multiple of those
            before it; 0 is none.
        head_shrinks: whether it gets narrower with the rest.
        features: channels of a layer between pooling and classifier; 0 is none.
        features_pooled: whether that layer is a convolution with its norm, or a linear one.
        width, depth: multipliers of the paper's own, times those given.
        block_name, flat: as `Block` and `layers_of` have them.
        nested: whether a row's blocks stand in a module of their own, as in torchvision's
            EfficientNet, or all one after the other.
        drop_path: how often the last block is left out in training; the earlier ones less.
    """

    rows: tuple[Row, ...]
    stem: int
    head: int = 0
    head_times: int = 0
    features: int = 0
    activation: Activation = relu
    norm: Norm = nn.BatchNorm2d
    block_name: str = "block"
    flat: bool = False
    nested: bool = False
    head_shrinks: bool = True
    features_pooled: bool = False
    width: float = 1.0
    depth: float = 1.0
    dropout: float = 0.2
    drop_path: float = 0.0


class Network(nn.Module):
    """Features, one pooled value a channel, a classifier.

    Shapes: (B, channels, H, W) -> (B, classes).
    """

    def __init__(self, features: nn.Sequential, head: nn.Module, classifier: nn.Sequential) -> None:
        super().__init__()
        self.features = features
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.head = head
        self.classifier = classifier
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out")
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
            elif isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, 0, 0.01)
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(self.avgpool(self.features(x)))
        return self.classifier(torch.flatten(x, 1))  # type: ignore[no-any-return]


def build(
    design: Design,
    classes: int,
    channels: int,
    size: Size,
    width: float = 1.0,
    depth: float = 1.0,
) -> Network:
    """The network of a design.

    Args:
        size: rows and columns of its images, or one number for both. Where they are few, the first
            halvings are left out, so that at least three of each are left at the end.
    """
    rows = _halved_less([Row("plain", design.stem, 3, 2), *design.rows], size)
    stem, act, norm = rows[0].scaled(width), design.activation, design.norm
    made: list[nn.Module] = [
        ConvNorm(channels, stem.out, 3, stem.stride, norm=norm, activation=act)
    ]
    stages = [_deepened(stage, depth) for stage in _stages(rows[1:])]
    total, place, before = sum(map(len, stages)), 0, stem.out
    for stage in stages:
        blocks: list[nn.Module] = []
        for row in (row.scaled(width) for row in stage):
            blocks.append(_block(design, row, before, design.drop_path * place / total))
            before, place = row.out, place + 1
        made += [nn.Sequential(*blocks)] if design.nested else blocks
    last = before * design.head_times
    if design.head:
        last = divisible(design.head * (width if design.head_shrinks else max(1.0, width)))
    if last:
        made.append(ConvNorm(before, last, norm=norm, activation=act))
    features = nn.Sequential(*made)
    return Network(features, *_end(design, last or before, classes, width))


def _end(
    design: Design, channels: int, classes: int, width: float
) -> tuple[nn.Module, nn.Sequential]:
    """What follows the pooling: a convolution, if any, and the classifier."""
    act, head = design.activation, nn.Identity()
    front: list[nn.Module] = []
    wide = divisible(design.features * width) if design.features else channels
    if design.features and design.features_pooled:
        head = ConvNorm(channels, wide, norm=design.norm, activation=act)  # type: ignore[assignment]
    elif design.features:
        front = [nn.Linear(channels, wide), act()]
    return head, nn.Sequential(*front, nn.Dropout(design.dropout), nn.Linear(wide, classes))


def _block(design: Design, row: Row, channels: int, drop: float) -> nn.Module:
    layers = layers_of(row, channels, design.norm, design.flat)
    if row.kind in ("plain", "separable"):
        return nn.Sequential(*layers) if len(layers) > 1 else layers[0]
    added = row.stride == 1 and channels == row.out
    return Block(design.block_name, layers, added, drop)


def _stages(rows: Sequence[Row]) -> list[list[Row]]:
    """The blocks one by one; those that go on with the same channels at the same size together."""
    stages: list[list[Row]] = []
    for row in rows:
        blocks = [row, *[replace(row, stride=1)] * (row.repeats - 1)]
        if stages and row.stride == 1 and stages[-1][-1].out == row.out:
            stages[-1] += blocks
        else:
            stages.append(blocks)
    return stages


def _deepened(stage: list[Row], depth: float) -> list[Row]:
    """The first of a stage's blocks, or more of its last (1905.11946)."""
    count = math.ceil(round(len(stage) * depth, 6))
    return stage[:count] + [replace(stage[-1], stride=1)] * (count - len(stage))


def _halved_less(rows: Sequence[Row], size: Size) -> list[Row]:
    """The rows, without their first halvings where the images are too small for all."""
    halvings = sum(row.stride == 2 for row in rows)
    smallest, kept = size if isinstance(size, int) else min(size), halvings
    while kept and math.ceil(smallest / 2**kept) < SMALLEST_MAP:
        kept -= 1
    spare, made = halvings - kept, []
    for row in rows:
        spared = row.stride == 2 and spare > 0
        spare -= spared
        made.append(replace(row, stride=1) if spared else row)
    return made


# --- the designs -----------------------------------------------------------------------------


def _inverted(settings: str, **more: object) -> tuple[Row, ...]:
    """Rows of "expand channels repeats stride kernel", as the papers of MobileNetV2 and
    EfficientNet print them."""
    rows = (line.split() for line in settings.split("/"))
    return tuple(
        Row(
            "inverted",
            out=int(out),
            kernel=int(kernel),
            stride=int(stride),
            expand=float(expand),
            repeats=int(repeats),
            **more,  # type: ignore[arg-type]
        )
        for expand, out, repeats, stride, kernel in rows
    )


def _third(settings: str) -> tuple[Row, ...]:
    """Rows of "kernel hidden out squeeze activation stride", as MobileNetV3's paper prints them."""
    made = []
    for line in settings.split("/"):
        kernel, hidden, out, squeeze, activation, stride = line.split()
        made.append(
            Row(
                "inverted",
                out=int(out),
                kernel=int(kernel),
                stride=int(stride),
                hidden=int(hidden),
                squeeze="hard" if squeeze == "se" else "",
                activation=hard_swish if activation == "hs" else relu,
            )
        )
    return tuple(made)


_gentle: Norm = partial(nn.BatchNorm2d, eps=0.001, momentum=0.01)
MOBILENET_V1 = Design(  # 1704.04861
    rows=tuple(
        Row("separable", out, stride=stride, repeats=repeats)
        for out, stride, repeats in (
            (64, 1, 1), (128, 2, 1), (128, 1, 1), (256, 2, 1), (256, 1, 1), (512, 2, 1),
            (512, 1, 5), (1024, 2, 1), (1024, 1, 1),
        )
    ),
    stem=32,
)  # fmt: skip
MOBILENET_V2 = Design(  # 1801.04381
    rows=_inverted(
        "1 16 1 1 3/6 24 2 2 3/6 32 3 2 3/6 64 4 2 3/6 96 3 1 3/6 160 3 2 3/6 320 1 1 3",
        activation=relu6,
    ),
    stem=32,
    head=1280,
    activation=relu6,
    block_name="conv",
    flat=True,
    head_shrinks=False,
)
MOBILENET_V3_LARGE = Design(  # 1905.02244, large
    rows=_third(
        "3 16 16 - re 1/3 64 24 - re 2/3 72 24 - re 1/5 72 40 se re 2/5 120 40 se re 1/"
        "5 120 40 se re 1/3 240 80 - hs 2/3 200 80 - hs 1/3 184 80 - hs 1/3 184 80 - hs 1/"
        "3 480 112 se hs 1/3 672 112 se hs 1/5 672 160 se hs 2/5 960 160 se hs 1/5 960 160 se hs 1"
    ),
    stem=16,
    head_times=6,
    features=1280,
    activation=hard_swish,
    norm=_gentle,
)
MOBILENET_V3_SMALL = replace(
    MOBILENET_V3_LARGE,
    rows=_third(
        "3 16 16 se re 2/3 72 24 - re 2/3 88 24 - re 1/5 96 40 se hs 2/5 240 40 se hs 1/"
        "5 240 40 se hs 1/5 120 48 se hs 1/5 144 48 se hs 1/5 288 96 se hs 2/5 576 96 se hs 1/"
        "5 576 96 se hs 1"
    ),
    features=1024,
)
MOBILENET_V4_SMALL = Design(  # 2404.10518, conv-small
    rows=(
        Row("plain", 32, 3, 2),
        Row("plain", 32, 1),
        Row("plain", 96, 3, 2),
        Row("plain", 64, 1),
        Row("universal", 96, 5, 2, expand=3, inner=5),
        Row("universal", 96, 0, expand=2, inner=3, repeats=4),
        Row("universal", 96, 3, expand=4),
        Row("universal", 128, 3, 2, expand=6, inner=3),
        Row("universal", 128, 5, expand=4, inner=5),
        Row("universal", 128, 0, expand=4, inner=5),
        Row("universal", 128, 0, expand=3, inner=5),
        Row("universal", 128, 0, expand=4, inner=3, repeats=2),
    ),
    stem=32,
    head=960,
    features=1280,
    features_pooled=True,
)
EFFICIENTNET_B0 = Design(  # 1905.11946, B0
    rows=_inverted(
        "1 16 1 1 3/6 24 2 2 3/6 40 2 2 5/6 80 3 2 3/6 112 3 1 5/6 192 4 2 5/6 320 1 1 3",
        squeeze="swish",
        activation=swish,
    ),
    stem=32,
    head_times=4,
    activation=swish,
    nested=True,
    drop_path=0.2,
)
EFFICIENTNET_SCALES = (  # width, depth, dropout of B0 to B7; images of 224 to 600 pixels
    (1.0, 1.0, 0.2),
    (1.0, 1.1, 0.2),
    (1.1, 1.2, 0.3),
    (1.2, 1.4, 0.3),
    (1.4, 1.8, 0.4),
    (1.6, 2.2, 0.4),
    (1.8, 2.6, 0.5),
    (2.0, 3.1, 0.5),
)
EFFICIENTNET_V2_S = Design(  # 2104.00298, small
    rows=(
        Row("fused", 24, repeats=2, activation=swish),
        Row("fused", 48, stride=2, expand=4, repeats=4, activation=swish),
        Row("fused", 64, stride=2, expand=4, repeats=4, activation=swish),
        *_inverted(
            "4 128 6 2 3/6 160 9 1 3/6 256 15 2 3", squeeze="swish", activation=swish
        ),
    ),
    stem=24,
    head=1280,
    activation=swish,
    norm=partial(nn.BatchNorm2d, eps=0.001),
    nested=True,
    head_shrinks=False,
    drop_path=0.2,
)  # fmt: skip


DESIGNS = {  # parameters, multiply-adds with the pixels they were published for
    "mobilenet_v1": MOBILENET_V1,  # 4.2 M, 569 M at 224
    "mobilenet_v2": MOBILENET_V2,  # 3.5 M, 301 M at 224
    "mobilenet_v3_small": MOBILENET_V3_SMALL,  # 2.5 M, 56 M at 224
    "mobilenet_v3_large": MOBILENET_V3_LARGE,  # 5.5 M, 217 M at 224
    "mobilenet_v4_small": MOBILENET_V4_SMALL,  # 3.8 M, 186 M at 224
    "efficientnet_v2_s": EFFICIENTNET_V2_S,  # 21.5 M, 8.4 G at 384
    **{  # B0: 5.3 M, 386 M at 224
        f"efficientnet_b{n}": replace(
            EFFICIENTNET_B0,
            width=width,
            depth=depth,
            dropout=dropout,
            norm=_gentle if n >= 5 else nn.BatchNorm2d,
        )
        for n, (width, depth, dropout) in enumerate(EFFICIENTNET_SCALES)
    },
}


def designed(
    design: str,
    classes: int,
    channels: int = 3,
    size: Size = 224,
    width: float = 1.0,
    depth: float = 1.0,
) -> Network:
    """One of `DESIGNS`."""
    made = DESIGNS[design]
    return build(made, classes, channels, size, made.width * width, made.depth * depth)
