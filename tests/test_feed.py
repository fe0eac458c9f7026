"""How a split becomes batches for a model, and how a batch is scored."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import ConcatDataset, Dataset, StackDataset, Subset, TensorDataset

import paredown
from paredown import Task, UserError
from paredown.data import feed, splits
from paredown.data.evaluate import evaluate, scored


def split(count):
    return TensorDataset(torch.arange(float(count))[:, None].repeat(1, 2), torch.arange(count))


def accuracy(output, target):
    return (output.argmax(1) == target).float()


@pytest.fixture(scope="module")
def varying():
    return paredown.capture(nn.Linear(2, 3), (torch.zeros(4, 2),))


@pytest.fixture(scope="module")
def fixed(varying):
    return replace(varying, inputs=tuple(replace(item, dynamic={}) for item in varying.inputs))


def sizes(batches):
    return [(batch.count, batch.size) for batch in batches]


def test_every_example_counts_once(varying, fixed):
    assert sizes(feed.every(varying, split(10), 4)) == [(4, 4), (4, 4), (2, 2)]
    given = feed.every(fixed, split(10), 4)
    assert sizes(given) == sizes(given) == [(4, 4)] * 2 + [(2, 4)] and len(given) == 3
    *_, last = given
    assert last.inputs[:, 0].tolist() == [8.0, 9.0, 9.0, 9.0] and last.target.tolist() == [8, 9]
    assert sizes(feed.every(fixed, split(10), 4, 2)) == [(4, 4)] * 2


def test_whole_batches_are_never_filled(varying, fixed):
    assert sizes(feed.whole(fixed, split(10), "train", 4)) == [(4, 4)] * 2
    assert sizes(feed.whole(varying, split(10), "train", 4)) == [(4, 4), (4, 4), (2, 2)]
    assert sizes(feed.whole(varying, split(10), "train", 4, 1)) == [(4, 4)]
    orders = [
        torch.cat([b.target for b in feed.whole(fixed, split(8), "train", 4, None, True, seed)])
        for seed in (0, 0, 1)
    ]
    assert orders[0].tolist() == orders[1].tolist() != orders[2].tolist()


def test_one_error_for_a_split_that_fills_no_batch(fixed, varying):
    message = "calibration: 3 examples do not fill the model's batch of 4, the only one it was capt"
    with pytest.raises(UserError, match=message):
        feed.whole(fixed, split(3), "calibration", 4)
    with pytest.raises(UserError, match=message):
        feed.check_fills(fixed, split(3), "calibration")
    feed.check_fills(varying, split(3), "calibration")
    assert sizes(feed.every(fixed, split(3), 4)) == [(3, 4)]


@pytest.mark.parametrize(
    "step",
    [
        paredown.Quantize("int8"),
        paredown.PruneChannels(0.5, criterion="taylor"),
        paredown.PruneChannels(0.5, criterion="weight_activation"),
        paredown.FineTune(epochs=1, device="cpu"),
        paredown.LowRank(),
    ],
)
def test_every_step_says_so_in_the_same_words(step):
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    model = paredown.capture(net, (torch.zeros(4, 8),))
    model = replace(model, inputs=tuple(replace(item, dynamic={}) for item in model.inputs))
    few = TensorDataset(torch.randn(3, 8), torch.zeros(3, dtype=torch.long))
    loss = nn.functional.cross_entropy
    task = Task((torch.zeros(4, 8),), accuracy, loss, train=few, validation=few)
    with pytest.raises(UserError, match="3 examples do not fill the model's batch of 4, the only"):
        step.apply(model, task)


def test_bound_batches_are_as_the_graph_takes_them():
    class Named(nn.Module):
        def forward(self, first, second):
            return first - second

    one, two = torch.ones(5, 2), torch.zeros(5, 2)
    model = paredown.capture(Named(), {"first": one[:2], "second": two[:2]})

    class Swapped(torch.utils.data.Dataset):
        def __len__(self):
            return 5

        def __getitem__(self, index):
            return {"second": two[index], "first": one[index]}, 0

    for batch in feed.every(model, Swapped(), 2).bound():
        assert [float(leaf.mean()) for leaf in batch.inputs] == [1.0, 0.0]


def test_the_fixed_batch_is_never_another(varying, fixed):
    task = Task((torch.zeros(4, 2),), None, batch_size=16)
    assert feed.size(varying, 16, 5) == 5 and feed.size(varying, 16, 0) == 1
    assert feed.size(fixed, 16, 5) == feed.fitting(fixed, task, 1) == 4
    assert feed.fitting(varying, task, 1) == 1 and feed.fitting(varying, task, 1 << 20) == 16


def test_memory_bounds_what_is_kept_and_how_many_examples(varying, monkeypatch):
    task = Task((torch.zeros(4, 2),), None, validation=split(20), batch_size=16)
    assert sizes(feed.examples(varying, task, "validation")) == [(16, 16), (4, 4)]
    assert sizes(feed.examples(varying, task, "validation", 10)) == [(16, 16)]
    monkeypatch.setattr(feed, "MEMORY", 3 * 3 * 4)  # three outputs of three floats
    assert sizes(feed.examples(varying, task, "validation"))[0] == (3, 3)
    assert sizes(feed.examples(varying, task, "validation", 10)) == [(3, 3)] * 2


def test_asking_for_the_memory_draws_no_number():
    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    model = paredown.capture(net, (torch.zeros(1, 2),)).train()
    torch.manual_seed(7)
    expected = torch.rand(2)
    torch.manual_seed(7)
    assert feed.example_bytes([model]) > 0
    assert torch.equal(torch.rand(2), expected)


def test_only_what_filling_added_is_cut():
    batch = feed.Batch(None, None, 3, 4)
    rows, other, single = batch.cut([torch.zeros(4, 2), torch.zeros(7, 4), torch.tensor(1.0)])
    assert rows.shape == (3, 2) and other.shape == (7, 4) and single.dim() == 0


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (torch.tensor(1.0), r"shape \(2,\), got \(\); do not average"),
        (torch.zeros(2, 1), r"got \(2, 1\)"),
        (0.5, r"shape \(2,\), got \(\)"),
        (torch.zeros(2, dtype=torch.complex64), "got torch.complex64"),
        (torch.tensor([1.0, float("nan")]), "1 of 2 scores of a batch are NaN or infinite"),
        (None, "got NoneType"),
    ],
)
def test_a_score_is_checked_in_one_place(found, message, varying):
    task = Task((torch.zeros(4, 2),), lambda output, target: found, validation=split(2))
    with pytest.raises(UserError, match=rf"task\.score.*{message}"):
        scored(task, None, None, 2)
    with pytest.raises(UserError, match=rf"task\.score.*{message}"):
        evaluate(varying, task.validation, task)


def test_scores_are_what_the_task_says():
    task = Task((torch.zeros(4, 2),), lambda output, target: output > target)
    made = scored(task, torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), 2)
    assert made.tolist() == [1.0, 0.0] and made.dtype == torch.float64


class Doubled(TensorDataset):
    """What a user writes to transform the examples of a `TensorDataset`."""

    def __getitem__(self, index):
        inputs, target = super().__getitem__(index)
        return 2 * inputs, target


class Repeated(TensorDataset):
    def __getitem__(self, index):
        return super().__getitem__(index % len(self.tensors[0]))

    def __len__(self):
        return 8


class Shorter(TensorDataset):
    def __len__(self):
        return 3


class Listed(Dataset):
    """It has a quicker way to give a list of examples, as datasets of tables do."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.tensor([float(index)]), index

    def __getitems__(self, indices):
        return [self[index] for index in indices]


class Relisted(Listed):
    def __getitem__(self, index):
        return torch.tensor([2.0 * index]), index

    def __getitems__(self, indices):
        return [Relisted.__getitem__(self, index) for index in indices]


class OverListed(Listed):
    def __getitems__(self, indices):
        return [Listed.__getitem__(self, index) for index in indices]


class Transformed(OverListed):
    """Its list is inherited from a class that knows nothing of the transform."""

    def __getitem__(self, index):
        return torch.tensor([2.0 * index]), index


class InputsAlone(Transformed):
    def __getitem__(self, index):
        return super().__getitem__(index)[0]


class Delegating(Dataset):
    """A wrapper that passes on whatever it has not."""

    def __init__(self, inner):
        self.inner = inner

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __len__(self):
        return len(self.inner)

    def __getitem__(self, index):
        inputs, target = self.inner[index]
        return 2 * inputs, target


class Halved(Subset):
    def __init__(self, dataset, indices):  # without torch's own check
        self.dataset, self.indices = dataset, indices

    def __getitem__(self, index):
        inputs, target = super().__getitem__(index)
        return inputs / 2, target


ROWS = (torch.arange(4.0)[:, None], torch.arange(4))


@pytest.mark.parametrize(
    "data",
    [
        TensorDataset(*ROWS),
        Doubled(*ROWS),
        Repeated(*ROWS),
        Shorter(*ROWS),
        Listed(),
        Relisted(),
        Transformed(),
        Delegating(OverListed()),
        Subset(Doubled(*ROWS), [3, 1]),
        Subset(Transformed(), [3, 1]),
        Subset(Subset(Delegating(OverListed()), [3, 2, 1]), [0, 2]),
        Halved(TensorDataset(*ROWS), [3, 1]),
        Subset(Halved(TensorDataset(*ROWS), [3, 1]), [1, 0]),
        ConcatDataset([Doubled(*ROWS), Subset(Doubled(*ROWS), [3])]),
        StackDataset(InputsAlone(), ROWS[1]),
    ],
    ids=lambda data: type(data).__name__,
)
def test_every_example_is_what_the_datasets_own_getitem_gives(data):
    alone = [data[index] for index in range(len(data))]
    for shuffle in (False, True):
        found = list(splits.batches(data, 2, shuffle=shuffle))
        rows = torch.utils.data.default_collate(alone)
        order = torch.cat([target for _, target in found]) if shuffle else None
        inputs = torch.cat([inputs for inputs, _ in found])
        assert len(inputs) == len(data)
        if order is None:
            assert torch.equal(inputs, rows[0])
        else:
            assert sorted(inputs.flatten().tolist()) == sorted(rows[0].flatten().tolist())
    assert splits.fingerprint(data) == splits.fingerprint(alone)


def test_a_transform_of_the_users_runs_in_training_as_in_calibration(varying):
    seen = []

    class Watched(TensorDataset):
        def __getitem__(self, index):
            seen.append(int(index))
            return super().__getitem__(index)

    task = Task(
        example=(torch.zeros(4, 2),),
        score=accuracy,
        loss=torch.nn.functional.cross_entropy,
        train=Watched(*split(6).tensors[:1], torch.arange(6) % 3),
    )
    paredown.FineTune(epochs=1, device="cpu").apply(varying, task)
    assert sorted(set(seen)) == list(range(6))


class Augmented(Dataset):
    """It draws from all three generators, and may have one of its own."""

    def __init__(self, count=12, own=None):
        self.count, self.own = count, own

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        drawn = torch.rand(()) + random.random() + np.random.rand()
        if self.own is not None and index >= 5:
            drawn = drawn + self.own.random()
        return torch.full((2,), float(index) + float(drawn)), index % 3


class AugmentedLists(Augmented):
    def __getitems__(self, indices):
        return [self[index] for index in indices]


def everything(data, size, **how):
    found = list(splits.batches(data, size, **how))
    return torch.cat([inputs for inputs, _ in found]), torch.cat([target for _, target in found])


def drawn():
    return torch.rand(()).item(), random.random(), np.random.rand()


@pytest.mark.parametrize("data", [Augmented(), AugmentedLists(), Subset(Augmented(20), range(12))])
def test_random_data_are_the_same_each_time_and_other_ones_in_each_epoch(data):
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    expected = [drawn() for _ in range(3)]
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    once = everything(data, 4)
    between = drawn()
    again = everything(data, 4)
    first = splits.fingerprint(data)
    assert torch.equal(once[0], again[0]) and first == splits.fingerprint(data)
    assert [between, drawn(), drawn()] == expected  # the caller's numbers are left alone
    epochs = [everything(data, 4, shuffle=True, seed=seed)[0] for seed in (1, 1, 2)]
    assert torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[0].sort(0)[0], epochs[2].sort(0)[0])
    if not isinstance(data, AugmentedLists):
        assert torch.equal(everything(data, 5)[0], once[0])
        assert torch.equal(splits.example(data, 7)[0], once[0][7])
    assert splits.unrepeated(data, 4) is None


def test_where_data_differ_between_two_readings_is_found():
    assert splits.unrepeated(Augmented(own=np.random.default_rng()), 4) == 5
    holes = [(torch.full((2,), torch.nan), index) for index in range(3)]
    assert splits.unrepeated(holes, 2) is None


@pytest.mark.parametrize(
    "step",
    [
        paredown.Quantize("int8", ranges="entropy"),
        paredown.FineTune(epochs=2, device="cpu"),
        paredown.Distill(epochs=1, device="cpu"),
        paredown.PruneChannels(0.5, criterion="taylor"),
    ],
)
def test_a_step_repeats_on_random_data_whatever_the_caller_has_drawn(step):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))
    task = Task((torch.zeros(4, 2),), accuracy, nn.functional.cross_entropy, Augmented(24))
    made = []
    for seed in (1, 2):
        torch.manual_seed(seed), random.seed(seed), np.random.seed(seed)
        made.append(paredown.apply(net, [step], task))
    states = [model.state_dict() for model in made]
    assert made[0].graph.code == made[1].graph.code
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
