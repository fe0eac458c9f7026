"""Layer pruning: what is removed is f(x) and nothing else, the least first; every mistake told."""

import io
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, fx, nn
from torch.utils.data import Dataset, TensorDataset

from paredown.core import progress
from paredown.core.errors import UserError
from paredown.core.task import Task
from paredown.graph.capture import capture
from paredown.graph.model import Model
from paredown.graph.sites import sites
from paredown.steps.pruning.prune_layers import (
    PruneLayers,
    block_influence,
    prepared,
    relative_change,
    squared_norms,
)
from paredown.steps.pruning.prune_weights import PruneWeights
from paredown.steps.pruning.residual import Branch, at_most, branches, lost, remove, units
from paredown.steps.quantization.cast import Cast
from paredown.steps.quantization.quantize import Quantize
from paredown.steps.training.fine_tune import FineTune
from paredown.targets.runtimes import onnxruntime
from tests.architectures import ARCHITECTURES, make
from tests.architectures.blocks import EncoderBlock
from tests.architectures.captured import captured

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore")


class BasicBlock(nn.Module):
    """ResNet's, with its in-place ops."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True)))
        out += x
        return F.relu(out, inplace=True)


class Cnn(nn.Module):
    def __init__(self, depth: int = 4):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layer1 = nn.Sequential(*[BasicBlock(8) for _ in range(depth)])
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer1(self.stem(x).relu()).mean((2, 3)))


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(32, 16)
        self.blocks = nn.ModuleList([EncoderBlock(16, 2, dropout=0.1) for _ in range(4)])
        self.head = nn.Linear(16, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def task_of(inputs: Tensor, **changes) -> Task:
    rows = TensorDataset(inputs, torch.arange(len(inputs)) % 5)
    return Task(
        example=(inputs[:1],),
        score=lambda out, y: (out.argmax(1) == y).float(),
        loss=F.cross_entropy,
        train=rows,
        calibration=rows,
        batch_size=8,
        **changes,
    )


@pytest.fixture(scope="module")
def cnn() -> tuple[Model, Task]:
    """The third block adds next to nothing."""
    torch.manual_seed(0)
    net = Cnn()
    net.train()(torch.randn(64, 3, 8, 8))
    with torch.no_grad():
        net.layer1[2].bn2.weight.fill_(1e-4)
    task = task_of(torch.randn(20, 3, 8, 8))
    return capture(net.eval(), task.example), task


@pytest.fixture(scope="module")
def encoder() -> tuple[Model, Task]:
    """The second block adds next to nothing."""
    torch.manual_seed(0)
    net = Encoder().eval()
    with torch.no_grad():
        for name, parameter in net.blocks[1].named_parameters():
            if (parameter.dim() > 1 and parameter.shape[0] == 16) or name.endswith("bias"):
                parameter.mul_(1e-4)
    task = task_of(torch.randint(32, (20, 6)))
    return capture(net, task.example), task


def run(graph, model: Model, batch: int | None = None) -> list[Tensor]:
    leaves = [item.example.clone() for item in model.inputs]
    if batch is not None:
        leaves = [leaf[torch.arange(batch) % len(leaf)] for leaf in leaves]
    with torch.no_grad():
        return list(graph(*leaves))


def zeroed(model: Model, group: list[Branch]) -> fx.GraphModule:
    """The model with ``x + 0 * f(x)``: what removal must compute, by another way."""
    graph, place = fx.Graph(), {}
    graph.output(graph.graph_copy(model.graph.graph, place))
    for branch in group:
        add = place[branch.add]
        with graph.inserting_before(add):
            zeros = graph.call_function(torch.ops.aten.zeros_like.default, (place[branch.inner],))
        add.update_arg(1 - branch.place, zeros)
    return fx.GraphModule(model.graph, graph)


def close(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(
        a.shape == b.shape
        and a.dtype == b.dtype
        and torch.allclose(a.double(), b.double(), rtol=1e-5, atol=1e-5, equal_nan=True)
        for a, b in zip(ours, theirs, strict=True)
    )


def distance(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def say(step: PruneLayers, model: Model, task: Task) -> tuple[Model, list[str]]:
    """The pruned model and what the step told."""
    text = io.StringIO()
    with progress.shown(Console(file=text, width=200)):
        pruned = step.apply(model, task)
    return pruned, text.getvalue().splitlines()


# --- mathematics -----------------------------------------------------------------------------


def test_changes_of_batches_add_up_to_that_of_all():
    before, after = torch.randn(2, 12, 7)
    halves = [squared_norms(before[part], after[part]) for part in (slice(5), slice(5, 12))]
    whole = relative_change(torch.stack(halves).sum(0)[None])
    assert whole == pytest.approx(distance(after, before), rel=1e-5)


def test_a_change_is_the_mean_over_outputs_and_never_hides_a_nan():
    assert relative_change(torch.tensor([[4.0, 16.0], [0.0, 0.0]])) == 0.25
    masked = torch.tensor([1.0, float("-inf")])
    assert relative_change(squared_norms(masked, masked)[None]) == 0.0
    broken = squared_norms(torch.ones(2), torch.tensor([1.0, float("nan")]))
    assert relative_change(broken[None]) == float("inf")


def test_influence_is_that_of_angles_alone():
    x = torch.randn(3, 4, 8)
    torch.testing.assert_close(block_influence(x, 5 * x), torch.zeros(3, 4), atol=1e-6, rtol=0)
    torch.testing.assert_close(block_influence(x, -x), torch.full((3, 4), 2.0))


# --- the right block -------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", ["output_change", "cosine"])
@pytest.mark.parametrize(("kind", "name"), [("cnn", "layer1.2"), ("encoder", "blocks.1")])
def test_the_useless_block_goes(kind, name, criterion, request):
    model, task = request.getfixturevalue(kind)
    pruned, told = say(PruneLayers(criterion=criterion), model, task)
    gone = set(model.state_dict()) - set(pruned.state_dict())
    assert gone == {key for key in model.state_dict() if key.startswith(f"{name}.")}
    assert set(pruned.state_dict()) < set(model.state_dict())
    assert len(told) == 1 and told[0].startswith(f"  removed {name} (")
    inputs = task.calibration[:][0]
    with torch.no_grad():
        change = distance(pruned(inputs), model(inputs))
    assert 0 < change < 2e-3
    if criterion == "output_change":
        assert told[0].endswith(f"(output changes by {100 * change:.3g} %)")


def test_a_single_branch_of_a_block_goes(encoder):
    model, task = encoder
    by_branch, by_block = units(model.graph, "branch"), units(model.graph, "block")
    assert len(by_branch) == 8 and [u.name for u in by_block] == [f"blocks.{n}" for n in range(4)]
    pruned = PruneLayers(2, unit="branch").apply(model, task)
    gone = set(model.state_dict()) - set(pruned.state_dict())
    assert gone == {key for key in model.state_dict() if key.startswith("blocks.1.")}
    pruned = PruneLayers(1, unit="branch").apply(model, task)
    gone = {key.split(".")[2] for key in set(model.state_dict()) - set(pruned.state_dict())}
    assert gone and gone < {
        key.split(".")[2] for key in model.state_dict() if key[:8] == "blocks.1"
    }


class Shifts(nn.ModuleList):
    """Each layer adds a constant to the input: 0.95, -1.0 and 0.6."""

    def __init__(self):
        super().__init__([nn.Linear(4, 4) for _ in range(3)])
        for layer, shift in zip(self, (0.95, -1.0, 0.6), strict=True):
            nn.init.zeros_(layer.weight)
            nn.init.constant_(layer.bias, shift)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = x + layer(x)
        return x


def test_each_removal_is_measured_given_those_before():
    """-0.6 alone changes least; given that, +1.0 makes up for it, though 0.95 is less alone."""
    task = task_of(10 * torch.ones(6, 4))
    pruned, told = say(PruneLayers(2), capture(Shifts(), task.example), task)
    assert sorted(pruned.state_dict()) == ["0.bias", "0.weight"]
    shares = [100 * 0.6 / 10.55, 100 * 0.4 / 10.55]
    assert told == [
        f"  removed 2 (output changes by {shares[0]:.3g} %)",
        f"  removed 1 (output changes by {shares[1]:.3g} %)",
    ]


def test_ratio_is_a_share_of_the_blocks_and_excluded_ones_stay(cnn):
    model, task = cnn
    pruned = PruneLayers(ratio=0.5).apply(model, task)
    assert len(units(pruned.graph, "block")) == 2
    pruned = PruneLayers(1, exclude=("layer1.2", "layer1.0.conv1*")).apply(model, task)
    left = {unit.name for unit in units(pruned.graph, "block")}
    assert len(left) == 3 and {"layer1.0", "layer1.2"} < left


def test_only_so_many_examples_are_run(cnn):
    """Blocks look alike on the first examples of this split and differ on the rest."""
    model, task = cnn
    first = task.calibration[:4]
    few = replace(task, calibration=TensorDataset(*first))
    ours, told = say(PruneLayers(exclude=("layer1.2",), examples=4), model, task)
    theirs, same = say(PruneLayers(exclude=("layer1.2",)), model, few)
    _, other = say(PruneLayers(exclude=("layer1.2",)), model, task)
    assert told == same != other and ours.graph.code == theirs.graph.code


# --- what is left ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cnn", "encoder"])
def test_the_rest_is_a_model_like_any_other(kind, request, tmp_path):
    model, task = request.getfixturevalue(kind)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    code = model.graph.code
    pruned = PruneLayers(2).apply(model, task)
    assert model.graph.code == code and set(model.state_dict()) == set(before)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    for batch in (1, 3):
        assert pruned(task.calibration[:batch][0]).shape == (batch, 5)
    pruned.save(tmp_path / "m.safetensors")
    loaded = Model.load(tmp_path / "m.safetensors")
    assert close(run(loaded.graph, loaded), run(pruned.graph, pruned))
    again = PruneLayers(2).apply(loaded, task)
    assert not units(again.graph, "block") and len(sites(again.graph)) == 2
    sizes = {}
    for name, which in {"whole": model, "pruned": pruned}.items():
        onnxruntime.lower(which, tmp_path / f"{name}.onnx")
        sizes[name] = (tmp_path / f"{name}.onnx").stat().st_size
    weights = sum(4 * t.numel() for n, t in before.items() if n not in pruned.state_dict())
    assert sizes["whole"] - sizes["pruned"] > 0.9 * weights
    predict = onnxruntime.open(tmp_path / "pruned.onnx")
    inputs = task.calibration[:3][0]
    with torch.no_grad():
        expected = pruned(inputs)
    torch.testing.assert_close(torch.from_numpy(predict(inputs.numpy())[0]), expected)
    trained = FineTune(epochs=1, device="cpu").apply(pruned, task).state_dict()
    assert all(torch.isfinite(t).all() for t in trained.values())
    moved = [n for n, p in pruned.named_parameters() if not torch.equal(trained[n], p)]
    assert len(moved) == len(list(pruned.parameters()))


def test_masks_go_with_their_weights_and_other_steps_follow(cnn):
    model, task = cnn
    pruned = PruneLayers(1).apply(PruneWeights(0.5).apply(model, task), task)
    assert set(pruned.masks) == {site.weight for site in sites(pruned.graph)}
    quantized = Quantize().apply(pruned, task)
    inputs = task.calibration[:][0]
    with torch.no_grad():
        assert distance(quantized(inputs), pruned(inputs)) < 0.2
    assert len(units(PruneLayers(2).apply(Cast().apply(model, task), task).graph, "block")) == 2


class Pooling(nn.Module):
    """A branch without weights, and one whose weight is scaled and whose GELU is written out."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8, 1, 1))
        self.weight = nn.Parameter(torch.randn(8, 8, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.scale * F.avg_pool2d(x, 3, 1, 1)
        y = F.conv2d(x, self.weight / self.weight.norm(), padding=1)
        return x + 0.5 * y * (1 + torch.tanh(0.8 * (y + 0.045 * y**3)))


def test_a_shortcut_in_another_precision_is_one():
    class Precise(nn.Linear):
        def forward(self, x):
            x = x.half()
            return x.float() + super().forward(x.float()).tanh()

    model = capture(nn.Sequential(*[Precise(4, 4) for _ in range(3)]), (torch.randn(2, 4),))
    assert check_removal(model) == 3


def test_a_branch_without_weights_goes_with_its_block_and_never_alone():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 1), *[Pooling() for _ in range(3)], nn.Flatten())
    model = capture(net, (torch.randn(2, 3, 4, 4),))
    assert len(branches(model.graph)) == 9  # with the one in each GELU, which is no layer
    assert [unit.weights for unit in units(model.graph, "branch")] == [
        {f"{n}.weight"} for n in (1, 2, 3)
    ]
    assert [(u.name, len(u.branches)) for u in units(model.graph, "block")] == [
        (str(n), 2) for n in (1, 2, 3)
    ]
    assert "2.scale" not in without(model, ["2"], "block").state_dict()
    assert check_removal(model) == 3


class Shared(nn.Module):
    """One layer that runs three times, and one that shares only its weight."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.layers[1].weight = self.layers[0].weight
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.layers[0], self.layers[0], self.layers[0], self.layers[1]):
            x = x + layer(x).tanh()
        return self.head(x)


def test_shared_weights_stay_until_nothing_reads_them():
    torch.manual_seed(0)
    task = task_of(torch.randn(12, 8))
    model = capture(Shared(), task.example)
    names = [unit.name for unit in units(model.graph, "block")]
    assert names[:3] == ["layers.0", "layers.0 (use 2)", "layers.0 (use 3)"] and len(names) == 4
    for count in (1, 2, 3):
        assert "layers.0.weight" in PruneLayers(count).apply(model, task).state_dict()
    assert sorted(PruneLayers(4).apply(model, task).state_dict()) == ["head.bias", "head.weight"]


class Fixed(Shifts):
    """Its batch is written into it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).reshape(3, 4)


def test_a_fixed_batch_is_kept_to():
    task = task_of(10 * torch.ones(7, 4))
    model = capture(Fixed(), (torch.ones(3, 4),))
    assert model.fixed_batch == 3
    for criterion in ("output_change", "cosine"):
        pruned = PruneLayers(1, criterion=criterion, examples=1).apply(model, task)
        assert len(pruned.state_dict()) == 4
    short = replace(task, calibration=TensorDataset(torch.ones(2, 4), torch.zeros(2)))
    with pytest.raises(UserError, match=r"calibration: 2 examples do not fill .* batch of 3"):
        PruneLayers().apply(model, short)


# --- in-place ops ----------------------------------------------------------------------------


class InPlace(nn.Module):
    """Two residual branches in one of the ways in which memory can be shared."""

    def __init__(self, way: str):
        super().__init__()
        self.way = way
        self.first, self.second = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, self.way)(x.tanh())

    def into_the_shortcut(self, x):
        x += self.first(x).relu_()
        return x + self.second(x)

    def shortcut_written_in_the_branch(self, x):
        x = x + self.first(F.relu(x, inplace=True))
        return x + self.second(F.relu(x, inplace=True))

    def sum_written_later(self, x):
        y = F.relu(x + self.first(x), inplace=True)  # without f, this must not reach x
        return torch.cat([x, y + self.second(y)])

    def sum_written_through_a_view(self, x):
        y = x + self.first(x)
        y[:, 1:3].mul_(2)
        return torch.cat([x, y + self.second(y)])

    def shortcut_written_later(self, x):
        y = x + self.first(x)
        x.mul_(3)
        return torch.cat([x, y + self.second(y)])

    def relu_twice(self, x):
        x = x.relu_()
        y = (x + self.first(x)).relu_()
        return torch.cat([x, (y + self.second(y)).relu_().neg_()])

    def second_relu_written_later(self, x):
        x = x.relu()
        y = x + self.first(x)
        z = y.relu()
        w = z * 1
        z.mul_(2)
        return torch.cat([x, y, z, w + self.second(w)])

    def branch_written_in_a_buffer(self, x):
        y = torch.zeros_like(x)
        y[:, :2] = self.first(x)[:, :2]
        y += x
        return y + self.second(y)


WAYS = [way for way in vars(InPlace) if not way.startswith("_") and way != "forward"]


@pytest.mark.parametrize("way", WAYS)
def test_memory_that_is_shared_is_not_mixed_up(way):
    torch.manual_seed(0)
    model = capture(InPlace(way).eval(), (torch.randn(2, 4, 6, 6),))
    found = branches(model.graph)
    assert found
    check_removal(model)


def check_removal(model: Model) -> int:
    """Removing each unit, and all of them, is the same as adding zeros; how many there are."""
    count, model = 0, prepared(model)
    for by in ("branch", "block"):
        for unit in units(model.graph, by):
            whole = run(zeroed(model, list(unit.branches)), model)
            got = without(model, [unit.name], by)
            assert close(run(got.graph, got), whole), f"{by} {unit.name}"
            assert not unit.weights & {s.weight for s in sites(got.graph)} - repeated(model)
            count += by == "block"
    return count


def repeated(model: Model) -> set[str]:
    """The weights that more than one op reads."""
    names = [site.weight for site in sites(model.graph)]
    return {name for name in names if names.count(name) > 1}


def without(model: Model, names: list[str], by: str) -> Model:
    copied = model.copy()
    for unit in units(copied.graph, by):
        if unit.name in names:
            remove(copied, unit)
    return copied


def test_a_sum_over_a_branch_that_is_read_again_is_left_alone():
    class Reused(nn.Linear):
        def forward(self, x):
            f = super().forward(x)
            part = f[:, :2]
            y = f.add_(x)
            return torch.cat([y, part], 1)  # a part of the sum, under the name of one of f

    model = capture(Reused(4, 4), (torch.randn(2, 4),))
    assert branches(model.graph) == []


# --- over architectures ----------------------------------------------------------------------

QUICK = (*("resnet8", "resnet_preactivation", "mobilenet_v2", "convnext", "vit", "bert", "albert"),)
# No identity shortcut: without any, all of them projected, or joined by other ops than addition.
NONE = {
    *("big_transfer", "repvgg", "vgg", "alexnet", "densenet", "googlenet", "inception"),
    *("squeezenet", "conv3d", "mobilenet_v1", "shufflenet_v2", "mixnet", "ds_cnn"),
    *("unet", "unet_bilinear", "fcn", "deeplab", "hrnet", "pyramid_detector"),
    *("autoencoder", "vae", "dcgan", "lstm", "gru_bidirectional", "crnn", "gru_cell"),
    *("nbeats", "image_and_table", "recommender", "pointnet", "mlp", "outputs_tuple"),
    *("outputs_dict", "outputs_dataclass", "tied_language_model", "group_norm"),
    *("siamese", "spectral_critic"),
}


def case(name: str):
    return pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)


@pytest.mark.parametrize("name", [case(name) for name in ARCHITECTURES])
def test_removal_is_adding_zeros_in_every_architecture(name):
    model, example = captured(name)
    assert (check_removal(model) == 0) == (name in NONE)


def test_attention_scores_are_no_branch_of_the_bias_that_is_added_to_them():
    """MPNet adds one positional bias to the scores of every layer."""
    model = capture(*make("mpnet"))
    layers = [f"mpnet.encoder.layer.{n}" for n in (0, 1)]
    assert [(u.name, len(u.branches)) for u in units(model.graph, "block")] == [
        (name, 2) for name in layers
    ]
    assert len(branches(model.graph)) > len(units(model.graph, "branch")) == 4


# --- mistakes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"count": 0}, "count: expected a whole number from 1 up, got 0"),
        ({"count": True}, "count: expected a whole number or "),
        ({"count": None}, "count: expected a whole number from 1 up, got None"),
        ({"examples": 0}, "examples: expected a whole number from 1 up, got 0"),
        ({"ratio": 1.0}, r"ratio: expected above 0 and below 1, got 1\.0"),
        ({"ratio": float("nan")}, "ratio: expected above 0 and below 1, got nan"),
        ({"ratio": "half"}, "ratio: expected a number or "),
        ({"count": 2, "ratio": 0.5}, r"count: got 2 beside ratio=0\.5; give one"),
        ({"unit": "stage"}, 'unit: expected "block" or "branch", got \'stage\''),
        ({"criterion": "kl"}, 'criterion: expected "output_change" or "cosine", got \'kl\''),
        ({"exclude": "fc"}, "exclude: expected a tuple of names, got the text 'fc'"),
    ],
)
def test_settings_out_of_range_are_told(settings, message):
    with pytest.raises(UserError, match=message):
        PruneLayers(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"count": 5}, "count: expected at most 4, the blocks that can be removed, got 5"),
        ({"ratio": 0.1}, r"ratio: 0\.1 of the 4 blocks .* is none; ask for"),
        ({"exclude": ("layer1.9",)}, r"exclude: no block is called 'layer1\.9'; .* 'layer1\.\d"),
        ({"exclude": ("layer1",)}, "exclude: leaves none of the 4 residual blocks"),
        ({"exclude": ("*",)}, "exclude: leaves none of the 4 residual blocks"),
    ],
)
def test_what_does_not_fit_the_model_is_told(cnn, settings, message):
    with pytest.raises(UserError, match=message):
        PruneLayers(**settings).apply(*cnn)


def test_a_model_without_residual_blocks_is_told():
    task = task_of(torch.randn(4, 8))
    model = capture(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 5)), task.example)
    with pytest.raises(UserError, match="PruneLayers: the model has no residual block to remove"):
        PruneLayers().apply(model, task)


def test_what_would_leave_no_model_is_not_offered():
    class Whole(nn.Linear):
        def forward(self, x):
            return x + super().forward(x)

    class Two(nn.Module):
        """Removing its branch would leave the second input unread."""

        def __init__(self):
            super().__init__()
            self.mix, self.head = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x, y):
            return self.head(x + self.mix(x * y))

    inputs = torch.randn(2, 4)
    for module, example in ((Whole(4, 4), (inputs,)), (Two(), (inputs, inputs))):
        graph = capture(module, example).graph
        assert len(branches(graph)) == 1 and not lost(graph, branches(graph))
        assert units(graph, "block") == units(graph, "branch") == []


class Conditioned(nn.Module):
    """Each block reads some of the other inputs, which nothing else does."""

    def __init__(self, reads: tuple[str, ...]):
        super().__init__()
        self.reads, self.head = reads, nn.Linear(4, 4)
        self.blocks = nn.ModuleList([nn.Linear(4, 4) for _ in reads])

    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        for block, read in zip(self.blocks, self.reads, strict=True):
            x = x + block(x * y if read == "y" else x * z if read == "z" else x * y * z)
        return self.head(x)


class Unread(Dataset):
    """Twelve examples that nobody may look at."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int):
        raise AssertionError("an example was read")


def conditioned(*reads: str) -> tuple[Model, Task]:
    torch.manual_seed(0)
    x = torch.randn(6, 1, 4)
    example = (x[0], x[0] + 1, x[0] + 2)
    rows = [((row[0], row[0] + 1, row[0] + 2), 0) for row in x]
    return capture(Conditioned(reads), example), replace(
        task_of(x[0]), example=example, calibration=rows
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"count": 4},
            r"count: expected at most 2, .* removed \(an input .* more\), got 4; ask for",
        ),
        ({"count": 3}, r"count: expected at most 2, the blocks that can be removed \(an .* got 3"),
        ({"ratio": 0.8}, r"ratio: 0\.8 of the 4 blocks is 3, and 2 can be .* ask for 0\.5 or less"),
    ],
)
@pytest.mark.parametrize("criterion", ["output_change", "cosine"])
def test_what_cannot_go_after_the_others_is_told_before_any_work(settings, message, criterion):
    model, task = conditioned("y", "y", "z", "z")
    blind = replace(task, calibration=Unread())
    with pytest.raises(UserError, match=message):
        PruneLayers(**{"criterion": criterion, **settings}).apply(model, blind)
    left = PruneLayers(2, criterion=criterion).apply(model, task)
    assert {site.weight for site in sites(left.graph)} in [
        {f"blocks.{y}.weight", f"blocks.{z}.weight", "head.weight"} for y in (0, 1) for z in (2, 3)
    ]


@pytest.mark.parametrize("criterion", ["output_change", "cosine"])
def test_a_block_goes_only_if_as_many_as_asked_can_still_follow(criterion):
    """The first block changes nothing, yet without it neither of the others could go."""
    model, task = conditioned("yz", "y", "z")
    with torch.no_grad():
        model.graph.blocks.get_submodule("0").weight.mul_(1e-6)
        model.graph.blocks.get_submodule("0").bias.zero_()
    found = units(model.graph, "block")
    assert [at_most(model.graph, found, count) for count in (1, 2, 3)] == [1, 2, 2]
    one, two = (PruneLayers(n, criterion=criterion).apply(model, task) for n in (1, 2))
    assert {site.weight for site in sites(one.graph)} == {
        *("blocks.1.weight", "blocks.2.weight", "head.weight")
    }
    assert {site.weight for site in sites(two.graph)} == {"blocks.0.weight", "head.weight"}


def test_the_inner_blocks_of_a_block_are_counted_once():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
            self.outer = nn.Linear(4, 4)

        def forward(self, x):
            y = x
            for layer in self.inner:
                y = y + layer(y).tanh()
            return F.linear(x + y * 1e-6, self.outer.weight)

    task = task_of(torch.randn(8, 4))
    model = capture(Nested(), task.example)
    assert len(units(model.graph, "branch")) == 4
    pruned = PruneLayers(3, unit="branch").apply(model, task)  # the outer one would leave none
    assert not any(name.startswith("inner") for name in pruned.state_dict())
    with pytest.raises(UserError, match="at most 3, the branches"):
        PruneLayers(4, unit="branch").apply(model, task)


def test_no_data_and_a_quantized_model_are_told(cnn):
    model, task = cnn
    with pytest.raises(UserError, match="task: has no calibration split"):
        PruneLayers().apply(model, replace(task, calibration=None, train=None))
    with pytest.raises(UserError, match=r"PruneLayers: the model is quantized.*before Quantize"):
        PruneLayers().apply(Quantize().apply(model, task), task)


def test_outputs_that_tell_nothing_are_told():
    task = task_of(torch.zeros(4, 4))
    net = Shifts()
    for layer in net:
        nn.init.zeros_(layer.bias)
    with pytest.raises(UserError, match="outputs are zero, NaN or infinite on all examples"):
        PruneLayers().apply(capture(net, task.example), task)
