"""Binary and ternary weights: what is rounded how, what trains, and what the file holds."""

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from docs import make_architectures as page
from paredown.core import progress
from paredown.core.errors import UserError
from paredown.core.task import Target, Task
from paredown.data.scores import accuracy
from paredown.graph.capture import capture
from paredown.graph.model import Model
from paredown.graph.quantized.forms import WEIGHT_FORMS
from paredown.graph.quantized.low_bits import (
    BINARY,
    TERNARY,
    binary_gradient,
    binary_scales,
)
from paredown.graph.quantized.quantizers import quantized_weights, rounded
from paredown.graph.state import tensor_of
from paredown.steps import recipe
from paredown.steps.pruning.prune_weights import PruneWeights
from paredown.steps.quantization.binarize import Binarize
from paredown.steps.quantization.cast import Cast
from paredown.steps.quantization.quantize import Quantize
from paredown.steps.training.fine_tune import FineTune
from paredown.targets.runtimes import onnxruntime, pytorch
from tests.architectures import ARCHITECTURES, with_batch
from tests.architectures.captured import captured
from tests.test_architectures import NOTHING_TO_QUANTIZE, check_file, reload

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore")
LOW = ("binary", "ternary")
each_form = pytest.mark.parametrize("form", LOW)
TASK = Task(example=(torch.zeros(1, 8),), score=lambda out, y: out[:, 0])


def binarized(model: Model) -> set[str]:
    return set(quantized_weights(model.graph))


def stored(path) -> dict[str, int]:
    return onnxruntime.census(path).bytes_by_dtype


# --- the mathematics -------------------------------------------------------------------------


def test_the_scale_of_signs_has_the_least_squared_error():
    weight = torch.randn(6, 4, 3, 3)
    scales = binary_scales(weight, 0)
    errors = [
        float((weight - weight.sign() * (scales * factor).reshape(-1, 1, 1, 1)).square().sum())
        for factor in (1, 0.9, 0.99, 1.01, 1.1)
    ]
    assert min(errors) == errors[0] < errors[1]


def test_ternary_is_near_the_least_squared_error():
    weight = torch.randn(4, 5000)
    ours = (weight - TERNARY(weight, 0)).square().mean()
    best = min(
        (weight - weight.sign() * kept * (weight.abs() * kept).sum() / kept.sum()).square().mean()
        for kept in (weight.abs() > t for t in torch.linspace(0.2, 1.2, 50))
    )
    assert best <= ours < 1.02 * best
    assert ours < (weight - BINARY(weight, 0)).square().mean()


def test_the_gradient_is_that_of_a_scale_and_of_a_sign_that_lets_through():
    weight = torch.randn(3, 5, requires_grad=True)
    scale = weight.abs().mean(1, keepdim=True)
    sign = weight + (torch.where(weight < 0, -1.0, 1.0) - weight).detach()
    grad = torch.randn(3, 5)
    (sign * scale).backward(grad)
    # the straight way through the scale is exact: sign' is 1, and the scale's is sign / n
    assert torch.allclose(binary_gradient(weight.detach(), 0, grad), weight.grad, atol=1e-6)
    again = weight.detach().requires_grad_()
    BINARY(again, 0).backward(grad)
    assert torch.allclose(again.grad, weight.grad, atol=1e-6)


@each_form
def test_signs_and_scales_follow_the_weight(form):
    """A factor of a channel, negative ones too, passes through: so a batch norm folds exactly."""
    op = WEIGHT_FORMS[form].op
    weight, factor = torch.randn(5, 7, 3), torch.tensor([2.0, -1.5, 0.3, -0.1, 1.0])[:, None, None]
    torch.testing.assert_close(op(weight * factor, 0), op(weight, 0) * factor)


# --- which layers ----------------------------------------------------------------------------


class Mixed(nn.Module):
    """One of each layer, and a norm behind some."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8, padding=1)
        self.grouped, self.norm = nn.Conv2d(8, 16, 3, groups=4, bias=False), nn.BatchNorm2d(16)
        self.up = nn.ConvTranspose2d(16, 8, 2, 2)
        self.line = nn.Conv1d(8, 8, 3)
        self.space = nn.Conv3d(8, 4, 2)
        self.product = nn.Parameter(torch.randn(8, 8))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.up(self.norm(self.grouped(self.depthwise(self.first(x)))).relu())  # (B, 8, 8, 8)
        x = x + self.line(x.flatten(2))[:, :, :1, None]
        y = self.space(x[:, :, None].expand(-1, -1, 2, -1, -1)).mean((1, 2, 3, 4))[:, None]
        return self.head(x.mean((2, 3)) @ self.product + y)


ALL = ["depthwise.weight", "grouped.weight", "up.weight", "line.weight", "space.weight", "product"]


@pytest.fixture(scope="module")
def mixed() -> Model:
    torch.manual_seed(0)
    module = Mixed()
    module.train()(torch.randn(8, 3, 8, 8))
    with torch.no_grad():
        module.norm.weight.copy_(torch.randn(16))  # negative ones too
        module.norm.weight[3] = 0
    return capture(module.eval(), (torch.randn(2, 3, 8, 8),))


def test_first_last_and_depthwise_layers_stay(mixed):
    assert binarized(Binarize().apply(mixed, TASK)) == set(ALL[1:])
    assert binarized(Binarize(depthwise=True).apply(mixed, TASK)) == set(ALL)
    both = Binarize(first=True, last=True).apply(mixed, TASK)
    assert binarized(both) == {"first.weight", *ALL[1:], "head.weight"}
    some = Binarize(exclude=("grouped", "*e.weight")).apply(mixed, TASK)
    assert binarized(some) == {"up.weight", "product"}


@each_form
def test_every_kind_of_layer_is_stored_in_its_bits(form, mixed, tmp_path):
    made = Binarize(form, depthwise=True).apply(mixed, TASK)
    path = onnxruntime.lower(made, tmp_path / "m.onnx")  # asserts parity, to float precision
    sizes = [tensor_of(made.graph, name).numel() for name in ALL]
    assert stored(path)[form] == sum(-(-size * LOW_BITS_OF[form] // 8) for size in sizes)
    kinds = {node.op_type for node in onnx.load(str(path)).graph.node}
    assert "BatchNormalization" not in kinds
    opened = onnxruntime.open(path)
    for batch in (1, 5):
        x = torch.randn(batch, 3, 8, 8)
        with torch.no_grad():
            expected = made(x).numpy()
        np.testing.assert_allclose(opened(x.numpy())[0], expected, rtol=1e-4, atol=1e-5)
    ran = onnxruntime.census(path)
    assert not ran.integer_ops and form in ran.notes[0]
    assert not {"BitwiseAnd", "BitShift", "Where", "Cast"} & set(ran.float_ops), "not folded"


LOW_BITS_OF = {form: WEIGHT_FORMS[form].bits for form in LOW}


@each_form
def test_a_file_of_pytorch_is_packed_too(form, mixed, tmp_path):
    made = Binarize(form, depthwise=True).apply(mixed, TASK)
    for model in (made, Cast("bf16").apply(made, TASK)):
        path = pytorch.lower(model, tmp_path / "m.safetensors")
        census = pytorch.census(path)
        sizes = [tensor_of(made.graph, name).numel() for name in ALL]
        packed = sum(-(-size * LOW_BITS_OF[form] // 8) for size in sizes)
        assert census.bytes_by_dtype[form] == packed and form in census.notes[0]
        x = torch.randn(3, 3, 8, 8)
        with torch.no_grad():
            expected = model(x)
        assert torch.equal(torch.from_numpy(pytorch.open(path)(x.numpy())[0]), expected)
        assert torch.equal(Model.load(path)(x), expected)  # which unpacks at each call


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.first, self.one, self.two = (nn.Linear(8, 8) for _ in range(3))
        self.head, self.last = nn.Linear(8, 16, bias=False), nn.Linear(16, 2)
        self.head.weight, self.two.weight = self.embedding.weight, self.one.weight

    def forward(self, ids):
        x = self.two(self.one(self.first(self.embedding(ids)).relu()).relu())
        return self.last(self.head(x + self.one(x)))


@each_form
def test_tied_weights_stay_tied_and_embeddings_float(form, tmp_path):
    example = (torch.randint(16, (2, 5)),)
    made = Binarize(form).apply(capture(Tied(), example), TASK)
    assert len(binarized(made)) == 1 and binarized(made) < {"one.weight", "two.weight"}
    assert tensor_of(made.graph, "one.weight") is tensor_of(made.graph, "two.weight")
    path = onnxruntime.lower(made, tmp_path / "m.onnx")
    assert stored(path)[form] == 8 * 8 * LOW_BITS_OF[form] // 8
    reload(made, tmp_path)


class Shared(nn.Module):
    """A convolution that runs twice, with another norm each time: neither can be folded."""

    def __init__(self):
        super().__init__()
        self.first, self.conv, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3), nn.Linear(4, 2)
        self.norms = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(4)])

    def forward(self, x):
        x = self.first(x)
        for norm in self.norms:
            x = norm(self.conv(x)).relu()
        return self.last(x.mean((2, 3)))


def test_a_weight_that_two_norms_follow_is_not_folded(tmp_path):
    module = Shared()
    for _ in range(3):
        module.train()(torch.randn(8, 3, 8, 8) * 3)
    model = capture(module.eval(), (torch.randn(2, 3, 8, 8),))
    made = Binarize().apply(model, TASK)
    path = onnxruntime.lower(made, tmp_path / "m.onnx")
    kinds = [node.op_type for node in onnx.load(str(path)).graph.node]
    assert kinds.count("BatchNormalization") == 2
    Quantize().apply(made, Task(TASK.example, None, calibration=[(torch.randn(3, 8, 8), 0)] * 4))


# --- training --------------------------------------------------------------------------------


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.body, self.norm2 = nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.more, self.norm3 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        x = self.norm1(self.first(x)).relu()
        x = self.norm3(self.more(self.norm2(self.body(x)).relu())).relu()
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def trained() -> tuple[Model, Task]:
    """Bars at three angles under noise, learned."""
    torch.manual_seed(0)
    labels = torch.randint(3, (256,))
    bars = torch.zeros(3, 8, 8)
    bars[0, :, 3], bars[1, 3], bars[2] = 1, 1, torch.eye(8)
    images = bars[labels][:, None] + 0.4 * torch.randn(256, 3, 8, 8)
    data = TensorDataset(images, labels)
    task = Task((images[:1],), accuracy, F.cross_entropy, data, validation=data, test=data)
    model = FineTune(epochs=6, lr=5e-3, device="cpu").apply(capture(Small(), task.example), task)
    return model, task


def score(model: Model, task: Task) -> float:
    images, labels = task.test[:]
    with torch.no_grad():
        return float(accuracy(model(images), labels).mean())


@each_form
def test_fine_tuning_trains_the_float_weights_through_the_signs(form, trained, tmp_path):
    model, task = trained
    made = Binarize(form).apply(model, task)
    after = FineTune(epochs=3, lr=2e-3, device="cpu").apply(made, task)
    assert score(after, task) >= score(model, task) - 0.03
    before, then = (tensor_of(m.graph, "body.weight") for m in (made, after))
    assert not torch.equal(before, then) and len(then.unique()) > 100
    signs = rounded(after.graph, quantized_weights(after.graph)["body.weight"])
    assert len(signs[0].unique()) <= {"binary": 2, "ternary": 3}[form]
    assert bool((before.sign() != then.sign()).any()), "no sign was flipped"
    path = onnxruntime.lower(after, tmp_path / "m.onnx")
    images, labels = task.test[:]
    got = torch.from_numpy(onnxruntime.open(path)(images.numpy())[0])
    assert float(accuracy(got, labels).mean()) == pytest.approx(score(after, task), abs=0.005)


@each_form
def test_int8_after_it_runs_on_integers(form, trained, tmp_path):
    model, task = trained
    steps = [Binarize(form), FineTune(epochs=2, lr=2e-3, device="cpu")]
    low = recipe.apply(model, steps, task)
    made = Quantize().apply(low, task)
    assert score(made, task) >= score(low, task) - 0.02
    path = onnxruntime.lower(made, tmp_path / "m.onnx")
    census = onnxruntime.census(path)
    assert census.integer_ops["QLinearConv"] == 3 and census.unfused == ()
    bits = (8 * 16 + 16 * 16) * 9 * LOW_BITS_OF[form]
    assert census.bytes_by_dtype[form] == bits // 8
    assert census.bytes_by_dtype["int8"] < 400  # first and last layer, zero points
    again = FineTune(epochs=1, lr=1e-3, device="cpu").apply(made, task)  # through both roundings
    assert score(again, task) >= score(low, task) - 0.02
    assert binarized(again) == binarized(made) and onnxruntime.lower(again, path)


@each_form
def test_a_dead_channel_does_not_spoil_the_integers(form, trained, tmp_path):
    """Its norm's gain is 0: what is left of the channel is its bias."""
    model, task = trained
    dead = model.copy()
    with torch.no_grad():
        dead.graph.norm2.weight[2] = 0
        dead.graph.norm2.bias[2] = 0.7
        dead.graph.norm2.weight[3] = 1e-12
    made = Quantize().apply(Binarize(form).apply(dead, task), task)
    path = onnxruntime.lower(made, tmp_path / "m.onnx")
    images = task.test[:16][0]
    with torch.no_grad():
        expected = made(images).numpy()
    got = onnxruntime.open(path)(images.numpy())[0]
    assert np.linalg.norm(got - expected) < 0.05 * np.linalg.norm(expected)


def test_pruned_weights_stay_zero_in_ternary_ones(trained, tmp_path):
    model, task = trained
    steps = [
        PruneWeights(pattern="2:4"),
        Binarize("ternary"),
        FineTune(epochs=1, lr=2e-3, device="cpu"),
    ]
    made = recipe.apply(model, steps, task)
    for then in (made, Quantize().apply(made, task)):
        for name, node in quantized_weights(then.graph).items():
            if node.target is TERNARY:
                assert not rounded(then.graph, node)[~then.masks[name]].any()
        onnxruntime.lower(then, tmp_path / "m.onnx")
    with pytest.raises(UserError, match=r'body.weight is pruned, .* use Binarize\("ternary"\)'):
        Binarize().apply(PruneWeights(0.5).apply(model, task), task)
    Binarize(exclude=("body",)).apply(PruneWeights(0.5, exclude=("more",)).apply(model, task), task)


@each_form
def test_16_bit_after_it_narrows_the_rest(form, trained, tmp_path):
    model, task = trained
    low = Binarize(form).apply(model, task)
    made = Cast("fp16").apply(low, task)
    path = onnxruntime.lower(made, tmp_path / "m.onnx")
    assert stored(path)[form] == (8 * 16 + 16 * 16) * 9 * LOW_BITS_OF[form] // 8
    assert "float" not in stored(path) and stored(path)["float16"] < 1200
    images = task.test[:16][0]
    got = onnxruntime.open(path)(images.numpy())[0]
    with torch.no_grad():
        assert np.abs(got - low(images).numpy()).max() < 0.05 * np.abs(got).max()


# --- what is refused -------------------------------------------------------------------------


def test_bad_settings_and_models_are_told(trained):
    model, task = trained
    with pytest.raises(UserError, match='form: expected "binary" or "ternary", got \'unary\''):
        Binarize("unary")
    with pytest.raises(UserError, match="exclude: expected a tuple of names, got the text 'fc'"):
        Binarize(exclude="fc")
    with pytest.raises(UserError, match="no layer or weight is called 'bodi'; did you mean 'body'"):
        Binarize(exclude=("bodi",)).apply(model, task)
    with pytest.raises(UserError, match="no convolution or linear layer is left besides the first"):
        Binarize(exclude=("body", "more")).apply(model, task)
    two = capture(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)), TASK.example)
    with pytest.raises(UserError, match="set first=True or last=True"):
        Binarize().apply(two, TASK)
    with pytest.raises(UserError, match=r"the model is quantized already; binarize before"):
        Binarize().apply(Quantize().apply(model, task), task)


@pytest.mark.parametrize("runtime", ["onnxruntime", "pytorch"])
@each_form
def test_the_runtimes_that_write_it(form, runtime):
    assert recipe.problems([Binarize(form)], TASK, Target(runtime=runtime)) == []


# --- every architecture ----------------------------------------------------------------------

NOTHING_LEFT = "no convolution or linear layer is left"
BRIEF = ("resnet8", "lstm", "dcgan")  # the rest are slow
every = pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in BRIEF else pytest.mark.slow) for n in ARCHITECTURES],
)


@every
def test_every_architecture_binarizes(name, tmp_path):
    model, example = captured(name)
    for form in LOW:
        try:
            made = Binarize(form).apply(model, TASK)
        except UserError as error:
            assert NOTHING_LEFT in str(error)
            continue
        path = onnxruntime.lower(made, tmp_path / f"{form}.onnx")  # asserts parity
        weights = {id(t): t for t in (tensor_of(made.graph, n) for n in binarized(made))}
        count = sum(t.numel() for t in weights.values())
        census = onnxruntime.census(path)
        assert census.bytes_by_dtype[form] <= count * LOW_BITS_OF[form] / 8 + len(weights)
        parameters = sum(t.nbytes for t in model.parameters()) - 4 * count
        assert census.bytes_by_dtype.get("float", 0) < 1.3 * parameters + 16000
        assert not {"BitwiseAnd", "BitShift", "ReduceProd"} & set(census.float_ops), "not folded"
        check_file(path, made, with_batch(example, 3))
        reload(made, tmp_path)
        check_that_it_trains(made)
        if form == "binary" and name not in NOTHING_TO_QUANTIZE:
            check_int8(name, made, example, tmp_path)


def check_that_it_trains(made: Model):
    before = {n: tensor_of(made.graph, n) for n in binarized(made)}
    copy = made.copy().train()
    outputs = copy.graph(*[item.example.clone() for item in copy.inputs])
    floats = [t for t in outputs if t.is_floating_point() and t.requires_grad]
    sum(t[t.isfinite()].square().mean() for t in floats).backward()
    grads = [tensor_of(copy.graph, n).grad for n in before]
    assert all(g is None or torch.isfinite(g).all() for g in grads)
    assert sum(g is not None and bool(g.any()) for g in grads) > len(grads) / 2


def check_int8(name, made, example, folder):
    task = page.calibration_task(ARCHITECTURES[name], example)
    both = Quantize().apply(made, task)
    path = onnxruntime.lower(both, folder / "int8.onnx")
    census = onnxruntime.census(path)
    assert census.unfused == () and sum(census.integer_ops.values()) > 0
    reload(both, folder)


def test_a_layer_that_came_sparse_is_left_in_float_by_one_bit(monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(progress, "say", said.append)
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    with torch.no_grad():
        net[1].weight[torch.rand(8, 8) < 0.5] = 0
    model = capture(net, TASK.example)
    made = Binarize().apply(model, TASK)
    assert set(quantized_weights(made.graph)) == {"2.weight"}
    assert any("1.weight came sparse" in line for line in said)
    assert set(quantized_weights(Binarize("ternary").apply(model, TASK).graph)) == {
        "1.weight",
        "2.weight",
    }
    with pytest.raises(UserError, match=r"1\.weight came sparse"):
        Binarize(exclude=("2",)).apply(model, TASK)
