"""Quantization-aware training: LSQ's gradients, the same bits once baked, and what must last."""

import math
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import TensorDataset

from docs import make_architectures as page
from paredown.core.errors import UserError
from paredown.core.task import Task
from paredown.data import evaluate
from paredown.graph import store, structure
from paredown.graph.capture import capture
from paredown.graph.model import Model
from paredown.graph.quantized.quantizers import (
    PER_TENSOR,
    fake_quantize,
    quantized_weights,
    quantizers,
    rounded,
)
from paredown.graph.quantized.rounding import (
    fake_quantize_channel_training,
    fake_quantize_training,
    gradient_scale,
    round_to_grid,
    spread,
    step_gradient,
)
from paredown.steps.pruning.prune_weights import PruneWeights
from paredown.steps.quantization.quantize import Quantize
from paredown.steps.recipe import apply
from paredown.steps.training.fine_tune import FineTune
from paredown.targets.runtimes import onnxruntime
from paredown.train import loop, qat
from paredown.train.loop import fit
from paredown.train.settings import Training
from tests.architectures import ARCHITECTURES
from tests.architectures.captured import captured
from tests.test_architectures import NOTHING_TO_QUANTIZE

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore")
SCHEMES = ("int8", "int4")
QUICK = [*((n, "int4") for n in ("mobilenet_v2", "unet", "vit")), ("tied_language_model", "int8")]
each_kind = pytest.mark.parametrize("kind", qat.KINDS)
each_scheme = pytest.mark.parametrize("scheme", SCHEMES)

# --- mathematics -----------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(0, 0, 255), (37, 0, 255), (0, -8, 7), (255, 0, 255)])
@pytest.mark.parametrize("scale", [0.0173, 1.0, 3e-12, 7e5])
def test_rounding_is_that_of_pytorchs_kernel_bit_for_bit(grid, scale):
    torch.manual_seed(0)
    x = torch.cat([torch.randn(5000) * 20, torch.arange(-300, 300) + 0.5, torch.zeros(1)]) * scale
    expected = torch.fake_quantize_per_tensor_affine(x, scale, *grid)
    made, inside = round_to_grid(x, scale, *grid)
    assert torch.equal(made, expected) and torch.equal(fake_quantize(x, scale, *grid), expected)
    assert torch.equal(round_to_grid(x, torch.tensor(scale), *grid)[0], expected)
    steps = torch.round(x * (torch.tensor(1.0) / torch.tensor(scale))) + grid[0]
    assert torch.equal(inside, (steps >= grid[1]) & (steps <= grid[2]))


def straight_through(x: Tensor, scale: Tensor, zero_point: int, low: int, high: int) -> Tensor:
    """The definition: round's gradient is taken for one, clamp's is its own."""
    steps = x / scale
    steps = steps + (steps.round() - steps).detach()
    return scale * steps.clamp(low - zero_point, high - zero_point)


@pytest.mark.parametrize("grid", [(0, 0, 255), (101, 0, 255), (0, 0, 15)])
def test_gradients_of_a_tensor_are_lsqs(grid):
    torch.manual_seed(0)
    x = (3 * torch.randn(6, 50)).requires_grad_()
    weights = 1e-3 * torch.randn(6, 50)  # so that the change's gradient keeps within 1
    scale = torch.tensor(0.021)
    change = torch.zeros((), requires_grad=True)
    (weights * fake_quantize_training(x, scale, change, *grid)).sum().backward()
    theirs, step = x.detach().clone().requires_grad_(), scale.clone().requires_grad_()
    (weights * straight_through(theirs, step, *grid)).sum().backward()
    torch.testing.assert_close(x.grad, theirs.grad)
    pace = 1 / math.sqrt(50 * grid[2])  # 50 features an example
    assert float(change.grad) == pytest.approx(float(step.grad) * pace / 0.021, rel=1e-4)


@pytest.mark.parametrize("axis", [0, 1])
def test_gradients_of_a_channel_are_lsqs(axis):
    torch.manual_seed(0)
    weight = torch.randn(5, 4, 3, requires_grad=True)
    factors, scale = 0.01 * torch.randn(5, 4, 3), 0.1 + torch.rand(weight.shape[axis])
    change = torch.zeros(weight.shape[axis], requires_grad=True)
    made = fake_quantize_channel_training(weight, scale, change, axis, -8, 7)
    (factors * made).sum().backward()
    theirs, steps = weight.detach().clone().requires_grad_(), scale.clone().requires_grad_()
    (factors * straight_through(theirs, spread(steps, theirs, axis), 0, -8, 7)).sum().backward()
    torch.testing.assert_close(weight.grad, theirs.grad)
    pace = gradient_scale(weight.numel() // weight.shape[axis], 7)
    torch.testing.assert_close(change.grad, steps.grad * pace / scale, rtol=1e-4, atol=1e-4)


def test_the_papers_three_cases_and_a_difference_quotient():
    scale = torch.tensor(0.5)
    for value, expected in ((0.6, 1 - 1.2), (9.0, 7.0), (-9.0, -8.0)):
        x = torch.tensor([value])
        found = step_gradient(torch.ones(1), x, *round_to_grid(x, scale, 0, -8, 7), scale, None)
        assert float(found) == pytest.approx(expected, abs=1e-5)
        if abs(value) > 4:  # outside, the result is linear in the scale
            up, down = (round_to_grid(x, scale + e, 0, -8, 7)[0] for e in (1e-2, -1e-2))
            assert float((up - down) / 2e-2) == pytest.approx(expected, rel=1e-3)


def test_a_small_plain_step_moves_the_scale_by_what_lsq_moves_it():
    torch.manual_seed(0)
    x, scale, lr = torch.randn(4, 30), torch.tensor(0.03), 1e-2
    change = torch.zeros((), requires_grad=True)
    (1e-4 * fake_quantize_training(x, scale, change, 0, 0, 15).square()).sum().backward()
    moved = float(scale * torch.exp(-lr * change.grad))
    step = scale.clone().requires_grad_()
    (1e-4 * straight_through(x, step, 0, 0, 15).square()).sum().backward()
    lsq = float(scale - lr * step.grad / math.sqrt(30 * 15))
    assert moved != float(scale) and moved - float(scale) == pytest.approx(lsq - 0.03, rel=0.02)


def test_a_channel_of_almost_nothing_moves_its_scale_by_little():
    change = torch.zeros(2, requires_grad=True)
    weight, scale = torch.tensor([[0.1, 0.2], [1.0, -1.0]]), torch.tensor([0.03, 1e-9])
    made = fake_quantize_channel_training(weight, scale, change, 0, -8, 7)
    (made * torch.tensor([[0.01, 0.02], [0.01, -0.01]])).sum().backward()
    assert float(change.grad[1]) == 1 and 0 < abs(float(change.grad[0])) < 1


def test_clipping_takes_no_notice_of_scales():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight[0] = 1e-9
    data = TensorDataset(torch.randn(32, 4), torch.randint(0, 2, (32,)))
    task = replace(TASK, example=(torch.zeros(1, 4),), train=data, validation=None)
    made = Quantize("int4", edge_bits=4).apply(capture(model, task.example), task)
    qat.attach(made, "learned")
    clipped = {id(p) for p in loop._weights(made)}
    for name, parameter in made.graph.named_parameters():
        assert (id(parameter) in clipped) == (not name.endswith("_change"))


# --- training --------------------------------------------------------------------------------


class Net(nn.Module):
    """Convolutions, a max-pool, dropout, a residual, a tied linear layer and a classifier."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.body, self.pool, self.drop = (
            nn.Conv2d(8, 8, 3, padding=1),
            nn.MaxPool2d(2),
            nn.Dropout(0.3),
        )
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
        self.two.weight = self.one.weight
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        x = self.pool(self.norm(self.stem(x)).relu())
        x = (x + self.body(x)).relu()
        x = self.drop(x).mean((2, 3))
        return self.head(self.two(self.one(x).relu()))


def examples(count: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 2, (count,), generator=generator)
    images = torch.randn(count, 1, 6, 6, generator=generator)
    return TensorDataset(images + labels[:, None, None, None], labels)


TASK = Task(
    example=(torch.zeros(2, 1, 6, 6),),
    score=lambda out, y: (out.argmax(1) == y).float(),
    loss=cross_entropy,
    train=examples(96, 0),
    validation=examples(40, 1),
    batch_size=16,
)
FAST = FineTune(epochs=2, lr=0.01, device="cpu")


@pytest.fixture(scope="module")
def net() -> Model:
    torch.manual_seed(0)
    module = Net()
    module.norm.running_mean.normal_()
    return capture(module, TASK.example)


@pytest.fixture(scope="module")
def quantized(net) -> dict[str, Model]:
    return {scheme: Quantize(scheme).apply(net, TASK) for scheme in SCHEMES}


def outputs(model: Model, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return model(inputs)


@each_kind
@each_scheme
def test_the_trained_simulation_and_the_baked_graph_agree_bit_for_bit(
    quantized, kind, scheme, tmp_path
):
    seen: list[Tensor] = []
    task = replace(
        TASK, score=lambda out, y: seen.append(out.clone()) or (out.argmax(1) == y).float()
    )
    tuned = replace(FAST, quantizers=kind).apply(quantized[scheme], task)
    whole = torch.cat(seen[-3:])  # 40 examples at 16 a batch, after the last epoch
    inputs = TASK.validation.tensors[0]
    assert torch.equal(torch.cat([outputs(tuned, part) for part in inputs.split(16)]), whole)
    before = quantized[scheme]
    assert set(tuned.state_dict()) == set(before.state_dict())
    targets = [[n.target for n in m.graph.graph.nodes] for m in (tuned, before)]
    assert targets[0] == targets[1] and not any("training" in str(t) for t in targets[0])
    path = onnxruntime.lower(tuned, tmp_path / "net.onnx")
    assert onnxruntime.census(path).unfused == ()
    got = onnxruntime.open(path)(inputs.numpy())[0]
    assert np.linalg.norm(got - whole.numpy()) < 0.02 * np.linalg.norm(whole.numpy())
    tuned.save(tmp_path / "m.safetensors")
    assert torch.equal(
        outputs(Model.load(tmp_path / "m.safetensors"), inputs), outputs(tuned, inputs)
    )


def grids(model: Model) -> list[tuple]:
    return [n.args[1:] for n in quantizers(model.graph) if n.target is PER_TENSOR]


def scales(model: Model) -> dict[str, Tensor]:
    return {k: v for k, v in model.state_dict().items() if k.endswith("_scale")}


@each_kind
def test_which_scales_move(quantized, kind):
    before = quantized["int4"]
    tuned = replace(FAST, quantizers=kind).apply(before, TASK)
    moved = [
        a != pytest.approx(b, rel=1e-6) for a, b in zip(grids(tuned), grids(before), strict=True)
    ]
    other = [not torch.equal(scales(tuned)[k], s) for k, s in scales(before).items()]
    if kind == "frozen":
        assert not any(moved) and not any(other)
    else:
        assert all(moved) and all(other)
    if kind == "learned":
        assert [a[1] for a in grids(tuned)] == [b[1] for b in grids(before)]  # zero points stay
    assert all(0 < scale < math.inf and 0 <= zero <= 255 for scale, zero, *_ in grids(tuned))


@each_kind
def test_to_train_and_back_changes_nothing(quantized, kind):
    for before in quantized.values():
        made = before.copy()
        qat.attach(made, kind)
        x = TASK.validation.tensors[0]
        if kind != "average":  # whose zero points are rounded anew
            assert torch.equal(outputs(made, x), outputs(before, x))
        qat.bake(made)
        if kind != "average":
            assert torch.equal(outputs(made, x), outputs(before, x))
            assert store.encode(made).count(b"_change") == 0
        assert made.state_dict().keys() == before.state_dict().keys()
        for ours, theirs in zip(grids(made), grids(before), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)
        for name, scale in scales(before).items():
            torch.testing.assert_close(scales(made)[name], scale)


@each_kind
def test_a_moved_value_keeps_the_scale_of_its_source(quantized, kind):
    tuned = replace(FAST, quantizers=kind).apply(quantized["int8"], TASK)
    moved = [
        node
        for node in quantizers(tuned.graph)
        if node.target is PER_TENSOR and "max_pool" in str(node.args[0].target)
    ]
    assert len(moved) == 1
    for node in moved:
        assert node.args[1:] == node.args[0].args[0].args[1:]


def test_dropout_is_not_clipped_to_the_grid_of_its_source(quantized):
    made = quantized["int8"].copy()
    drop = next(n for n in made.graph.graph.nodes if "dropout" in str(n.target))
    (after,) = drop.users
    assert after.target is PER_TENSOR
    qat.attach(made, "learned")
    assert after.target.__name__ == "fake_quantize_moved"
    qat.bake(made)
    assert after.target is PER_TENSOR and after.args[1:] == drop.args[0].args[1:]


@each_kind
@each_scheme
def test_a_killed_training_goes_on_to_the_same_bits(quantized, kind, scheme, tmp_path, monkeypatch):
    settings = Training(epochs=3, lr=0.01, device="cpu", quantizers=kind, patience=2)
    whole, again = quantized[scheme].copy(), quantized[scheme].copy()
    history = fit(whole, TASK, settings)
    write, path = loop.write, tmp_path / "c.safetensors"

    def kill(*args):
        write(*args)
        if args[-1].epoch == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "write", kill)
    cut = quantized[scheme].copy()
    with pytest.raises(KeyboardInterrupt):
        fit(cut, TASK, settings, path)
    assert len(quantizers(cut.graph)) == len(quantizers(whole.graph))  # whole, if not finished
    monkeypatch.setattr(loop, "write", write)
    assert fit(again, TASK, settings, path) == history
    assert store.encode(again) == store.encode(whole)


@each_kind
@each_scheme
@pytest.mark.parametrize("pruning", [{"pattern": "2:4"}, {"sparsity": 0.6}], ids=str)
def test_zeros_and_ties_last_through_training_into_the_file(net, kind, scheme, pruning, tmp_path):
    steps = [PruneWeights(**pruning), Quantize(scheme), replace(FAST, quantizers=kind)]
    tuned = apply(net, steps, TASK)
    held = {
        t.name: onnx.numpy_helper.to_array(t)
        for t in onnx.load(str(onnxruntime.lower(tuned, tmp_path / "n.onnx"))).graph.initializer
    }
    assert tuned.masks and tuned.graph.one.weight is tuned.graph.two.weight
    for name, node in quantized_weights(tuned.graph).items():
        gone = ~tuned.masks[name] if name in tuned.masks else torch.tensor(False)
        made = rounded(tuned.graph, node)
        assert not made[gone.expand_as(made)].any()
        integers = held.get(f"{name}_quantized", held.get(f"{name}_t_quantized"))
        assert int((integers == 0).sum()) >= int(gone.sum())
    assert (
        sum(name.startswith(("one.weight", "two.weight")) and "quantized" in name for name in held)
        == 1
    )


# --- what it is good for ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def student() -> tuple[Model, Task]:
    """A small regression that 4-bit weights cannot follow, and too wide a range to start from."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    x = torch.randn(512, 8)
    with torch.no_grad():
        data = TensorDataset(x, teacher(x))
    task = Task(
        example=(x[:1],),
        score=lambda out, y: -(out - y).square().mean(1),
        loss=mse_loss,
        train=data,
        batch_size=32,
    )
    plain = Quantize("int4", edge_bits=4, smooth=0.0, correct_bias=False)  # leave room to learn
    return plain.apply(capture(teacher, (x[:1],)), task), task


def test_learned_and_frozen_scales_beat_none(student):
    model, task = student
    error = {"none": -float(evaluate.evaluate(model, task.train, task).mean())}
    for kind in qat.KINDS:
        tuned = [
            FineTune(epochs=6, lr=3e-3, quantizers=kind, seed=n).apply(model, task)
            for n in range(2)
        ]
        error[kind] = -sum(float(evaluate.evaluate(m, task.train, task).mean()) for m in tuned) / 2
    assert error["learned"] < 0.9 * error["none"] and error["frozen"] < 0.9 * error["none"], error
    assert error["learned"] < 1.15 * error["frozen"], (
        error
    )  # by a tenth either way with the processor
    assert error["average"] < error["none"]


class Dead(nn.Module):
    """Channels that are zero but for a bias, which training makes large."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 4, 3), nn.Linear(4, 2)
        with torch.no_grad():
            self.conv.weight[:2] = 0
            self.conv.bias[0] = 1e-6

    def forward(self, x):
        return self.head(self.conv(x).mean((2, 3)))


@each_kind
@each_scheme
def test_biases_that_grew_in_training_fit_into_32_bits(kind, scheme, tmp_path):
    torch.manual_seed(0)
    plain = Quantize(scheme, edge_bits=4, smooth=0.0, correct_bias=False)
    model = plain.apply(capture(Dead(), TASK.example), TASK)
    model.masks["conv.weight"] = model.state_dict()["conv.weight"] != 0
    step = FineTune(epochs=2, lr=0.3, device="cpu", quantizers=kind, clip_norm=None, weight_decay=0)
    tuned = step.apply(model, TASK)
    assert float(tuned.state_dict()["conv.bias"][0].abs()) > 1e-3
    path = onnxruntime.lower(tuned, tmp_path / "dead.onnx")
    graph = onnx.load(str(path)).graph
    biases = [t for t in graph.initializer if t.data_type == onnx.TensorProto.INT32]
    assert biases
    for tensor in biases:
        values = onnx.numpy_helper.to_array(tensor).astype(np.int64)
        assert np.abs(values).max() < 2**31 - 1, tensor.name


# --- any architecture ------------------------------------------------------------------------


def squares(output, _) -> Tensor:
    """A loss for any output: the size of all that is finite."""
    floats = [t for t in structure.flatten(output)[0] if t.is_floating_point() and t.requires_grad]
    return sum(t[t.isfinite()].square().mean() for t in floats)


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        pytest.param(name, scheme, marks=() if (name, scheme) in QUICK else pytest.mark.slow)
        for name in ARCHITECTURES
        for scheme in SCHEMES
    ],
)
def test_a_step_of_training_then_the_file_agrees(name, scheme, tmp_path):
    if name in NOTHING_TO_QUANTIZE:
        return
    entry = ARCHITECTURES[name]
    captured_model, example = captured(name)
    task = page.calibration_task(entry, example)
    task = replace(task, train=task.calibration, loss=squares, batch_size=2)
    model = Quantize(scheme).apply(captured_model, task)
    tuned = FineTune(epochs=1e-9, lr=1e-4, device="cpu").apply(model, task)
    assert grids(tuned) != grids(model)
    onnxruntime.lower(tuned, tmp_path / "model.onnx")  # asserts parity on the example


# --- what is asked wrongly -------------------------------------------------------------------


def test_a_model_in_float_is_trained_the_same_whatever_is_asked_of_quantizers(net):
    made = [store.encode(replace(FAST, quantizers=kind).apply(net, TASK)) for kind in qat.KINDS]
    assert made[0] == made[1] == made[2]


@pytest.mark.parametrize("value", ["x", "", None, 3, True])
def test_an_unknown_kind_is_refused_at_once(value):
    text = isinstance(value, str)
    said = 'one of "learned", "average", "fr' if text else f"a text, got {value}"
    for kind in (FineTune, Training):
        with pytest.raises(UserError, match=f"quantizers: expected {said}"):
            kind(quantizers=value)


@each_kind
def test_a_training_that_fails_leaves_a_whole_quantized_model(quantized, kind):
    model = quantized["int8"].copy()
    task = replace(TASK, loss=lambda out, y: cross_entropy(out, y) * math.nan)
    with pytest.raises(UserError, match="the loss is nan at epoch 1"):
        fit(model, task, Training(device="cpu", quantizers=kind))
    assert len(quantizers(model.graph)) == len(quantizers(quantized["int8"].graph))
    assert model.state_dict().keys() == quantized["int8"].state_dict().keys()
