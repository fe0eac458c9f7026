"""Quantization: ranges against brute force, exact zeros and folds, biases that fit."""

import itertools
import math

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from paredown.core.errors import UserError
from paredown.core.task import Task
from paredown.data.observe import BINS, Statistics, observe
from paredown.graph.capture import capture
from paredown.graph.fold import fold_batch_norm
from paredown.graph.model import Model
from paredown.graph.quantized.grouped import PER_GROUP
from paredown.graph.quantized.per_channel import PER_CHANNEL, fake_quantize_channel
from paredown.graph.quantized.quantizers import (
    PER_TENSOR,
    fake_quantize,
    quantizers,
    rounded,
)
from paredown.graph.quantized.scales import affine, channel_scales
from paredown.steps.quantization.quantize import Quantize
from paredown.steps.quantization.range_methods import (
    POWER,
    entropy_range,
    lp_range,
    minmax_range,
    percentile_range,
)
from paredown.steps.quantization.ranges import RANGES, range_method
from paredown.targets.runtimes import onnxruntime

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore")


def gathered(values: Tensor, parts: int = 1) -> Statistics:
    statistics = Statistics()
    for part in values.chunk(parts):
        statistics.add(part, histogram=True)
    return statistics


def calibrated(inputs: Tensor, batch_size: int = 16) -> Task:
    data = TensorDataset(inputs, torch.zeros(len(inputs)))
    return Task(example=(inputs[:1],), score=None, calibration=data, batch_size=batch_size)


def snr_db(before: Tensor, after: Tensor) -> float:
    noise = float((before - after).double().square().sum())
    return 10 * math.log10(float(before.double().square().sum()) / noise) if noise else math.inf


def quantized_weights(model: Model) -> list[str]:
    return [str(n.args[0].target) for n in quantizers(model.graph) if n.target is PER_CHANNEL]


# --- mathematics -----------------------------------------------------------------------------

finite = st.floats(-1e30, 1e30, allow_nan=False)


@given(finite, finite)
def test_zero_is_exact_and_the_ends_are_reached(a, b):
    low, high = min(a, b), max(a, b)
    scale, zero = affine(low, high)
    assert scale > 0 and 0 <= zero <= 255
    values = torch.tensor([0.0, low, high])
    made = fake_quantize(values, scale, zero, 0, 255)
    assert made[0] == 0
    if scale > 1e-11:  # below, the smallest scale wins
        error = (made[1:].double() - values[1:].double()).abs().max()
        assert float(error) <= scale * 0.501 + 1e-6 * max(abs(low), abs(high))


def test_a_range_without_zero_is_widened_to_it():
    assert affine(2.0, 2.55) == affine(0.0, 2.55) == (pytest.approx(0.01), 0)
    assert affine(-2.55, -1.0) == (pytest.approx(0.01), 255)
    assert affine(0.0, 0.0)[0] > 0


@pytest.mark.parametrize("axis", [0, 1])
def test_channel_scales_are_each_channels_own(axis):
    weight = torch.randn(4, 6, 3)
    scales = channel_scales(weight, axis)
    assert scales.shape == (weight.shape[axis],)
    made = fake_quantize_channel(weight, scales, axis, -127, 127)
    shape = [-1 if dim == axis else 1 for dim in range(3)]
    assert ((made - weight).abs() <= scales.reshape(shape) * 0.5001).all()
    steps = (made / scales.reshape(shape)).round().abs().movedim(axis, 0).flatten(1).amax(1)
    assert (steps == 127).all()
    assert (channel_scales(torch.zeros(2, 3), 0) > 0).all()


def test_a_quantizer_passes_gradients_straight_through_inside_its_range():
    x = torch.tensor([-0.5, 0.26, 5.0, 30.0], requires_grad=True)
    fake_quantize(x, 0.1, 0, 0, 255).sum().backward()
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 0.0]
    w = torch.tensor([[0.1, 9.0], [0.1, 9.0]], requires_grad=True)
    fake_quantize_channel(w, torch.tensor([0.01, 1.0]), 0, -127, 127).sum().backward()
    assert w.grad.tolist() == [[1.0, 0.0], [1.0, 1.0]]


# --- statistics ------------------------------------------------------------------------------


def test_statistics_over_parts_are_those_of_the_whole():
    torch.manual_seed(0)
    values = torch.randn(4096) * torch.linspace(0.1, 4, 4096)  # each part is wider than the last
    whole, parts = gathered(values), gathered(values, 16)
    assert (parts.low, parts.high) == (whole.low, whole.high)
    assert (whole.low, whole.high) == (float(values.min()), float(values.max()))
    assert whole.values == parts.values == 4096
    assert float(whole.counts.sum()) == float(parts.counts.sum()) == 4096
    width = (whole.high - whole.low) / BINS
    for share in (1.0, 10.0, 90.0, 99.0):
        ends = [percentile_range(s, share if share > 50 else 100 - share) for s in (whole, parts)]
        assert np.allclose(ends[0], ends[1], atol=20 * width)


def test_what_is_not_finite_is_counted_and_left_out():
    statistics = Statistics()
    statistics.add(torch.tensor([1.0, float("nan"), float("inf"), -float("inf")]), True)
    statistics.add(torch.zeros(0), True)
    statistics.add(torch.tensor([-1.0, 2.0]), True)
    assert statistics.non_finite == 3 and statistics.values == 2
    assert (statistics.low, statistics.high) == (-1.0, 2.0)


def test_large_tensors_are_sampled_but_their_range_is_exact():
    values = torch.zeros(1 << 18)
    values[12345] = 7.0
    statistics = gathered(values)
    assert statistics.high == 7.0 and float(statistics.counts.sum()) <= 1 << 17


# --- ranges against brute force --------------------------------------------------------------

SHAPES = {
    "normal": lambda: torch.randn(6000),
    "heavy": lambda: torch.distributions.StudentT(2.0).sample((6000,)),
    "one-sided": lambda: torch.randn(6000).relu(),
    "silu": lambda: nn.functional.silu(3 * torch.randn(6000)),
    "negative": lambda: -torch.rand(6000) - 1,
    "two spikes": lambda: torch.cat([torch.full((3000,), 0.5), torch.full((30,), 9.0)]),
}


def rounding_error(values: Tensor, low: float, high: float) -> float:
    """The error on the values themselves, no histogram."""
    return float((rounding(values, low, high).abs() ** POWER).sum())


def rounding(values: Tensor, low: float, high: float) -> Tensor:
    return (fake_quantize(values, *affine(low, high), 0, 255) - values).double()


@pytest.mark.parametrize("kind", SHAPES)
def test_lp_is_as_good_as_brute_force(kind):
    torch.manual_seed(0)
    values = SHAPES[kind]()
    statistics = gathered(values)
    low, high = min(statistics.low, 0.0), max(statistics.high, 0.0)
    shrink = np.linspace(0.1, 1.0, 46)
    best = min(rounding_error(values, low * f, high * f) for f in shrink)
    mine = lp_range(statistics)
    assert rounding_error(values, *mine) <= 1.1 * best + 1e-9
    assert low <= mine[0] <= mine[1] <= high


def test_lp_clips_the_two_ends_apart_where_one_is_short():
    torch.manual_seed(0)
    values = torch.cat([-0.3 * torch.rand(5000), torch.zeros(60_000).exponential_()])
    low, high = lp_range(gathered(values))
    assert high < 0.99 * float(values.max())
    assert abs(low - float(values.min())) < 0.03  # about a step: rounded, hardly clipped


def divergence(values: np.ndarray, low: float, high: float, span: tuple[float, float]) -> float:
    """Kullback-Leibler from the clipped histogram to its rounding, bin by bin."""
    counts, edges = np.histogram(values, BINS, span)
    at_zero = [n for n in range(BINS) if edges[n] <= 0 <= edges[n + 1]]
    beside = [n for m in at_zero for n in (m - 1, m + 1) if 0 <= n < BINS and n not in at_zero]
    counts = counts.astype(float)
    for n in at_zero:
        counts[n] = min(counts[n], np.mean(counts[beside]))
    centres = (edges[:-1] + edges[1:]) / 2
    scale, zero = affine(low, high)
    within = [n for n in range(BINS) if low <= centres[n] <= high]
    folded = np.zeros(BINS)
    for n in range(BINS):  # what is clipped goes to the nearest bin inside
        folded[min(max(n, within[0]), within[-1])] += counts[n]
    groups: dict[int, list[int]] = {}
    for n in within:
        level = min(255, max(0, round(float(centres[n]) / scale) + zero))
        groups.setdefault(level, []).append(n)
    spread = np.zeros(BINS)
    for members in groups.values():
        filled = [n for n in members if folded[n]]
        spread[filled] = counts[members].sum() / max(1, len(filled))
    p, q = folded / counts.sum(), spread / counts[within].sum()
    seen = p > 0
    return float((p[seen] * np.log(p[seen] / np.maximum(q[seen], 1e-9))).sum())


@pytest.mark.parametrize("kind", ["normal", "heavy", "one-sided", "silu"])
def test_entropy_is_the_least_divergence_of_its_candidates(kind):
    torch.manual_seed(0)
    values = SHAPES[kind]()
    statistics = gathered(values)
    span = (statistics.histogram_low, statistics.histogram_high)
    low, high = min(statistics.low, 0.0), max(statistics.high, 0.0)
    mine = divergence(values.numpy(), *entropy_range(statistics), span)
    others = [divergence(values.numpy(), low * f, high * f, span) for f in (1, 0.9, 0.7, 0.5, 0.3)]
    assert mine <= min(others) + 1e-3


@pytest.mark.parametrize("tail", ["light", "heavy"])
def test_entropy_does_not_clip_a_relu_for_its_zeros(tail):
    torch.manual_seed(0)
    drawn = torch.randn(60_000)
    values = (drawn if tail == "light" else drawn * drawn.abs()).relu()
    assert float((values == 0).float().mean()) > 0.4

    def squared(low, high):
        return float(rounding(values, low, high).square().sum())

    best = min(squared(0.0, float(values.max()) * f) for f in np.linspace(0.1, 1, 46))
    assert squared(*entropy_range(gathered(values))) < 10 * best


def test_entropy_counts_what_is_clipped_where_it_ends_up():
    """A spread with a tenth of its values far out: to clip them would heap them on the last bin."""
    torch.manual_seed(0)
    values = torch.cat([torch.rand(54_000), 4 + 0.05 * torch.rand(6_000)])
    assert entropy_range(gathered(values))[1] > 4


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("percentile", [60.0, 99.0, 99.99])
def test_percentiles_are_those_of_the_values(kind, percentile):
    torch.manual_seed(0)
    values = SHAPES[kind]().sort().values
    statistics = gathered(values)
    width = (statistics.histogram_high - statistics.histogram_low) / BINS
    low, high = percentile_range(statistics, percentile)
    tail = (1 - percentile / 100) / 2
    below = int((values < low - width / 2).sum()) / len(values)
    above = int((values > high + width / 2).sum()) / len(values)
    assert below <= tail + 1e-4 and above <= tail + 1e-4
    # a bin further in would clip more than was asked
    assert int((values < low + 1.01 * width).sum()) / len(values) >= tail - 1e-4
    assert int((values > high - 1.01 * width).sum()) / len(values) >= tail - 1e-4


def test_percentiles_grow_to_everything():
    torch.manual_seed(0)
    statistics = gathered(torch.randn(10_000))
    wide = [percentile_range(statistics, p) for p in (60, 90, 99, 99.9, 100)]
    for (low, high), (next_low, next_high) in itertools.pairwise(wide):
        assert next_low <= low and high <= next_high
    assert np.allclose(wide[-1], (statistics.low, statistics.high), atol=1e-5)
    assert wide[0][1] < 0.5 * wide[-1][1]


def test_minmax_is_everything():
    assert minmax_range(gathered(torch.tensor([-3.0, 1.0, 5.0]))) == (-3.0, 5.0)


@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize("value", [0.0, 3.5, -2.0, 1e-20, 1e20])
def test_a_constant_has_a_range_that_holds_it(name, value):
    low, high = range_method(name).choose(gathered(torch.full((50,), value)), 99.99)
    assert math.isfinite(low) and math.isfinite(high)
    scale, zero = affine(low, high)
    made = fake_quantize(torch.tensor([value]), scale, zero, 0, 255)
    assert float(made) == pytest.approx(value, rel=0.01, abs=1e-9)


# --- batch norms -----------------------------------------------------------------------------


def settled(module: nn.Module) -> nn.Module:
    """Statistics, scales and shifts that are not the identity."""
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.running_mean.normal_()
            part.running_var.uniform_(0.01, 4)
            if part.affine:
                nn.init.normal_(part.weight)
                nn.init.normal_(part.bias)
    return module.eval()


class Twice(nn.Module):
    """One convolution under two norms: it cannot be folded."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norms = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(4)])

    def forward(self, x):
        return self.norms[0](self.conv(x)) + self.norms[1](self.conv(x + 1))


class Shared(nn.Module):
    """The convolution's output is read beside the norm."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) + y


class OneBias(nn.Module):
    """Two convolutions with one bias between them, and norms after both or the first."""

    def __init__(self, norms: int = 2):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(2))
        self.convs[1].bias = self.convs[0].bias
        self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(norms))

    def forward(self, x):
        for conv, norm in itertools.zip_longest(self.convs, self.norms):
            x = conv(x) if norm is None else norm(conv(x))
        return x


def image(*shape):
    return torch.randn(2, *shape)


FOLDED = {
    "conv": (lambda: (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), (3, 8, 8), 1),
    "no bias": (lambda: (nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)), (3, 8, 8), 1),
    "no affine": (lambda: (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False)), (3, 8, 8), 1),
    "depthwise": (lambda: (nn.Conv2d(4, 8, 3, groups=4), nn.BatchNorm2d(8)), (4, 8, 8), 1),
    "conv1d": (lambda: (nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)), (3, 9), 1),
    "conv3d": (lambda: (nn.Conv3d(3, 4, 3), nn.BatchNorm3d(4)), (3, 5, 5, 5), 1),
    "transposed": (lambda: (nn.ConvTranspose2d(3, 4, 2), nn.BatchNorm2d(4)), (3, 4, 4), 1),
    "linear": (lambda: (nn.Linear(5, 4), nn.BatchNorm1d(4)), (5,), 1),
    "two in a row": (
        lambda: (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)),
        (3, 8, 8),
        2,
    ),
    "transposed, grouped": (
        lambda: (nn.ConvTranspose2d(4, 4, 2, groups=2), nn.BatchNorm2d(4)),
        (4, 4, 4),
        0,
    ),
    "linear over a sequence": (lambda: (nn.Linear(5, 4), nn.BatchNorm1d(3)), (3, 5), 0),
    "norm first": (lambda: (nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)), (3, 8, 8), 0),
    "relu between": (lambda: (nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)), (3, 8, 8), 0),
    "no statistics": (
        lambda: (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)),
        (3, 8, 8),
        0,
    ),
    "one conv, two norms": (lambda: (Twice(),), (3, 8, 8), 0),
    "read twice": (lambda: (Shared(),), (3, 8, 8), 0),
    "one bias, two layers": (lambda: (OneBias(),), (3, 8, 8), 2),
    "one bias, one norm": (lambda: (OneBias(norms=1),), (3, 8, 8), 1),
}


@pytest.mark.parametrize("kind", FOLDED)
def test_folding_is_exact(kind):
    torch.manual_seed(0)
    build, shape, count = FOLDED[kind]
    module = nn.Sequential(*build())
    if kind != "no statistics":
        settled(module)
    model = capture(module.eval(), (image(*shape),))
    folded = model.copy()
    assert len(fold_batch_norm(folded.graph)) == count
    left = [n for n in folded.graph.graph.nodes if "batch_norm" in str(n.target)]
    assert bool(left) == (count == 0)
    x = image(*shape)
    with torch.no_grad():
        ours, theirs = folded.graph(x)[0], module(x)
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    if count:
        assert not any("running" in name or "batches" in name for name in folded.state_dict())


# --- the step --------------------------------------------------------------------------------


class Net(nn.Module):
    """Two convolutions, a max-pool, a residual, a concatenation, a mean and a classifier."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.pool = nn.MaxPool2d(2)
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.side = nn.Conv2d(8, 4, 1)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        x = self.pool(self.norm(self.stem(x)).relu())
        x = (x + self.body(x)).relu()
        x = torch.cat([x, self.side(x)], 1)
        return self.head(x.mean((2, 3)))


PLAIN = {  # float weights and biases stay as they were, and scales are those of 8 bits
    "smooth": 0.0,
    "correct_bias": False,
    "saturation": "vnni",
}
WEIGHTS = ["stem.weight", "body.weight", "side.weight", "head.weight"]


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(48, 3, 12, 12, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def net(images) -> Model:
    torch.manual_seed(0)
    return capture(settled(Net()), (images[:1],))


@pytest.mark.parametrize("ranges", RANGES)
def test_every_method_from_end_to_end(net, images, ranges, tmp_path):
    quantized = Quantize(ranges=ranges, percentile=99.9).apply(net, calibrated(images[:32]))
    assert quantized_weights(quantized) == WEIGHTS
    with torch.no_grad():
        before, after = net(images[32:]), quantized(images[32:])
    assert snr_db(before, after) > 25
    path = onnxruntime.lower(quantized, tmp_path / "net.onnx")
    census = onnxruntime.census(path)
    assert census.unfused == ()
    assert census.integer_ops["QLinearConv"] == 3 and census.integer_ops["QGemm"] == 1
    assert census.integer_ops["QLinearAdd"] == census.integer_ops["QLinearConcat"] == 1
    assert census.integer_ops["QLinearGlobalAveragePool"] == 1
    assert not set(census.float_ops) & {"Conv", "FusedConv", "Gemm", "MatMul", "Add", "Concat"}
    assert census.bytes_by_dtype["int8"] >= sum(net.state_dict()[n].numel() for n in WEIGHTS)
    got = onnxruntime.open(path)(images[32:].numpy())[0]
    assert snr_db(after, torch.from_numpy(got)) > 30  # ties may round apart


def test_clipping_pays_on_heavy_tails(images):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    x = torch.distributions.StudentT(2.5).sample((16_384, 16))
    model = capture(module, (x[:1],))
    found = {}
    for ranges in ("lp", "minmax"):
        quantized = Quantize(ranges=ranges).apply(model, calibrated(x))
        with torch.no_grad():
            found[ranges] = snr_db(model(x), quantized(x))
    assert found["lp"] > found["minmax"] + 0.5


def test_a_narrow_percentile_clips(net, images):
    task = calibrated(images[:32])
    scales = {}
    for percentile in (60.0, 99.0, 100.0):
        made = Quantize(ranges="percentile", percentile=percentile).apply(net, task)
        first = next(n for n in quantizers(made.graph) if n.target is PER_TENSOR)
        scales[percentile] = first.args[1]
    assert scales[60.0] < 0.5 * scales[99.0] and scales[99.0] < 0.95 * scales[100.0]
    exact = affine(float(images[:32].min()), float(images[:32].max()))[0]
    assert scales[100.0] == pytest.approx(exact, rel=1e-3)


def test_one_scale_through_a_max_pool(net, images):
    made = Quantize().apply(net, calibrated(images[:32]))
    pool = next(n for n in made.graph.graph.nodes if "max_pool" in str(n.target))
    (after,) = pool.users
    assert after.target is PER_TENSOR and pool.args[0].target is PER_TENSOR
    assert after.args[1:] == pool.args[0].args[1:]


def test_activations_before_a_relu_have_no_scale_of_their_own(net, images):
    made = Quantize().apply(net, calibrated(images[:32]))
    for node in made.graph.graph.nodes:
        if "relu" in str(node.target):
            assert node.args[0].target is not PER_TENSOR
            (after,) = node.users
            assert after.target is PER_TENSOR and after.args[2] == 0  # nothing below zero


class PostNorm(nn.Module):
    """A norm in float whose result a layer reads, and a sum in float."""

    def __init__(self):
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x):
        x = self.norm(x)
        return x + nn.functional.gelu(self.fc(x))


def test_what_is_computed_in_float_is_rounded_for_integer_ops_alone():
    torch.manual_seed(0)
    x = torch.randn(32, 8)
    made = Quantize().apply(capture(PostNorm().eval(), (x[:1],)), calibrated(x))
    norm = next(n for n in made.graph.graph.nodes if "layer_norm" in str(n.target))
    assert sorted(str(user.target) for user in norm.users) == [
        "aten.add.Tensor",
        "paredown.fake_quantize.default",
    ]


@pytest.mark.parametrize(
    ("settings", "left"),
    [
        ({}, []),
        ({"first": False}, ["stem.weight"]),
        ({"last": False}, ["head.weight"]),
        ({"first": False, "last": False}, ["stem.weight", "head.weight"]),
        ({"exclude": ("body.weight",)}, ["body.weight"]),
        ({"exclude": ("*ody*", "side.*")}, ["body.weight", "side.weight"]),
        ({"exclude": ("*",)}, None),
    ],
)
def test_layers_that_stay_in_float(net, images, settings, left, tmp_path):
    task = calibrated(images[:32])
    if left is None:
        with pytest.raises(
            UserError, match="no convolution, linear or recurrent layer is left to run on"
        ):
            Quantize(**settings).apply(net, task)
        return
    made = Quantize(**settings).apply(net, task)
    assert quantized_weights(made) == [name for name in WEIGHTS if name not in left]
    path = onnxruntime.lower(made, tmp_path / "net.onnx")
    stored = {t.name for t in onnx.load(str(path)).graph.initializer if t.data_type == 1}
    assert all(any(name in item for item in stored) for name in left)


def test_an_exclusion_that_fits_nothing(net, images):
    with pytest.raises(UserError, match=r"exclude 'bodi\.weight' .* nearest is .*body\.weight"):
        Quantize(exclude=("bodi.weight",)).apply(net, calibrated(images))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scheme": "int3"}, "scheme 'int3' is not known"),
        ({"ranges": "magic"}, "'magic' is not one of lp, minmax, percentile, entropy"),
        ({"percentile": 50}, r"percentile must be in \(50, 100\], got 50"),
        ({"percentile": 100.1}, "got 100.1"),
        ({"percentile": math.nan}, "got nan"),
    ],
)
def test_wrong_settings_are_refused_at_once(settings, message):
    with pytest.raises(UserError, match=message):
        Quantize(**settings)


@pytest.mark.parametrize(
    ("module", "example"),
    [
        (nn.Embedding(5, 3), torch.zeros(2, 4, dtype=torch.long)),
        (nn.GELU(), torch.zeros(2, 4)),
        (nn.LayerNorm(4), torch.zeros(2, 4)),
    ],
)
def test_a_model_without_integers_is_refused(module, example):
    with pytest.raises(
        UserError, match="no convolution, linear or recurrent layer is left to run on"
    ):
        Quantize().apply(capture(module, (example,)), calibrated(example))


def test_twice_is_refused(net, images):
    once = Quantize().apply(net, calibrated(images[:8]))
    with pytest.raises(UserError, match="the model is quantized already"):
        Quantize().apply(once, calibrated(images[:8]))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_calibration_data_that_is_not_finite(net, images, bad):
    spoiled = images[:8].clone()
    spoiled[3, 0, 0, 0] = bad
    with pytest.raises(UserError, match=r"calibration: .* are NaN or infinite; check the calib"):
        Quantize().apply(net, calibrated(spoiled))


class Overflow(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.second(self.first(x).exp())


def test_values_that_overflow_inside_the_model_are_named():
    model = capture(Overflow().eval(), (torch.zeros(2, 4),))
    with pytest.raises(UserError, match="values of 'exp' are NaN or infinite"):
        Quantize().apply(model, calibrated(torch.full((8, 4), 1e6)))


class Empty(nn.Module):
    def forward(self, x):
        return x, x[:, :0] * 2


def test_a_value_that_never_ran():
    model = capture(Empty(), (torch.zeros(2, 4),))
    values = [n for n in model.graph.graph.nodes if "slice" in n.name]
    with pytest.raises(UserError, match=r"'slice_.*' never ran on the calibration data"):
        observe(model, calibrated(torch.zeros(8, 4)), values, histogram=True)


@pytest.mark.parametrize("value", [0.0, 0.7])
@pytest.mark.parametrize("ranges", RANGES)
def test_constant_calibration_data(net, ranges, value, tmp_path):
    x = torch.full((8, 3, 12, 12), value)
    made = Quantize(ranges=ranges).apply(net, calibrated(x))
    with torch.no_grad():
        assert torch.isfinite(made(x)).all()
        assert snr_db(net(x), made(x)) > 20
    onnxruntime.lower(made, tmp_path / "net.onnx")


def test_calibration_falls_back_to_the_training_data(net, images):
    data = TensorDataset(images, torch.zeros(len(images)))
    task = Task(example=(images[:1],), score=None, train=data)
    assert task.missing(Quantize.needs) == []
    assert quantized_weights(Quantize().apply(net, task)) == WEIGHTS


# --- biases ----------------------------------------------------------------------------------


def integer_biases(path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Name -> the int32 biases of a file and the scales that they are stored with."""
    graph = onnx.load(str(path)).graph
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    return {
        node.input[0]: (stored[node.input[0]].astype(np.int64), stored[node.input[1]])
        for node in graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in stored
        if stored[node.input[0]].dtype == np.int32
    }


class Dead(nn.Module):
    """Channels of zeros and of tiny weights, whose biases matter all the same."""

    def __init__(self, size: float):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 6, 3), nn.Linear(6, 4)
        with torch.no_grad():
            self.conv.weight[:3] *= size
            self.conv.bias.copy_(torch.tensor([5.0, -300.0, 0.0, 0.1, -0.1, 1e4]))
            self.fc.weight[1:3] *= size
            self.fc.bias.copy_(torch.tensor([0.1, 7.0, -1e5, 0.0]))

    def forward(self, x):
        return self.fc(self.conv(x).mean((2, 3)))


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-12, 1e-6, 1e-3])
def test_biases_fit_into_32_bits(size, images, tmp_path):
    torch.manual_seed(0)
    module = Dead(size).eval()
    model = capture(module, (images[:1],))
    made = Quantize(**PLAIN).apply(model, calibrated(images[:16]))
    path = onnxruntime.lower(made, tmp_path / "dead.onnx")
    biases = list(integer_biases(path).values())
    assert len(biases) == 2
    for (integers, scales), exact in zip(biases, (module.conv.bias, module.fc.bias), strict=True):
        assert np.abs(integers).max() < 2**31 - 1
        error = np.abs(integers * scales.astype(np.float64) - exact.detach().numpy())
        assert (error <= 0.51 * scales + 1e-6 * np.abs(exact.detach().numpy())).all()
    assert onnxruntime.census(path).unfused == ()
    with torch.no_grad():
        assert snr_db(model(images), made(images)) > 25


@pytest.mark.parametrize("size", [0.0, 1e-12, 1e-3])
def test_equalised_and_corrected_biases_fit_too(size, images, tmp_path):
    torch.manual_seed(0)
    model = capture(Dead(size).eval(), (images[:1],))
    made = Quantize().apply(model, calibrated(images[:16]))
    path = onnxruntime.lower(made, tmp_path / "dead.onnx")
    biases = integer_biases(path).values()
    assert len(biases) == 2 and all(np.abs(i).max() < 2**31 - 1 for i, _ in biases)
    with torch.no_grad():
        assert snr_db(model(images), made(images)) > 25


class TwoUses(nn.Module):
    """One weight with a dead channel under two biases, the second one the larger."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        with torch.no_grad():
            self.first.weight[1] = 0.0
            self.first.bias[1], self.second.bias[1] = 0.0, 900.0

    def forward(self, x):
        return self.second(self.first(x).relu())


def test_biases_of_a_shared_weight_all_fit(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(32, 4)
    model = capture(TwoUses().eval(), (x[:1],))
    made = Quantize().apply(model, calibrated(x))
    path = onnxruntime.lower(made, tmp_path / "two.onnx")
    assert all(np.abs(i).max() < 2**31 - 1 for i, _ in integer_biases(path).values())
    with torch.no_grad():
        assert snr_db(model(x), made(x)) > 25
        got = onnxruntime.open(path)(x.numpy())[0]
        assert snr_db(made(x), torch.from_numpy(got)) > 30


# --- weights ---------------------------------------------------------------------------------


def test_weights_behind_one_input_are_rounded_to_their_own_grid(net, images):
    made = Quantize(**PLAIN).apply(net, calibrated(images[:16]))
    state = made.state_dict()
    folded = net.copy()
    fold_batch_norm(folded.graph)
    for name in WEIGHTS:
        assert torch.equal(state[name], folded.state_dict()[name])  # float, to be trained on
        scales = state[f"{name}_scale"]
        assert torch.allclose(scales, channel_scales(state[name], 0))


class Tagger(nn.Module):
    """Looks words and places up; its output layer may be the table of words."""

    def __init__(self, tied: bool):
        super().__init__()
        self.words, self.places = nn.Embedding(200, 32), nn.Embedding(12, 32)
        self.inner, self.head = nn.Linear(32, 32), nn.Linear(32, 200)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, ids):
        x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        return self.head(self.inner(x).relu())


@pytest.fixture(params=[False, True], ids=["apart", "tied"])
def tagger(request):
    torch.manual_seed(0)
    ids = torch.randint(200, (16, 8))
    return capture(Tagger(request.param).eval(), (ids[:1],)), ids


@pytest.mark.parametrize(("bits", "least_db"), [(8, 30), (4, 18)])
def test_tables_are_integers_and_tied_ones_stay_one(bits, least_db, tagger, tmp_path):
    model, ids = tagger
    made = Quantize(embedding_bits=bits, saturation="vnni").apply(model, calibrated(ids))
    table = made.state_dict()["words.weight"]
    [lookup] = [n for n in made.graph.graph.nodes if n.args[:1] and n.name == "embedding"]
    assert lookup.args[0].target is PER_GROUP
    read = rounded(made.graph, lookup.args[0])
    assert snr_db(table, read) > least_db and snr_db(model(ids), made(ids)) > least_db - 3
    if bits == 8:  # a row's scale is that of a linear layer's channel
        assert torch.equal(
            read, fake_quantize_channel(table, channel_scales(table, 0), 0, -127, 127)
        )
    small = onnxruntime.lower(made, tmp_path / "small.onnx")
    float_tables = Quantize(embedding_bits=0, saturation="vnni").apply(model, calibrated(ids))
    large = onnxruntime.lower(float_tables, tmp_path / "large.onnx")
    saved = 200 * 32 * (4 - bits / 8)
    assert large.stat().st_size - small.stat().st_size > 0.8 * saved
    assert onnxruntime.census(small).integer_ops["GatherBlockQuantized"] >= 1


def test_tables_stay_float_where_asked(tagger):
    model, ids = tagger
    for step in (Quantize(embedding_bits=0), Quantize(exclude=("*s.weight", "head.weight"))):
        made = step.apply(model, calibrated(ids))
        [lookup] = [n for n in made.graph.graph.nodes if n.args[:1] and n.name == "embedding"]
        assert lookup.args[0].op == "get_attr"
    with pytest.raises(UserError, match="embedding_bits must be 8, 4, or 0 for float, got 2"):
        Quantize(embedding_bits=2)


def test_a_quantized_model_trains(net, images):
    made = Quantize().apply(net, calibrated(images[:16])).train()
    loss = made(images[:16]).square().mean()
    loss.backward()
    for name in WEIGHTS:
        owner = made.graph.get_parameter(name)
        assert owner.grad is not None and torch.isfinite(owner.grad).all() and owner.grad.any()


class BiasBeside(nn.Module):
    """A layer whose bias is also an output's offset."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.layer(x).relu()), x + self.layer.bias


def test_a_bias_that_another_op_reads_is_not_corrected():
    torch.manual_seed(0)
    x = torch.randn(64, 8)
    model = capture(BiasBeside().eval(), (x[:2],))
    made = Quantize().apply(model, calibrated(x))
    assert torch.equal(made.state_dict()["layer.bias"], model.state_dict()["layer.bias"])
    assert not torch.equal(made.state_dict()["head.bias"], model.state_dict()["head.bias"])
