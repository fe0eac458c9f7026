"""The table of weight forms: what each record says is so, and a new one is counted everywhere."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import paredown
from paredown.core.errors import UserError
from paredown.core.task import Task
from paredown.explain import restore
from paredown.explain.layers import find_layers, folded
from paredown.graph.capture import capture
from paredown.graph.quantized.codes import from_bytes, to_bytes
from paredown.graph.quantized.forms import WEIGHT_FORMS, Form, Rounded, form_of, of_op
from paredown.graph.quantized.group_scales import choose_grid
from paredown.graph.quantized.grouped import PER_GROUP, spread
from paredown.graph.quantized.per_channel import PER_CHANNEL
from paredown.graph.quantized.quantizers import (
    PER_TENSOR,
    quantized_weights,
    quantizers,
    read,
    rounded,
    weight_forms,
)
from paredown.graph.quantized.scales import channel_scales
from paredown.graph.rows import from_rows, rows
from paredown.run.details import _layers
from paredown.steps.pruning.prune_weights import PruneWeights
from paredown.steps.recipe import apply
from paredown.targets.runtimes import RUNTIMES, pytorch, runtime

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore")
OF_INTEGERS = [name for name, form in WEIGHT_FORMS.items() if form.dtype is None]
each_form = pytest.mark.parametrize("name", OF_INTEGERS)


def arguments(form: Form, weight: Tensor, axis: int, group: int, zero_point: bool) -> tuple:
    """What the form's op takes behind the weight."""
    if form.op is PER_CHANNEL:
        return channel_scales(weight, axis, form.high), axis, form.low, form.high
    if form.op is PER_GROUP:
        flat, ends = rows(weight, axis), (form.low, form.high)
        return *choose_grid(flat, group, *ends, zero_point=zero_point), axis, group, *ends
    return (axis,)


def product(made: Rounded) -> Tensor:
    """Integers, less their zero points, times their scales, in the shape of the weight."""
    features = made.integers.shape[1]
    steps = made.integers.float()
    if made.zero_points is not None:
        steps -= spread(made.zero_points, made.group, features)
    return from_rows(steps * spread(made.scales, made.group, features), made.weight, made.axis)


# --- what a record says ----------------------------------------------------------------------


@each_form
@pytest.mark.parametrize("shape, axis", [((6, 40), 0), ((5, 7), 1), ((4, 6, 3, 3), 1)])
@pytest.mark.parametrize("group, zero_point", [(0, False), (16, True)])
def test_integers_times_scales_are_what_the_op_computes(name, shape, axis, group, zero_point):
    torch.manual_seed(0)
    form, weight = WEIGHT_FORMS[name], torch.randn(shape)
    weight.select(axis, 1).zero_()
    rest = arguments(form, weight, axis, group, zero_point)
    made = form.read("weight", weight, *rest)
    assert torch.equal(product(made), form.op(weight, *rest))
    assert torch.equal(made.values(), form.op(weight, *rest))
    assert set(made.integers.unique().tolist()) <= set(form.grid)
    assert made.integers.shape == rows(weight, axis).shape
    assert len(made.scales) == shape[axis] and made.integers.dtype is torch.int8
    assert made.shaped().shape == weight.shape
    assert torch.equal(rows(made.shaped(), axis), made.integers)


@each_form
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_packing_loses_nothing(name, data):
    form = WEIGHT_FORMS[name]
    values = data.draw(st.lists(st.sampled_from(form.grid), min_size=1, max_size=70))
    line = torch.tensor(values, dtype=torch.int8)
    packed = form.pack(line)
    assert torch.equal(form.unpack(packed, line.shape), line)
    assert packed.dtype is torch.uint8 and packed.numel() == form.stored_bytes(len(line))
    assert form.stored_bytes(8 * len(line)) + form.saved_bytes(8 * len(line)) == 32 * len(line)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_rows_of_bytes_are_packed_apart(bits):
    codes = torch.randint(2**bits, (3, 5))
    packed = to_bytes(codes, bits)
    assert packed.shape == (3, -(-5 * bits // 8))
    assert torch.equal(from_bytes(packed, bits, 5).long(), codes)
    assert all(
        torch.equal(to_bytes(row, bits), line) for row, line in zip(codes, packed, strict=True)
    )


@each_form
def test_a_grid_has_as_many_numbers_as_its_bits_hold(name):
    form = WEIGHT_FORMS[name]
    assert 2 ** (form.bits - 1) < len(form.grid) <= 2**form.bits and form.bits in (1, 2, 4, 8)
    assert of_op(form.op, form.bits).word == form.word


def test_what_is_packed_is_told_apart_by_its_bits():
    packed = [form.bits for form in WEIGHT_FORMS.values() if form.follows]
    assert len(set(packed)) == len(packed)


def test_every_form_is_written_by_a_runtime():
    assert set(WEIGHT_FORMS) == set().union(*(runtime(name).FORMS for name in RUNTIMES))
    assert all(form.name == name for name, form in WEIGHT_FORMS.items())


def test_a_grid_that_no_form_has():
    with pytest.raises(LookupError, match=r"fake_quantize_channel.default and 3 bits"):
        of_op(PER_CHANNEL, 3)


# --- what is told of a model -----------------------------------------------------------------


class Net(nn.Module):
    """Three layers, so that one is neither the first nor the last."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(torch.relu(self.fc2(torch.relu(self.fc1(x)))))


@pytest.fixture(scope="module")
def task() -> Task:
    data = TensorDataset(torch.randn(64, 64), torch.zeros(64))
    return Task(example=(torch.zeros(1, 64),), score=None, calibration=data)


@pytest.fixture(scope="module")
def net(task):
    torch.manual_seed(0)
    return capture(Net(), task.example)


@pytest.mark.parametrize("name", WEIGHT_FORMS)
def test_details_and_explanations_say_what_the_record_says(name, net, task):
    form = WEIGHT_FORMS[name]
    step = eval(form.made_by, {key: getattr(paredown, key) for key in paredown.__all__})
    assert step.form == name
    made = apply(net, [step], task)
    told = {row["name"]: row for row in _layers(net.graph, made.graph)}["fc2.weight"]
    assert told["dtype_before"] == "float32" and told["dtype_after"] == form.word
    assert told["bytes_after"] == form.stored_bytes(64 * 64)
    bits = {each.name: each.bits for each in find_layers(made.graph, folded(net).graph)}
    assert bits["fc2.weight"] == (form.bits if form.dtype is None else None)
    if form.dtype is None:
        node = quantized_weights(made.graph)["fc2.weight"]
        assert node.target is form.op and form_of(node) is of_op(form.op, form.bits)
        assert torch.equal(product(read(made.graph, node)), rounded(made.graph, node))


# --- a form that is made up ------------------------------------------------------------------


@torch.library.custom_op("paredown::fake_quantize_odd", mutates_args=())
def fake_quantize_odd(weight: Tensor, scale: Tensor, axis: int) -> Tensor:
    """Odd numbers from -3 to 3, times the scale (C,) of their channel."""
    integers, scales, *_ = _odd(weight, scale, axis)
    return (integers * scales).reshape(weight.shape)


@fake_quantize_odd.register_fake
def _(weight: Tensor, scale: Tensor, axis: int) -> Tensor:
    return torch.empty_like(weight)


def _odd(weight: Tensor, scale: Tensor, axis: int):
    scales = scale[:, None]
    integers = ((rows(weight, axis) / scales - 1) / 2).round().mul(2).add(1).clamp(-3, 3)
    return integers.to(torch.int8), scales, None, axis, 0


INT2 = replace(WEIGHT_FORMS["int8"], name="int2", made_by="Two()", word="int2", grid=range(-2, 2))
ODD = Form(
    "odd",
    made_by="Odd()",
    word="odd",
    op=torch.ops.paredown.fake_quantize_odd.default,
    grid=range(-3, 4, 2),
    parts=_odd,
)


def with_form(model, form: Form, name: str):
    """A copy in which that weight, of 8 bits, has another form of a scale for each channel."""
    made = model.copy()
    node = quantized_weights(made.graph)[name]
    weight, scale, axis, *ends = node.args
    node.target = form.op
    node.args = (weight, scale, axis, *([form.low, form.high] if form.op is PER_CHANNEL else []))
    made.graph.get_buffer(str(scale.target)).mul_(127 / form.high)
    made.graph.recompile()
    return made


@pytest.mark.parametrize("form", [INT2, ODD], ids=lambda form: form.name)
def test_a_form_that_is_made_up_is_counted_everywhere(form, net, task, monkeypatch, tmp_path):
    """The record is all that capture, sizes, details, explanations and the file ask."""
    whole = apply(net, [paredown.Quantize("int8")], task)
    monkeypatch.setitem(WEIGHT_FORMS, form.name, form)
    made = with_form(whole, form, "fc2.weight")
    assert weight_forms(made.graph)["fc2.weight"] is form
    assert len(quantizers(made.graph)) == len(quantizers(whole.graph))
    told = {row["name"]: row for row in _layers(net.graph, made.graph)}["fc2.weight"]
    assert told["dtype_after"] == form.word and told["bytes_after"] == 64 * 64 * 2 // 8
    layers = {each.name: each for each in find_layers(made.graph, folded(net).graph)}
    assert layers["fc2.weight"].bits == 2 and layers["fc1.weight"].bits == 8
    saved = restore.Rounding(made, list(layers.values())).candidate(["fc2.weight"]).cost_bytes
    assert saved == 64 * 64 * 30 // 8
    node = quantized_weights(made.graph)["fc2.weight"]
    weight = read(made.graph, node)
    assert torch.equal(product(weight), rounded(made.graph, node))
    assert torch.equal(form.unpack(form.pack(weight.shaped()), (64, 64)), weight.shaped())
    predictor = pytorch.open(pytorch.lower(made, tmp_path / "model.safetensors"))
    inputs = torch.randn(1, 64)
    assert torch.equal(torch.from_numpy(predictor(inputs.numpy())[0]), made.frozen()(inputs))


def test_a_form_without_a_zero_is_not_pruned(net, task, monkeypatch):
    monkeypatch.setitem(WEIGHT_FORMS, "odd", ODD)
    made = with_form(apply(net, [paredown.Quantize("int8")], task), ODD, "fc2.weight")
    assert any(node.target is PER_TENSOR for node in quantizers(made.graph))
    with pytest.raises(UserError, match=r"fc2.weight is odd, and its 2 bits have no zero"):
        PruneWeights(0.5).apply(made, task)
