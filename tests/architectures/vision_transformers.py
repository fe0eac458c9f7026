"""Image models built on attention or token mixing, by hand and from transformers."""

import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

from .blocks import ConvNorm, EncoderBlock, FeedForward
from .entry import Architecture, images


class ViT(nn.Module):
    """A vision transformer: patches, a class token, learned positions, blocks with drop path."""

    def __init__(self, width: int = 48, heads: int = 4, depth: int = 3, patch: int = 8):
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, (32 // patch) ** 2 + 1, width))
        self.dropout = nn.Dropout(0.1)
        self.blocks = nn.Sequential(
            *[EncoderBlock(width, heads, 0.1, 0.1 * i) for i in range(depth)]
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)  # (B, patches, D)
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], dim=1)
        x = self.blocks(self.dropout(x + self.positions))
        return self.head(self.norm(x)[:, 0])


class MixerBlock(nn.Module):
    """An MLP over the patches, then one over the channels, (B, P, D) kept."""

    def __init__(self, patches: int, width: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.tokens = FeedForward(patches, 2 * patches)
        self.channels = FeedForward(width, 3 * width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class GatedBlock(nn.Module):
    """gMLP: one half of the hidden channels gates the other after mixing over the patches."""

    def __init__(self, patches: int, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.enter = nn.Linear(width, 4 * width)
        self.gate_norm = nn.LayerNorm(2 * width)
        self.mix = nn.Conv1d(patches, patches, 1)
        self.leave = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        kept, gate = F.gelu(self.enter(self.norm(x))).chunk(2, dim=-1)  # (B, P, 2 D) each
        return x + self.leave(kept * self.mix(self.gate_norm(gate)))


class Mixer(nn.Module):
    """Patches, blocks that mix them, and a classifier of their mean."""

    def __init__(self, block: type, width: int = 32, depth: int = 3, patch: int = 8):
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.blocks = nn.Sequential(*[block((32 // patch) ** 2, width) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)  # (B, patches, D)
        return self.head(self.norm(self.blocks(x)).mean(dim=1))


class PositionedAttention(nn.Module):
    """BoTNet's attention over a map, with learned positions of rows and columns, by einsum."""

    def __init__(self, inputs: int, width: int, size: int, heads: int = 4):
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.qkv = nn.Conv2d(inputs, 3 * width, 1, bias=False)
        self.rows = nn.Parameter(torch.randn(heads, width // heads, size, 1))
        self.columns = nn.Parameter(torch.randn(heads, width // heads, 1, size))

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        q, k, v = self.qkv(x).chunk(3, dim=1)
        q, k, v = (t.reshape(x.shape[0], self.heads, -1, height * width) for t in (q, k, v))
        positions = (self.rows + self.columns).flatten(2)  # (heads, head width, H W)
        logits = torch.einsum("bhdi,bhdj->bhij", q, k)
        logits = logits + torch.einsum("bhdi,hdj->bhij", q, positions)
        weights = (self.scale * logits).softmax(dim=-1)
        out = torch.einsum("bhij,bhdj->bhdi", weights, v)
        return out.reshape(x.shape[0], -1, height, width)


class BottleneckTransformer(nn.Module):
    """Convolutions whose last blocks have attention in the place of the 3x3."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(ConvNorm(3, 16, 3, 2), ConvNorm(16, 48, 3, 2))
        self.reduce = nn.ModuleList(ConvNorm(48, 32, 1) for _ in range(2))
        self.attend = nn.ModuleList(PositionedAttention(32, 32, 8) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(32) for _ in range(2))
        self.expand = nn.ModuleList(ConvNorm(32, 48, 1, act=None) for _ in range(2))
        self.head = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)  # (B, 48, 8, 8)
        blocks = zip(self.reduce, self.attend, self.norms, self.expand, strict=True)
        for reduce, attend, norm, expand in blocks:
            x = F.relu(x + expand(F.relu(norm(attend(reduce(x))))))
        return self.head(x.mean((2, 3)))


class CrossCovariance(nn.Module):
    """XCiT's attention between channels: normalised queries and keys, a learned temperature."""

    def __init__(self, patches: int, width: int, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.project = nn.Linear(width, width)
        self.scale = nn.Parameter(1e-5 * torch.ones(width))
        self.mlp_norm, self.mlp = nn.LayerNorm(width), FeedForward(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 4, 1)  # (B, heads, head width, L) each
        weights = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        weights = (weights * self.temperature).softmax(dim=-1)  # (B, heads, d, d)
        mixed = (weights @ v).permute(0, 3, 1, 2).reshape(batch, length, width)
        x = x + self.scale * self.project(mixed)
        return x + self.mlp(self.mlp_norm(x))


PLAIN = {  # what ViT-like configurations share: three blocks of width 32 on 8x8 patches
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "image_size": 32,
    "patch_size": 8,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "num_labels": 10,
}


def vit_eager() -> nn.Module:
    config = hf.ViTConfig(**PLAIN, attn_implementation="eager")
    return hf.ViTForImageClassification(config)


def deit() -> nn.Module:
    return hf.DeiTForImageClassificationWithTeacher(hf.DeiTConfig(**PLAIN))


def beit() -> nn.Module:
    config = hf.BeitConfig(
        **PLAIN, use_relative_position_bias=True, layer_scale_init_value=0.1, drop_path_rate=0.1
    )
    return hf.BeitForImageClassification(config)


def dinov2() -> nn.Module:
    config = hf.Dinov2Config(**PLAIN, mlp_ratio=3, drop_path_rate=0.1, use_swiglu_ffn=True)
    return hf.Dinov2ForImageClassification(config)


def yolos() -> nn.Module:
    options = PLAIN | {"image_size": [32, 32]}
    return hf.YolosForObjectDetection(hf.YolosConfig(**options, num_detection_tokens=5))


WINDOWED = {  # what the two Swin generations share: shifted windows on an 8x8 map, then 4x4
    "image_size": 32,
    "patch_size": 4,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
    "drop_path_rate": 0.1,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "num_labels": 10,
}


def swin() -> nn.Module:
    return hf.SwinForImageClassification(hf.SwinConfig(**WINDOWED))


def swin_v2() -> nn.Module:
    return hf.Swinv2ForImageClassification(hf.Swinv2Config(**WINDOWED))


def poolformer() -> nn.Module:
    config = hf.PoolFormerConfig(
        depths=[2, 2, 2, 2], hidden_sizes=[12, 16, 24, 32], num_labels=10, drop_path_rate=0.1
    )
    return hf.PoolFormerForImageClassification(config)


def cvt() -> nn.Module:
    config = hf.CvtConfig(
        embed_dim=[16, 32, 48],
        num_heads=[1, 2, 4],
        depth=[1, 2, 3],
        drop_rate=[0.1, 0.1, 0.1],
        num_labels=10,
    )
    return hf.CvtForImageClassification(config)


def levit() -> nn.Module:
    config = hf.LevitConfig(
        image_size=128,
        hidden_sizes=[32, 48, 64],
        num_attention_heads=[2, 3, 4],
        depths=[2, 2, 2],
        key_dim=[8, 8, 8],
        num_labels=10,
    )
    return hf.LevitForImageClassificationWithTeacher(config)


def mobilevit() -> nn.Module:
    config = hf.MobileViTConfig(
        image_size=64,
        hidden_sizes=[24, 32, 40],
        neck_hidden_sizes=[8, 16, 24, 32, 40, 48, 64],
        output_stride=16,
        num_attention_heads=4,
        num_labels=10,
    )
    return hf.MobileViTForImageClassification(config)


def mobilevit_v2() -> nn.Module:
    config = hf.MobileViTV2Config(
        image_size=64,
        width_multiplier=0.25,
        base_attn_unit_dims=[64, 96, 128],
        n_attn_blocks=[2, 2, 2],
        output_stride=16,
        num_labels=10,
    )
    return hf.MobileViTV2ForImageClassification(config)


def segformer() -> nn.Module:
    config = hf.SegformerConfig(
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 2, 2],
        num_attention_heads=[1, 2, 3, 4],
        decoder_hidden_size=32,
        num_labels=5,
    )
    return hf.SegformerForSemanticSegmentation(config)


def pvt() -> nn.Module:
    config = hf.PvtConfig(
        image_size=64,
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 2, 2],
        num_attention_heads=[1, 2, 3, 4],
        mlp_ratios=[4, 4, 4, 4],
        num_labels=10,
    )
    return hf.PvtForImageClassification(config)


def focalnet() -> nn.Module:
    config = hf.FocalNetConfig(
        image_size=32,
        embed_dim=16,
        depths=[2, 2],
        hidden_sizes=[16, 32],
        focal_levels=[2, 2],
        focal_windows=[3, 3],
        use_layerscale=True,
        num_labels=10,
    )
    return hf.FocalNetForImageClassification(config)


def convnext_v2() -> nn.Module:
    config = hf.ConvNextV2Config(
        hidden_sizes=[16, 24, 32, 48], depths=[1, 1, 2, 1], drop_path_rate=0.1, num_labels=10
    )
    return hf.ConvNextV2ForImageClassification(config)


def entry(build, size: int = 32) -> Architecture:
    """An image model of this file."""
    return Architecture(build=build, example=images(size), family="vision transformer")


ENTRIES = {
    "vit": entry(ViT),
    "mlp_mixer": entry(lambda: Mixer(MixerBlock)),
    "gmlp": entry(lambda: Mixer(GatedBlock)),
    "xcit": entry(lambda: Mixer(CrossCovariance)),
    "botnet": entry(BottleneckTransformer),
    "vit_eager": entry(vit_eager),
    "deit": entry(deit),
    "beit": entry(beit),
    "dinov2": entry(dinov2),
    "yolos": entry(yolos),
    "swin": entry(swin),
    "swin_v2": entry(swin_v2),
    "poolformer": entry(poolformer, size=64),
    "cvt": entry(cvt, size=64),
    "levit": entry(levit, size=128),
    "mobilevit": entry(mobilevit, size=64),
    "mobilevit_v2": entry(mobilevit_v2, size=64),
    "segformer": entry(segformer, size=64),
    "pvt": entry(pvt, size=64),
    "focalnet": entry(focalnet),
    "convnext_v2": entry(convnext_v2, size=64),
}
