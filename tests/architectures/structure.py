"""Models chosen for their structure: many inputs or outputs, shared weights, gates, odd shapes."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import ConvNorm, DropPath, RMSNorm
from .entry import Architecture, Inputs, images, series, token_ids


def mlp() -> nn.Module:
    """Linear layers with batch norm and dropout."""
    layers = [nn.Linear(20, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.2)]
    layers += [nn.Linear(64, 48), nn.BatchNorm1d(48), nn.Tanh(), nn.Dropout(0.2)]
    return nn.Sequential(*layers, nn.Linear(48, 5))


class Trunk(nn.Sequential):
    """A small convolutional trunk, (B, 3, H, W) to (B, 32)."""

    def __init__(self):
        pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        super().__init__(ConvNorm(3, 16, 3, 2), ConvNorm(16, 32, 3, 2), ConvNorm(32, 32), *pool)


class TwoHeads(nn.Module):
    """A trunk with heads of its own layers, whose outputs come as a nested tuple."""

    def __init__(self):
        super().__init__()
        self.trunk = Trunk()
        self.age = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 1))
        self.kind = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> tuple:
        features = self.trunk(x)
        return self.age(features), (self.kind(features), features)


class NamedHeads(nn.Module):
    """A trunk with heads kept in a dict, and a dict of their outputs."""

    def __init__(self):
        super().__init__()
        self.trunk = Trunk()
        self.heads = nn.ModuleDict({"colour": nn.Linear(32, 3), "shape": nn.Linear(32, 5)})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.trunk(x)
        return {name: head(features) for name, head in self.heads.items()}


@dataclass
class Detection:
    """What DataclassOutput returns: scores (B, 4) and a box of positive sizes (B, 4)."""

    scores: Tensor
    box: Tensor


torch.export.register_dataclass(Detection, serialized_type_name="tests.architectures.Detection")


class DataclassOutput(nn.Module):
    """A trunk whose output is a dataclass."""

    def __init__(self):
        super().__init__()
        self.trunk = Trunk()
        self.scores, self.box = nn.Linear(32, 4), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Detection:
        features = self.trunk(x)
        return Detection(self.scores(features), F.softplus(self.box(features)))


class TiedLanguageModel(nn.Module):
    """A next-token model whose output layer is its embedding."""

    def __init__(self, vocabulary: int = 64, width: int = 32):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.conv = nn.Conv1d(width, 48, 3)
        self.project = nn.Linear(48, width)
        self.head = nn.Linear(width, vocabulary)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = F.pad(self.embedding(tokens).transpose(1, 2), (2, 0))  # (B, D, 2 + L)
        hidden = F.gelu(self.conv(x)).transpose(1, 2)
        return self.head(self.project(hidden))  # (B, L, vocabulary)


class GroupNet(nn.Module):
    """Group norm, instance norm and a one-group layer norm, with standardised inputs."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.1, -0.1, 0.2]).view(1, 3, 1, 1))
        self.conv1, self.norm1 = nn.Conv2d(3, 16, 3, 2, 1), nn.GroupNorm(4, 16)
        self.conv2, self.norm2 = nn.Conv2d(16, 24, 3, 2, 1), nn.InstanceNorm2d(24, affine=True)
        self.conv3, self.norm3 = nn.Conv2d(24, 32, 3, padding=1), nn.GroupNorm(1, 32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm1(self.conv1(x - self.mean)))
        x = F.leaky_relu(self.norm2(self.conv2(x)))
        x = F.mish(self.norm3(self.conv3(x)))
        return self.head(F.dropout(x.amax((2, 3)), 0.2, self.training))


class StochasticDepth(nn.Module):
    """Residual blocks each dropped with a rising probability while training."""

    def __init__(self, width: int = 24, depth: int = 4):
        super().__init__()
        self.stem = ConvNorm(3, width, 3, 2)
        self.blocks = nn.ModuleList(
            nn.Sequential(ConvNorm(width, width), ConvNorm(width, width, act=None))
            for _ in range(depth)
        )
        self.drops = nn.ModuleList(DropPath(0.1 * (i + 1)) for i in range(depth))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block, drop in zip(self.blocks, self.drops, strict=True):
            x = F.relu(x + drop(block(x)))
        return self.head(x.mean((2, 3)))


class Siamese(nn.Module):
    """One trunk run on both images; the distance and the similarity of the two codes."""

    def __init__(self):
        super().__init__()
        self.trunk = Trunk()
        self.project = nn.Sequential(nn.Linear(32, 16), nn.BatchNorm1d(16))
        self.compare = nn.Linear(16, 1)

    def forward(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.project(self.trunk(first)), self.project(self.trunk(second))
        similarity = F.cosine_similarity(a, b, dim=1)  # (B,)
        return self.compare((a - b).abs()), similarity


class DenseExperts(nn.Module):
    """A mixture of experts, all of them computed, their outputs weighted by a softmax gate."""

    def __init__(self, width: int = 24, experts: int = 4, hidden: int = 32):
        super().__init__()
        self.enter = nn.Linear(12, width)
        self.gate = nn.Linear(width, experts)
        self.up = nn.Parameter(torch.randn(experts, width, hidden) / width**0.5)
        self.down = nn.Parameter(torch.randn(experts, hidden, width) / hidden**0.5)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)  # (B, width)
        weights = self.gate(x).softmax(dim=-1)  # (B, experts)
        hidden = F.gelu(torch.einsum("bd,edh->beh", x, self.up))
        outputs = torch.einsum("beh,ehd->bed", hidden, self.down)
        return self.head(x + torch.einsum("bed,be->bd", outputs, weights))


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: each pair of channels turned by its position's angle."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class DecoderBlock(nn.Module):
    """RMS norm, grouped-query attention with rotary positions, and a SwiGLU."""

    def __init__(self, width: int, heads: int, keys: int, hidden: int):
        super().__init__()
        self.heads, self.keys, self.size = heads, keys, width // heads
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)
        self.q = nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(width, 2 * keys * self.size, bias=False)
        self.o = nn.Linear(width, width, bias=False)
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def attend(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, width = x.shape
        q = self.q(x).view(batch, length, self.heads, self.size).transpose(1, 2)
        kv = self.kv(x).view(batch, length, 2, self.keys, self.size).permute(2, 0, 3, 1, 4)
        q, k = turned(q, cos, sin), turned(kv[0], cos, sin)  # (B, heads, L, size)
        k, v = (t.repeat_interleave(self.heads // self.keys, dim=1) for t in (k, kv[1]))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(out.transpose(1, 2).reshape(batch, length, width))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attend(self.norm1(x), cos, sin)
        inner = self.norm2(x)
        return x + self.down(F.silu(self.gate(inner)) * self.up(inner))


class Decoder(nn.Module):
    """A Llama-like decoder by hand, its output layer tied to the embedding."""

    def __init__(self, vocabulary: int = 64, width: int = 32):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.blocks = nn.ModuleList(DecoderBlock(width, 4, 2, 80) for _ in range(2))
        self.norm = RMSNorm(width)
        rates = 1e4 ** (-torch.arange(0, 4) / 4)
        self.register_buffer("rates", rates.repeat(2), persistent=False)  # (head size,)

    def forward(self, tokens: Tensor) -> Tensor:
        angles = torch.arange(tokens.shape[1], device=tokens.device)[:, None] * self.rates
        x = F.dropout(self.embedding(tokens), 0.1, self.training)
        for block in self.blocks:
            x = block(x, angles.cos(), angles.sin())
        return F.linear(self.norm(x), self.embedding.weight)  # (B, L, vocabulary)


class SpectralCritic(nn.Module):
    """Convolutions divided by their largest singular value, pixel unshuffle, a dueling head."""

    def __init__(self):
        super().__init__()
        normed = nn.utils.parametrizations.spectral_norm
        self.convs = nn.Sequential(
            nn.PixelUnshuffle(2),
            normed(nn.Conv2d(12, 24, 3, padding=1)),
            nn.LeakyReLU(0.1),
            normed(nn.Conv2d(24, 32, 4, 2, 1)),
            nn.LeakyReLU(0.1),
        )
        self.value, self.advantage = nn.Linear(32, 1), nn.Linear(32, 6)

    def forward(self, x: Tensor) -> Tensor:
        features = self.convs(x).mean((2, 3))
        advantage = self.advantage(features)
        return self.value(features) + advantage - advantage.mean(dim=1, keepdim=True)


def pair_of_images() -> Inputs:
    return (torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32, 32))


def entry(build, example=None, dynamic=None) -> Architecture:
    """A model of this file; of 32x32 images unless said otherwise."""
    example = example or images()
    return Architecture(build=build, example=example, family="structure", dynamic=dynamic)


LENGTH = ({1: "length"},)
ENTRIES = {
    "mlp": entry(mlp, series(20)),
    "outputs_tuple": entry(TwoHeads),
    "outputs_dict": entry(NamedHeads),
    "outputs_dataclass": entry(DataclassOutput),
    "tied_language_model": entry(TiedLanguageModel, lambda: (token_ids(),), LENGTH),
    "group_norm": entry(GroupNet),
    "stochastic_depth": entry(StochasticDepth),
    "siamese": entry(Siamese, pair_of_images),
    "dense_experts": entry(DenseExperts, series(12)),
    "swiglu_decoder": entry(Decoder, lambda: (token_ids(),), LENGTH),
    "spectral_critic": entry(SpectralCritic),
}
