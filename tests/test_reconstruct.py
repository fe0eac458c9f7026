"""Least squares after a cut: exact where it can be, never worse where it cannot."""

import copy
import dataclasses
import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from paredown.core.errors import UserError
from paredown.core.task import Task
from paredown.data import feed, lockstep, splits
from paredown.data.evaluate import evaluate
from paredown.graph import store, structure
from paredown.graph.capture import capture
from paredown.graph.edit import insert_after
from paredown.graph.model import Model
from paredown.graph.patches import patches
from paredown.steps.quantization.quantize import Quantize
from paredown.train import reconstruct as module
from paredown.train.reconstruct import best, equations, reconstruct, refit, solve, squared_error
from tests.architectures import ARCHITECTURES, make

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore")

Kept = dict[str, dict[int, torch.Tensor]]


def data_task(x: torch.Tensor, **fields) -> Task:
    split = TensorDataset(x, torch.zeros(len(x)))
    fields = {"calibration": split} | fields
    return Task(example=(x[:1],), score=lambda out, y: out.flatten(1)[:, 0], **fields)


def cut(net: nn.Module, kept: Kept, x: torch.Tensor) -> Model:
    """The captured net with only those indices of its tensors."""
    made = copy.deepcopy(net)
    for name, dims in kept.items():
        owner = made.get_submodule(name.rpartition(".")[0])
        leaf = name.rpartition(".")[2]
        tensor = getattr(owner, leaf).detach()
        for dim, indices in dims.items():
            tensor = tensor.index_select(dim, indices)
        if leaf in owner._parameters:
            setattr(owner, leaf, nn.Parameter(tensor.clone()))
        else:
            setattr(owner, leaf, tensor.clone())
    return dataclasses.replace(capture(made, (x[:1],)), kept=kept)


def error(before: Model, after: Model, x: torch.Tensor) -> float:
    """The energy of the difference over that of the original's output."""
    with torch.no_grad():
        old, new = before(x), after(x)
    return float((new - old).square().sum() / old.square().sum())


class Pair(nn.Module):
    """Two layers with a ReLU between."""

    def __init__(self, first: nn.Module, second: nn.Module):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x):
        return self.second(self.first(x).relu())


class Product(nn.Module):
    """``x @ weight (+ bias)``, the weight as (F, O)."""

    def __init__(self, features: int, outputs: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(features, outputs))
        self.bias = nn.Parameter(torch.randn(outputs)) if bias else None

    def forward(self, x):
        return x @ self.weight if self.bias is None else torch.addmm(self.bias, x, self.weight)


def doubled(net: nn.Module) -> Kept:
    """Make the last two of the first layer's 6 channels copies, and name the four others."""
    first, second = net.first, net.second
    with torch.no_grad():
        for tensor in first.parameters():
            tensor[4:] = 2 * tensor[:2]
    four = torch.arange(4)
    kept = {f"first.{name}": {0: four} for name, _ in first.named_parameters()}
    return kept | {"second.weight": {0 if isinstance(second, Product) else 1: four}}


# --- mathematics -----------------------------------------------------------------------------


def rows(count: int, features: int, outputs: int, seed: int = 0):
    torch.manual_seed(seed)
    return (
        *(torch.randn(count, features), torch.randn(count, outputs)),
        *(torch.randn(outputs, features), torch.randn(outputs)),
    )


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("ridge", [1e-9, 0.1, 10.0])
def test_refit_is_the_ridge_solution(with_bias, ridge):
    x, y, weight, bias = rows(5000, 7, 3)  # more rows than are taken at a time
    x, y = x + 1, y + 2
    new, new_bias = refit(x, y, weight, bias if with_bias else None, ridge)
    a, b = x.double(), y.double()
    if with_bias:
        a, b = a - a.mean(0), b - b.mean(0)
    level = ridge * a.square().sum(0).mean()
    stacked = torch.cat([a, level.sqrt() * torch.eye(7, dtype=torch.float64)])
    target = torch.cat([b, level.sqrt() * weight.double().T])
    torch.testing.assert_close(new, torch.linalg.lstsq(stacked, target).solution.T)
    if with_bias:
        torch.testing.assert_close(new_bias, y.double().mean(0) - new @ x.double().mean(0))
    else:
        assert new_bias is None


def test_a_large_ridge_keeps_the_weights_and_dead_inputs_change_nothing():
    x, y, weight, bias = rows(50, 4, 2)
    assert torch.allclose(refit(x, y, weight, None, 1e12)[0], weight.double())
    change, shift = solve(equations(0 * x, y, weight, bias), 1e-4)
    assert not change.any() and torch.allclose(shift, (y.double() - bias).mean(0))


@pytest.mark.parametrize("ridge", [1e-9, 1e-4])
def test_constant_and_dependent_inputs_are_solved(ridge):
    x, y, weight, bias = rows(3000, 64, 2)
    for dependent in (torch.full_like(x, 1234.5), 1e3 * x[:, :1].expand(-1, 64), 1e4 + 0 * x):
        for given in (bias, None):
            new, new_bias = refit(dependent, y, weight, given, ridge)
            assert torch.isfinite(new).all() and (given is None or torch.isfinite(new_bias).all())
            old = squared_error(dependent, y, weight, given)
            assert squared_error(dependent, y, new, new_bias) < old


def test_a_ridge_below_rounding_grows_until_the_equations_can_be_solved():
    x, y, weight, _ = rows(500, 32, 2)
    dependent = x[:, :1].expand(-1, 32)
    tiny = solve(equations(dependent, y, weight, None), 1e-30)[0]
    plain = solve(equations(dependent, y, weight, None), 1e-9)[0]
    torch.testing.assert_close(tiny @ torch.ones(32).double(), plain @ torch.ones(32).double())


CONVOLUTIONS = [
    ((9,), [3], [2], [1], [1]),
    ((9, 8), [3, 2], [2, 1], [1, 0], [1, 2]),
    ((7, 6), [1, 1], [3, 2], [0, 2], [1, 1]),
    ((5, 6, 7), [3, 2, 1], [1, 2, 3], [2, 1, 0], [2, 1, 1]),
]


@pytest.mark.parametrize(("sizes", "kernel", "stride", "padding", "dilation"), CONVOLUTIONS)
def test_patches_times_weight_is_the_convolution(sizes, kernel, stride, padding, dilation):
    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, *sizes), torch.randn(4, 3, *kernel)
    convolution = (F.conv1d, F.conv2d, F.conv3d)[len(sizes) - 1]
    wanted = convolution(x, weight, None, stride, padding, dilation).movedim(1, -1)
    found = patches(x, kernel, stride, [(p, p) for p in padding], dilation)
    assert found.shape[: 1 + len(sizes)] == wanted.shape[:-1]
    product = found.flatten(1 + len(sizes)) @ weight.flatten(1).T
    torch.testing.assert_close(product, wanted)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("count", [3, 20, 200])
def test_never_worse_on_the_rows_held_out(seed, count):
    x, y, weight, bias = rows(count + 20, 16, 4, seed)
    fit, held = (x[20:], y[20:]), (x[:20], y[:20])
    for given in (bias, None):
        old = squared_error(*held, weight, given)
        new = squared_error(*held, *best(fit, held, weight, given, 1e-4))
        assert new < old if count == 200 else new <= old


def test_right_weights_stay_where_the_rows_only_add_noise():
    x, _, weight, bias = rows(40, 16, 4)
    clean = x @ weight.T + bias
    noisy = clean[20:] + torch.randn(20, 4)
    new, new_bias = best((x[20:], noisy), (x[:20], clean[:20]), weight, bias, 1e-4)
    assert new is weight and new_bias is bias


def test_beyond_the_cap_only_the_bias_moves(monkeypatch):
    monkeypatch.setattr(module, "FEATURES", 15)
    x, _, weight, bias = rows(200, 16, 4)
    y = x @ weight.T + bias + 3
    new, new_bias = best((x[20:], y[20:]), (x[:20], y[:20]), weight, bias, 1e-4)
    assert new is weight and torch.allclose(new_bias, bias + 3, atol=1e-5)
    assert best((x, y), (x, y), weight, None, 1e-4) == (weight, None)


# --- exact where it can be -------------------------------------------------------------------

EXACT = {
    "linear": (lambda: Pair(nn.Linear(5, 6), nn.Linear(6, 3)), (200, 5)),
    "linear, no bias": (lambda: Pair(nn.Linear(5, 6), nn.Linear(6, 3, bias=False)), (200, 5)),
    "linear (B, L, C)": (lambda: Pair(nn.Linear(5, 6), nn.Linear(6, 3)), (40, 7, 5)),
    "matmul": (lambda: Pair(nn.Linear(5, 6), Product(6, 3, False)), (40, 7, 5)),
    "addmm": (lambda: Pair(nn.Linear(5, 6), Product(6, 3, True)), (200, 5)),
    "conv2d": (lambda: Pair(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3)), (40, 3, 9, 9)),
    "stride, padding, dilation": (
        lambda: Pair(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, (3, 2), (2, 1), (1, 2), (1, 2))),
        (40, 3, 9, 8),
    ),
    "conv1d, same": (
        lambda: Pair(nn.Conv1d(3, 6, 1), nn.Conv1d(6, 4, 4, padding="same", bias=False)),
        (40, 3, 12),
    ),
    "conv2d, reflected": (
        lambda: Pair(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect")),
        (40, 3, 6, 6),
    ),
    "conv3d, valid": (
        lambda: Pair(nn.Conv3d(2, 6, 1), nn.Conv3d(6, 4, 2, padding="valid")),
        (40, 2, 4, 4, 4),
    ),
}


@pytest.mark.parametrize("name", EXACT)
def test_copies_of_kept_channels_are_made_up_for_exactly(name):
    torch.manual_seed(0)
    build, shape = EXACT[name]
    net, x = build(), torch.randn(shape)
    kept = doubled(net)
    before, after = capture(net, (x[:1],)), cut(net, kept, x)
    first = after.state_dict()["first.weight"].clone()
    names = set(after.state_dict())
    assert error(before, after, x) > 1e-2
    reconstruct(before, after, data_task(x), ridge=1e-9)
    assert error(before, after, x) < 1e-9
    assert torch.equal(after.state_dict()["first.weight"], first)  # its input is what it was
    assert set(after.state_dict()) == names


def test_a_layer_whose_own_channels_were_cut_has_the_kept_ones_as_its_target():
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))
    x, hidden, odd = torch.randn(300, 5), torch.arange(4), torch.tensor([1, 3, 5, 7])
    with torch.no_grad():
        net[0].weight[4:], net[0].bias[4:] = 2 * net[0].weight[:2], 2 * net[0].bias[:2]
        net[4].weight[:, ::2] = 0  # so that nothing is lost with the even channels
    kept = {"0.weight": {0: hidden}, "0.bias": {0: hidden}, "2.weight": {0: odd, 1: hidden}}
    kept |= {"2.bias": {0: odd}, "4.weight": {1: odd}}
    before, after = capture(net, (x[:1],)), cut(net, kept, x)
    assert error(before, after, x) > 1e-2
    last = after.state_dict()["4.weight"].clone()
    reconstruct(before, after, data_task(x), ridge=1e-9)
    assert error(before, after, x) < 1e-9
    torch.testing.assert_close(after.state_dict()["4.weight"], last, atol=1e-3, rtol=0)


# --- real models -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    path = Path(__file__).parent.parent / "examples" / "digits.py"
    spec = importlib.util.spec_from_file_location("digits_example", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    return example.model().eval(), example.task()


def inner_channels(net: nn.Module, share: float) -> Kept:
    """All but that share of each block's inner channels, those of largest L1 norm."""
    kept = {}
    for name in ("layer1", "layer2", "layer3"):
        norms = getattr(net, name).conv1.weight.abs().sum((1, 2, 3))
        count = round(len(norms) * (1 - share))
        stay = norms.argsort(descending=True, stable=True)[:count].sort().values
        kept[f"{name}.conv1.weight"], kept[f"{name}.conv2.weight"] = {0: stay}, {1: stay}
        for tensor in ("weight", "bias", "running_mean", "running_var"):
            kept[f"{name}.bn1.{tensor}"] = {0: stay}
    return kept


@pytest.mark.slow
@pytest.mark.parametrize(("share", "decibels"), [(0.3, 26), (0.5, 20)])
def test_a_trained_network_gets_its_accuracy_back(digits, share, decibels):
    net, task = digits
    images = task.validation.tensors[0]
    before, after = capture(net, task.example), cut(net, inner_channels(net, share), images)
    scores = [float(evaluate(before, task.validation, task).mean())]
    scores.append(float(evaluate(after, task.validation, task).mean()))
    reconstruct(before, after, task, examples=128)
    scores.append(float(evaluate(after, task.validation, task).mean()))
    assert scores[0] > 0.98 and scores[1] < 0.6
    assert scores[2] > scores[0] - 0.01
    assert error(before, after, images) < 10 ** (-decibels / 10)


class Examples(torch.utils.data.Dataset):
    """Examples of an architecture, one by one, in the nesting that it takes."""

    def __init__(self, name: str, batches: int):
        torch.manual_seed(0)
        self.batches = [ARCHITECTURES[name].example() for _ in range(batches)]
        self.each = len(structure.flatten(self.batches[0])[0][0])

    def __len__(self):
        return len(self.batches) * self.each

    def __getitem__(self, index):
        batch = self.batches[index // self.each]
        items = batch.items() if isinstance(batch, dict) else enumerate(batch)
        found = {key: value[index % self.each] for key, value in items}
        return found if isinstance(batch, dict) else tuple(found.values()), 0


def moved(model: Model) -> Model:
    """A copy whose vectors (norms, biases) have moved a little, so that matrices can make up."""
    made, generator = model.copy(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 1 and parameter.is_floating_point():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise * 0.2 * parameter.square().mean().sqrt())
    return made


def distance(before: Model, after: Model, split: Examples) -> float:
    total = energy = 0.0
    for inputs, _ in splits.batches(split, split.each):
        args, kwargs = splits.arguments(inputs)
        leaves = before.bind(args, kwargs)
        with torch.no_grad():
            old, new = before.graph(*leaves)[0].float(), after.graph(*leaves)[0].float()
        total, energy = total + float((new - old).norm() ** 2), energy + float(old.norm() ** 2)
    return total / energy


@pytest.mark.parametrize("name", ["resnet8", "vit"])
def test_any_architecture_comes_nearer_to_the_original(name):
    net, example = make(name)
    split = Examples(name, 16)
    before = capture(net, example)
    after = moved(before)
    task = Task(example, score=lambda out, y: out, calibration=split)
    far = distance(before, after, split)
    reconstruct(before, after, task)
    assert distance(before, after, split) < far


# --- what is left alone ----------------------------------------------------------------------


class Several(nn.Module):
    """A first layer that is cut, and after it one of each kind that stays as it is."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.masked, self.free = nn.Linear(8, 8), nn.Linear(8, 8)
        self.tied, self.again = nn.Linear(8, 8), nn.Linear(8, 8)
        self.again.weight = self.tied.weight
        self.lone_bias = nn.Linear(8, 2)

    def forward(self, x):
        x = self.up(self.grouped(self.first(x).relu_()).relu_()).movedim(1, -1)
        x = self.again(self.tied(self.free(self.masked(x).relu_()).relu_()).relu_())
        return F.linear(x, self.lone_bias.weight, self.lone_bias.bias * 2)


@pytest.fixture
def several() -> tuple[Model, Model, Task]:
    torch.manual_seed(0)
    x = torch.randn(40, 3, 6, 6)
    before = capture(Several(), (x[:1],))
    after = before.copy()
    state = after.state_dict()
    with torch.no_grad():
        state["first.weight"][0] = 0  # as if its first channel were cut
        mask = torch.rand(8, 8) > 0.5
        state["masked.weight"][~mask] = 0
        state["first.bias"][0] = 0
    after.masks["masked.weight"] = mask
    return before, after, data_task(x)


def changed(old: Model, new: Model) -> set[str]:
    state = new.state_dict()
    return {name for name, t in old.state_dict().items() if not torch.equal(t, state[name])}


def test_tied_masked_grouped_and_transposed_weights_are_left_alone(several):
    before, after, task = several
    reconstructed = after.copy()
    reconstruct(before, reconstructed, task)
    assert changed(after, reconstructed) <= {
        "first.weight",
        "first.bias",
        "free.weight",
        "free.bias",
    }
    assert {"free.weight", "free.bias"} <= changed(after, reconstructed)
    images = task.calibration.tensors[0]
    assert error(before, reconstructed, images) < error(before, after, images)


def test_a_masked_layer_without_its_mask_is_refitted(several):
    before, after, task = several
    after.masks.clear()
    reconstructed = after.copy()
    reconstruct(before, reconstructed, task)
    assert "masked.weight" in changed(after, reconstructed)


def test_what_has_not_changed_stays_to_the_byte(several):
    before, _, task = several
    after = before.copy()
    stored = store.encode(before)
    reconstruct(before, after, task)
    assert store.encode(after) == stored == store.encode(before)


def test_the_original_is_untouched_and_twice_gives_the_same_bytes(several):
    before, after, task = several
    stored, results = store.encode(before), []
    for seed in (1, 2):  # whatever the random state of the caller
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        made = after.copy()
        reconstruct(before, made, task)
        results.append(store.encode(made))
        assert torch.equal(torch.get_rng_state(), state)
    assert results[0] == results[1] != store.encode(after)
    assert store.encode(before) == stored


def test_places_that_were_cut_themselves_are_left_alone():
    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.channels, self.tokens = nn.Linear(5, 6), nn.Linear(7, 7)
            self.last = nn.Linear(6, 3)

        def forward(self, x):  # (B, 7, 5)
            x = self.channels(x).relu()
            return self.last(self.tokens(x.movedim(1, 2)).movedim(1, 2))

    torch.manual_seed(0)
    net, x, four = Mixer(), torch.randn(100, 7, 5), torch.arange(4)
    kept = {"channels.weight": {0: four}, "channels.bias": {0: four}, "last.weight": {1: four}}
    before, after = capture(net, (x[:1],)), cut(net, kept, x)
    cut_only = after.copy()
    reconstruct(before, after, data_task(x))
    assert changed(cut_only, after) == {"last.weight", "last.bias"}
    assert error(before, after, x) < error(before, cut_only, x)


# --- data, memory, errors --------------------------------------------------------------------


def cut_pair(x: torch.Tensor, fixed: bool = False) -> tuple[Model, Model]:
    torch.manual_seed(0)
    net = Pair(nn.Linear(5, 6), nn.Linear(6, 3))
    kept = doubled(net)
    before, after = capture(net, (x[:1],)), cut(net, kept, x)
    if not fixed:
        return before, after
    batch = [dataclasses.replace(i, example=x[:16], dynamic={}) for i in before.inputs]
    pair = [dataclasses.replace(m, inputs=tuple(batch)) for m in (before, after)]
    return pair[0], pair[1]


@pytest.mark.parametrize("count", [16, 40])
def test_a_fixed_batch_is_filled(count):
    x = torch.randn(40, 5)
    before, after = cut_pair(x, fixed=True)
    assert before.fixed_batch == 16
    reconstruct(before, after, data_task(x[:count]), ridge=1e-9)
    assert error(before, after, x[:16]) < 1e-9
    with pytest.raises(UserError, match="15 examples do not fill the model's batch of 16"):
        reconstruct(before, after, data_task(x[:15]))


def test_memory_bounds_the_examples(monkeypatch):
    x = torch.randn(200, 5)
    before, after = cut_pair(x)
    one = feed.peak_bytes(before, [x[:1]]) + feed.peak_bytes(after, [x[:1]])
    monkeypatch.setattr(lockstep, "MEMORY", 50 * one)
    batches = lockstep.batches([before, after], data_task(x), 512)
    assert sum(len(values[0]) for values in batches) == 50
    monkeypatch.setattr(lockstep, "MEMORY", 1)
    reconstruct(before, after, data_task(x))  # one example at least
    monkeypatch.undo()
    assert sum(len(b[0]) for b in lockstep.batches([before, after], data_task(x), 90)) == 90


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ridge": 0.0}, "ridge: expected a number from 1e-9 up, got 0.0"),
        ({"ridge": float("nan")}, "got nan"),
        ({"ridge": float("inf")}, "got inf"),
        ({"examples": 1}, "examples: expected a whole number from 2 up, got 1"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    x = torch.randn(20, 5)
    before, after = cut_pair(x)
    with pytest.raises(UserError, match=message):
        reconstruct(before, after, data_task(x), **settings)


def test_what_cannot_be_refitted_says_why(several):
    x = torch.randn(20, 5)
    before, after = cut_pair(x)
    with pytest.raises(UserError, match="task: has no calibration split"):
        reconstruct(before, after, data_task(x, calibration=None))
    broken = x.clone()
    broken[3] = float("nan")
    with pytest.raises(UserError, match=r"the layer of 'first.weight' are NaN or infinite"):
        reconstruct(before, after, data_task(broken))
    quantized = Quantize("int8").apply(before, data_task(x))
    with pytest.raises(UserError, match="is quantized; cut and refit it before Quantize"):
        reconstruct(before, quantized, data_task(x))
    other = capture(Reversed(), (x[:1],))
    with pytest.raises(UserError, match="come in different orders"):
        reconstruct(capture(Ordered(), (x[:1],)), other, data_task(x))


class Ordered(nn.Module):
    def forward(self, x):
        return x.relu().tanh()


class Reversed(nn.Module):
    def forward(self, x):
        return x.tanh().relu()


def test_ops_that_were_inserted_are_run():
    x = torch.randn(100, 5)
    before, after = cut_pair(x)
    relu = next(node for node in after.graph.graph.nodes if "relu" in str(node.target))
    insert_after(relu, torch.ops.aten.mul.Tensor, (0.5,))
    after.graph.recompile()
    reconstruct(before, after, data_task(x), ridge=1e-9)
    assert error(before, after, x) < 1e-9
