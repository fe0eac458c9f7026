"""Channel pruning: scores by hand, exact selection, what was asked is what goes, mistakes told."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import TensorDataset

from paredown.core import progress
from paredown.core.errors import UserError
from paredown.core.task import Target, Task
from paredown.graph import store
from paredown.graph.capture import capture
from paredown.graph.coupling.coupling import Coupling, analyze
from paredown.graph.coupling.groups import Group, Member
from paredown.graph.model import Model
from paredown.measure.timing import speedup
from paredown.steps import latency, recipe
from paredown.steps.pruning import criteria
from paredown.steps.pruning.criteria import CRITERIA, unit_slices
from paredown.steps.pruning.ladder import comparable, ladder, largest, prices, widths
from paredown.steps.pruning.prune_channels import PruneChannels
from paredown.steps.pruning.prune_weights import PruneWeights
from paredown.steps.quantization.quantize import Quantize
from paredown.steps.step import Setting, Step

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore")
WEIGHTS = ("l1", "l2", "geometric_median", "bn_scale", "taylor")  # take slices and nothing else


class Cnn(nn.Module):
    """Two groups of 32 and 24 channels, each made by a convolution and read by a layer."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.conv2 = nn.Conv2d(32, 24, 3, padding=1)
        self.fc = nn.Linear(24, 4)

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        return self.fc(self.conv2(x).relu().mean((2, 3)))


class Mlp(nn.Module):
    """Neurons behind a layer norm, which sees how many there are, and neurons behind nothing."""

    def __init__(self, plain: bool = True):
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(6, 20), nn.LayerNorm(20), nn.Linear(20, 5)
        self.hidden = nn.Linear(5, 10) if plain else None
        self.out = nn.Linear(10 if plain else 5, 3)

    def forward(self, x):
        x = self.down(self.norm(self.up(x)))
        return self.out(x if self.hidden is None else self.hidden(x).relu())


def task_for(inputs: torch.Tensor, classes: int, targets: bool = True) -> Task:
    labels = torch.arange(len(inputs)) % classes
    data = TensorDataset(inputs, labels) if targets else TensorDataset(inputs)
    return Task(
        example=(inputs[:1],),
        score=lambda out, y: (out.argmax(1) == y).float(),
        loss=F.cross_entropy,
        calibration=data,
        batch_size=8,
    )


@pytest.fixture
def cnn() -> tuple[Model, Task]:
    torch.manual_seed(0)
    task = task_for(torch.randn(20, 3, 6, 6), 4)
    return capture(Cnn().eval(), task.example), task


def member(indices, dim=0, role="out", name="w") -> Member:
    return Member(name, dim, np.asarray(indices), role)


def plain_group(name: str, size: int, columns: int = 1) -> Group:
    indices = np.arange(size * columns).reshape(size, columns)
    return Group(name, size, (Member(f"{name}.weight", 0, indices, "out"),), True)


def cnn_groups() -> tuple[Group, Group]:
    """The groups of `Cnn`, by hand."""
    one, two = np.arange(32)[:, None], np.arange(24)[:, None]
    first = (
        *(Member("conv1.weight", 0, one, "out"), Member("conv2.weight", 1, one, "in")),
        *(Member("bn1.weight", 0, one, "scale"), Member("bn1.bias", 0, one, "other")),
        *(Member("bn1.running_mean", 0, one, "other"), Member("bn1.running_var", 0, one, "other")),
    )
    second = (
        *(Member("conv2.weight", 0, two, "out"), Member("conv2.bias", 0, two, "other")),
        Member("fc.weight", 1, two, "in"),
    )
    return Group("conv1", 32, first, True), Group("conv2", 24, second, True)


def scores(name: str, model: Model, task: Task, groups=None, seed: int = 0):
    return criteria.score(name, model, task, groups or cnn_groups(), seed)


# --- the mathematics -------------------------------------------------------------------------


def test_slices_are_what_goes_with_a_unit():
    weight = torch.randn(6, 4, 3, 3)
    heads = [[0, 1], [2, 5], [3, 4]]
    out = unit_slices(weight, member(heads))
    assert out.shape == (3, 2, 36)
    assert torch.equal(out[1, 1], weight[5].flatten())
    read = unit_slices(weight, member([[1], [3]], dim=1, role="in"))
    assert torch.equal(read[1, 0], weight[:, 3].flatten())
    assert unit_slices(torch.randn(6), member(heads)).shape == (3, 2, 1)


def test_scores_by_hand():
    slices = [torch.tensor([[3.0, -4.0], [0.0, 1.0]]), torch.tensor([[12.0], [-1.0]])]
    assert criteria.l1(slices).tolist() == [19, 2]
    assert criteria.l2(slices).tolist() == pytest.approx([13, math.sqrt(2)])
    assert criteria.bn_scale(slices).tolist() == [19, 2]
    assert criteria.taylor(slices).tolist() == [121, 0]
    points = [torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 4.0]])]
    assert criteria.geometric_median(points).tolist() == pytest.approx([9, 8, 7])
    weights = [torch.tensor([[[3.0, 4.0], [1.0, 0.0]]]), torch.tensor([[[2.0], [0.0]]])]
    norms = [torch.tensor([[2.0, 0.5]]), torch.tensor([[3.0, 9.0]])]
    wanted = math.sqrt(6**2 + 8**2 + 0.5**2 + 6**2)
    assert criteria.weight_activation(weights, norms).tolist() == pytest.approx([wanted])


units_of = st.integers(2, 9)
seeds = st.integers(0, 2**31)


@pytest.mark.parametrize("name", WEIGHTS)
@given(units=units_of, seed=seeds)
def test_permuted_units_have_permuted_scores(name, units, seed):
    made = torch.Generator().manual_seed(seed)
    slices = [torch.randn(units, 2, 5, generator=made), torch.randn(units, 3, generator=made)]
    order = torch.randperm(units, generator=made)
    score = CRITERIA[name].score
    torch.testing.assert_close(score([s[order] for s in slices]), score(slices)[order])


@pytest.mark.parametrize("name", ["l1", "l2", "bn_scale", "weight_activation"])
@given(units=units_of, seed=seeds, factor=st.floats(1.1, 100))
def test_a_unit_that_is_scaled_up_gains(name, units, seed, factor):
    made = torch.Generator().manual_seed(seed)
    slices = [torch.randn(units, 2, 5, generator=made), torch.randn(units, 2, 3, generator=made)]
    larger = [torch.cat([s[:1] * factor, s[1:]]) for s in slices]
    more = [[torch.ones(units, 2)] * 2] if name == "weight_activation" else []
    before, after = (CRITERIA[name].score(s, *more) for s in (slices, larger))
    assert float(after[0]) == pytest.approx(factor * float(before[0]), rel=1e-4)
    assert torch.equal(after[1:], before[1:])


@given(units=st.integers(3, 9), seed=seeds)  # two are as far from each other
def test_a_filter_far_from_the_others_is_the_last_to_go(units, seed):
    filters = torch.randn(units, 7, generator=torch.Generator().manual_seed(seed))
    filters[units // 2] += 1000
    assert int(criteria.geometric_median([filters]).argmax()) == units // 2


def test_grouped_channels_share_an_index():
    squares = torch.tensor([1.0, 4.0, 9.0, 16.0, 25.0, 36.0])
    wanted = [math.sqrt(1 + 9 + 25), math.sqrt(4 + 16 + 36)]
    assert criteria.channel_norms(squares, 2).tolist() == pytest.approx(wanted)
    assert criteria.channel_norms(squares, 4) is None


def test_widths_are_multiples_where_there_is_room():
    assert widths(64, 7, 8) == [56, 48, 40, 32, 24, 16, 8]
    assert widths(16, 1, 8) == [8] and widths(15, 12, 8) == [14, 13, 12]
    assert widths(5, 5, 1) == widths(1, 1, 1) == widths(3, 9, 1) == []
    assert widths(2, 0, 1) == [1]  # a layer of no channels is none


@given(size=st.integers(1, 200), least=st.integers(1, 50), multiple=st.integers(1, 32))
def test_widths_keep_their_bounds(size, least, multiple):
    found = widths(size, least, multiple)
    assert found == sorted(set(found), reverse=True)
    assert all(least <= width < size for width in found)
    assert size < 2 * multiple or all(width % multiple == 0 for width in found)


@given(units=st.integers(2, 40), seed=seeds, data=st.data())
def test_the_units_of_least_score_go_first(units, seed, data):
    score = torch.randint(0, 5, (units,), generator=torch.Generator().manual_seed(seed)).float()
    wide = data.draw(st.integers(1, units))
    narrow = data.draw(st.integers(1, wide))
    more, fewer = largest(score, wide), largest(score, narrow)
    assert int(more.sum()) == wide and int(fewer.sum()) == narrow
    assert not (fewer & ~more).any()  # cuts are nested
    assert wide == units or score[~more].max() <= score[more].min()


def test_prices_rise_and_are_means_of_what_goes():
    score = torch.tensor([5.0, 1.0, 3.0, 1.0, 7.0, 2.0])
    assert prices(score, [4, 2, 1]).tolist() == [1.0, 2.5, 5.0]
    assert comparable(score).mean() == pytest.approx(1.0)
    assert comparable(torch.zeros(3)).tolist() == [0, 0, 0]


def test_a_factor_of_a_whole_layer_changes_no_choice():
    groups = [plain_group("a", 9), plain_group("b", 9)]
    score = [torch.rand(9), torch.rand(9)]
    allowed = [widths(9, 1, 1)] * 2
    plain = ladder(groups, score, allowed, "global")
    scaled = ladder(groups, [score[0] * 1024, score[1]], allowed, "global")
    assert [(r.group, r.width) for r in plain.rungs] == [(r.group, r.width) for r in scaled.rungs]


@pytest.mark.parametrize("scope", ["global", "uniform"])
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4), seed=seeds)
def test_every_start_of_a_ladder_is_a_choice(scope, sizes, seed):
    made = torch.Generator().manual_seed(seed)
    groups = [plain_group(f"g{n}", size) for n, size in enumerate(sizes)]
    score = [torch.randint(0, 4, (size,), generator=made).float() for size in sizes]
    steps = ladder(groups, score, [widths(size, 2, 8) for size in sizes], scope)
    before = {group.name: np.ones(group.size, bool) for group in groups}
    for count in range(1, len(steps) + 1):
        after = before | steps.choice(count)
        gone = sum(int((before[name] & ~after[name]).sum()) for name in before)
        assert gone == steps.rungs[count - 1].units > 0
        assert not any((after[name] & ~before[name]).any() for name in before)
        before = after
    assert steps.choice(0) == {}


# --- what gathers the tensors ----------------------------------------------------------------


def test_weights_of_their_roles_are_looked_at(cnn):
    model, task = cnn
    state = model.state_dict()
    parts = [state["conv1.weight"].flatten(1), state["conv2.weight"].transpose(0, 1).flatten(1)]
    found = scores("l2", model, task)["conv1"]
    torch.testing.assert_close(found, torch.cat(parts, 1).norm(dim=1))
    torch.testing.assert_close(scores("l1", model, task)["conv1"], torch.cat(parts, 1).abs().sum(1))
    rows = parts[0]
    wanted = (rows[:, None] - rows[None]).norm(dim=2).sum(1)
    torch.testing.assert_close(scores("geometric_median", model, task)["conv1"], wanted)


def test_groups_without_a_norm_have_no_scale(cnn):
    model, task = cnn
    with torch.no_grad():
        model.graph.bn1.weight.copy_(torch.linspace(-1, 1, 32))
    found = scores("bn_scale", model, task)
    assert set(found) == {"conv1"}
    torch.testing.assert_close(found["conv1"], torch.linspace(-1, 1, 32).abs())
    with pytest.raises(UserError, match=r"no group has what 'bn_scale' looks at \(scale weights\)"):
        scores("bn_scale", model, task, cnn_groups()[1:])


def test_taylor_is_the_square_of_the_gate_s_gradient(cnn):
    """A unit's weights times their gradients add up to the gradient of a gate on them."""
    model, task = cnn
    made, gates = Cnn().eval(), torch.ones(24, requires_grad=True)
    made.load_state_dict(model.state_dict())

    def gated(x):  # the gate scales all that makes the unit; what reads it counts again
        x = made.bn1(made.conv1(x)).relu()
        x = F.conv2d(
            x, made.conv2.weight * gates[:, None, None, None], made.conv2.bias * gates, 1, 1
        )
        return F.linear(x.relu().mean((2, 3)), made.fc.weight * gates, made.fc.bias)

    inputs, labels = task.calibration.tensors
    order = torch.randperm(20, generator=torch.Generator().manual_seed(3))[:16]
    wanted = torch.zeros(24)
    for chosen in order.split(8):  # 20 examples are two whole batches of 8
        (gradient,) = torch.autograd.grad(task.loss(gated(inputs[chosen]), labels[chosen]), gates)
        wanted += gradient.square() / 2
    torch.testing.assert_close(scores("taylor", model, task, seed=3)["conv2"], wanted)
    assert all(p.grad is None for p in model.parameters())


def test_taylor_prefers_training_data_and_wants_targets(cnn):
    model, task = cnn
    bare = dataclasses.replace(task_for(task.calibration.tensors[0], 4, targets=False))
    with pytest.raises(UserError, match="the data has no targets; give the task labelled data"):
        scores("taylor", model, bare)
    both = dataclasses.replace(bare, train=task.calibration)
    torch.testing.assert_close(scores("taylor", model, both), scores("taylor", model, task))


def test_activations_are_those_that_the_weights_read(cnn):
    model, task = cnn
    made = Cnn().eval()
    made.load_state_dict(model.state_dict())
    with torch.no_grad():
        x = made.bn1(made.conv1(task.calibration.tensors[0])).relu()
        y = made.conv2(x).relu().mean((2, 3))
        first = x.transpose(0, 1).flatten(1).norm(dim=1)
        wanted = {
            "conv1": made.conv2.weight.transpose(0, 1).flatten(1).norm(dim=1) * first,
            "conv2": made.fc.weight.norm(dim=0) * y.norm(dim=0),
        }
    bare = task_for(task.calibration.tensors[0], 4, targets=False)
    torch.testing.assert_close(scores("weight_activation", model, bare), wanted)


def test_chance_is_seeded(cnn):
    one, same, other = (scores("random", *cnn, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one["conv2"], same["conv2"])
    assert not torch.equal(one["conv2"], other["conv2"])
    assert not torch.equal(one["conv1"][:24], one["conv2"])


@pytest.mark.parametrize("name", CRITERIA)
def test_a_criterion_leaves_the_model_as_it_was(name, cnn):
    model, task = cnn
    model.train()
    before, code = store.encode(model), model.graph.code
    found = scores(name, model, task)
    assert {g: len(s) for g, s in found.items()}.items() <= {"conv1": 32, "conv2": 24}.items()
    assert found and store.encode(model) == before and model.graph.code == code


def test_scores_that_mean_nothing_are_told(cnn):
    model, task = cnn
    with torch.no_grad():
        model.graph.conv2.weight[3] = math.nan
    with pytest.raises(UserError, match="scores by 'l2' of 'conv1' are NaN or infinite; check"):
        scores("l2", model, task)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    with pytest.raises(UserError, match=r"every unit a score of zero: .* Use a trained model, or"):
        scores("l2", model, task)


def test_an_unknown_criterion_suggests_the_nearest():
    with pytest.raises(UserError, match=r"criterion: 'tailor' is not one of .* mean 'taylor'\?"):
        PruneChannels(criterion="tailor")


# --- settings --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratio": 0}, "ratio: expected a share above 0 and below 1, got 0"),
        ({"ratio": 1}, "ratio: expected a share above 0 and below 1, got 1"),
        ({"ratio": -0.1}, "got -0.1"),
        ({"ratio": math.nan}, "got nan"),
        ({"amount": "flops"}, r"amount: 'flops' is not one of .*; did you mean '.*'\?"),
        ({"amount": "parameter"}, r"did you mean 'parameters'\?"),
        ({"scope": "layer"}, "scope: 'layer' is not one of global, uniform"),
        ({"attention": "head"}, r"attention: 'head' is .*; did you mean 'heads'\?"),
        ({"group_norm": "inside"}, "group_norm: 'inside' is not one of groups, within"),
        ({"round_to": 0}, "round_to: expected a whole number from 1 up, got 0"),
        ({"round_to": 2.5}, "round_to: expected a whole number or "),
        ({"min_width": 0}, "min_width: expected a whole number from 1 up, got 0"),
        ({"max_ratio": 0}, "max_ratio: expected a share above 0 and at most 1, got 0"),
        ({"max_ratio": 1.5}, "max_ratio: expected a share above 0 and at most 1, got 1.5"),
        ({"exclude": "fc"}, "exclude: expected a tuple of names, got the text 'fc'"),
        ({"criterion": "l3"}, "criterion: 'l3' is not one of"),
    ],
)
def test_wrong_settings_are_refused_at_once(settings, message):
    with pytest.raises(UserError, match=message):
        PruneChannels(**settings)


@pytest.mark.parametrize(
    ("settings", "needs"),
    [
        ({}, {"calibration"}),
        ({"reconstruct": False}, set()),
        ({"criterion": "taylor", "reconstruct": False}, {"calibration", "loss"}),
        ({"criterion": "weight_activation", "reconstruct": False}, {"calibration"}),
        ({"criterion": "taylor"}, {"calibration", "loss"}),
    ],
)
def test_what_is_needed_depends_on_the_settings(settings, needs):
    step = PruneChannels(**settings)
    assert isinstance(step, Step) and step.needs == needs and PruneChannels.needs == frozenset()
    assert dataclasses.replace(step, ratio=0.25).needs == needs
    assert dataclasses.replace(step, criterion="l1", reconstruct=False).needs == set()
    bare = Task(example=(torch.zeros(1, 3),), score=lambda out, y: out)
    assert len(recipe.problems([step], bare)) == bool(needs)


# --- what is chosen --------------------------------------------------------------------------


def sizes(coupling: Coupling) -> dict[str, int]:
    return {group.name: group.size for group in coupling.groups}


def kept(coupling: Coupling, choice) -> dict[str, int]:
    return sizes(coupling) | {name: int(stays.sum()) for name, stays in choice.items()}


def choose(model: Model, task: Task, **settings):
    coupling = analyze(model)
    return coupling, PruneChannels(**settings).choose(model, task, coupling)


@pytest.mark.parametrize("scope", ["global", "uniform"])
@pytest.mark.parametrize("ratio", [0.05, 0.3, 0.5, 0.77])
def test_channels_are_removed_to_within_a_unit(scope, ratio, cnn):
    coupling, choice = choose(*cnn, ratio=ratio, scope=scope, round_to=1)
    widths_, before = kept(coupling, choice), sizes(coupling)
    gone = sum(before.values()) - sum(widths_.values())
    if scope == "uniform":
        assert all(widths_[n] == math.ceil(before[n] * (1 - ratio) - 1e-9) for n in before)
    else:
        assert gone == math.floor(ratio * sum(before.values()))


@pytest.mark.parametrize("scope", ["global", "uniform"])
@pytest.mark.parametrize("amount", ["parameters", "macs"])
@pytest.mark.parametrize(("ratio", "round_to"), [(0.1, 1), (0.5, 1), (0.5, None), (0.8, 1)])
def test_costs_fall_by_the_share_asked_and_one_cut_less_would_not_do(
    scope, amount, ratio, round_to, cnn
):
    model, task = cnn
    step = PruneChannels(ratio, amount, scope=scope, round_to=round_to, reconstruct=False)
    coupling = analyze(model)
    cuts, whole = step.cuts(model, task, coupling), getattr(coupling.costs(), amount)
    counts = [getattr(coupling.costs(cuts.choice(n)), amount) for n in range(len(cuts) + 1)]
    assert counts == sorted(counts, reverse=True) and counts[0] == whole
    reached = getattr(coupling.costs(step.choose(model, task, coupling)), amount)
    assert reached <= (1 - ratio) * whole < counts[counts.index(reached) - 1]
    made = step.apply(model, task)
    if amount == "parameters":
        assert sum(p.numel() for p in made.parameters()) == reached


def test_widths_are_multiples_of_eight_unless_asked(cnn):
    for round_to, multiple in ((None, 8), (4, 4), (12, 12)):
        coupling, choice = choose(*cnn, ratio=0.6, round_to=round_to, scope="uniform")
        changed = [w for n, w in kept(coupling, choice).items() if w < sizes(coupling)[n]]
        assert changed and all(width % multiple == 0 for width in changed)


def test_a_head_of_many_channels_is_a_multiple_by_itself():
    for columns, wanted in ((1, 8), (4, 2), (6, 4), (8, 1), (64, 1)):
        assert PruneChannels()._multiple(plain_group("g", 4, columns)) == wanted
    assert PruneChannels(round_to=1)._multiple(plain_group("g", 4, 3)) == 1


def test_no_group_falls_below_its_guards(cnn):
    model, task = cnn
    with torch.no_grad():  # the first group's units differ so much that most seem worth nothing
        model.graph.conv1.weight.mul_(torch.tensor([1.0] + 31 * [1e-6])[:, None, None, None])
        model.graph.conv2.weight[:, 1:] *= 1e-6
    free = choose(model, task, ratio=0.55, round_to=1, max_ratio=1.0)
    assert min(kept(*free).values()) < 32 * 0.1
    for settings, least in (({}, 4), ({"max_ratio": 0.75}, 8), ({"min_width": 11}, 11)):
        guarded = choose(model, task, ratio=0.55, round_to=1, **settings)
        assert min(kept(*guarded).values()) == least
        assert sum(kept(*guarded).values()) == 26  # the others make up for it


def test_equal_shares_under_uniform_scope(cnn):
    model, task = cnn
    with torch.no_grad():
        model.graph.conv2.weight[5:] *= 1e-3
    coupling, choice = choose(model, task, ratio=0.25, scope="uniform", round_to=1)
    assert sorted(kept(coupling, choice).values()) == [18, 24]


def test_a_group_with_an_excluded_layer_stays_whole(cnn):
    for exclude in (("bn1",), ("bn1.bias",), ("*onv1",), ("conv1.*",)):
        coupling, choice = choose(*cnn, exclude=exclude)
        assert [n for n, w in kept(coupling, choice).items() if w == sizes(coupling)[n] == 32]
        assert len(choice) == 1
    message = r"exclude: no layer or weight is called 'conv3'; did you mean 'conv[12]'\?"
    with pytest.raises(UserError, match=message):
        choose(*cnn, exclude=("conv3",))
    with pytest.raises(UserError, match="no channels that can be cut besides those excluded"):
        choose(*cnn, exclude=("*",))


def test_groups_that_an_op_counts_can_be_left_whole():
    torch.manual_seed(0)
    inputs = torch.randn(8, 6)
    model, task = capture(Mlp().eval(), (inputs[:1],)), task_for(inputs, 3)
    coupling = analyze(model)
    inexact = {group.name for group in coupling.groups if not group.exact}
    assert inexact and len(inexact) < len(coupling.groups)
    every = PruneChannels(round_to=1, scope="uniform").choose(model, task, coupling)
    exact = PruneChannels(round_to=1, scope="uniform", exact_only=True)
    assert set(every) & inexact and not set(exact.choose(model, task, coupling)) & inexact


def test_exact_only_with_none_to_cut_names_the_op():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 20), nn.LayerNorm(20), nn.Linear(20, 3))
    model = capture(module.eval(), (torch.zeros(1, 6),))
    with pytest.raises(UserError, match=r"exact_only: none of the 1 groups .* \(.*norm.*\) sees"):
        PruneChannels(exact_only=True).apply(model, None)


# --- the step on real models -----------------------------------------------------------------


def planted() -> tuple[Model, Task, list[int]]:
    """A trained-looking network in which half of each layer's channels are near to nothing."""
    torch.manual_seed(1)
    module, noise = Cnn(), list(range(1, 32, 2))
    with torch.no_grad():
        module.conv1.weight[noise] *= 1e-7
        module.bn1.running_mean.zero_()
        module.conv2.weight[1::2] *= 1e-7
        module.conv2.bias[1::2] *= 1e-7
    inputs = torch.randn(16, 3, 6, 6)
    task = task_for(inputs, 4)
    return capture(module.eval(), task.example), task, noise


@pytest.mark.parametrize("criterion", ["l1", "l2", "taylor", "weight_activation"])
def test_exactly_the_channels_that_are_noise_go(criterion):
    model, task, noise = planted()
    plain = {"round_to": 1, "reconstruct": False}
    made = PruneChannels(0.5, criterion=criterion, **plain).apply(model, task)
    stays = sorted(set(range(32)) - set(noise))
    for name, rows in (("conv1.weight", stays), ("conv2.weight", range(0, 24, 2))):
        wanted = model.state_dict()[name][list(rows)]
        wanted = wanted[:, stays] if name == "conv2.weight" else wanted
        assert torch.equal(made.state_dict()[name], wanted)
    inputs = task.calibration.tensors[0]
    with torch.no_grad():
        torch.testing.assert_close(made(inputs), model(inputs), rtol=1e-5, atol=1e-5)
        chance = PruneChannels(0.5, criterion="random", **plain).apply(model, task)
        assert float((chance(inputs) - model(inputs)).norm() / model(inputs).norm()) > 0.1


@pytest.mark.parametrize("criterion", CRITERIA)
def test_the_same_bytes_whatever_the_random_state(criterion, cnn):
    model, task = cnn
    before, step = store.encode(model), PruneChannels(0.5, criterion=criterion)
    first = store.encode(step.apply(model, task))
    torch.manual_seed(99)
    assert store.encode(step.apply(model, task)) == first != before == store.encode(model)


def test_reconstruction_brings_the_outputs_nearer(cnn):
    model, task = cnn
    inputs = task.calibration.tensors[0]
    errors = []
    for fitted in (False, True):
        made = PruneChannels(0.3, reconstruct=fitted).apply(model, task)
        with torch.no_grad():
            errors.append(float((made(inputs) - model(inputs)).norm()))
    assert errors[1] < errors[0]


def test_what_was_cut_is_told(cnn):
    from rich.console import Console

    model, task = cnn
    with open("/dev/null", "w") as nowhere:
        console = Console(file=nowhere, record=True, width=200)
        with progress.shown(console):
            made = PruneChannels(0.5).apply(model, task)
    after = sum(p.numel() for p in made.parameters())
    text = console.export_text()
    assert (
        f"2 of 2 groups cut, 24 of 56 units gone; 7.96 k to {after / 1e3:.3g} k parameters" in text
    )


def test_what_changes_nothing_raises(cnn):
    model, task = cnn
    with pytest.raises(
        UserError, match=r"changed nothing; all 2 groups are as narrow as min_width"
    ):
        choose(model, task, min_width=32)
    with pytest.raises(UserError, match=r"changed nothing; the first cut takes 8 units, more than"):
        choose(model, task, ratio=0.1)
    bare = capture(nn.Linear(4, 2), (torch.zeros(1, 4),))
    with pytest.raises(UserError, match="the model has no channels that can be cut"):
        PruneChannels().apply(bare, None)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    with pytest.raises(UserError, match='Use a trained model, or criterion="random"'):
        choose(model, task)


def test_an_amount_out_of_reach_says_what_is_within(cnn):
    message = r"share of 0.95 of the channels was asked; .* at most 0\.\d+ can be removed"
    with pytest.raises(UserError, match=message):
        choose(*cnn, ratio=0.95)
    with pytest.raises(UserError, match=r"share of 0\.9 of the channels"):
        choose(*cnn, ratio=0.9, scope="uniform", min_width=8)
    with pytest.raises(UserError, match=r"0.99 of the macs was asked; .* at most 0\.\d+ can"):
        choose(*cnn, ratio=0.99, amount="macs", min_width=10)
    with pytest.raises(UserError) as caught:
        choose(*cnn, ratio=0.99, amount="parameters", min_width=10, round_to=1)
    most = float(str(caught.value).split("at most ")[1].split(" ")[0])
    choose(*cnn, ratio=most - 1e-4, amount="parameters", min_width=10, round_to=1)


def test_a_quantized_model_is_refused(cnn):
    model, task = cnn
    with pytest.raises(UserError, match="the model is quantized; cut channels before Quantize"):
        PruneChannels().apply(Quantize().apply(model, task), task)


def test_weights_that_were_pruned_stay_zero(cnn):
    model, task = cnn
    made = recipe.apply(model, [PruneWeights(0.5), PruneChannels(0.5)], task)
    assert made.masks["conv2.weight"].shape == made.state_dict()["conv2.weight"].shape
    assert not made.state_dict()["conv2.weight"][~made.masks["conv2.weight"]].any()


# --- latency ---------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("asked", [0.1, 0.4, 0.75])
def test_the_search_ends_near_what_was_asked(power, asked):
    tried = []

    def removed(share):
        tried.append(share)
        return share**power

    found = latency.search(removed, asked, 0.95, "")
    assert found in tried and len(tried) <= latency.MEASUREMENTS
    assert asked <= found**power < asked + 0.12 and found == round(found, 3)


def test_a_latency_out_of_reach_says_what_is_within():
    with pytest.raises(UserError, match=r"0.9 of the latency was asked; .* removes 0.45 of it"):
        latency.search(lambda share: share / 2, 0.9, 0.9, "")


@pytest.mark.slow
def test_latency_is_settled_as_multiply_adds():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU()]
    module = nn.Sequential(*layers, nn.Conv2d(64, 8, 3, padding=1))
    model = capture(module.eval(), (torch.randn(1, 3, 48, 48),))
    step = PruneChannels(0.4, "latency", scope="uniform", reconstruct=False)
    settled = step.settle(model, None, Setting())
    assert settled == dataclasses.replace(step, amount="macs", ratio=settled.ratio)
    assert settled.settle(model, None, Setting()) is settled
    assert speedup(model, settled.apply(model, None), Target()).estimate > 1.3
    with pytest.raises(UserError, match=r"of the latency was asked; the smallest model"):
        dataclasses.replace(step, ratio=0.99, min_width=32).settle(model, None, Setting())
