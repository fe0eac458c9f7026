"""Weight-only quantization: grids against brute force, GPTQ against its definition, small files."""

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
from paredown.data.moments import moment_sum
from paredown.data.scores import accuracy
from paredown.graph import store
from paredown.graph.capture import capture
from paredown.graph.model import Model
from paredown.graph.quantized.forms import form_of
from paredown.graph.quantized.group_scales import (
    affine_grid,
    choose_grid,
    in_groups,
    symmetric_grid,
)
from paredown.graph.quantized.grouped import PER_GROUP, fake_quantize_group
from paredown.graph.quantized.quantizers import quantized_weights, rounded, weight_forms
from paredown.graph.rows import from_rows, rows
from paredown.graph.sites import sites
from paredown.steps import recipe
from paredown.steps.pruning.prune_weights import PruneWeights
from paredown.steps.quantization import gptq_layers
from paredown.steps.quantization.gptq import gptq, triangular_factor
from paredown.steps.quantization.quantize import Quantize
from paredown.steps.quantization.quantize_weights import QuantizeWeights
from paredown.steps.training.fine_tune import FineTune
from paredown.targets.parity import agreement_db
from paredown.targets.runtimes import onnxruntime

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore")
GRIDS = {8: (-128, 127), 4: (-8, 7)}


def calibrated(inputs: Tensor, batch_size: int = 16) -> Task:
    data = TensorDataset(inputs, torch.zeros(len(inputs)))
    return Task(example=(inputs[:1],), score=None, calibration=data, batch_size=batch_size)


def run(model: Model, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return model.graph(inputs)[0]


# --- the op ----------------------------------------------------------------------------------


def one_by_one(weight, scale, zero, axis, group, low, high):
    """The definition, weight by weight, in Python's numbers."""
    made = weight.clone()
    moved, out = weight.movedim(axis, 0).flatten(1), made.movedim(axis, 0)
    features = moved.shape[1]
    result = torch.zeros_like(moved)
    for r, f in itertools.product(range(moved.shape[0]), range(features)):
        g = f // group if group else 0
        s, z = scale[r, g], 0 if zero is None else int(zero[r, g])
        steps = round(float(moved[r, f] / s)) + z
        result[r, f] = s * (max(low, min(high, steps)) - z)
    out.copy_(result.reshape(out.shape))
    return made


@pytest.mark.parametrize(("shape", "axis"), [((5, 12), 0), ((12, 5), 1), ((3, 2, 2, 5), 1)])
@pytest.mark.parametrize("group", [0, 3, 4, 5, 64])
@pytest.mark.parametrize("affine", [False, True])
def test_a_weight_is_rounded_as_defined(shape, axis, group, affine):
    torch.manual_seed(0)
    weight = torch.randn(shape)
    channels = shape[axis]
    groups = -(-(weight.numel() // channels) // group) if group else 1
    scale = torch.rand(channels, groups) * 0.3 + 0.05
    zero = torch.randint(-8, 8, scale.shape, dtype=torch.int8) if affine else None
    made = fake_quantize_group(weight, scale, zero, axis, group, -8, 7)
    assert made.shape == weight.shape and made.is_contiguous()
    assert torch.equal(made, one_by_one(weight, scale, zero, axis, group, -8, 7))
    again = fake_quantize_group(made, scale, zero, axis, group, -8, 7)
    assert torch.equal(again, made)


@given(st.integers(0, 2**31), st.sampled_from([4, 8]), st.floats(1e-6, 1e6), st.booleans())
def test_rounding_twice_changes_no_bit_and_zeros_stay(seed, bits, size, affine):
    torch.manual_seed(seed)
    weight = torch.randn(4, 40) * size * torch.rand(4, 1)
    weight[torch.rand(4, 40) < 0.3] = 0
    low, high = GRIDS[bits]
    scale, zero = choose_grid(weight, 16, low, high, zero_point=affine)
    made = fake_quantize_group(weight, scale, zero, 0, 16, low, high)
    assert torch.equal(fake_quantize_group(made, scale, zero, 0, 16, low, high), made)
    assert not made[weight == 0].any()


def test_gradients_pass_straight_through_inside_the_grid():
    weight = torch.tensor([[0.1, -9.0, 0.2, 9.0]], requires_grad=True)
    zero = torch.tensor([[0, 7]], dtype=torch.int8)
    scale = torch.tensor([[0.1, 0.1]])
    fake_quantize_group(weight, scale, zero, 0, 2, -8, 7).sum().backward()
    assert weight.grad.tolist() == [[1.0, 0.0, 0.0, 0.0]]


def test_rows_and_back():
    weight = torch.randn(3, 4, 2, 2)
    for axis in range(4):
        flat = rows(weight, axis)
        assert flat.shape == (weight.shape[axis], weight.numel() // weight.shape[axis])
        assert torch.equal(from_rows(flat, weight, axis), weight)


# --- grids -----------------------------------------------------------------------------------


def error(weight: Tensor, importance: Tensor, scale: Tensor, zero: Tensor | None, bits: int):
    low, high = GRIDS[bits]
    z = 0 if zero is None else zero.float()[..., None]
    s = scale[..., None]
    made = s * ((weight / s).round() + z).clamp(low, high) - s * z
    return (importance * (made - weight) ** 2).sum(2)


@pytest.mark.parametrize(("bits", "above"), [(4, 1.06), (8, 1.5)])
def test_scales_err_about_as_little_as_the_best_of_many(bits, above):
    torch.manual_seed(0)
    weight = torch.distributions.StudentT(4.0).sample((6, 3, 32))
    importance = torch.rand(6, 3, 32) ** 2
    low, high = GRIDS[bits]
    found = error(weight, importance, symmetric_grid(weight, importance, low, high)[0], None, bits)
    widest = weight.abs().amax(2) / high
    tried = [
        error(weight, importance, widest * share, None, bits)
        for share in np.linspace(0.3, 1.1, 2000)
    ]
    assert (found <= error(weight, importance, widest, None, bits)).all()
    assert float((found / torch.stack(tried).amin(0)).mean()) < above


def test_zero_points_pay_on_lopsided_groups_alone():
    torch.manual_seed(0)
    centred, lopsided = torch.randn(8, 256), torch.rand(8, 256) - 0.2
    scale, zero = choose_grid(lopsided, 32, -8, 7)
    assert zero is not None and zero.dtype is torch.int8 and zero.shape == scale.shape == (8, 8)
    assert choose_grid(centred.sign() * (1 + centred.abs()), 0, -8, 7)[1] is None
    groups, ones = in_groups(lopsided, 32), torch.ones(8, 8, 32)
    plain = error(groups, ones, symmetric_grid(groups, ones, -8, 7)[0], None, 4)
    affine = error(groups, ones, *affine_grid(groups, ones, -8, 7), 4)
    assert float(affine.sum()) < 0.5 * float(plain.sum())


def test_what_counts_is_rounded_closer():
    torch.manual_seed(0)
    weight = torch.randn(16, 1, 64)
    counts = torch.ones(16, 1, 64)
    counts[..., :8] = 100.0
    ones = torch.ones_like(counts)

    def of_first(importance: Tensor) -> float:
        scale, _ = symmetric_grid(weight, importance, -8, 7)
        return float(error(weight[..., :8], ones[..., :8], scale, None, 4).sum())

    assert of_first(counts) < 0.9 * of_first(ones)


def test_a_group_of_zeros_has_a_scale_and_the_last_group_may_be_short():
    weight = torch.zeros(2, 20)
    weight[1, 16:] = torch.tensor([1.0, -2.0, 3.0, -4.0])
    scale, zero = choose_grid(weight, 16, -8, 7, zero_point=False)
    assert scale.shape == (2, 2) and (scale > 0).all() and zero is None
    made = fake_quantize_group(weight, scale, None, 0, 16, -8, 7)
    assert not made[weight == 0].any() and float((made - weight).abs().max()) < 0.3


def test_scales_are_halves_unless_too_small():
    weight = torch.randn(4, 64)
    scale, _ = choose_grid(weight, 32, -8, 7)
    assert torch.equal(scale.half().float(), scale)
    tiny, _ = choose_grid(weight * 1e-9, 32, -8, 7)
    assert not torch.equal(tiny.half().float(), tiny)


# --- GPTQ ------------------------------------------------------------------------------------


def correlated(features: int, places: int = 400) -> Tensor:
    """Inputs (P, F) that depend on each other."""
    mixing = torch.randn(features, features) / math.sqrt(features)
    return torch.randn(places, features) @ (mixing + 0.5 * torch.randn(1, features))


def by_definition(weight, hessian, scale, damping, order):
    """Optimal brain quantization in GPTQ's order, with an inverse for each input; float64."""
    h = hessian.double().clone()
    h += damping * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    places = hessian.diagonal().argsort(descending=True, stable=True) if order else range(len(h))
    places = [int(p) for p in places]
    w = weight.double().clone()
    for n, p in enumerate(places):
        left = places[n:]
        inverse = h[left][:, left].inverse()
        made = (w[:, p] / scale[:, p]).round().clamp(-8, 7) * scale[:, p]
        step = (w[:, p] - made) / inverse[0, 0]
        w[:, left[1:]] -= step[:, None] * inverse[0, 1:]
        w[:, p] = made
    return w.float()


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("features", [7, 150])  # one block, and two
def test_gptq_is_what_its_paper_defines(order, features):
    torch.manual_seed(features)
    weight = torch.randn(5, features)
    hessian = moment_sum(correlated(features)[None]) / 400
    scale = torch.full_like(weight, 0.4)
    args = (weight[None], hessian, scale[None], torch.zeros_like(scale)[None], -8, 7)
    made = gptq(*args, damping=0.05, order=order)[0]
    expected = by_definition(weight, hessian[0], scale, 0.05, order)
    assert float((made != expected).float().mean()) < 0.01  # ties aside
    nearest = (weight / scale).round().clamp(-8, 7) * scale

    def loss(candidate: Tensor) -> float:
        change = candidate - weight
        return float((change @ hessian[0] @ change.T).trace())

    assert loss(made) < 0.7 * loss(nearest)


def test_gptq_of_several_parts_is_that_of_each():
    torch.manual_seed(0)
    weight, scale = torch.randn(3, 4, 9), torch.full((3, 4, 9), 0.5)
    hessian = torch.cat([moment_sum(correlated(9)[None]) / 400 for _ in range(3)])
    zeros = torch.randint(-8, 8, (3, 4, 9)).float()
    whole = gptq(weight, hessian, scale, zeros, -8, 7)
    for n in range(3):
        part = slice(n, n + 1)
        alone = gptq(weight[part], hessian[part], scale[part], zeros[part], -8, 7)
        assert torch.equal(whole[part], alone)


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_dead_inputs_and_a_singular_hessian_are_no_obstacle(rank):
    torch.manual_seed(0)
    inputs = torch.randn(rank, 12) if rank else torch.zeros(1, 12)
    inputs[:, 4:6] = 0
    weight, scale = torch.randn(1, 6, 12), torch.full((1, 6, 12), 0.3)
    hessian = moment_sum(inputs[None]) / len(inputs)
    for damping in (0.0, 0.01):
        made = gptq(weight, hessian, scale, 0 * scale, -8, 7, damping=damping)
        assert torch.isfinite(made).all()
        nearest = (weight / scale).round().clamp(-8, 7) * scale
        dead = [4, 5] if rank else list(range(12))
        assert torch.equal(made[..., dead], nearest[..., dead])
        assert torch.equal((made / scale).round() * scale, made)


def test_pruned_weights_stay_zero_and_the_rest_makes_up_for_rounding():
    torch.manual_seed(0)
    weight = torch.randn(1, 8, 16)
    weight.view(-1, 4)[:, :2] = 0  # 2:4
    hessian = moment_sum(correlated(16)[None]) / 400
    made = gptq(weight, hessian, torch.full_like(weight, 0.4), torch.zeros_like(weight), -8, 7)
    assert not made[weight == 0].any() and made[weight != 0].any()


def test_moments_and_their_factor_are_those_of_all_rows():
    rows = torch.randn(2, 40, 1100).double()  # three panels
    moments = moment_sum(rows)
    assert torch.allclose(moments, rows.mT @ rows) and torch.equal(moments, moments.mT)
    lower = triangular_factor(moments, 0.1)
    level = moments.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    damped = moments + 0.1 * level * torch.eye(1100, dtype=torch.float64)
    assert torch.allclose(lower @ lower.mT, damped, rtol=1e-8)
    assert torch.equal(lower, lower.tril())


# --- the step --------------------------------------------------------------------------------


class Mixed(nn.Module):
    """One of each kind of weight: lookup, linear, product, convolutions, recurrent layer."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50, 48)
        self.linear = nn.Linear(48, 40)
        self.product = nn.Parameter(torch.randn(40, 48) / 6)
        self.conv = nn.Conv1d(48, 32, 3, padding=1)
        self.grouped = nn.Conv1d(32, 32, 5, padding="same", groups=4)
        self.up = nn.ConvTranspose1d(32, 24, 4, stride=2, padding=1, groups=2)
        self.lstm = nn.LSTM(24, 20, batch_first=True)
        self.head = nn.Linear(20, 3)  # whose weight would not be smaller

    def forward(self, ids):
        x = self.linear(self.table(ids)).relu() @ self.product  # (B, T, 48)
        x = self.grouped(self.conv(x.transpose(1, 2)).relu())  # (B, 32, T)
        x, _ = self.lstm(self.up(x).transpose(1, 2))
        return self.head(x.tanh().mean(1))


WEIGHTS = {
    *("table.weight", "linear.weight", "product", "conv.weight", "grouped.weight", "up.weight"),
    *("lstm.weight_ih_l0", "lstm.weight_hh_l0"),
}


@pytest.fixture(scope="module")
def mixed():
    torch.manual_seed(0)
    ids = torch.randint(50, (24, 16))
    return capture(Mixed().eval(), (ids[:1],)), calibrated(ids)


SETTINGS = [
    *(
        {"bits": bits, "embedding_bits": bits, "group": group}
        for bits in (8, 4)
        for group in (0, 16, 32)
    ),
    *(
        {"bits": bits, "embedding_bits": bits, "zero_point": True, "group": group}
        for bits in (8, 4)
        for group in (0, 32)
    ),
]


def noise_db(model: Model, made: Model, inputs: Tensor) -> float:
    return agreement_db(run(model, inputs).numpy(), run(made, inputs).numpy())


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_every_kind_of_weight_is_quantized(settings, method, mixed):
    model, task = mixed
    made = QuantizeWeights(method=method, **settings).apply(model, task)
    found = quantized_weights(made.graph)
    assert set(found) == WEIGHTS
    assert {s.weight for s in sites(made.graph)} == {s.weight for s in sites(model.graph)}
    for name, node in found.items():
        assert node.target is PER_GROUP and form_of(node).bits == settings["bits"]
        weight = made.state_dict()[name]
        again = rounded(made.graph, node)
        assert torch.equal(again, weight) or method == "rtn" or name not in SOLVED
        assert agreement_db(weight.numpy(), again.numpy()) > (12 if settings["bits"] == 4 else 35)
        has_zero = f"{name}_zero_point" in made.state_dict()
        assert has_zero == settings.get("zero_point", has_zero)
    inputs = task.calibration[:8][0]
    assert noise_db(model, made, inputs) > (10 if settings["bits"] == 4 else 30)


SOLVED = {"linear.weight", "product", "conv.weight", "grouped.weight", "up.weight"}


@pytest.mark.parametrize("name", sorted(SOLVED))
def test_gptq_lowers_the_error_of_each_kind_of_layer(name, mixed):
    """Of its outputs on the calibration data, beside rounding to nearest on the same grid."""
    model, task = mixed
    others = tuple(sorted(WEIGHTS - {name}))
    inputs = task.calibration[:][0]
    outputs = {}
    for method in ("rtn", "gptq"):
        step = QuantizeWeights(4, group=0, method=method, exclude=others, zero_point=False)
        made = step.apply(model, task)
        node = next(s.node for s in sites(made.graph) if s.weight == name)
        outputs[method] = layer_output(made, node.name, inputs)
    before = layer_output(model, node.name, inputs)
    found = {key: agreement_db(before.numpy(), out.numpy()) for key, out in outputs.items()}
    assert found["gptq"] > found["rtn"] + 0.3, found


def layer_output(model: Model, name: str, inputs: Tensor) -> Tensor:
    seen = []

    class Watching(torch.fx.Interpreter):
        def run_node(self, n):
            result = super().run_node(n)
            if n.name == name:
                seen.append(result)
            return result

    with torch.no_grad():
        Watching(model.graph).run(inputs)
    return seen[0]


def test_a_layer_is_rounded_on_what_the_rounded_layers_before_give_it(monkeypatch):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    x = torch.randn(64, 32)
    seen = {}
    plain = gptq_layers.hessian_of

    def watch(layer, inputs):
        seen[layer.name] = torch.cat(list(inputs))
        return plain(layer, inputs)

    monkeypatch.setattr(gptq_layers, "hessian_of", watch)
    model = capture(net.eval(), (x[:1],))
    made = QuantizeWeights(4).apply(model, calibrated(x))
    order = [int(((x - row).abs().sum(1)).argmin()) for row in seen["0.weight"]]
    assert sorted(order) == list(range(64))
    with torch.no_grad():
        first = nn.functional.linear(x[order], made.state_dict()["0.weight"], net[0].bias).relu()
        float_first = net[1](net[0](x[order]))
    assert torch.allclose(seen["2.weight"], first, atol=1e-6)
    assert not torch.allclose(seen["2.weight"], float_first, atol=1e-3)


class Tied(nn.Module):
    """The table that is looked up is what the head multiplies with."""

    def __init__(self, words: int, width: int):
        super().__init__()
        self.table, self.mix = nn.Embedding(words, width), nn.Linear(width, width)
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids):
        return self.head(self.mix(self.table(ids)))


def test_a_tied_table_stays_tied_and_is_rounded_once():
    torch.manual_seed(0)
    ids = torch.randint(60, (16, 5))
    model = capture(Tied(60, 32).eval(), (ids[:1],))
    made = QuantizeWeights(4).apply(model, calibrated(ids))
    state = made.state_dict()
    assert state["table.weight"] is state["head.weight"] or torch.equal(
        state["table.weight"], state["head.weight"]
    )
    named = dict(made.graph.named_parameters(remove_duplicate=False))
    assert named["table.weight"] is named["head.weight"]
    values = [rounded(made.graph, node) for node in quantized_weights(made.graph).values()]
    assert len(values) >= 2 and not torch.equal(values[0], state["table.weight"])
    assert all(torch.equal(values[0], v) for v in values if v.shape == values[0].shape)
    loaded = Model.decode(store.encode(made), "made")
    assert torch.equal(run(loaded, ids), run(made, ids))


# --- the file --------------------------------------------------------------------------------


def lowered(model: Model, folder, inputs: Tensor):
    """The file's path, its census, and its agreement with the model in dB."""
    path = onnxruntime.lower(model, folder / "model.onnx")
    got = onnxruntime.open(path)(inputs.numpy())[0]
    return path, onnxruntime.census(path), agreement_db(run(model, inputs).numpy(), got)


def held_bytes(made: Model) -> int:
    """What the rounded weights, their scales as halves and their zero points take; the last group
    of a weight that is no linear layer's is filled up."""
    total = 0
    for name, node in quantized_weights(made.graph).items():
        weight, bits = made.state_dict()[name], form_of(node).bits
        total += weight.numel() * bits // 8
        if node.args[4]:
            channels = weight.shape[node.args[3]]
            total += channels * (-weight.numel() // channels % node.args[4]) * bits // 8
        total += 2 * made.state_dict()[f"{name}_scale"].numel()
        total += made.state_dict().get(f"{name}_zero_point", torch.zeros(0)).numel() * bits // 8
    return total


@pytest.mark.parametrize(
    "settings", [pytest.param(s, marks=pytest.mark.slow) for s in SETTINGS[:-1]] + SETTINGS[-1:]
)
def test_the_file_is_small_and_computes_the_same(settings, mixed, tmp_path):
    model, task = mixed
    made = QuantizeWeights(method="rtn", **settings).apply(model, task)
    path, census, agreement = lowered(made, tmp_path, task.calibration[:8][0])
    assert agreement > 30
    assert census.integer_ops == {"GatherBlockQuantized": 1, "MatMulNBits": 2}
    assert "DequantizeLinear" not in census.float_ops
    held = sum(census.bytes_by_dtype.values())
    assert held <= held_bytes(made) + 4 * 60 * 8  # and what is left in float: biases
    assert path.stat().st_size <= held + 11_000  # the graph


PRODUCTS = [  # bits, group, zero point, width, dimensions of the input
    *itertools.product((8, 4), (0, 32), (False, True), (32, 48, 100), (2, 3)),
]
QUICK_PRODUCTS = {(4, 32, False, 100, 2), (8, 0, False, 48, 3), (4, 32, True, 48, 3)}


def quick(cases, chosen):
    """All cases, those that are not chosen marked slow."""
    return [pytest.param(*c, marks=() if c in chosen else pytest.mark.slow) for c in cases]


@pytest.mark.parametrize(
    ("bits", "group", "zero_point", "features", "dims"), quick(PRODUCTS, QUICK_PRODUCTS)
)
def test_products_of_any_width_are_fused_with_their_weights(
    bits, group, zero_point, features, dims, tmp_path
):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(features, 64), nn.ReLU(), nn.Linear(64, 33, bias=False))
    x = torch.randn(*(6, 5)[: dims - 1], features)
    model = capture(net.eval(), (x[:1],))
    made = QuantizeWeights(bits, group, method="rtn", zero_point=zero_point).apply(model, None)
    _, census, agreement = lowered(made, tmp_path, x)
    assert census.integer_ops == {"MatMulNBits": 2} and agreement > 35
    assert "DequantizeLinear" not in census.float_ops and census.unfused == ()


TABLES = [*itertools.product((8, 4), (32, 36, 48, 96), (False, True))]


@pytest.mark.parametrize(
    ("bits", "features", "zero_point"), quick(TABLES, {(4, 96, True), (8, 48, False)})
)
def test_a_tied_table_is_in_the_file_once(bits, features, zero_point, tmp_path):
    torch.manual_seed(0)
    ids = torch.randint(200, (4, 5))
    model = capture(Tied(200, features).eval(), (ids[:1],))
    step = QuantizeWeights(bits, method="rtn", zero_point=zero_point, embedding_bits=bits)
    made = step.apply(model, None)
    _, census, agreement = lowered(made, tmp_path, ids)
    assert agreement > 30
    once = features % 16 == 0
    table = 200 * features * bits // 8
    held = sum(v for k, v in census.bytes_by_dtype.items() if "float" not in k)
    assert table <= held < (1.5 if once else 3) * table + features**2 * bits // 8


def test_scales_too_small_for_halves_stay_float(tmp_path):
    torch.manual_seed(0)
    net = nn.Linear(64, 64, bias=False)
    x = torch.randn(4, 64)
    for size, kind in ((1.0, "float16"), (1e-6, "float")):
        with torch.no_grad():
            net.weight.copy_(torch.randn(64, 64) * size)
        made = QuantizeWeights(4, method="rtn").apply(capture(net.eval(), (x[:1],)), None)
        _, census, agreement = lowered(made, tmp_path, x)
        assert agreement > 35 and census.bytes_by_dtype[kind] == 64 * 2 * (2 if size == 1 else 4)


def test_a_table_of_odd_width_is_small_on_disk(tmp_path):
    torch.manual_seed(0)
    ids = torch.randint(200, (4, 5))
    net = nn.Sequential(nn.Embedding(200, 63), nn.Linear(63, 3))
    step = QuantizeWeights(4, method="rtn", embedding_bits=4)
    made = step.apply(capture(net.eval(), (ids[:1],)), None)
    path, census, agreement = lowered(made, tmp_path, ids)
    assert agreement > 30 and census.float_ops["Gather"] == 1  # of floats, once it is loaded
    assert path.stat().st_size < 200 * 63 / 2 + 200 * 2 * 2 + 2500


def test_pruned_weights_stay_zero_through_gptq_and_2_of_4_stays(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
    x = torch.randn(64, 64) @ torch.randn(64, 64)
    model, task = capture(net.eval(), (x[:1],)), calibrated(x)
    pruned = PruneWeights(pattern="2:4").apply(model, task)
    made = recipe.apply_step(pruned, QuantizeWeights(4), task)
    for name, node in quantized_weights(made.graph).items():
        assert not rounded(made.graph, node)[~pruned.masks[name]].any()
        assert ((rounded(made.graph, node).reshape(-1, 4) == 0).sum(1) >= 2).all()
        assert not torch.equal(made.state_dict()[name], pruned.state_dict()[name])
    path = onnxruntime.lower(made, tmp_path / "model.onnx")
    columns = [
        onnx.numpy_helper.to_array(t).astype(np.int32)
        for t in onnx.load(str(path)).graph.initializer
        if t.name.endswith("_columns")
    ]
    assert len(columns) == 2
    for integers in columns:  # (inputs, outputs)
        most, counts = np.unique(integers, return_counts=True)
        zero = most[counts.argmax()]
        assert ((integers.T.reshape(-1, 4) == zero).sum(1) >= 2).all()


def test_fine_tuning_goes_on_through_the_rounding(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))
    x = torch.randn(256, 16)
    data = TensorDataset(x, x[:, :4].argmax(1))
    task = Task(
        example=(x[:1],),
        score=accuracy,
        loss=nn.functional.cross_entropy,
        train=data,
        validation=data,
    )
    model = FineTune(epochs=8, lr=1e-2, device="cpu").apply(capture(net, task.example), task)
    small = QuantizeWeights(4, group=0, method="rtn").apply(model, task)
    tuned = FineTune(epochs=4, lr=2e-3, device="cpu").apply(small, task)

    def loss(each: Model) -> float:
        return float(task.loss(run(each, x), data.tensors[1]))

    assert loss(tuned) < loss(small)
    _, _, agreement = lowered(tuned, tmp_path, x)
    assert agreement > 30


# --- what cannot be --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 3}, "bits: expected 4 or 8, got 3."),
        ({"bits": 16}, "bits: expected 4 or 8, got 16."),
        (
            {"group": 24},
            "group: expected a power of 2 from 16 up, or 0 for whole channels, got 24.",
        ),
        ({"group": 8}, "group: expected a power of 2 from 16 up"),
        ({"group": -32}, "group: expected a power of 2 from 16 up"),
        ({"embedding_bits": 3}, "embedding_bits: expected 8, 4, or 0 for float, got 3."),
        ({"method": "awq"}, 'method: expected "gptq" or "rtn", got \'awq\'.'),
        ({"damping": -1.0}, "damping: expected a share from 0 up, got -1.0."),
        ({"damping": math.inf}, "damping: expected a share from 0 up, got inf."),
        ({"examples": 0}, "examples: expected a whole number from 1 up, got 0."),
        ({"exclude": "head"}, "exclude: expected a tuple of names, got the text 'head'."),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(UserError) as caught:
        QuantizeWeights(**settings)
    assert str(caught.value).startswith(message)


def linear_model(x: Tensor, **kwargs) -> Model:
    torch.manual_seed(0)
    return capture(nn.Sequential(nn.Linear(x.shape[1], 64), nn.Linear(64, 64)), (x[:1],))


def test_gptq_needs_calibration_data_and_rounding_to_nearest_none():
    x = torch.randn(8, 32)
    bare = Task(example=(x[:1],), score=None)
    assert QuantizeWeights().needs == {"calibration"} and QuantizeWeights.needs == frozenset()
    assert QuantizeWeights(method="rtn").needs == frozenset()
    with pytest.raises(UserError, match=r"QuantizeWeights\(\): needs calibration of the task"):
        recipe.apply(linear_model(x), [QuantizeWeights()], bare)
    assert recipe.apply(linear_model(x), [QuantizeWeights(method="rtn")], bare)


@pytest.mark.parametrize("count", [1, 3])
def test_one_example_or_constant_data_will_do(count):
    x = torch.randn(1, 32).repeat(count, 1)
    model = linear_model(x)
    made = QuantizeWeights(4).apply(model, calibrated(x))
    assert agreement_db(run(model, x).numpy(), run(made, x).numpy()) > 25  # it fits these alone
    zeros = QuantizeWeights(4).apply(model, calibrated(0 * x))
    assert agreement_db(run(model, x).numpy(), run(zeros, x).numpy()) > 10


def test_nan_is_told_where_it_is():
    x = torch.randn(8, 32)
    bad = x.clone()
    bad[2, 3] = math.nan
    with pytest.raises(UserError, match=r"calibration: inputs of the layer of '0.weight' are NaN"):
        QuantizeWeights().apply(linear_model(x), calibrated(bad))
    model = linear_model(x)
    with torch.no_grad():
        model.graph.get_parameter("1.weight")[0, 0] = math.inf
    with pytest.raises(UserError, match=r"'1.weight' holds NaN or infinite weights"):
        QuantizeWeights(method="rtn").apply(model, None)


def test_what_is_left_out_stays_float_and_nothing_left_is_told():
    x = torch.randn(8, 32)
    model = linear_model(x)

    def quantized(**settings) -> set[str]:
        made = QuantizeWeights(method="rtn", **settings).apply(model, None)
        return set(quantized_weights(made.graph))

    assert quantized(first=False) == {"1.weight"} and quantized(last=False) == {"0.weight"}
    assert quantized(exclude=("1",)) == {"0.weight"} == quantized(exclude=("1.*",))
    with pytest.raises(UserError, match=r"no layer or weight is called 'head'; did you mean"):
        quantized(exclude=("head",))
    with pytest.raises(UserError, match=r"no float32 weight is left .*, besides those excluded"):
        quantized(exclude=("*",))
    made = QuantizeWeights(method="rtn").apply(model, None)
    with pytest.raises(UserError, match=r"the model is quantized already; no float32 weight"):
        QuantizeWeights(method="rtn").apply(made, None)


def test_tables_have_bits_of_their_own():
    net = nn.Sequential(nn.Embedding(100, 32), nn.Linear(32, 32))
    model = capture(net.eval(), (torch.zeros(1, 4, dtype=torch.long),))
    for bits in (8, 4):
        made = QuantizeWeights(4, method="rtn", embedding_bits=bits).apply(model, None)
        found = {name: form.bits for name, form in weight_forms(made.graph).items()}
        assert found == {"0.weight": bits, "1.weight": 4}


def test_tables_may_stay_float():
    net = nn.Sequential(nn.Embedding(100, 32), nn.Linear(32, 32))
    model = capture(net.eval(), (torch.zeros(1, 4, dtype=torch.long),))
    made = QuantizeWeights(method="rtn", embedding_bits=0).apply(model, None)
    assert set(quantized_weights(made.graph)) == {"1.weight"}


def test_a_group_larger_than_the_layer_is_its_whole_channel():
    x = torch.randn(8, 32)
    made = QuantizeWeights(4, group=128, method="rtn").apply(linear_model(x), None)
    state = made.state_dict()
    assert state["0.weight_scale"].shape == (64, 1) and state["1.weight_scale"].shape == (64, 1)
    assert [node.args[4] for node in quantized_weights(made.graph).values()] == [0, 0]


def test_what_int8_left_in_float_can_follow():
    torch.manual_seed(0)
    ids = torch.randint(100, (16, 6))
    net = nn.Sequential(nn.Embedding(100, 32), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))
    model, task = capture(net.eval(), (ids[:1],)), calibrated(ids)
    int8 = Quantize("int8", embedding_bits=0).apply(model, task)
    made = QuantizeWeights(8, method="rtn").apply(int8, task)
    assert set(quantized_weights(made.graph)) == {"0.weight", "1.weight", "3.weight"}
    assert noise_db(int8, made, ids) > 30
