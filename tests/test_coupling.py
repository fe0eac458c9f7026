"""What must be cut together, for every family of ops: found, cut and priced exactly."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paredown.core.errors import UserError
from paredown.core.task import Task
from paredown.graph.capture import capture
from paredown.graph.coupling.coupling import Choice, Coupling, analyze
from paredown.graph.coupling.cut import cut, mask
from paredown.graph.coupling.groups import Group
from paredown.graph.coupling.verify import verify
from paredown.graph.model import Model
from paredown.graph.quantized.per_channel import PER_CHANNEL
from paredown.steps.pruning.prune_weights import PruneWeights
from paredown.steps.quantization.quantize import Quantize
from tests.architectures import randomise, with_batch
from tests.architectures.captured import captured

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore")
TOLERANCE = 1e-5


class Net(nn.Module):
    """Layers by name, and a forward that is given them: the smallest module with some op."""

    def __init__(self, run: Callable, **layers):
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            if isinstance(layer, Tensor) and not isinstance(layer, nn.Parameter):
                self.register_buffer(name, layer)
            else:
                setattr(self, name, layer)

    def forward(self, x):
        return self.run(self, x)


class Pair(Net):
    """The same with two inputs."""

    def forward(self, x, y):
        return self.run(self, x, y)


def each(units: int, start: int = 0) -> np.ndarray:
    """(units, 1): one index for each unit."""
    return np.arange(start, start + units)[:, None]


def runs(units: int, width: int, start: int = 0) -> np.ndarray:
    """(units, width): neighbouring indices."""
    return start + np.arange(units * width).reshape(units, width)


def strided(units: int, times: int) -> np.ndarray:
    """(units, times): the same place of every one of ``times`` parts."""
    return np.arange(units * times).reshape(times, units).T


def heads_of_three(heads: int, size: int) -> np.ndarray:
    """(heads, 3 * size): a head's rows of queries, keys and values in one matrix."""
    table = np.arange(3 * heads * size).reshape(3, heads, size)
    return table.transpose(1, 0, 2).reshape(heads, -1)


def dims_of_heads(heads: int, size: int) -> np.ndarray:
    """(size, heads): the same dimension of every head."""
    return np.arange(heads * size).reshape(heads, size).T


@dataclass(frozen=True)
class Expected:
    """A group: ``"fc.weight/1 fc.bias/0": indices``; ``exact`` None where either would be right."""

    members: dict[str, np.ndarray]
    exact: bool | None = True
    by: str = ""


@dataclass(frozen=True)
class Case:
    build: Callable[[], nn.Module]
    example: tuple[Tensor, ...]
    groups: list[Expected]
    policy: dict[str, str] = field(default_factory=dict)
    dynamic: tuple | None = None
    batches: tuple[int, ...] = (1, 3)


def param(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) / math.sqrt(shape[-1]))


def image(channels: int = 3, size: int = 4) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(2, channels, size, size, generator=generator),)


def rows(*shape: int) -> tuple[Tensor, ...]:
    return (torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)),)


def group(*given, exact: bool | None = True, by: str = "") -> Expected:
    """Its members as places, indices, places, indices, ...; a dict stands for several pairs."""
    members, rest = {}, list(given)
    while rest:
        first = rest.pop(0)
        members |= first if isinstance(first, dict) else {first: rest.pop(0)}
    return Expected(members, exact, by)


CASES: dict[str, Case] = {}


# --- linear layers and convolutions ----------------------------------------------------------

CASES |= {
    "linear": Case(
        lambda: Net(lambda m, x: m.b(m.a(x).tanh()), a=nn.Linear(4, 8), b=nn.Linear(8, 3)),
        rows(4),
        [group("a.weight/0 a.bias/0 b.weight/1", each(8))],
    ),
    "linear on sequences, three of them": Case(
        lambda: nn.Sequential(nn.Linear(4, 8), nn.Sigmoid(), nn.Linear(8, 6), nn.Linear(6, 2)),
        rows(5, 4),
        [
            group("0.weight/0 0.bias/0 2.weight/1", each(8)),
            group("2.weight/0 2.bias/0 3.weight/1", each(6)),
        ],
    ),
    "matmul and addmm": Case(
        lambda: Net(
            lambda m, x: torch.addmm(m.bias, (x @ m.a + m.shift).tanh(), m.b) @ m.c,
            **{"a": param(4, 8), "shift": param(8), "b": param(8, 6), "bias": param(6)},
            c=param(6, 2),
        ),
        rows(4),
        [group("a/1 shift/0 b/0", each(8)), group("b/1 bias/0 c/0", each(6))],
    ),
    "conv": Case(
        lambda: Net(
            lambda m, x: m.b(m.a(x).sigmoid()),
            a=nn.Conv2d(3, 8, 3, padding=1),
            b=nn.Conv2d(8, 4, 1),
        ),
        image(),
        [group("a.weight/0 a.bias/0 b.weight/1", each(8))],
    ),
    "conv1d and conv3d": Case(
        lambda: Net(
            lambda m, x: m.c(m.b(m.a(x).unflatten(2, (2, 2, 2))).flatten(2)),
            **{"a": nn.Conv1d(3, 8, 1), "b": nn.Conv3d(8, 6, 1, bias=False)},
            c=nn.Conv1d(6, 2, 3, bias=False),
        ),
        rows(3, 8),
        [group("a.weight/0 a.bias/0 b.weight/1", each(8)), group("b.weight/0 c.weight/1", each(6))],
    ),
    "grouped conv, whole groups": Case(
        lambda: Net(
            lambda m, x: m.c(m.b(m.a(x).tanh())),
            **{"a": nn.Conv2d(3, 16, 1), "b": nn.Conv2d(16, 24, 3, groups=8)},
            c=nn.Conv2d(24, 2, 1),
        ),
        image(),
        [group("a.weight/0 a.bias/0", runs(8, 2), "b.weight/0 b.bias/0 c.weight/1", runs(8, 3))],
    ),
    "grouped conv, within groups": Case(
        lambda: Net(
            lambda m, x: m.c(m.b(m.a(x).tanh())),
            **{"a": nn.Conv2d(3, 8, 1), "b": nn.Conv2d(8, 12, 3, groups=2)},
            c=nn.Conv2d(12, 2, 1),
        ),
        image(),
        [
            group("a.weight/0 a.bias/0", strided(4, 2), "b.weight/1", each(4)),
            group("b.weight/0 b.bias/0 c.weight/1", strided(6, 2)),
        ],
    ),
    "depthwise": Case(
        lambda: Net(
            lambda m, x: m.c(m.b(m.a(x).tanh())),
            **{"a": nn.Conv2d(3, 8, 1), "b": nn.Conv2d(8, 8, 3, groups=8)},
            c=nn.Conv2d(8, 2, 1),
        ),
        image(),
        [group("a.weight/0 a.bias/0 b.weight/0 b.bias/0 c.weight/1", each(8))],
    ),
    "depthwise with a multiplier": Case(
        lambda: Net(
            lambda m, x: m.c(m.b(m.a(x).tanh())),
            **{"a": nn.Conv2d(3, 8, 1), "b": nn.Conv2d(8, 16, 3, groups=8)},
            c=nn.Conv2d(16, 2, 1),
        ),
        image(),
        [group("a.weight/0 a.bias/0", each(8), "b.weight/0 b.bias/0 c.weight/1", runs(8, 2))],
    ),
    "transposed": Case(
        lambda: Net(
            lambda m, x: m.c(m.b(m.a(x).tanh())),
            **{"a": nn.Conv2d(3, 8, 1), "b": nn.ConvTranspose2d(8, 6, 2, stride=2)},
            c=nn.Conv2d(6, 2, 1),
        ),
        image(),
        [
            group("a.weight/0 a.bias/0 b.weight/0", each(8)),
            group("b.weight/1 b.bias/0 c.weight/1", each(6)),
        ],
    ),
    "transposed depthwise": Case(
        lambda: Net(
            lambda m, x: m.c(m.b(m.a(x).tanh())),
            **{"a": nn.Conv2d(3, 8, 1), "b": nn.ConvTranspose2d(8, 8, 2, groups=8)},
            c=nn.Conv2d(8, 2, 1),
        ),
        image(),
        [group("a.weight/0 a.bias/0 b.weight/0 b.bias/0 c.weight/1", each(8))],
    ),
    "transposed, within groups": Case(
        lambda: Net(
            lambda m, x: m.c(m.b(m.a(x).tanh())),
            **{"a": nn.Conv2d(3, 8, 1), "b": nn.ConvTranspose2d(8, 12, 2, groups=2)},
            c=nn.Conv2d(12, 2, 1),
        ),
        image(),
        [
            group("a.weight/0 a.bias/0 b.weight/0", strided(4, 2)),
            group("b.weight/1", each(6), "b.bias/0 c.weight/1", strided(6, 2)),
        ],
    ),
    "weight norm": Case(
        lambda: Net(
            lambda m, x: m.c(m.b(m.a(x).tanh()).tanh()),
            **{"a": nn.Linear(4, 8), "c": nn.Linear(6, 2)},
            b=nn.utils.parametrizations.weight_norm(nn.Linear(8, 6)),
        ),
        rows(4),
        [
            group("a.weight/0 a.bias/0 b.parametrizations.weight.original1/1", each(8), exact=None),
            group(
                "b.parametrizations.weight.original0/0 b.bias/0",
                each(6),
                "b.parametrizations.weight.original1/0 c.weight/1",
                each(6),
            ),
        ],
    ),
}


# --- what joins, splits and reorders ---------------------------------------------------------


def written(m, x: Tensor) -> Tensor:
    """Parts of a tensor written in place, one of them from the input."""
    made = x.new_zeros(x.shape[0], 10)
    made[:, :8] = m.a(x).tanh()
    made[:, 8:] = x[:, :2]
    return m.b(made)


CASES |= {
    "slices written in place": Case(
        lambda: Net(written, a=nn.Linear(4, 8), b=nn.Linear(10, 2)),
        rows(4),
        [group("a.weight/0 a.bias/0 b.weight/1", each(8))],
    ),
    "one layer twice": Case(
        lambda: Net(
            lambda m, x: m.c(m.b(m.b(m.a(x)).tanh())),
            **{"a": nn.Linear(4, 8), "b": nn.Linear(8, 8), "c": nn.Linear(8, 2)},
        ),
        rows(4),
        [group("a.weight/0 a.bias/0 b.weight/0 b.weight/1 b.bias/0 c.weight/1", each(8))],
    ),
    "stack and flatten, one after another": Case(
        lambda: Net(
            lambda m, x: m.c(torch.stack([m.a(x), m.b(x)], -1).flatten(1)),
            **{"a": nn.Linear(4, 8), "b": nn.Linear(4, 8), "c": nn.Linear(16, 2)},
        ),
        rows(4),
        [group("a.weight/0 a.bias/0 b.weight/0 b.bias/0", each(8), "c.weight/1", runs(8, 2))],
    ),
    "weights that are a product": Case(
        lambda: Net(
            lambda m, x: m.out(F.linear(x, m.w + m.a @ m.b).tanh()),
            **{"w": param(8, 4), "a": param(8, 6), "b": param(6, 4), "out": nn.Linear(8, 2)},
        ),
        rows(4),
        [group("w/0 a/0 out.weight/1", each(8)), group("a/1 b/0", each(6))],
    ),
    "an index in a list": Case(
        lambda: Net(
            lambda m, x: m.c(m.b(m.a(x)[:, [0, 2, 5]])),
            **{"a": nn.Linear(4, 8), "b": nn.Linear(3, 6), "c": nn.Linear(6, 2)},
        ),
        rows(4),
        [group("b.weight/0 b.bias/0 c.weight/1", each(6))],
    ),
    "residual add": Case(
        lambda: Net(
            lambda m, x: m.c((h := m.a(x)) + m.b(h.tanh())),
            **{"a": nn.Linear(4, 8), "b": nn.Linear(8, 8), "c": nn.Linear(8, 2)},
        ),
        rows(4),
        [group("a.weight/0 a.bias/0 b.weight/0 b.weight/1 b.bias/0 c.weight/1", each(8))],
    ),
    "concatenation": Case(
        lambda: Net(
            lambda m, x: m.c(torch.cat([h := m.a(x).tanh(), m.b(h)], 1)),
            **{"a": nn.Conv2d(3, 4, 1), "b": nn.Conv2d(4, 6, 1), "c": nn.Conv2d(10, 2, 1)},
        ),
        image(),
        [
            group("a.weight/0 a.bias/0 b.weight/1 c.weight/1", each(4)),
            group("b.weight/0 b.bias/0", each(6), "c.weight/1", each(6, 4)),
        ],
    ),
    "concatenation with an input": Case(
        lambda: Net(
            lambda m, x: m.b(torch.cat([x, m.a(x)], 1)), a=nn.Linear(4, 8), b=nn.Linear(12, 2)
        ),
        rows(4),
        [group("a.weight/0 a.bias/0", each(8), "b.weight/1", each(8, 4))],
    ),
    "U-Net skip": Case(
        lambda: Net(
            lambda m, x: m.out(torch.cat([m.up(m.down(h := m.a(x).tanh()).tanh()), h], 1)),
            **{"a": nn.Conv2d(3, 4, 1), "down": nn.Conv2d(4, 6, 2, stride=2)},
            **{"up": nn.ConvTranspose2d(6, 4, 2, stride=2), "out": nn.Conv2d(8, 2, 1)},
        ),
        image(),
        [
            group("a.weight/0 a.bias/0 down.weight/1", each(4), "out.weight/1", each(4, 4)),
            group("down.weight/0 down.bias/0 up.weight/0", each(6)),
            group("up.weight/1 up.bias/0 out.weight/1", each(4)),
        ],
    ),
    "channel shuffle by view and transpose": Case(
        lambda: Net(
            lambda m, x: m.b(m.a(x).unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2)),
            **{"a": nn.Conv2d(3, 8, 1), "b": nn.Conv2d(8, 2, 1)},
        ),
        image(),
        [group("a.weight/0 a.bias/0", strided(4, 2), "b.weight/1", runs(4, 2))],
    ),
    "channel shuffle": Case(
        lambda: Net(
            lambda m, x: m.b(F.channel_shuffle(m.a(x), 2)),
            **{"a": nn.Conv2d(3, 8, 1), "b": nn.Conv2d(8, 2, 1)},
        ),
        image(),
        [group("a.weight/0 a.bias/0", strided(4, 2), "b.weight/1", runs(4, 2))],
    ),
    "flatten": Case(
        lambda: Net(
            lambda m, x: m.b(m.a(x).sigmoid().flatten(1)), a=nn.Conv2d(3, 8, 3), b=nn.Linear(32, 2)
        ),
        image(),
        [group("a.weight/0 a.bias/0", each(8), "b.weight/1", runs(8, 4))],
    ),
    "pixel shuffle": Case(
        lambda: Net(
            lambda m, x: m.b(F.pixel_shuffle(m.a(x), 2)),
            a=nn.Conv2d(3, 16, 1),
            b=nn.Conv2d(4, 2, 1),
        ),
        image(),
        [group("a.weight/0 a.bias/0", runs(4, 4), "b.weight/1", each(4))],
    ),
    "pixel unshuffle": Case(
        lambda: Net(
            lambda m, x: m.b(F.pixel_unshuffle(m.a(x), 2)),
            **{"a": nn.Conv2d(3, 4, 1), "b": nn.Conv2d(16, 2, 1)},
        ),
        image(),
        [group("a.weight/0 a.bias/0", each(4), "b.weight/1", runs(4, 4))],
    ),
    "gate by chunk": Case(
        lambda: Net(
            lambda m, x: m.b((h := m.a(x).chunk(2, -1))[0] * h[1].sigmoid()),
            **{"a": nn.Linear(4, 16), "b": nn.Linear(8, 2)},
        ),
        rows(5, 4),
        [group("a.weight/0 a.bias/0", strided(8, 2), "b.weight/1", each(8))],
    ),
    "gated linear unit": Case(
        lambda: Net(lambda m, x: m.b(F.glu(m.a(x))), a=nn.Linear(4, 16), b=nn.Linear(8, 2)),
        rows(5, 4),
        [group("a.weight/0 a.bias/0", strided(8, 2), "b.weight/1", each(8))],
    ),
    "squeeze and excite": Case(
        lambda: Net(
            lambda m, x: m.c((h := m.a(x)) * m.up(m.down(h.mean((2, 3), True)).relu()).sigmoid()),
            **{"a": nn.Conv2d(3, 8, 1), "down": nn.Conv2d(8, 4, 1), "up": nn.Conv2d(4, 8, 1)},
            c=nn.Conv2d(8, 2, 1),
        ),
        image(),
        [
            group("a.weight/0 a.bias/0 down.weight/1 up.weight/0 up.bias/0 c.weight/1", each(8)),
            group("down.weight/0 down.bias/0 up.weight/1", each(4)),
        ],
    ),
    "padding of channels": Case(
        lambda: Net(
            lambda m, x: m.c(
                m.b(h := m.a(x).tanh()) + F.pad(h[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
            ),
            **{"a": nn.Conv2d(3, 4, 1), "b": nn.Conv2d(4, 8, 1, stride=2), "c": nn.Conv2d(8, 2, 1)},
        ),
        image(),
        [
            group(
                "a.weight/0 a.bias/0 b.weight/1",
                each(4),
                "b.weight/0 b.bias/0",
                each(4, 2),
                "c.weight/1",
                each(4, 2),
            ),
            group("b.weight/0 b.bias/0 c.weight/1", np.array([[0], [1], [6], [7]])),
        ],
    ),
    "slices of channels": Case(
        lambda: Net(
            lambda m, x: m.b((h := m.a(x))[:, :3]) + m.c(h[:, 3:]),
            **{"a": nn.Conv2d(3, 8, 1), "b": nn.Conv2d(3, 2, 1), "c": nn.Conv2d(5, 2, 1)},
        ),
        image(),
        [
            group("a.weight/0 a.bias/0 b.weight/1", each(3)),
            group("a.weight/0 a.bias/0", each(5, 3), "c.weight/1", each(5)),
        ],
    ),
    "every second channel": Case(
        lambda: Net(
            lambda m, x: m.b((h := m.a(x).tanh())[:, ::2]) + m.c(h),
            **{"a": nn.Linear(4, 8), "b": nn.Linear(4, 2), "c": nn.Linear(8, 2)},
        ),
        rows(4),
        [group("a.weight/0 a.bias/0 c.weight/1", runs(4, 2), "b.weight/1", each(4))],
    ),
    "split into unequal sizes": Case(
        lambda: Net(
            lambda m, x: m.b((h := m.a(x).split([4, 6], 1))[0]) + m.c(h[1]),
            **{"a": nn.Linear(4, 10), "b": nn.Linear(4, 2), "c": nn.Linear(6, 2)},
        ),
        rows(4),
        [
            group("a.weight/0 a.bias/0 b.weight/1", each(4)),
            group("a.weight/0 a.bias/0", each(6, 4), "c.weight/1", each(6)),
        ],
    ),
    "narrow": Case(
        lambda: Net(lambda m, x: m.b(m.a(x).narrow(1, 2, 4)), a=nn.Linear(4, 8), b=nn.Linear(4, 2)),
        rows(4),
        [
            group("a.weight/0 a.bias/0", np.array([[0], [1], [6], [7]])),
            group("a.weight/0 a.bias/0", each(4, 2), "b.weight/1", each(4)),
        ],
    ),
    "select": Case(
        lambda: Net(
            lambda m, x: m.b(h := m.a(x).tanh()) * h.select(1, 2)[:, None],
            **{"a": nn.Linear(4, 8), "b": nn.Linear(8, 2)},
        ),
        rows(4),
        [group("a.weight/0 a.bias/0 b.weight/1", np.array([[0], [1], [3], [4], [5], [6], [7]]))],
    ),
    "select of a token": Case(
        lambda: Net(lambda m, x: m.b(m.a(x)[:, 0]), a=nn.Linear(4, 8), b=nn.Linear(8, 2)),
        rows(5, 4),
        [group("a.weight/0 a.bias/0 b.weight/1", each(8))],
    ),
    "a token by expand": Case(
        lambda: Net(
            lambda m, x: m.b(torch.cat([m.token.expand(x.shape[0], -1, -1), m.a(x)], 1).tanh()),
            **{"token": param(1, 1, 8), "a": nn.Linear(4, 8), "b": nn.Linear(8, 2)},
        ),
        rows(5, 4),
        [group("token/2 a.weight/0 a.bias/0 b.weight/1", each(8))],
    ),
    "repeat": Case(
        lambda: Net(lambda m, x: m.b(m.a(x).repeat(1, 2)), a=nn.Linear(4, 8), b=nn.Linear(16, 2)),
        rows(4),
        [group("a.weight/0 a.bias/0", each(8), "b.weight/1", strided(8, 2))],
    ),
    "repeat interleaved": Case(
        lambda: Net(
            lambda m, x: m.b(m.a(x).repeat_interleave(2, 1)), a=nn.Linear(4, 8), b=nn.Linear(16, 2)
        ),
        rows(4),
        [group("a.weight/0 a.bias/0", each(8), "b.weight/1", runs(8, 2))],
    ),
    "stack": Case(
        lambda: Net(
            lambda m, x: m.c(torch.stack([m.a(x), m.b(x)], 1).flatten(1)),
            **{"a": nn.Linear(4, 8), "b": nn.Linear(4, 8), "c": nn.Linear(16, 2)},
        ),
        rows(4),
        [group("a.weight/0 a.bias/0 b.weight/0 b.bias/0", each(8), "c.weight/1", strided(8, 2))],
    ),
    "unflatten": Case(
        lambda: Net(
            lambda m, x: m.b(m.a(x).unflatten(1, (2, 4)).sum(1)),
            **{"a": nn.Linear(4, 8), "b": nn.Linear(4, 2)},
        ),
        rows(4),
        [group("a.weight/0 a.bias/0", strided(4, 2), "b.weight/1", each(4))],
    ),
    "unbind after a view": Case(
        lambda: Net(
            lambda m, x: m.b((h := m.a(x).view(-1, 4, 4).unbind(1))[0]) + m.c(h[1]),
            **{"a": nn.Linear(4, 16), "b": nn.Linear(4, 2), "c": nn.Linear(4, 2)},
        ),
        rows(4),
        [group("a.weight/0 a.bias/0", strided(4, 4), "b.weight/1 c.weight/1", each(4))],
    ),
    "squeeze without dims": Case(
        lambda: Net(
            lambda m, x: m.b(F.adaptive_avg_pool2d(m.a(x), 1).squeeze()),
            **{"a": nn.Conv2d(3, 8, 1), "b": nn.Linear(8, 2)},
        ),
        image(),
        [group("a.weight/0 a.bias/0 b.weight/1", each(8))],
        batches=(3,),
    ),
    "flip": Case(
        lambda: Net(lambda m, x: m.b(m.a(x).flip(1)), a=nn.Linear(4, 8), b=nn.Linear(8, 2)),
        rows(4),
        [group("a.weight/0 a.bias/0", each(8), "b.weight/1", each(8)[::-1])],
    ),
    "roll": Case(
        lambda: Net(lambda m, x: m.b(m.a(x).roll(1, 1)), a=nn.Linear(4, 8), b=nn.Linear(8, 2)),
        rows(4),
        [],
    ),
    "permuted and scaled": Case(
        lambda: Net(
            lambda m, x: m.b(m.gamma * m.a(x).permute(0, 2, 3, 1)),
            **{"a": nn.Conv2d(3, 8, 1), "gamma": param(8), "b": nn.Linear(8, 2)},
        ),
        image(),
        [group("a.weight/0 a.bias/0 gamma/0 b.weight/1", each(8))],
    ),
    "pooling and upsampling": Case(
        lambda: Net(
            lambda m, x: m.b(
                F.adaptive_avg_pool2d(F.interpolate(F.max_pool2d(m.a(x), 2), scale_factor=2), 2)
            ),
            **{"a": nn.Conv2d(3, 8, 1), "b": nn.Conv2d(8, 2, 1)},
        ),
        image(),
        [group("a.weight/0 a.bias/0 b.weight/1", each(8))],
    ),
    "bilinear upsampling to a size": Case(
        lambda: Net(
            lambda m, x: m.b(F.interpolate(m.a(x), size=(5, 6), mode="bilinear")),
            **{"a": nn.Conv2d(3, 8, 1), "b": nn.Conv2d(8, 2, 1)},
        ),
        image(),
        [group("a.weight/0 a.bias/0 b.weight/1", each(8))],
    ),
    "einsum": Case(
        lambda: Net(
            lambda m, x: torch.einsum(
                "blhd,hdo->blo", torch.einsum("bli,ihd->blhd", x, m.a).tanh(), m.b
            ),
            **{"a": param(4, 4, 6), "b": param(4, 6, 2)},
        ),
        rows(5, 4),
        [group("a/1 b/0", each(4)), group("a/2 b/1", each(6))],
    ),
}


# --- norms and reductions --------------------------------------------------------------------


class Standardised(nn.Module):
    """A convolution whose weight is standardised by a batch norm, as Big Transfer's in timm."""

    def __init__(self):
        super().__init__()
        self.weight = param(6, 8, 1, 1)

    def forward(self, x):
        flat = self.weight.reshape(1, 6, -1)
        weight = F.batch_norm(flat, None, None, training=True).reshape_as(self.weight)
        return F.conv2d(x, weight)


def normed(norm: nn.Module, width: int = 8) -> Callable[[], nn.Module]:
    return lambda: Net(
        lambda m, x: m.b(m.norm(m.a(x)).sigmoid()),
        **{"a": nn.Conv2d(3, width, 1, bias=False), "norm": norm, "b": nn.Conv2d(width, 2, 1)},
    )


CASES |= {
    "batch norm after flatten": Case(
        lambda: Net(
            lambda m, x: m.b(m.norm(m.a(x).flatten(1))),
            **{"a": nn.Conv2d(3, 4, 3), "norm": nn.BatchNorm1d(16), "b": nn.Linear(16, 2)},
        ),
        image(),
        [
            group(
                "a.weight/0 a.bias/0",
                each(4),
                "norm.weight/0 norm.bias/0 b.weight/1",
                runs(4, 4),
                "norm.running_mean/0 norm.running_var/0",
                runs(4, 4),
            )
        ],
    ),
    "batch norm": Case(
        normed(nn.BatchNorm2d(8)),
        image(),
        [
            group(
                "a.weight/0 norm.weight/0 norm.bias/0 b.weight/1",
                each(8),
                "norm.running_mean/0 norm.running_var/0",
                each(8),
            )
        ],
    ),
    "instance norm": Case(
        normed(nn.InstanceNorm2d(8, affine=True)),
        image(),
        [group("a.weight/0 norm.weight/0 norm.bias/0 b.weight/1", each(8))],
    ),
    "group norm, whole groups": Case(
        normed(nn.GroupNorm(4, 16), 16),
        image(),
        [group("a.weight/0 norm.weight/0 norm.bias/0 b.weight/1", runs(4, 4))],
    ),
    "group norm, within groups": Case(
        normed(nn.GroupNorm(4, 16), 16),
        image(),
        [
            group(
                "a.weight/0 norm.weight/0 norm.bias/0 b.weight/1",
                strided(4, 4),
                exact=False,
                by="group_norm",
            )
        ],
        {"group_norm": "within"},
    ),
    "layer norm": Case(
        lambda: nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2)),
        rows(4),
        [
            group(
                "0.weight/0 0.bias/0 1.weight/0 1.bias/0 2.weight/1",
                each(8),
                exact=False,
                by="layer_norm",
            )
        ],
    ),
    "RMS norm": Case(
        lambda: nn.Sequential(nn.Linear(4, 8), nn.RMSNorm(8), nn.Linear(8, 2)),
        rows(4),
        [group("0.weight/0 0.bias/0 1.weight/0 2.weight/1", each(8), exact=False)],
    ),
    "PReLU": Case(
        lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.PReLU(8), nn.Conv2d(8, 2, 1)),
        image(),
        [group("0.weight/0 0.bias/0 1.weight/0 2.weight/1", each(8))],
    ),
    "PReLU with one slope": Case(
        lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.PReLU(), nn.Conv2d(8, 2, 1)),
        image(),
        [group("0.weight/0 0.bias/0 2.weight/1", each(8))],
    ),
    "weights standardised by a batch norm": Case(
        lambda: nn.Sequential(nn.Conv2d(3, 8, 1), Standardised(), nn.Conv2d(6, 2, 1)),
        image(),
        [
            group("0.weight/0 0.bias/0 1.weight/1", each(8), exact=False, by="batch_norm"),
            group("1.weight/0 2.weight/1", each(6)),
        ],
    ),
    "normalised features": Case(
        lambda: Net(lambda m, x: m.b(F.normalize(m.a(x))), a=nn.Linear(4, 8), b=nn.Linear(8, 2)),
        rows(4),
        [group("a.weight/0 a.bias/0 b.weight/1", each(8), exact=False, by="norm")],
    ),
    "mean over channels": Case(
        lambda: Net(
            lambda m, x: m.b(h := m.a(x)) * h.mean(1, keepdim=True),
            **{"a": nn.Conv2d(3, 8, 1), "b": nn.Conv2d(8, 2, 1)},
        ),
        image(),
        [group("a.weight/0 a.bias/0 b.weight/1", each(8), exact=False, by="mean")],
    ),
    "softmax over features": Case(
        lambda: Net(lambda m, x: m.b(m.a(x).softmax(-1)), a=nn.Linear(4, 8), b=nn.Linear(8, 2)),
        rows(4),
        [group("a.weight/0 a.bias/0 b.weight/1", each(8), exact=False, by="softmax")],
    ),
}


# --- attention -------------------------------------------------------------------------------


def split(x: Tensor, heads: int) -> Tensor:
    """(B, L, heads * d) -> (B, heads, L, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def attend(m, x: Tensor, y: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Four heads of queries from x, keys and values from y."""
    y = x if y is None else y
    q, k, v = split(m.q(x), 4), split(m.k(y), 4), split(m.v(y), 4)
    return m.out(joined(F.scaled_dot_product_attention(q, k, v, bias)))


def projections(width: int = 16, source: int = 6) -> dict[str, nn.Module]:
    """Queries, keys, values and what reads the heads."""
    return {name: nn.Linear(source, width) for name in "qkv"} | {"out": nn.Linear(width, 3)}


def fused(m, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4).unbind(0)
    return m.out(joined(F.scaled_dot_product_attention(q, k, v)))


def by_matmul(m, x: Tensor) -> Tensor:
    q, k, v = (split(part, 4) for part in m.qkv(x).chunk(3, -1))
    return m.out(joined((q @ k.transpose(-2, -1) * 0.5).softmax(-1) @ v))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (arXiv 2104.09864): halves of a head turned against each other."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def rotary(m, x: Tensor) -> Tensor:
    q, k, v = split(m.q(x), 4), split(m.k(x), 4), split(m.v(x), 4)
    q, k = rotated(q, m.cos, m.sin), rotated(k, m.cos, m.sin)
    return m.out(joined(F.scaled_dot_product_attention(q, k, v)))


def angles() -> dict[str, Tensor]:
    """cos and sin (L = 5, d = 8) of the usual frequencies."""
    half = torch.arange(5.0)[:, None] * 10 ** -torch.arange(4.0)
    full = torch.cat([half, half], -1)
    return {"cos": full.cos(), "sin": full.sin()}


def grouped(m, x: Tensor, how: str) -> Tensor:
    """Eight heads of queries on four of keys and values, two dimensions each."""
    q, k, v = split(m.q(x), 8), split(m.k(x), 4), split(m.v(x), 4)
    if how == "expand":
        k, v = (t[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2) for t in (k, v))
    elif how == "repeat":
        k, v = (t.repeat_interleave(2, 1) for t in (k, v))
    made = F.scaled_dot_product_attention(q, k, v, enable_gqa=how == "enable_gqa")
    return m.out(joined(made))


def grouped_case(how: str) -> Case:
    return Case(
        lambda: Net(
            lambda m, x: grouped(m, x, how),
            **{"q": nn.Linear(6, 16), "k": nn.Linear(6, 8), "v": nn.Linear(6, 8)},
            out=nn.Linear(16, 3),
        ),
        rows(5, 6),
        [
            group(
                "q.weight/0 q.bias/0 out.weight/1",
                runs(4, 4),
                "k.weight/0 k.bias/0 v.weight/0 v.bias/0",
                runs(4, 2),
            )
        ],
    )


def merged_with_batch(m, x: Tensor) -> Tensor:
    """Heads in the batch dimension, as before there was an op for attention."""
    batch, length, _ = x.shape
    q, k, v = (split(p(x), 4).reshape(batch * 4, length, 4) for p in (m.q, m.k, m.v))
    made = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)
    return m.out(joined(made.view(batch, 4, length, 4)))


def windows(m, x: Tensor) -> Tensor:
    """Swin's (arXiv 2103.14030): attention within 2 x 2 windows, a bias for each head."""
    x = m.embed(x).permute(0, 2, 3, 1)
    batch, height, width, channels = x.shape
    cells = x.view(batch, height // 2, 2, width // 2, 2, channels)
    cells = cells.permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, channels)
    q, k, v = m.qkv(cells).reshape(-1, 4, 3, 4, 2).permute(2, 0, 3, 1, 4).unbind(0)
    bias = m.table[m.index.view(-1)].view(4, 4, -1).permute(2, 0, 1)
    made = ((q @ k.transpose(-2, -1)) * 0.7 + bias[None]).softmax(-1) @ v
    made = m.out(made.transpose(1, 2).reshape(-1, 4, 8))
    made = made.view(batch, height // 2, width // 2, 2, 2, channels).permute(0, 1, 3, 2, 4, 5)
    return m.head((x + made.reshape(batch, height, width, channels)).mean((1, 2)))


def window_case(dynamic: dict | None = None) -> Case:
    return Case(
        lambda: Net(
            windows,
            **{"embed": nn.Conv2d(3, 8, 1), "qkv": nn.Linear(8, 24), "out": nn.Linear(8, 8)},
            **{"table": param(9, 4), "index": torch.arange(16).remainder(9).view(4, 4)},
            head=nn.Linear(8, 2),
        ),
        image(),
        [
            group(
                "embed.weight/0 embed.bias/0 qkv.weight/1",
                each(8),
                "out.weight/0 out.bias/0 head.weight/1",
                each(8),
            ),
            group(
                "qkv.weight/0 qkv.bias/0",
                heads_of_three(4, 2),
                "out.weight/1",
                runs(4, 2),
                "table/1",
                each(4),
            ),
        ],
        dynamic=dynamic and (dynamic,),
    )


HEADS = {"q.weight/0 q.bias/0 k.weight/0 k.bias/0 v.weight/0 v.bias/0 out.weight/1": runs(4, 4)}
BY_DIMENSION = [
    group("q.weight/0 q.bias/0 k.weight/0 k.bias/0", dims_of_heads(4, 4), exact=None),
    group("v.weight/0 v.bias/0 out.weight/1", dims_of_heads(4, 4)),
]

CASES |= {
    "heads of a fused projection": Case(
        lambda: Net(fused, qkv=nn.Linear(6, 48), out=nn.Linear(16, 3)),
        rows(5, 6),
        [group("qkv.weight/0 qkv.bias/0", heads_of_three(4, 4), "out.weight/1", runs(4, 4))],
    ),
    "heads by matmul": Case(
        lambda: Net(by_matmul, qkv=nn.Linear(6, 48), out=nn.Linear(16, 3)),
        rows(5, 6),
        [group("qkv.weight/0 qkv.bias/0", heads_of_three(4, 4), "out.weight/1", runs(4, 4))],
    ),
    "heads of separate projections": Case(
        lambda: Net(attend, **projections()), rows(5, 6), [group(HEADS)]
    ),
    "heads of MultiheadAttention": Case(
        lambda: Net(
            lambda m, x: m.out(m.mha(x, x, x, need_weights=False)[0]),
            **{"mha": nn.MultiheadAttention(16, 4, batch_first=True), "out": nn.Linear(16, 3)},
        ),
        rows(5, 16),
        [
            group(
                "mha.in_proj_weight/0 mha.in_proj_bias/0",
                heads_of_three(4, 4),
                "mha.out_proj.weight/1",
                runs(4, 4),
            ),
            group("mha.out_proj.weight/0 mha.out_proj.bias/0 out.weight/1", each(16)),
        ],
    ),
    "grouped queries by expand": grouped_case("expand"),
    "grouped queries by repeat": grouped_case("repeat"),
    "grouped queries by enable_gqa": grouped_case("enable_gqa"),
    "cross attention": Case(
        lambda: Pair(attend, **projections()), (*rows(5, 6), *rows(7, 6)), [group(HEADS)]
    ),
    "a bias for each head": Case(
        lambda: Net(
            lambda m, x: attend(m, x, bias=m.table[m.index].permute(2, 0, 1)),
            **{"table": param(9, 4), "index": torch.arange(5)[:, None] - torch.arange(5) + 4},
            **projections(),
        ),
        rows(5, 6),
        [group(HEADS, "table/1", each(4))],
    ),
    "dimensions of heads": Case(
        lambda: Net(attend, **projections()), rows(5, 6), BY_DIMENSION, {"attention": "head_dim"}
    ),
    "dimensions of heads by matmul": Case(
        lambda: Net(by_matmul, qkv=nn.Linear(6, 48), out=nn.Linear(16, 3)),
        rows(5, 6),
        [
            group(
                "qkv.weight/0 qkv.bias/0",
                np.hstack([dims_of_heads(4, 4), 16 + dims_of_heads(4, 4)]),
                exact=None,
            ),
            group(
                "qkv.weight/0 qkv.bias/0",
                32 + dims_of_heads(4, 4),
                "out.weight/1",
                dims_of_heads(4, 4),
            ),
        ],
        {"attention": "head_dim"},
    ),
    "dimensions of heads of a fused projection": Case(  # whose view has one size for all three
        lambda: Net(fused, qkv=nn.Linear(6, 48), out=nn.Linear(16, 3)),
        rows(5, 6),
        [
            group(
                "qkv.weight/0 qkv.bias/0",
                dims_of_heads(12, 4),
                "out.weight/1",
                dims_of_heads(4, 4),
                exact=None,
            )
        ],
        {"attention": "head_dim"},
    ),
    "heads with rotary embedding": Case(
        lambda: Net(rotary, **projections(32), **angles()),
        rows(5, 6),
        [
            group(
                "q.weight/0 q.bias/0 k.weight/0 k.bias/0 v.weight/0 v.bias/0",
                runs(4, 8),
                "out.weight/1",
                runs(4, 8),
            )
        ],
    ),
    "dimensions with rotary embedding": Case(
        lambda: Net(rotary, **projections(32), **angles()),
        rows(5, 6),
        [
            group(
                "q.weight/0 q.bias/0 k.weight/0 k.bias/0",
                np.arange(32).reshape(8, 4).T,
                "cos/1 sin/1",
                strided(4, 2),
                exact=None,
            ),
            group("v.weight/0 v.bias/0 out.weight/1", dims_of_heads(4, 8)),
        ],
        {"attention": "head_dim"},
    ),
    "heads merged with the batch": Case(
        lambda: Net(merged_with_batch, **projections()), rows(5, 6), [group(HEADS)]
    ),
    "heads merged with the batch, the length dynamic": Case(
        lambda: Net(merged_with_batch, **projections()),
        rows(5, 6),
        [group(HEADS)],
        dynamic=({1: "length"},),
    ),
    "attention with a dynamic length": Case(
        lambda: Net(attend, **projections()), rows(5, 6), [group(HEADS)], dynamic=({1: "length"},)
    ),
    "windows": window_case(),
    "windows, height and width dynamic": window_case({2: "height", 3: "width"}),
}


# --- recurrent layers and embeddings ---------------------------------------------------------


def recurrent(kind: type, **settings) -> Callable[[], nn.Module]:
    width = settings.get("proj_size", 6) * (1 + settings.get("bidirectional", False))
    return lambda: Net(
        lambda m, x: m.out(m.rnn(m.a(x))[0]),
        **{"a": nn.Linear(4, 5), "rnn": kind(5, 6, batch_first=True, **settings)},
        out=nn.Linear(width, 2),
    )


def gates(number: int, *suffixes: str) -> dict[str, np.ndarray]:
    """A recurrent layer's matrices and biases, for each suffix as of layer 0 in reverse."""
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    return {f"rnn.{n}_{s}/0": strided(6, number) for s in suffixes for n in names}


def fed(*suffixes: str) -> Expected:
    return group(
        "a.weight/0 a.bias/0", each(5), {f"rnn.weight_ih_{s}/1": each(5) for s in suffixes}
    )


CASES |= {
    "LSTM": Case(
        recurrent(nn.LSTM),
        rows(3, 4),
        [fed("l0"), group(gates(4, "l0"), "rnn.weight_hh_l0/1 out.weight/1", each(6))],
    ),
    "LSTM of two layers": Case(
        recurrent(nn.LSTM, num_layers=2),
        rows(3, 4),
        [
            fed("l0"),
            group(
                gates(4, "l0", "l1"),
                "rnn.weight_hh_l0/1 rnn.weight_hh_l1/1 rnn.weight_ih_l1/1",
                each(6),
                "out.weight/1",
                each(6),
            ),
        ],
    ),
    "LSTM with a projection": Case(
        recurrent(nn.LSTM, proj_size=4),
        rows(3, 4),
        [
            fed("l0"),
            group(gates(4, "l0"), "rnn.weight_hr_l0/1", each(6)),
            group("rnn.weight_hr_l0/0 rnn.weight_hh_l0/1 out.weight/1", each(4)),
        ],
    ),
    "GRU in both directions": Case(
        recurrent(nn.GRU, bidirectional=True),
        rows(3, 4),
        [
            fed("l0", "l0_reverse"),
            group(
                gates(3, "l0", "l0_reverse"),
                "rnn.weight_hh_l0/1 rnn.weight_hh_l0_reverse/1",
                each(6),
                "out.weight/1",
                strided(6, 2),
            ),
        ],
    ),
    "GRU of two layers in both directions": Case(
        recurrent(nn.GRU, bidirectional=True, num_layers=2),
        rows(3, 4),
        [
            fed("l0", "l0_reverse"),
            group(
                gates(3, "l0", "l0_reverse", "l1", "l1_reverse"),
                {f"rnn.weight_hh_{s}/1": each(6) for s in ("l0", "l0_reverse")},
                {f"rnn.weight_hh_{s}/1": each(6) for s in ("l1", "l1_reverse")},
                {f"rnn.weight_ih_{s}/1": strided(6, 2) for s in ("l1", "l1_reverse")},
                "out.weight/1",
                strided(6, 2),
            ),
        ],
    ),
    "GRU from a learned state": Case(
        lambda: Net(
            lambda m, x: m.out(m.rnn(x, m.h.expand(-1, x.shape[0], -1).contiguous())[0]),
            **{"rnn": nn.GRU(4, 6, batch_first=True), "h": param(1, 1, 6), "out": nn.Linear(6, 2)},
        ),
        rows(3, 4),
        [group(gates(3, "l0"), "rnn.weight_hh_l0/1 h/2 out.weight/1", each(6))],
    ),
    "a GRU cell from zeros": Case(
        lambda: Net(
            lambda m, x: m.out(m.rnn(x[:, 1], m.rnn(x[:, 0], x.new_zeros(x.shape[0], 6)))),
            **{"rnn": nn.GRUCell(4, 6), "out": nn.Linear(6, 2)},
        ),
        rows(3, 4),
        [
            group(
                "rnn.weight_ih/0 rnn.weight_hh/0 rnn.bias_ih/0 rnn.bias_hh/0",
                strided(6, 3),
                "rnn.weight_hh/1 out.weight/1",
                each(6),
            )
        ],
    ),
    "embedding tied with the head": Case(
        lambda: Net(
            lambda m, x: F.linear(m.b(m.embed(x)).tanh(), m.embed.weight),
            **{"embed": nn.Embedding(10, 8), "b": nn.Linear(8, 8)},
        ),
        (torch.arange(6).view(2, 3),),
        [group("embed.weight/1 b.weight/1 b.weight/0 b.bias/0", each(8))],
    ),
    "position embeddings": Case(
        lambda: Net(
            lambda m, x: m.b(m.embed(x) + m.learned[:, : x.shape[1]] + m.position(m.numbers)),
            **{"embed": nn.Embedding(10, 8), "learned": param(1, 7, 8)},
            **{"position": nn.Embedding(5, 8), "numbers": torch.arange(3), "b": nn.Linear(8, 2)},
        ),
        (torch.arange(6).view(2, 3),),
        [
            group("embed.weight/1 learned/2 position.weight/1 b.weight/1", each(8)),
            group("learned/1", each(4, 3)),  # of places that no input reaches
        ],
    ),
}


# --- every case ------------------------------------------------------------------------------


@functools.cache
def analyzed(name: str) -> tuple[Model, Coupling]:
    case = CASES[name]
    torch.manual_seed(0)
    module = case.build()
    randomise(module)
    model = capture(module.eval(), case.example, case.dynamic)
    return model, analyze(model, **case.policy)


def half(coupling: Coupling, exact_only: bool = False, seed: int = 0) -> Choice:
    """Half of the units of every group, drawn; rounded up, so that one always stays."""
    random = np.random.default_rng(seed)
    chosen = {}
    for group in coupling.groups:
        if group.exact or not exact_only:
            kept = np.zeros(group.size, dtype=bool)
            kept[random.permutation(group.size)[: -(-group.size // 2)]] = True
            chosen[group.name] = kept
    return chosen


def run(model: Model, inputs=None) -> Tensor:
    leaves = [item.example for item in model.inputs] if inputs is None else list(inputs)
    with torch.no_grad():
        return torch.cat([out.flatten() for out in model.graph(*leaves)])


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def units(group: Group) -> frozenset:
    """Its units, each the indices that it has of every member, in whatever order."""
    return frozenset(
        frozenset((m.name, m.dim, tuple(sorted(m.indices[unit].tolist()))) for m in group.members)
        for unit in range(group.size)
    )


def wanted_units(expected: Expected) -> frozenset:
    flat = [
        (*place.rsplit("/", 1), indices)
        for places, indices in expected.members.items()
        for place in places.split()
    ]
    size = len(flat[0][2])
    assert all(len(indices) == size for _, _, indices in flat)
    return frozenset(
        frozenset((name, int(dim), tuple(sorted(i[unit].tolist()))) for name, dim, i in flat)
        for unit in range(size)
    )


every = pytest.mark.parametrize("name", CASES)


@every
def test_groups_are_found_exactly(name):
    coupling, expected = analyzed(name)[1], CASES[name].groups
    found = {units(group): group for group in coupling.groups}
    assert set(found) == set(map(wanted_units, expected)) and coupling.unknown == ()
    for wanted in expected:
        group = found[wanted_units(wanted)]
        assert group.exact in (wanted.exact, group.exact if wanted.exact is None else None)
        assert wanted.by in group.reduced_by and bool(group.reduced_by) != group.exact


@every
def test_half_of_the_units(name):
    model, coupling = analyzed(name)
    if not coupling.groups:
        return
    choice = half(coupling, exact_only=True)
    if choice:
        small, masked = cut(model, coupling, choice), mask(model, coupling, choice)
        assert difference(run(masked), run(model)) > 1e-3
        for batch in (2, *CASES[name].batches):
            inputs = with_batch(CASES[name].example, batch)
            assert difference(run(small, inputs), run(masked, inputs)) < TOLERANCE
        found = verify(model, small)
        assert found.error < TOLERANCE and found.change > 1e-3


@every
def test_the_same_groups_are_found_again(name):
    model, coupling = analyzed(name)
    choice = half(coupling)
    small = cut(model, coupling, choice)
    again = analyze(small, **CASES[name].policy)
    for batch in CASES[name].batches:
        inputs = with_batch(CASES[name].example, batch)
        assert run(small, inputs).shape == run(model, inputs).shape

    def shape(group: Group, size: int) -> tuple:
        places = frozenset((m.name, m.dim, m.indices.shape[1]) for m in group.members)
        return places, size, group.exact

    expected = {shape(g, int(choice[g.name].sum())) for g in coupling.groups}
    assert {shape(group, group.size) for group in again.groups} == expected
    assert again.costs() == coupling.costs(choice) != coupling.costs() or not choice
    assert {n: t.shape for n, t in small.state_dict().items()}.keys() == model.state_dict().keys()


@every
def test_one_unit_of_each_group_is_enough(name):
    model, coupling = analyzed(name)
    choice = {g.name: np.arange(g.size) == g.size - 2 for g in coupling.groups}
    if name == "LSTM with a projection":  # to as many as there are is no projection to PyTorch
        choice["rnn.weight_ih_l0"][-1] = True
    small, masked = cut(model, coupling, choice), mask(model, coupling, choice)
    inputs = with_batch(CASES[name].example, 3)
    found, expected = run(small, inputs), run(masked, inputs)
    assert found.shape == expected.shape
    if all(group.exact for group in coupling.groups):
        assert difference(found, expected) < TOLERANCE


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.dynamic])
def test_other_sizes(name):
    model, coupling = analyzed(name)
    choice, (x,) = half(coupling), CASES[name].example
    larger = [
        2 * size if dim in CASES[name].dynamic[0] else size for dim, size in enumerate(x.shape)
    ]
    inputs = (torch.randn(3, *larger[1:]),)
    found = run(cut(model, coupling, choice), inputs)
    assert difference(found, run(mask(model, coupling, choice), inputs)) < TOLERANCE


@pytest.mark.parametrize(
    "name",
    [
        *("layer norm", "RMS norm", "weights standardised by a batch norm", "mean over channels"),
        *("softmax over features", "group norm, within groups"),
    ],
)
def test_what_is_not_exact_is_not(name):
    model, coupling = analyzed(name)
    choice = {g.name: half(coupling)[g.name] for g in coupling.groups if not g.exact}
    small, masked = cut(model, coupling, choice), mask(model, coupling, choice)
    error = difference(run(small), run(masked))
    assert error > 1e-2 and verify(model, small).error == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("name", ["dimensions of heads", "dimensions with rotary embedding"])
def test_the_default_scale_of_attention_stays_what_it_was(name):
    model, coupling = analyzed(name)
    for group in coupling.groups:
        choice = {group.name: half(coupling)[group.name]}
        small, masked = cut(model, coupling, choice), mask(model, coupling, choice)
        assert difference(run(small), run(masked)) < TOLERANCE < difference(run(masked), run(model))


# --- what a choice costs ---------------------------------------------------------------------

COSTS = [  # case, hand-counted parameters, multiply-adds of one example
    ("linear", 4 * 8 + 8 + 8 * 3 + 3, 4 * 8 + 8 * 3),
    ("linear on sequences, three of them", 40 + 54 + 14, 5 * (4 * 8 + 8 * 6 + 6 * 2)),
    ("conv", 3 * 8 * 9 + 8 + 8 * 4 + 4, 16 * (3 * 8 * 9 + 8 * 4)),
    (
        "grouped conv, whole groups",
        3 * 16 + 16 + 24 * 2 * 9 + 24 + 24 * 2 + 2,
        16 * 3 * 16 + 4 * (24 * 2 * 9 + 24 * 2),
    ),
    (
        "grouped conv, within groups",
        3 * 8 + 8 + 12 * 4 * 9 + 12 + 12 * 2 + 2,
        16 * 3 * 8 + 4 * (12 * 4 * 9 + 12 * 2),
    ),
    ("depthwise", 32 + 8 * 9 + 8 + 18, 16 * 24 + 4 * (8 * 9 + 16)),
    ("transposed", 32 + 8 * 6 * 4 + 6 + 14, 16 * (3 * 8 + 8 * 6 * 4) + 64 * 12),
    (
        "heads of separate projections",
        3 * (6 * 16 + 16) + 16 * 3 + 3,
        5 * (3 * 6 * 16 + 16 * 3) + 2 * 4 * 5 * 5 * 4,
    ),
    (
        "heads by matmul",
        3 * (6 * 16 + 16) + 16 * 3 + 3,
        5 * (3 * 6 * 16 + 16 * 3) + 2 * 4 * 5 * 5 * 4,
    ),
    ("LSTM", 25 + 4 * 6 * (5 + 6 + 2) + 14, 3 * (4 * 5 + 4 * 6 * (5 + 6) + 6 * 2)),
    (
        "GRU in both directions",
        25 + 2 * 3 * 6 * (5 + 6 + 2) + 26,
        3 * (4 * 5 + 2 * 3 * 6 * (5 + 6) + 12 * 2),
    ),
    ("einsum", 4 * 24 + 24 * 2, 5 * (4 * 24 + 24 * 2)),
]


@pytest.mark.parametrize(("name", "parameters", "macs"), COSTS)
def test_costs_are_those_counted_by_hand(name, parameters, macs):
    model, coupling = analyzed(name)
    found = coupling.costs()
    assert found.parameters == parameters == sum(p.numel() for p in model.parameters())
    assert found.macs == 2 * macs  # the example has two
    single = capture(CASES[name].build(), tuple(x[:1] for x in CASES[name].example))
    assert analyze(single).costs().macs == macs


def test_bytes_are_those_of_parameters_and_buffers_as_stored():
    found = analyzed("batch norm")[1].costs()
    floats = 3 * 8 + 4 * 8 + 8 * 2 + 2
    assert found.size_bytes == 4 * floats + 8 and found.parameters == floats - 16


MODELS = (
    *("resnet8", "mobilenet_v2", "shufflenet_v2", "densenet", "unet", "vit", "se_resnet"),
    *("lstm", "transformer_encoder", "conv_mixer", "tied_language_model"),
)


@pytest.mark.parametrize("name", MODELS)
def test_whole_models(name):
    model, _ = captured(name)
    coupling = analyze(model)
    assert coupling.unknown == () and coupling.coverage > 0.5
    choice = half(coupling)
    small = cut(model, coupling, choice)
    again = analyze(small).costs()
    assert again == coupling.costs(choice)
    assert again.parameters == sum(p.numel() for p in small.parameters())
    assert again.parameters < coupling.costs().parameters
    found = verify(model, cut(model, coupling, half(coupling, exact_only=True)))
    assert found.error < TOLERANCE and found.change > 1e-3


# --- what is told ----------------------------------------------------------------------------


def test_names_are_those_of_the_layers_that_make_the_values():
    assert [g.name for g in analyzed("U-Net skip")[1].groups] == ["a", "down", "up"]
    assert [g.name for g in analyzed("dimensions of heads")[1].groups] == ["q", "v"]
    roles = {(m.name, m.dim): m.role for m in analyzed("batch norm")[1].groups[0].members}
    assert roles["a.weight", 0] == "out" and roles["b.weight", 1] == "in"
    assert roles["norm.weight", 0] == "scale" and roles["norm.running_var", 0] == "other"


def test_explain_says_which_group_each_dimension_is_in():
    coupling = analyzed("split into unequal sizes")[1]
    first, second = (g.name for g in coupling.groups)
    both, whole = coupling.explain("a.weight")
    assert f"{first!r} (4 units)" in both and f"{second!r} (6 units)" in both
    assert "dimension 0 of 10" in both and whole == "dimension 1 of 4: stays whole"
    with pytest.raises(UserError, match=r"no parameter is called 'a\.wieght'; .* 'a\.weight'"):
        coupling.explain("a.wieght")


@torch.library.custom_op("paredown_tests::twist", mutates_args=())
def twist(x: Tensor) -> Tensor:
    return x.flip(1).cumsum(1)


@twist.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_an_unknown_op_keeps_what_it_touches_and_is_named():
    net = Net(
        lambda m, x: m.c(m.b(twist(m.a(x))).relu()),
        **{"a": nn.Linear(4, 8), "b": nn.Linear(8, 6), "c": nn.Linear(6, 2)},
    )
    model = capture(net, rows(4))
    coupling = analyze(model)
    assert len(coupling.unknown) == 1 and "twist" in coupling.unknown[0]
    assert [(g.name, g.size) for g in coupling.groups] == [("b", 6)]
    assert any("twist" in why and count >= 8 for why, count in coupling.pinned_by.items())
    assert coupling.coverage == pytest.approx((8 * 6 + 6 * 2) / (4 * 8 + 8 * 6 + 6 * 2))
    choice = half(coupling)
    small = cut(model, coupling, choice)
    assert difference(run(small), run(mask(model, coupling, choice))) < TOLERANCE


def test_coverage_of_all_and_of_nothing():
    assert analyzed("linear")[1].coverage == 1 == analyzed("conv")[1].coverage
    nothing = analyze(capture(Net(lambda m, x: twist(m.a(x)), a=nn.Linear(4, 8)), rows(4)))
    assert nothing.coverage == 0 and nothing.groups == ()
    assert analyzed("roll")[1].coverage == 0
    alone = analyze(capture(nn.Linear(4, 8), rows(4)))
    assert alone.coverage == 0 and any("output" in why for why in alone.pinned_by)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"z": np.ones(8, dtype=bool)}, "no group is called 'z'"),
        ({"a": np.ones(7, dtype=bool)}, r"group 'a' has 8 units, got \(7,\)"),
        ({"a": np.ones((8, 1), dtype=bool)}, r"group 'a' has 8 units, got \(8, 1\)"),
        ({"a": np.zeros(8, dtype=bool)}, "group 'a' would vanish"),
    ],
)
def test_wrong_choices_are_refused(choice, message):
    model, coupling = analyzed("linear")
    for use in (lambda: cut(model, coupling, choice), lambda: coupling.costs(choice)):
        with pytest.raises(UserError, match=message):
            use()


def test_a_projection_to_as_many_as_there_are_is_refused():
    """PyTorch tells a projection by its size, so no LSTM can be cut to that."""
    model, coupling = analyzed("LSTM with a projection")
    choice = {group.name: np.arange(group.size) < 3 for group in coupling.groups}
    with pytest.raises(UserError):
        cut(model, coupling, choice)


def test_unknown_policies_are_refused():
    model = analyzed("linear")[0]
    with pytest.raises(UserError, match=r"attention: expected 'heads' or 'head_dim', got 'head'"):
        analyze(model, attention="head")
    with pytest.raises(UserError, match=r"group_norm: expected 'groups' or 'within', got 'no'"):
        analyze(model, group_norm="no")


# --- the cut model ---------------------------------------------------------------------------


class Tied(nn.Module):
    """A head that is the embedding, between them a layer that can be cut."""

    def __init__(self):
        super().__init__()
        self.embed, self.hidden = nn.Embedding(10, 8), nn.Linear(8, 6)
        self.back, self.head = nn.Linear(6, 8), nn.Linear(8, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.back(self.hidden(self.embed(ids)).relu()))


def small_cnn() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5)),
        *(nn.Conv2d(8, 6, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)),
    )
    randomise(net)
    return net.eval()


@pytest.fixture
def cnn() -> Model:
    return capture(small_cnn(), image(size=6))


def test_kept_counts_in_the_indices_of_the_original(cnn, tmp_path):
    original = {name: tensor.clone() for name, tensor in cnn.state_dict().items()}
    once = cut(cnn, first := analyze(cnn), half(first))
    twice = cut(once, second := analyze(once), half(second, seed=1))
    twice.save(tmp_path / "m.safetensors")
    loaded = Model.load(tmp_path / "m.safetensors")
    for model in (once, twice, loaded):
        assert list(model.state_dict()) == list(original)
        for name, tensor in model.state_dict().items():
            expected = original[name]
            for dim, kept in model.kept.get(name, {}).items():
                expected = expected.index_select(dim, kept)
            assert torch.equal(tensor, expected), name
        assert set(model.kept["0.weight"]) == {0} and set(model.kept["4.weight"]) == {0, 1}
    assert [len(m.kept["0.weight"][0]) for m in (once, twice, loaded)] == [4, 2, 2]
    assert torch.equal(run(loaded), run(twice))
    for before, after in ((cnn, once), (cnn, twice), (once, twice), (cnn, loaded)):
        found = verify(before, after)
        assert found.error < TOLERANCE and found.change > 1e-3
    assert analyze(loaded).costs() == analyze(twice).costs()


def test_the_original_is_untouched(cnn):
    before, state = run(cnn), {name: tensor.clone() for name, tensor in cnn.state_dict().items()}
    code = cnn.graph.code
    coupling = analyze(cnn)
    for made in (cut(cnn, coupling, half(coupling)), mask(cnn, coupling, half(coupling))):
        assert not torch.equal(run(made), before)
        assert torch.equal(run(cnn), before) and cnn.graph.code == code and not cnn.kept
        assert all(torch.equal(state[name], tensor) for name, tensor in cnn.state_dict().items())


def test_nothing_chosen_is_nothing_cut(cnn):
    coupling = analyze(cnn)
    whole = {g.name: np.ones(g.size, dtype=bool) for g in coupling.groups}
    for choice in ({}, whole):
        made = cut(cnn, coupling, choice)
        assert torch.equal(run(made), run(cnn)) and not made.kept
        assert coupling.costs(choice) == coupling.costs()


def test_masks_of_pruned_weights_are_cut_with_them(cnn):
    pruned = PruneWeights(0.5).apply(cnn, Task(example=image(size=6), score=None))
    coupling = analyze(pruned)
    small = cut(pruned, coupling, half(coupling))
    assert small.masks.keys() == pruned.masks.keys() and len(small.masks) == 3
    for name, found in small.masks.items():
        expected = pruned.masks[name]
        for dim, kept in small.kept[name].items():
            expected = expected.index_select(dim, kept)
        weight = small.state_dict()[name]
        assert torch.equal(found, expected) and found.shape == weight.shape
        assert not weight[~found].any() and weight[found].all()
    assert all(m.shape == pruned.state_dict()[n].shape for n, m in pruned.masks.items())


def test_tied_weights_stay_tied(tmp_path):
    torch.manual_seed(0)
    model = capture(Tied(), (torch.arange(6).view(2, 3),))
    coupling = analyze(model)
    assert {g.size for g in coupling.groups} == {6, 8}
    small = cut(model, coupling, half(coupling))
    assert small.graph.head.weight is small.graph.embed.weight
    assert small.graph.embed.weight.shape == (10, 4)
    assert list(small.state_dict()) == list(model.state_dict())
    assert coupling.costs(half(coupling)).parameters == sum(p.numel() for p in small.parameters())
    assert verify(model, small).error < TOLERANCE
    small.save(tmp_path / "m.safetensors")
    loaded = Model.load(tmp_path / "m.safetensors")
    assert loaded.graph.head.weight is loaded.graph.embed.weight
    assert verify(model, loaded).error < TOLERANCE


def test_a_quantized_graph_is_cut_with_its_scales(cnn):
    data = [(x, 0) for x in torch.randn(16, 3, 6, 6)]
    task = Task(example=image(size=6), score=None, calibration=data)
    quantized = Quantize("int8").apply(cnn, task)
    coupling = analyze(quantized)
    assert coupling.unknown == () and sorted(g.size for g in coupling.groups) == [6, 8]
    choice = half(coupling)
    small = cut(quantized, coupling, choice)
    state, seen = small.state_dict(), 0
    for node in small.graph.graph.nodes:
        if node.target == PER_CHANNEL:
            weight, scale, axis = (node.args[0].target, node.args[1].target, node.args[2])
            assert state[scale].shape == (state[weight].shape[axis],)
            kept = small.kept.get(weight, {}).get(axis)
            whole = quantized.state_dict()[scale]
            assert torch.equal(state[scale], whole if kept is None else whole[kept])
            seen += kept is not None
    assert seen >= 2
    assert difference(run(small), run(mask(quantized, coupling, choice))) < TOLERANCE
    assert run(small, with_batch(image(size=6), 3)).shape == (12,)


def test_a_cut_model_trains(cnn):
    coupling = analyze(cnn)
    small = cut(cnn, coupling, half(coupling)).train()
    before = run(small.copy().eval())
    optimizer = torch.optim.SGD(small.parameters(), 0.1)
    losses = []
    for _ in range(30):
        loss = F.cross_entropy(small(image(size=6)[0]), torch.tensor([0, 1]))
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in small.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) < sum(losses[:5])
    assert difference(run(small.eval()), before) > 1e-2
    found = verify(cnn, small)
    assert found.error < TOLERANCE and found.change > 1e-3


# --- verify ----------------------------------------------------------------------------------


def test_verify_compares_the_cut_and_not_the_weights():
    model, coupling = analyzed("residual add")
    small = cut(model, coupling, half(coupling))
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.copy_(torch.randn_like(parameter))
    state = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    found = verify(model, small)
    assert found.error < TOLERANCE and found.change > 1e-2
    assert "relative error" in str(found)
    assert all(torch.equal(state[name], tensor) for name, tensor in small.state_dict().items())


def test_verify_takes_the_module_itself_and_other_inputs(cnn):
    coupling = analyze(cnn)
    small = cut(cnn, coupling, half(coupling))
    assert verify(small_cnn(), small) == verify(cnn, small)
    other = verify(cnn, small, (torch.randn(5, 3, 6, 6),))
    assert other.error < TOLERANCE and other.change != verify(cnn, small).change


def test_verify_of_nothing_cut_says_that_nothing_changed(cnn):
    found = verify(cnn, cnn.copy())
    assert found.error == found.change == 0


def test_verify_refuses_what_was_not_cut_from_the_model(cnn):
    coupling = analyze(cnn)
    small = cut(cnn, coupling, half(coupling))
    other = analyzed("residual add")[0]
    with pytest.raises(UserError, match=r"verify: 'a\.weight' is no parameter of the model before"):
        verify(cnn, other)
    wider = nn.Sequential(*small_cnn())
    wider[8] = nn.Linear(6, 5)
    with pytest.raises(UserError, match=r"verify: '8\.weight' is \(5, 6\) and was \(4, 6\)"):
        verify(cnn, capture(wider.eval(), image(size=6)))
    with pytest.raises(UserError, match="verify: "):
        verify(small, cnn)  # the wrong way round


def test_verify_finds_a_cut_that_is_wrong(cnn):
    """A cut of other inputs than outputs, as a wrong rule would make it."""
    coupling = analyze(cnn)
    small = cut(cnn, coupling, half(coupling))
    gone = np.setdiff1d(np.arange(8), small.kept["4.weight"][1].numpy())
    small.kept["4.weight"][1] = torch.from_numpy(gone)
    assert verify(cnn, small).error > 1e-2


def positions(h):
    """Sines and cosines of one table of frequencies, as in the paper on attention."""
    steps = torch.arange(h.shape[1])[:, None] * torch.exp(torch.arange(0, 16, 2) * -0.1)
    return h + torch.cat([steps.sin(), steps.cos()], -1)


COUNTED = {
    "arange": (lambda h: h * torch.arange(16), 16),
    "size": (lambda h: h + torch.arange(h.shape[-1]) / 16, 16),
    "linspace": (lambda h: h * torch.linspace(0.5, 1, 16), 16),
    "eye": (lambda h: h @ torch.eye(16), 16),
    "positions": (positions, 8),
}


class Counted(nn.Module):
    def __init__(self, way):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.way = nn.Linear(8, 16), nn.Linear(16, 4), way

    def forward(self, x):
        return self.two(self.way(self.one(x)))


@pytest.mark.parametrize("kind", COUNTED)
def test_a_constant_that_the_forward_counts_out_is_cut_with_its_channels(kind, tmp_path):
    way, size = COUNTED[kind]
    model = capture(Counted(way).eval(), (torch.randn(2, 6, 8),), ({1: "length"},))
    found = analyze(model)
    assert found.coverage == 1 and {group.size for group in found.groups} == {size}
    choice = {group.name: np.arange(group.size) % 3 != 1 for group in found.groups}
    small, masked = cut(model, found, choice), mask(model, found, choice)
    small.save(tmp_path / "m.safetensors")
    assert small.state_dict().keys() == model.state_dict().keys()
    x = torch.randn(3, 9, 8)
    for made in (small, Model.load(tmp_path / "m.safetensors")):
        torch.testing.assert_close(made(x), masked(x))
    again = analyze(small)
    assert again.coverage == 1  # and can be cut once more
    choice = {group.name: np.arange(group.size) % 2 == 0 for group in again.groups}
    torch.testing.assert_close(cut(small, again, choice)(x), mask(small, again, choice)(x))
