"""Weight pruning: exact counts, masks that only grow, and every mistake told."""

import math

import pytest
import torch
from torch import nn

from paredown.core.errors import UserError
from paredown.core.task import Task
from paredown.graph.capture import capture
from paredown.graph.model import Model
from paredown.steps.pruning.prune_weights import (
    PruneWeights,
    cubic_sparsity,
    global_masks,
    magnitude_mask,
    n_m_mask,
)

torch.set_num_threads(1)
TASK = Task(example=(torch.zeros(1, 3, 8, 8),), score=lambda out, y: out[:, 0])


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.fc = nn.Linear(4, 10)

    def forward(self, x):
        x = self.up(self.depthwise(self.conv(x).relu()).relu())
        return self.fc(x.mean((2, 3)))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.hidden = nn.Linear(8, 8)
        self.again = nn.Linear(8, 8)
        self.again.weight = self.hidden.weight
        self.head = nn.Linear(8, 16)
        self.head.weight = self.embedding.weight
        self.lstm = nn.LSTM(8, 8, batch_first=True)

    def forward(self, ids):
        x = self.lstm(self.again(self.hidden(self.embedding(ids))))[0]
        return self.head(x)


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return capture(Net(), (torch.randn(2, 3, 8, 8),))


def zeros(model: Model) -> dict[str, int]:
    return {n: int((t == 0).sum()) for n, t in model.state_dict().items() if t.dim() > 1}


@pytest.mark.parametrize("sparsity", [0.01, 0.1, 0.333, 0.5, 0.99])
def test_counts_are_exact_and_ties_go_by_index(sparsity):
    weight = torch.randint(-2, 3, (13, 17)).float()
    mask = magnitude_mask(weight, sparsity)
    assert int((~mask).sum()) == round(sparsity * weight.numel())
    order = weight.abs().flatten().argsort(stable=True)[: int((~mask).sum())]
    assert set(order.tolist()) == set((~mask).flatten().nonzero().flatten().tolist())
    assert weight[~mask].abs().max() <= weight[mask].abs().min()


def test_all_zero_weights_lose_exactly_their_share():
    assert (~magnitude_mask(torch.zeros(3, 4), 0.25)).flatten().tolist() == [True] * 3 + [False] * 9


def test_global_masks_take_the_smallest_wherever_they_are():
    small, large = torch.rand(10, 10), 2 + torch.rand(10, 10)
    masks = global_masks([small, large], 0.6)
    assert [int((~m).sum()) for m in masks] == [100, 20]
    assert masks[1].shape == large.shape


@pytest.mark.parametrize(("n", "m", "axis"), [(2, 4, 1), (1, 4, 0), (2, 4, 2), (3, 8, -1)])
def test_n_m_keeps_the_largest_of_every_group(n, m, axis):
    weight = torch.randn(8, 16, 12)
    mask = n_m_mask(weight, n, m, axis)
    rows, kept = weight.movedim(axis, -1), mask.movedim(axis, -1)
    for values, keep in zip(rows.split(m, -1), kept.split(m, -1), strict=True):
        best = values.abs().topk(min(n, values.shape[-1]), -1).values.sum(-1)
        assert int(keep.sum(-1).max()) == int(keep.sum(-1).min()) == min(n, values.shape[-1])
        torch.testing.assert_close((values.abs() * keep).sum(-1), best)


def test_cubic_sparsity_rises_quickly_then_slowly():
    rates = cubic_sparsity(0.9, 10, initial=0.1)
    rises = [b - a for a, b in zip([0.1, *rates], rates, strict=False)]
    assert rates[-1] == 0.9 and rises == sorted(rises, reverse=True) and rises[-1] > 0
    assert rates[4] == pytest.approx(0.9 - 0.8 * 0.5**3)


def test_each_layer_gets_its_share_and_the_input_stays_untouched(model, tmp_path):
    before = {name: t.clone() for name, t in model.state_dict().items()}
    pruned = PruneWeights(0.5).apply(model, TASK)
    for name, count in zeros(pruned).items():
        assert count == round(0.5 * before[name].numel()), name
        assert torch.equal(pruned.masks[name], pruned.state_dict()[name] != 0)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert not model.masks
    pruned.save(tmp_path / "m.safetensors")
    again = PruneWeights(0.8).apply(Model.load(tmp_path / "m.safetensors"), TASK)
    assert zeros(again)["fc.weight"] == 32


def test_global_scope_counts_over_all_weights(model):
    pruned = PruneWeights(0.7, scope="global").apply(model, TASK)
    total = sum(t.numel() for n, t in model.state_dict().items() if t.dim() > 1)
    counts = zeros(pruned)
    assert sum(counts.values()) == round(0.7 * total)
    assert len({round(c / model.state_dict()[n].numel(), 3) for n, c in counts.items()}) > 1


def test_masks_only_grow(model):
    once = PruneWeights(0.5).apply(model, TASK)
    with torch.no_grad():
        once.graph.fc.weight[once.masks["fc.weight"]] = 0.0  # tie everything at zero
        once.graph.fc.weight[0, :3] = once.masks["fc.weight"][0, :3].float()
    twice = PruneWeights(0.75).apply(once, TASK)
    assert not (twice.masks["fc.weight"] & ~once.masks["fc.weight"]).any()
    assert int((~twice.masks["fc.weight"]).sum()) == 30
    other = PruneWeights(pattern="2:4").apply(once, TASK)
    for name, mask in other.masks.items():
        assert not (mask & ~once.masks[name]).any()


def test_a_pattern_runs_along_the_inputs_of_each_output(model):
    pruned = PruneWeights(pattern="2:4").apply(model, TASK)
    state = pruned.state_dict()
    assert (state["fc.weight"] != 0).sum(1).tolist() == [2] * 10
    assert (state["conv.weight"] != 0).sum(1).unique().tolist() == [2]
    assert (state["up.weight"] != 0).unflatten(0, (2, 4)).sum(1).unique().tolist() == [2]
    assert zeros(pruned)["depthwise.weight"] == 0  # one input channel: nothing to choose from


def test_tied_weights_are_pruned_once_and_embeddings_not_at_all():
    torch.manual_seed(0)
    model = capture(Tied(), (torch.randint(0, 16, (2, 5)),))
    pruned = PruneWeights(0.5).apply(model, TASK)
    state = pruned.state_dict()
    assert int((state["hidden.weight"] == 0).sum()) == 32
    assert pruned.graph.again.weight is pruned.graph.hidden.weight
    assert not (state["embedding.weight"] == 0).any() and not (state["head.weight"] == 0).any()
    assert int((state["lstm.weight_hh_l0"] == 0).sum()) == 128


def test_excluded_layers_stay(model):
    pruned = PruneWeights(0.5, exclude=("fc", "*wise.weight")).apply(model, TASK)
    counts = zeros(pruned)
    assert counts["fc.weight"] == counts["depthwise.weight"] == 0 < counts["conv.weight"]


def test_a_gradual_schedule_is_list_arithmetic(model):
    rest = PruneWeights(0.99)
    recipe = PruneWeights.gradual(0.8, 3, between=[rest], scope="global", exclude=("fc",))
    assert recipe[1::2] == [rest] * 3
    assert [s.sparsity for s in recipe[::2]] == cubic_sparsity(0.8, 3)
    assert recipe[0].scope == "global" and recipe[0].exclude == ("fc",)
    with pytest.raises(UserError, match="steps: expected a whole number from 1 up, got 0"):
        PruneWeights.gradual(0.8, 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": 0}, "sparsity: expected above 0 and below 1, got 0"),
        ({"sparsity": 1.0}, "sparsity: expected above 0 and below 1, got 1.0"),
        ({"sparsity": -0.1}, "got -0.1"),
        ({"sparsity": math.nan}, "got nan"),
        ({"scope": "model"}, 'scope: expected "layer" or "global", got \'model\''),
        ({"pattern": "4:2"}, "pattern: expected \"N:M\" .* got '4:2'"),
        ({"pattern": "half"}, "got 'half'"),
        ({"pattern": "2:4", "scope": "global"}, "a pattern prunes every layer alike"),
        ({"pattern": "1:4", "sparsity": 0.9}, "pattern 1:4 prunes 0.75, which contradicts 0.9"),
        ({"exclude": "fc"}, "exclude: expected a tuple of names"),
    ],
)
def test_wrong_settings_are_refused_at_once(settings, message):
    with pytest.raises(UserError, match=message):
        PruneWeights(**settings)


def test_an_unknown_name_suggests_the_nearest(model):
    with pytest.raises(
        UserError, match=r"no layer or weight is called 'depthwize'; .* 'depthwise'"
    ):
        PruneWeights(exclude=("depthwize",)).apply(model, TASK)


def test_the_zeros_that_a_model_came_with_are_adopted(model):
    sparse = model.copy()
    for weight in sparse.graph.parameters():
        if weight.dim() > 1:
            weight.data[torch.rand(weight.shape) < 0.8] = 0.0
    share = min(float((w == 0).float().mean()) for w in sparse.graph.parameters() if w.dim() > 1)
    for sparsity in (share, 0.5, 0.9):
        made = PruneWeights(sparsity).apply(sparse, TASK)
        for name, mask in made.masks.items():
            weight = sparse.state_dict()[name]
            assert not mask[weight == 0].any()
            assert float((~mask).float().mean()) >= sparsity - 0.5 / mask.numel()
    with pytest.raises(UserError, match="changed nothing"):
        PruneWeights(share).apply(PruneWeights(share).apply(sparse, TASK), TASK)


def test_what_changes_nothing_raises(model):
    once = PruneWeights(0.5).apply(model, TASK)
    with pytest.raises(UserError, match="changed nothing; all 4 weights have a share of"):
        PruneWeights(0.5).apply(once, TASK)
    with pytest.raises(UserError, match="no convolution or linear weight to prune besides those"):
        PruneWeights(exclude=("*",)).apply(model, TASK)
