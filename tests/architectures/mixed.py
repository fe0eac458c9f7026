"""Models of tables, point clouds and graphs, and of several inputs of different kinds."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import ConvNorm
from .entry import Architecture, Inputs, series


class ImageAndTable(nn.Module):
    """An image and a row of numbers and categories, fused by a gate the row computes."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.image = nn.Sequential(ConvNorm(3, 16, 3, 2), ConvNorm(16, width, 3, 2))
        self.numbers = nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width), nn.ReLU())
        self.categories = nn.ModuleList([nn.Embedding(5, 8), nn.Embedding(9, 8)])
        self.modulate = nn.Linear(width + 16, 2 * width)
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(2 * width + 16, 3))

    def forward(self, image: Tensor, numbers: Tensor, categories: Tensor) -> Tensor:
        codes = [table(categories[:, i]) for i, table in enumerate(self.categories)]
        row = torch.cat([self.numbers(numbers), *codes], dim=1)  # (B, width + 16)
        scale, shift = self.modulate(row)[:, :, None, None].chunk(2, dim=1)
        features = F.relu(self.image(image) * (1 + scale) + shift)  # (B, width, H / 4, W / 4)
        return self.head(torch.cat([features.mean((2, 3)), row], dim=1))


def image_and_table() -> Inputs:
    categories = torch.stack([torch.randint(5, (2,)), torch.randint(9, (2,))], dim=1)
    return {
        "image": torch.randn(2, 3, 16, 16),
        "numbers": torch.randn(2, 6),
        "categories": categories,
    }


class Recommender(nn.Module):
    """DLRM: embeddings and a dense vector, their pairwise products, an MLP of them."""

    def __init__(self, width: int = 12):
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(rows, width) for rows in (10, 20, 30))
        self.bottom = nn.Sequential(nn.Linear(5, 24), nn.ReLU(), nn.Linear(24, width), nn.ReLU())
        self.top = nn.Sequential(nn.Linear(6 + width, 24), nn.ReLU(), nn.Linear(24, 1))
        self.register_buffer("pairs", torch.tril_indices(4, 4, -1), persistent=False)

    def forward(self, numbers: Tensor, ids: Tensor) -> Tensor:
        dense = self.bottom(numbers)
        codes = [table(ids[:, i]) for i, table in enumerate(self.tables)]
        stacked = torch.stack([dense, *codes], dim=1)  # (B, 4, width)
        products = torch.bmm(stacked, stacked.transpose(1, 2))  # (B, 4, 4)
        crossed = products[:, self.pairs[0], self.pairs[1]]  # (B, 6)
        return torch.sigmoid(self.top(torch.cat([dense, crossed], dim=1)))


class PointNet(nn.Module):
    """Points through shared layers, a learned 3x3 transform, and a maximum over the points."""

    def __init__(self):
        super().__init__()
        self.locate = nn.Sequential(nn.Conv1d(3, 16, 1), nn.BatchNorm1d(16), nn.ReLU())
        self.transform = nn.Linear(16, 9)
        self.lift = nn.Sequential(nn.Conv1d(3, 24, 1), nn.BatchNorm1d(24), nn.ReLU())
        self.deep = nn.Sequential(nn.Conv1d(48, 64, 1), nn.BatchNorm1d(64), nn.ReLU())
        self.head = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, 8))

    def forward(self, points: Tensor) -> Tensor:
        identity = torch.eye(3, device=points.device).flatten()
        turn = (self.transform(self.locate(points).amax(-1)) + identity).view(-1, 3, 3)
        local = self.lift(torch.bmm(turn, points))  # (B, 24, N)
        overall = local.max(dim=-1, keepdim=True).values.expand_as(local)
        return self.head(self.deep(torch.cat([local, overall], 1)).amax(-1))


class GraphNet(nn.Module):
    """Graph convolutions with a dense adjacency matrix, with a residual and jumping knowledge."""

    def __init__(self, width: int = 24):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, width), nn.Linear(width, width)])
        self.head = nn.Linear(2 * width, 3)

    def forward(self, nodes: Tensor, adjacency: Tensor) -> Tensor:
        degree = adjacency.sum(-1, keepdim=True).clamp(min=1)  # (B, N, 1)
        first = F.relu(torch.matmul(adjacency / degree, self.layers[0](nodes)))
        second = first + F.relu(torch.matmul(adjacency / degree, self.layers[1](first)))
        return self.head(F.dropout(torch.cat([first, second], -1), 0.2, self.training))


def dense_and_ids() -> Inputs:
    ids = torch.stack([torch.randint(rows, (2,)) for rows in (10, 20, 30)], dim=1)  # (2, 3)
    return (torch.randn(2, 5), ids)


def random_graphs() -> Inputs:
    linked = (torch.rand(2, 10, 10) > 0.6).float()
    return (torch.randn(2, 10, 8), (linked + linked.transpose(1, 2)).clamp(max=1))


def entry(build, example, dynamic=None) -> Architecture:
    """A model of this file."""
    return Architecture(build=build, example=example, family="mixed", dynamic=dynamic)


ENTRIES = {
    "image_and_table": entry(ImageAndTable, image_and_table),
    "recommender": entry(Recommender, dense_and_ids),
    "pointnet": entry(PointNet, series(3, 32), ({2: "points"},)),
    "graph_net": entry(GraphNet, random_graphs, ({1: "nodes"}, {1: "nodes", 2: "nodes"})),
}
