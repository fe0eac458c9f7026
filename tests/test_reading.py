"""How splits are read: once, by name, by several processes, preprocessed, and in plain words."""

import dataclasses
import multiprocessing
import os
import random
import signal
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

import paredown
from paredown.core.errors import UserError
from paredown.core.task import Task
from paredown.data import evaluate, loader, splits
from paredown.graph import structure
from paredown.measure import measure
from paredown.report.table import comparison
from paredown.run import preflight

EXAMPLE = (torch.zeros(1, 3),)


class Read(Dataset):
    """Counts in all processes how often an example was read."""

    def __init__(self, draw=None, count=12):
        self.draw, self.count = draw, count
        self.reads = multiprocessing.Value("i", 0)

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        with self.reads.get_lock():
            self.reads.value += 1
        noise = self.draw() if self.draw else 0.0
        return torch.tensor([index + noise, 1.0, 2.0]), index % 2


def task_of(data, **settings):
    return splits.prepared(Task(EXAMPLE, score=paredown.accuracy, train=data, **settings))


def values(data, **how):
    return [leaf for item in splits.batches(data, 5, **how) for leaf in structure.flatten(item)[0]]


def equal(one, other):
    return len(one) == len(other) and all(map(torch.equal, one, other))


OWN = np.random.default_rng(0)
DRAWS = {
    "none": None,
    "torch": lambda: float(torch.rand(())),
    "numpy": lambda: float(np.random.random()),
    "python": random.random,
}


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_read_depends_on_neither_workers_nor_what_was_kept(draw, workers):
    data = Read(DRAWS[draw])
    split = task_of(data, workers=workers).train
    for how in ({}, {"shuffle": True}, *({"shuffle": True, "seed": n} for n in (1, 2, 3)), {}):
        assert equal(values(split, **how), values(Read(DRAWS[draw]), **how))
    few = Subset(split, [7, 2, 5])
    assert equal(values(few), values(Subset(Read(DRAWS[draw]), [7, 2, 5])))
    assert splits.fingerprint(split) == splits.fingerprint(data)


def test_the_order_is_that_of_torchs_loader():
    data, generator = Read(), torch.Generator().manual_seed(3)
    expected = [y for _, y in DataLoader(data, 5, shuffle=True, generator=generator)]
    assert equal([y for _, y in splits.batches(data, 5, shuffle=True, seed=3)], expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_data_are_decoded_once_and_training_sees_them_once_more(workers):
    data = Read()
    task = task_of(data, validation=data, workers=workers)
    for _ in range(3):
        splits.fingerprint(task.train)
        assert splits.problems(dataclasses.replace(task, validation=None), {}) == []
        values(splits.split(task, "calibration"))
    assert data.reads.value == 12
    values(task.train, shuffle=True, seed=1)
    assert data.reads.value == 24
    for seed in range(2, 5):
        values(task.train, shuffle=True, seed=seed)
    assert data.reads.value == 24
    assert splits.unrepeated(task.train, 5) is None and data.reads.value == 48  # in earnest


def test_augmentation_from_a_generator_of_its_own_stays_random():
    split = task_of(Read(lambda: float(OWN.random()))).train
    splits.fingerprint(split)
    epochs = [values(split, seed=seed) for seed in range(1, 5)]
    assert not any(equal(epochs[n], epochs[n + 1]) for n in range(3))
    assert splits.unrepeated(split, 5) == 0


def test_examples_that_do_not_fit_the_memory_are_read_again(monkeypatch):
    monkeypatch.setattr("paredown.graph.machine.free_bytes", lambda: 1000)
    data = Read()
    split = task_of(data).train
    assert equal(values(split), values(split)) and data.reads.value == 24


def test_a_tensor_that_is_filled_anew_is_kept_as_it_was():
    class Filled(Read):
        def __init__(self):
            super().__init__()
            self.room = torch.zeros(3)

        def __getitem__(self, index):
            return self.room.fill_(index), 0

    split = task_of(Filled()).train
    for _ in range(2):
        assert [int(x[0, 0]) for x, _ in splits.batches(split, 1)] == list(range(12))


# --- what goes wrong -------------------------------------------------------------------------


class Bad(Read):
    def __init__(self, at):
        super().__init__()
        self.at = at

    def __getitem__(self, index):
        found = super().__getitem__(index)
        return found if index != 7 else self.at(*found)


class Endless(IterableDataset):
    def __len__(self):
        return 12

    def __iter__(self):
        return iter([(torch.zeros(3), 0)] * 12)


def missing(x, y):
    raise KeyError("picture")


WRONG = {
    "error": (Bad(missing), "train: example 7: cannot be read: KeyError: 'picture'"),
    "inputs": (
        Bad(lambda x, y: (x[:2], y)),
        "train: example 7 is float32 (2,) with int, and example 5 float32 (3,) with int; a batch "
        "needs one shape",
    ),
    "targets": (Bad(lambda x, y: (x, [y, y])), "train: example 7 is float32 (3,) with int with"),
    "nothing": (Bad(lambda x, y: (None, y)), "train: example 7 is NoneType with int, and"),
    "exit": (
        Bad(lambda x, y: sys.exit(3)),
        "train: example 7: its code ended the program (sys.exit, with 3); raise an error instead.",
    ),
    "text": ([("a", 0), ("b", 1)] * 6, "train: expected inputs of numbers, got text; make"),
    "iterable": (
        Endless(),
        "train: expected a dataset with a length and an index, as TensorDataset has, got a "
        "Endless, which has no index; read it into a list",
    ),
    "loader": (DataLoader(Read()), "got a DataLoader; give its .dataset, paredown makes the"),
    "number": (3, "train: expected a dataset with a length and an index, as TensorDataset has"),
}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", WRONG)
def test_what_cannot_be_read_is_told_by_split_and_example(kind, workers):
    data, said = WRONG[kind]
    with pytest.raises(UserError) as caught:
        values(task_of(data, workers=workers).train)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert not multiprocessing.active_children()  # though the error holds what made them


@pytest.mark.parametrize(
    ("ends", "said"),
    [
        (lambda: os._exit(3), r"ended with exit code 3; use fewer Task\(workers=\)"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), r"was killed \(SIGKILL\), as the system"),
        (lambda: os.kill(os.getpid(), signal.SIGTERM), r"was ended from outside \(SIGTERM\); use"),
    ],
)
def test_a_process_that_ends_is_a_sentence(ends, said):
    with pytest.raises(UserError, match=f"^train: a process that reads it {said}"):
        values(task_of(Bad(lambda x, y: ends()), workers=1).train)


@pytest.mark.parametrize("error", [ConnectionResetError(104, "reset"), EOFError()])
def test_a_process_that_ends_while_it_hands_a_batch_over_is_a_sentence(error, monkeypatch):
    """Its memory is asked for while its answer is taken out of the queue."""

    def lost(self):
        self._workers[0].kill()
        raise error

    kind = torch.utils.data.dataloader._MultiProcessingDataLoaderIter
    monkeypatch.setattr(kind, "_next_data", lost)
    with pytest.raises(UserError, match=r"^train: a process that reads it was killed \(SIGKILL\)"):
        values(task_of(Read(), workers=1).train)


def test_reading_handles_no_signals():
    before = signal.getsignal(signal.SIGCHLD)
    for _ in splits.batches(task_of(Read(), workers=1).train, 5):
        assert signal.getsignal(signal.SIGCHLD) is before
    assert signal.getsignal(signal.SIGCHLD) is before


def test_data_that_other_processes_cannot_be_given_are_a_sentence(monkeypatch):
    monkeypatch.setattr(loader, "FORK", "no such method")
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    data = [(torch.zeros(3), 0)] * 4
    task = task_of(data, workers=1, preprocess=lambda x: x)
    with pytest.raises(UserError, match=r"train: its dataset cannot be given to other processes"):
        values(task.train)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"workers": -1}, "workers: expected a whole number from 0 up, got -1"),
        ({"batch_size": 0}, "batch_size: expected a whole number from 1 up, got 0"),
        ({"preprocess": "resize"}, "preprocess: expected a function, got 'resize'"),
    ],
)
def test_wrong_settings_of_a_task_are_refused(settings, said):
    with pytest.raises(UserError, match=said):
        Task(EXAMPLE, score=paredown.accuracy, **settings)


# --- preprocessing and postprocessing --------------------------------------------------------


def parsed(text):
    return torch.tensor([float(each) for each in text.split()])


def named(output):
    return ["abc"[place] for place in output.argmax(1).tolist()]


def right(names, target):
    return torch.tensor([name == "abc"[place] for name, place in zip(names, target, strict=True)])


def spoken(count=40):
    torch.manual_seed(0)
    rows = torch.randn(count, 3)
    data = [(" ".join(map(str, row.tolist())), int(row.argmax())) for row in rows]
    task = Task(EXAMPLE, right, nn.functional.cross_entropy, data, None, data, data)
    return dataclasses.replace(task, preprocess=parsed, postprocess=named), rows


def identity():
    net = nn.Linear(3, 3, bias=False)
    net.weight.data = torch.eye(3)
    return net.eval()


def test_splits_are_preprocessed_wherever_they_are_read_and_outputs_postprocessed_for_the_score():
    task, rows = spoken()
    ready = splits.prepared(task)
    assert splits.prepared(ready).train is ready.train and ready.train.raw(3) == task.train[3][0]
    assert torch.allclose(torch.cat([x for x, _ in splits.batches(ready.train, 7)]), rows)
    model = paredown.capture(identity(), EXAMPLE)
    assert evaluate.evaluate(model, ready.test, ready).tolist() == [1.0] * 40
    trained = paredown.apply(identity(), [paredown.FineTune(epochs=1)], task)
    assert not torch.equal(trained.state_dict()["weight"], torch.eye(3))
    found = preflight.check(identity(), task, paredown.Target("pytorch"))
    assert found.problems == []
    assert "preprocessed, postprocessed and scored one batch of validation" in found.facts


def test_a_task_that_fails_on_an_example_is_told(tmp_path):
    task, _ = spoken()
    broken = dataclasses.replace(task, train=[("1 2 x", 0), ("1 2 3", 1)])
    found = preflight.check(identity(), broken, paredown.Target("pytorch"))
    [problem] = found.problems
    assert problem.startswith("train: example 0: task.preprocess failed on it: ValueError: could")
    broken = dataclasses.replace(task, postprocess=lambda output: output.no_such)
    found = preflight.check(identity(), broken, paredown.Target("pytorch"))
    assert [problem[:45] for problem in found.problems] == [
        "task.postprocess failed: AttributeError: 'Ten"
    ]


@pytest.mark.parametrize(
    ("made", "rows"),
    [
        (lambda output: output[:1], 1),  # which every target would be compared with
        (lambda output: output[1:], 7),
        (lambda output: torch.cat([output, output]), 16),
        (lambda output: output.sum(), 1),
        (lambda output: output[:3].numpy(), 3),
        (lambda output: {"logits": output[:1]}, 1),
        (lambda output: output.argmax(1).tolist()[2:], 6),
        (lambda output: output, None),
        (lambda output: {"boxes": output[2:], "of": torch.arange(6)}, None),
        (lambda output: (output, torch.ones(1)), None),
        (lambda output: [{"label": each} for each in output.argmax(1).tolist()], None),
    ],
)
def test_a_postprocess_gives_a_row_for_each_example(made, rows):
    task = Task(EXAMPLE, lambda output, target: (target >= 0).float(), postprocess=made)
    given = task, torch.eye(8), torch.arange(8), 8
    if rows is None:
        assert evaluate.scored(*given).tolist() == [1.0] * 8
        return
    said = rf"task.postprocess: expected a row for each of the 8 examples of a batch, got {rows};"
    with pytest.raises(UserError, match=said):
        evaluate.scored(*given)


@pytest.mark.parametrize(
    ("score", "got"),
    [(0.5, r"\(\)"), ([1.0] * 7, r"\(7,\)"), (np.ones(9), r"\(9,\)"), ("good", "str")],
)
def test_a_score_of_other_rows_is_refused(score, got):
    task = Task(EXAMPLE, lambda output, target: score)
    with pytest.raises(UserError, match=rf"for each example, shape \(8,\), got {got}; do not"):
        evaluate.scored(task, torch.eye(8), torch.arange(8), 8)


def test_they_are_timed_apart_and_with_the_model(tmp_path):
    task, _ = spoken()
    model = paredown.capture(identity(), EXAMPLE)
    artifact = paredown.export(model, paredown.Target("pytorch"), tmp_path / "m.safetensors")
    files = {"original": tmp_path / "m.safetensors", "compressed": tmp_path / "m.safetensors"}
    found = measure.measure(files, model, task, paredown.Target("pytorch", rounds=2))
    both = {name: each.measurement for name, each in found.items()}
    for m in both.values():
        assert m.score == 1.0 and m.preprocess_ms > 0 and m.postprocess_ms > 0
        assert m.end_to_end_ms == m.latency_ms_p50 + m.preprocess_ms + m.postprocess_ms
    from tests.test_predictor import run_with

    run = dataclasses.replace(run_with(artifact), on_device=both)
    [row] = [row for row in comparison(run) if row["name"] == "End to end, median"]
    assert row["notes"][0].startswith("preprocessing ") and row["change"]
    pipeline = paredown.open(artifact.path, task=task)
    assert pipeline("3 2 1", "0 0 9") == ["a", "c"]
    assert repr(pipeline).endswith("m.safetensors -> named>")
    with pytest.raises(UserError, match=r"task.preprocess failed: ValueError: could not convert"):
        pipeline("x")
    with pytest.raises(UserError, match=r"input 'input': expected shape \(batch, 3\), got"):
        pipeline("1 2")
    with pytest.raises(UserError, match=r"given one by one: predict\(\*examples\)"):
        pipeline(["3 2 1", "0 0 9"])
    with pytest.raises(UserError, match="got 'text' by its name; give a dict whole"):
        pipeline(text="3 2 1")


class Looked(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(10, 3), nn.Linear(3, 3)

    def forward(self, ids):
        return self.head(self.table(ids).mean(1))


def put(tensor, place, value):
    made = tensor.clone()
    made[place] = value
    return made


@pytest.mark.parametrize(
    ("where", "place", "value", "said"),
    [
        (
            "ids",
            (5, 2),
            12,
            "with its least and largest inputs (0 in example 0, 12 in example 5): the m",
        ),
        ("ids", (70, 2), 12, "with its least and largest inputs (0 in example 0, 12 in example 70"),
        ("ids", (80, 1), -1, "least and largest inputs (-1 in example 80, 9 in example 9): the mo"),
        ("labels", 90, 7, "least and largest labels (0 in example 0, 7 in example 90): task.loss"),
        ("labels", 90, -3, "Target -3 is out of bounds; it was given an output of float32 (64, 3)"),
    ],
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_numbers_beyond_a_table_or_the_classes_are_told_wherever_they_stand(
    where, place, value, said, split
):
    ids = torch.arange(100)[:, None].expand(100, 4) % 10
    labels = torch.arange(100) % 3
    good = TensorDataset(ids, labels)
    ids, labels = (
        put(tensor, place, value) if where == name else tensor
        for name, tensor in (("ids", ids), ("labels", labels))
    )
    task = Task((ids[:1],), paredown.accuracy, nn.functional.cross_entropy, good, None, good, good)
    model = paredown.capture(Looked().eval(), task.example)
    assert preflight.problems(model, task, paredown.Target("pytorch")) == []
    task = dataclasses.replace(task, **{split: TensorDataset(ids, labels)})
    [problem] = preflight.problems(model, task, paredown.Target("pytorch"))
    assert problem.startswith(f"{split}: ") and said in problem


def test_a_loss_that_wants_other_targets_than_the_score_is_no_problem():
    rows = torch.randn(8, 3)
    train = TensorDataset(rows, rows.argmax(1))
    scored = TensorDataset(rows, torch.eye(3, dtype=torch.long)[rows.argmax(1)])
    task = Task(
        (rows[:1],),
        score=lambda output, target: target.gather(1, output.argmax(1)[:, None])[:, 0],
        loss=nn.functional.cross_entropy,
        train=train,
        validation=scored,
        test=scored,
    )
    model = paredown.capture(identity(), task.example)
    assert preflight.problems(model, task, paredown.Target("pytorch")) == []


def test_what_a_score_or_a_loss_was_given_is_told():
    rows = torch.randn(8, 3)
    data = TensorDataset(rows, rows.argmax(1).float())
    task = Task((rows[:1],), lambda output, target: None, nn.functional.cross_entropy, data)
    task = dataclasses.replace(task, validation=TensorDataset(rows), test=TensorDataset(rows))
    model = paredown.capture(identity(), task.example)
    found = preflight.problems(model, task, paredown.Target("pytorch"))
    assert found == [
        "task.score: expected one number for each example, shape (8,), got NoneType; do not average"
        " over the batch, return for example (output.argmax(1) == target).float().",
        "task.loss failed: RuntimeError: expected target dtype to be Long or Byte, but got Float; "
        "it was given an output of float32 (8, 3) and a target of float32 (8,).",
    ]


@pytest.mark.parametrize("seed", [2**62, -1, 1.0, True])
def test_a_seed_is_one_that_all_generators_take(seed):
    said = "seed: expected a whole number( from 0 to 4294967295)?, got"
    for step in (paredown.FineTune, paredown.HashWeights, paredown.PruneChannels):
        with pytest.raises(UserError, match=said):
            step(seed=seed)
    task = Task(EXAMPLE, paredown.accuracy)
    with pytest.raises(UserError, match=said):
        paredown.compress(identity(), task, paredown.Goals(size="1x"), seed=seed)


# --- what all of a split holds ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "least", "largest"),
    [
        (torch.bool, 0, 1),
        (torch.uint8, 3, 250),
        (torch.int8, -100, 100),
        (torch.uint16, 3, 65_000),
        (torch.uint32, 3, 2**32 - 1),
        (torch.uint64, 3, 2**64 - 1),
        (torch.int64, -(2**63), 2**62),
    ],
)
def test_whole_numbers_of_any_type_are_surveyed(dtype, least, largest):
    rows = [torch.tensor([least, least + (dtype != torch.bool)], dtype=dtype) for _ in range(5)]
    rows[3] = torch.tensor([least, largest], dtype=dtype)
    data = [(torch.zeros(3), row) for row in rows]
    task = Task(EXAMPLE, score=paredown.accuracy, train=data, batch_size=2)
    assert splits.survey(task, "train").ends == {
        ("label 0", "least"): (least, 0),
        ("label 0", "largest"): (largest, 3),
    }
