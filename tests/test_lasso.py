"""Group lasso: the proximal map, units that die exactly, and a useful one that stays."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from paredown.core import progress
from paredown.core.errors import UserError
from paredown.core.task import Task
from paredown.data import evaluate, splits
from paredown.graph.capture import capture
from paredown.graph.coupling.coupling import analyze
from paredown.graph.model import Model
from paredown.steps.pruning import criteria
from paredown.steps.pruning.prune_channels import PruneChannels
from paredown.steps.quantization.quantize import Quantize
from paredown.steps.training.fine_tune import FineTune
from paredown.train import loop
from paredown.train.lasso import pressure, proximal, units_of
from paredown.train.loop import fit
from paredown.train.settings import Training, learning_rate
from tests.architectures import make

torch.set_num_threads(1)
FAST = Training(epochs=4, lr=0.01, device="cpu")


class Net(nn.Module):
    """A residual block, so that a weight's two dimensions belong to units of two groups."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.body, self.back = nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 8, 3, padding=1)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        return self.head((x + self.back(self.body(x).relu())).mean((2, 3)))


def examples(count: int = 96, seed: int = 0) -> TensorDataset:
    """Two classes of 1 x 6 x 6 images, told apart by their mean."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 2, (count,), generator=generator)
    noise = torch.randn(count, 1, 6, 6, generator=generator)
    return TensorDataset(noise + labels[:, None, None, None], labels)


TASK = Task(
    example=(torch.zeros(2, 1, 6, 6),),
    score=lambda out, y: (out.argmax(1) == y).float(),
    loss=cross_entropy,
    train=examples(),
    batch_size=16,
)


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return capture(Net(), TASK.example)


def mlp(hidden: int = 4) -> Model:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, hidden), nn.ReLU(), nn.Linear(hidden, 2))
    return capture(net, (torch.zeros(2, 2),))


# --- the mathematics -------------------------------------------------------------------------


def test_the_proximal_map_by_hand():
    weights = torch.tensor([[3.0, 4.0], [0.6, 0.8], [0.0, 0.0]])  # norms 5, 1, 0
    made = weights * proximal(weights.norm(dim=1), torch.tensor([2.0, 1.0, 1.0]))[:, None]
    torch.testing.assert_close(made, torch.tensor([[1.8, 2.4], [0.0, 0.0], [0.0, 0.0]]))
    assert not made[1:].any()
    nothing = proximal(weights.norm(dim=1), torch.zeros(3))
    assert torch.equal(weights * nothing[:, None], weights)


@pytest.mark.parametrize("threshold", [0.1, 0.7, 1.5])
def test_the_proximal_map_is_where_its_objective_is_least(threshold):
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(5, generator=generator, dtype=torch.float64)
    start *= 1.2 / start.norm()

    def objective(v):
        return ((v - start) ** 2).sum(-1) / 2 + threshold * v.norm(dim=-1)

    ours = start * proximal(start.norm()[None], torch.tensor([threshold], dtype=torch.float64))
    nearby = ours + 0.1 * torch.randn(5000, 5, generator=generator, dtype=torch.float64)
    far = 2 * torch.randn(5000, 5, generator=generator, dtype=torch.float64)
    assert (objective(torch.cat([nearby, far])) >= objective(ours)).all()
    if threshold < 1.2:
        found = ours.clone().requires_grad_(True)
        objective(found).backward()
        assert found.grad.abs().max() < 1e-12
    else:
        assert not ours.any()


def test_weak_units_are_pressed_harder_within_their_group_alone():
    norms, group = torch.tensor([2.0, 4.0, 3.0, 1.0, 1.0]), torch.tensor([0, 0, 0, 1, 1])
    torch.testing.assert_close(pressure(norms, group, 2), torch.tensor([16.0, 1.0, 4.0, 1.0, 1.0]))
    torch.testing.assert_close(pressure(norms, group, 2, 0.0), torch.ones(5))


def of_unit(state, member, unit):
    """What of a member's weight goes with one unit."""
    return state[member.name].index_select(member.dim, torch.tensor(member.indices[unit]))


# --- on a model ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet8", "densenet", "shufflenet_v2", "vit", "crnn", "mixtral"])
def test_norms_are_those_that_pruning_ranks_by(name):
    """Coupled through residuals, concatenations, shuffles and heads: one slice at a time there,
    all at once here."""
    model = capture(*make(name))
    lasso = units_of(model, 1.0)
    theirs = criteria.score("l2", model, TASK, analyze(model).groups, 0)
    assert set(lasso.names) == set(theirs)
    norms = lasso.norms()
    for number, group in enumerate(lasso.names):
        torch.testing.assert_close(norms[lasso.group == number], theirs[group])


def test_one_step_against_a_loop_over_units(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    groups = analyze(model).groups
    assert sorted(group.size for group in groups) == [8, 12]
    units_of(model, 3.0).shrink(0.1)
    wanted = {name: tensor.clone() for name, tensor in before.items()}
    for group in groups:
        members = [m for m in group.members if m.role in ("out", "in")]
        norms = [
            torch.cat([of_unit(before, m, unit).ravel() for m in members]).norm()
            for unit in range(group.size)
        ]
        mean, low, high = sum(norms) / len(norms), min(norms), max(norms)
        for unit, norm in enumerate(norms):
            threshold = 0.1 * 3.0 * mean * 2 ** (4 * (high - norm) / (high - low))
            for m in members:
                shrunk = of_unit(wanted, m, unit) * max(0, 1 - threshold / norm)
                wanted[m.name].index_copy_(m.dim, torch.tensor(m.indices[unit]), shrunk)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, wanted[name])
    assert torch.equal(model.state_dict()["norm.weight"], before["norm.weight"])
    assert not torch.equal(model.state_dict()["body.weight"], before["body.weight"])


def test_a_useless_unit_dies_a_useful_one_stays_and_the_cut_takes_the_dead():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 2, generator=generator)
    task = Task(
        example=(torch.zeros(2, 2),),
        score=lambda out, y: (out.argmax(1) == y).float(),
        loss=cross_entropy,
        train=TensorDataset(x, (x[:, 0] > 0).long()),  # the second input says nothing
        validation=TensorDataset(x, (x[:, 0] > 0).long()),
        batch_size=32,
    )
    model = mlp()
    with torch.no_grad():
        model.graph.get_parameter("0.weight").copy_(
            torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
        )
        model.graph.get_parameter("0.bias").zero_()
        model.graph.get_parameter("2.weight").copy_(
            torch.tensor([[-1.0, 1.0, 0.5, 0.5], [1.0, -1.0, 0.5, 0.5]])
        )
    settings = FineTune(epochs=10, lr=0.01, device="cpu")
    plain = settings.apply(model, task)
    sparse = replace(settings, group_lasso=1.0).apply(model, task)
    assert (units_of(plain, 1.0).norms() > 0.5).all()
    norms = units_of(sparse, 1.0).norms()
    assert not norms[2:].any() and (norms[:2] > 0.5).all(), norms
    assert not sparse.state_dict()["2.weight"][:, 2:].any()
    cut = PruneChannels(0.5, criterion="l2", amount="channels", round_to=1, reconstruct=False)
    small = cut.apply(sparse, task)
    assert small.state_dict()["0.weight"].shape == (2, 2)
    torch.testing.assert_close(small(x), sparse(x))
    assert float(evaluate.evaluate(small, task.validation, task).mean()) > 0.97


def test_zeros_are_counted_and_told(model, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(progress, "say", said.append)
    fit(model, TASK, replace(FAST, epochs=8, group_lasso=1.0))
    dead = int((units_of(model, 1.0).norms() == 0).sum())
    assert 0 < dead < 20
    assert f", {dead} of 20 units at zero" in said[-1]


def test_a_group_driven_to_nothing_is_told(model):
    with pytest.raises(
        UserError, match=r"group_lasso: 100 has driven every unit of '.*' to zero; "
    ):
        fit(model, TASK, replace(FAST, group_lasso=100.0))


def test_off_is_plain_training_to_the_bit(model, monkeypatch):
    monkeypatch.setattr(loop, "units_of", None)  # not even looked for
    plain, ours = model.copy(), model.copy()
    fit(ours, TASK, replace(FAST, clip_norm=None, weight_decay=0.0, epochs=2))
    plain.train()
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(plain.parameters(), weight_decay=0.0, fused=True)
    for epoch in range(2):
        order = splits.batches(TASK.train, 16, shuffle=True, seed=epoch)
        for index, (x, y) in enumerate(order):
            optimizer.param_groups[0]["lr"] = learning_rate(epoch * 6 + index, 12, 0.01, 0.05)
            optimizer.zero_grad()
            cross_entropy(plain(x), y).backward()
            optimizer.step()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[name]), name


def test_another_strength_is_another_training(model, tmp_path, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(progress, "say", said.append)
    path, resumed, fresh = tmp_path / "c.safetensors", model.copy(), model.copy()
    settings = replace(FAST, epochs=2, group_lasso=0.5)
    fit(model.copy(), TASK, replace(settings, group_lasso=0.0), path)
    fit(resumed, TASK, settings, path)
    assert any("is of another training" in line for line in said)
    fit(fresh, TASK, settings)
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_masks_stay_true(model, optimizer):
    weight = model.graph.get_parameter("body.weight")
    model.masks["body.weight"] = torch.rand_like(weight) > 0.5
    weight.data.mul_(model.masks["body.weight"])
    fit(model, TASK, replace(FAST, optimizer=optimizer, group_lasso=0.2))
    made = model.state_dict()["body.weight"]
    assert not made[~model.masks["body.weight"]].any() and made.any()


def test_frozen_weights_stay(model):
    model.graph.get_parameter("stem.weight").requires_grad_(False)
    before = model.state_dict()["stem.weight"].clone()
    lasso = units_of(model, 1.0)
    lasso.shrink(0.1)
    assert torch.equal(model.state_dict()["stem.weight"], before) and len(lasso.group) == 20


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("linear", "the model has no channels that train and can be cut"),
        ("frozen", "the model has no channels that train and can be cut"),
        ("quantized", "the model is quantized, .* train with it before Quantize"),
    ],
)
def test_nothing_to_shrink_is_told(model, kind, message):
    if kind == "linear":
        model = capture(nn.Sequential(nn.Flatten(), nn.Linear(36, 2)), TASK.example)
    elif kind == "frozen":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in ("norm.weight", "head.bias"))
    else:
        model = Quantize().apply(model, TASK)
    with pytest.raises(UserError, match=f"group_lasso: {message}"):
        FineTune(epochs=1, group_lasso=0.1, device="cpu").apply(model, TASK)
