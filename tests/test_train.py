"""Training: the same bits by the same seed, after a crash too, and masks that nothing revives."""

from dataclasses import asdict, fields, replace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import prune
from torch.utils.data import Dataset, TensorDataset

from paredown import Distill, PruneChannels, PruneWeights, Quantize
from paredown.core import progress
from paredown.core.errors import UserError
from paredown.core.task import Task
from paredown.data import batches
from paredown.data.evaluate import evaluate
from paredown.graph.capture import capture
from paredown.graph.holds import own_zeros
from paredown.graph.model import Model
from paredown.steps import recipe
from paredown.steps.step import Setting
from paredown.steps.training.fine_tune import FineTune
from paredown.train import loop
from paredown.train.loop import fit
from paredown.train.objective import TaskLoss
from paredown.train.settings import Training, learning_rate

torch.set_num_threads(1)
FAST = Training(epochs=4, lr=0.01, device="cpu")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2)),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        )
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.second.weight = self.first.weight  # tied
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.second(self.first(self.body(x)).relu()))


def examples(count: int = 97, seed: int = 0) -> TensorDataset:
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
    validation=examples(50, seed=1),
    batch_size=16,
)


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return capture(Net(), TASK.example)


def same(one: Model, other: Model) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def said(monkeypatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(progress, "say", lines.append)
    return lines


@pytest.mark.parametrize(("optimizer", "lr"), [("adamw", 0.02), ("sgd", 0.1)])
def test_it_learns_and_says_how_far_it_is(model, said, optimizer, lr):
    before = evaluate(model, TASK.validation, TASK)
    history = fit(model, TASK, replace(FAST, epochs=8, lr=lr, optimizer=optimizer))
    after = evaluate(model, TASK.validation, TASK)
    assert before.shape == (50,) and after.mean() > 0.9 > before.mean()
    assert [row["epoch"] for row in history] == list(range(1, 9))
    assert history[-1]["score"] == pytest.approx(float(after.mean()))
    assert history[-1]["loss"] < history[0]["loss"]
    assert sum("validation score" in line for line in said) == 8


def test_the_same_seed_gives_the_same_bits_and_leaves_the_callers_alone(model):
    runs = []
    for settings in (FAST, FAST, replace(FAST, seed=1)):
        copied = model.copy()
        torch.manual_seed(5)
        history = fit(copied, TASK, settings)
        runs.append((copied, history, torch.rand(1)))
    assert same(runs[0][0], runs[1][0]) and runs[0][1] == runs[1][1]
    assert not same(runs[0][0], runs[2][0])
    torch.manual_seed(5)
    assert runs[0][2] == runs[1][2] == torch.rand(1)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize(
    "others", [{}, {"patience": 3}, {"group_lasso": 2.0}], ids=["plain", "patience", "lasso"]
)
def test_a_killed_training_goes_on_to_the_same_bits(
    model, tmp_path, monkeypatch, said, optimizer, others
):
    settings = replace(FAST, optimizer=optimizer, **others)
    whole, cut = model.copy(), model.copy()
    history = fit(whole, TASK, settings)
    write, path = loop.write, tmp_path / "run" / "c.safetensors"
    path.parent.mkdir()

    def kill(*args):
        write(*args)
        if args[-1].epoch == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "write", kill)
    with pytest.raises(KeyboardInterrupt):
        fit(cut, TASK, settings, path)
    assert path.exists() and not same(cut, whole)
    monkeypatch.setattr(loop, "write", write)
    again = model.copy()
    assert fit(again, TASK, settings, path) == history
    assert same(again, whole)
    assert any("going on from c.safetensors after epoch 2" in line for line in said)
    finished = model.copy()
    assert fit(finished, TASK, settings, path) == history and same(finished, whole)


def test_a_foreign_or_damaged_checkpoint_is_replaced(model, tmp_path, said):
    path = tmp_path / "c.safetensors"
    fit(model.copy(), TASK, replace(FAST, epochs=1), path)
    other, whole = model.copy(), model.copy()
    history = fit(other, TASK, FAST, path)
    assert len(history) == 4 and "is of another training" in said[1]
    path.write_bytes(path.read_bytes()[:1000])
    assert fit(whole, TASK, FAST, path) == history and same(whole, other)
    assert any("is not a whole checkpoint" in line for line in said)


def test_nothing_revives_a_pruned_weight(model):
    named = {"body.0.weight": model.graph.body, "second.weight": model.graph}
    for optimizer in ("adamw", "sgd"):
        pruned = model.copy()
        fit(pruned, TASK, replace(FAST, epochs=1, optimizer=optimizer))  # no mask yet
        for name in named:
            weight = dict(pruned.graph.named_parameters(remove_duplicate=False))[name]
            pruned.masks[name] = torch.rand_like(weight) > 0.5
            weight.data.mul_(pruned.masks[name])
        start = pruned.state_dict()["head.weight"].clone()
        fit(pruned, TASK, replace(FAST, optimizer=optimizer, weight_decay=0.1))
        for name, mask in pruned.masks.items():
            weight = pruned.state_dict()[name]
            assert not weight[~mask].any() and weight[mask].all()
        assert pruned.graph.first.weight is pruned.graph.second.weight
        assert not torch.equal(start, pruned.state_dict()["head.weight"])


@pytest.fixture
def sparse() -> Model:
    """A net that came with nine tenths of its weights at zero, and no mask that says so."""
    torch.manual_seed(0)
    net = Net()
    with torch.no_grad():
        for parameter in (net.body[0].weight, net.first.weight, net.head.weight):
            parameter[torch.rand(parameter.shape) < 0.9] = 0.0
    return capture(net, TASK.example)


def revived(before: Model, after: Model) -> int:
    old, new = before.state_dict(), after.state_dict()
    names = ("body.0.weight", "first.weight", "head.weight")
    return sum(int(((old[name] == 0) & (new[name] != 0)).sum()) for name in names if name in new)


TRAINING = {"epochs": 2, "lr": 0.01, "device": "cpu"}


@pytest.mark.parametrize(
    "steps",
    [
        [FineTune(**TRAINING)],
        [FineTune(**TRAINING), FineTune(**TRAINING)],
        [FineTune(optimizer="sgd", **TRAINING)],
        [Distill(**TRAINING)],
        [Quantize("int8"), FineTune(**TRAINING)],
        [Quantize("int8", correct_bias=False), Distill(**TRAINING)],
        [PruneWeights(0.5), FineTune(**TRAINING)],
        [PruneChannels(0.25, reconstruct=False), FineTune(**TRAINING)],
    ],
    ids=lambda steps: "-".join(recipe.name(step) for step in steps),
)
def test_zeros_that_came_with_the_model_stay_and_it_is_said(sparse, steps, said):
    made = recipe.apply(sparse, steps, TASK)
    if made.graph.head.weight.shape == sparse.graph.head.weight.shape:
        assert revived(sparse, made) == 0 and not same(sparse, made)
    assert float((made.state_dict()["head.weight"] == 0).float().mean()) > 0.7
    notes = [line for line in said if "came sparse: their zeros stay" in line]
    assert len(notes) == 1 and 'FineTune(zeros="free") trains them' in notes[0]
    assert not sparse.masks


def test_zeros_are_freed_on_request(sparse, model, said):
    freed = recipe.apply(sparse, [FineTune(zeros="free", **TRAINING)], TASK)
    assert revived(sparse, freed) > 50 and not freed.masks
    pruned = PruneWeights(0.5).apply(model, TASK)
    freed = FineTune(zeros="free", **TRAINING).apply(pruned, TASK)
    assert revived(pruned, freed) > 30 and not freed.masks
    assert not [line for line in said if "came sparse" in line]
    with pytest.raises(UserError, match='zeros: expected "keep" or "free"'):
        FineTune(zeros="maybe")


def test_zeros_of_a_start_or_of_a_step_are_to_train():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.no_grad():
        nn.init.eye_(net[0].weight), nn.init.zeros_(net[1].weight)
    model = capture(net, (torch.zeros(2, 4),))
    assert not own_zeros.found(model)
    with torch.no_grad():
        model.graph.get_parameter("2.weight")[0] = 0.0
    assert set(own_zeros.found(model)) == {"2.weight"}
    assert not own_zeros.found(model, capture(net, (torch.zeros(2, 4),)).copy())  # not as it came


def test_a_mask_in_the_models_own_code_is_kept_when_its_weight_is_folded():
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    prune.l1_unstructured(net[0], "weight", 0.5)
    data = TensorDataset(torch.randn(32, 8), torch.arange(32) % 3)
    task = replace(TASK, example=(torch.zeros(2, 8),), train=data, validation=None)
    made = recipe.apply(net, [Quantize("int8"), FineTune(**TRAINING)], task)
    [name] = [n for n, p in made.graph.named_parameters() if tuple(p.shape) == (8, 8)]
    assert int((made.state_dict()[name] == 0).sum()) >= 32


def test_patience_stops_and_restores_the_best(model):
    scores = iter([0.5, 0.9, 0.4, 0.3, 0.8, 0.7])

    def score(out, y):
        return torch.full((len(y),), score.now)

    seen = []
    task = replace(TASK, score=score)

    def watch(line):
        score.now = next(scores)
        seen.append(model.state_dict()["head.weight"].clone())

    score.now = next(scores)
    original, progress.say = progress.say, watch
    try:
        history = fit(model, task, replace(FAST, epochs=6, patience=2))
    finally:
        progress.say = original
    assert [round(row["score"], 1) for row in history] == [0.5, 0.9, 0.4, 0.3]
    assert torch.equal(model.state_dict()["head.weight"], seen[1])
    with pytest.raises(UserError, match="patience: stopping early needs a validation split"):
        fit(model, replace(TASK, validation=None), replace(FAST, patience=1))


def test_patience_counts_the_model_as_it_came(model, tmp_path, monkeypatch, said):
    fit(model, TASK, FAST)
    worse, cut, again = model.copy(), model.copy(), model.copy()
    ruin = replace(FAST, epochs=6, lr=10.0, optimizer="sgd", patience=2, clip_norm=None)
    history = fit(worse, TASK, ruin)
    assert same(worse, model) and len(history) == 2
    assert any("no epoch scored better than the model as it came" in line for line in said)
    write, path = loop.write, tmp_path / "c.safetensors"

    def kill(*args):
        write(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "write", kill)
    with pytest.raises(KeyboardInterrupt):
        fit(cut, TASK, ruin, path)
    monkeypatch.setattr(loop, "write", write)
    assert fit(again, TASK, ruin, path) == history and same(again, model)


def test_part_of_an_epoch_and_the_schedule(model):
    rates = [learning_rate(step, 100, 2.0, 0.1) for step in range(100)]
    assert rates[9] == rates[10] == max(rates) == 2.0
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)
    steps = []
    task = replace(TASK, loss=lambda out, y: steps.append(len(y)) or cross_entropy(out, y))
    history = fit(model, task, replace(FAST, epochs=1.5))
    assert len(history) == 2 and len(steps) == 9  # 6 steps an epoch: 97 = 6 * 16 + 1
    assert set(steps) == {16}  # a batch of one example has no variance


@pytest.mark.parametrize(
    ("epochs", "steps"),
    [(1.05, 6), (2.08, 12), (1.09, 7), (0.01, 1), (0.5, 3), (1.95, 12), (1, 6), (1 + 1e-9, 6)],
)
def test_a_part_of_an_epoch_too_small_for_a_step_is_none(model, epochs, steps):
    taken = []
    task = replace(TASK, loss=lambda out, y: taken.append(1) or cross_entropy(out, y))
    history = fit(model, task, replace(FAST, epochs=epochs))
    assert len(taken) == steps and len(history) == -(-steps // 6)
    assert all(row["lr"] > 0 for row in history)


def test_out_of_memory_halves_the_batch_and_keeps_its_gradient(model, monkeypatch, said):
    plain = capture(nn.Sequential(nn.Flatten(), nn.Linear(36, 2)), TASK.example)
    whole, halved = plain.copy(), plain.copy()
    fit(whole, TASK, FAST)
    said.clear()
    call, sizes = batches.call, []

    def short(model, inputs):
        if len(inputs) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(len(inputs))
        return call(model, inputs)

    monkeypatch.setattr(batches, "call", short)
    history = fit(halved, TASK, FAST)
    assert len(history) == 4 and max(sizes) <= 5
    for name, weight in whole.state_dict().items():
        torch.testing.assert_close(halved.state_dict()[name], weight, rtol=1e-3, atol=1e-4)
    assert "out of memory at a batch of 16: going on with 8 at a time" in said[0]
    assert "the same batch of 16" in said[0]


class Rows(nn.Module):
    """Its outputs are the rows of one linear layer; ``kind`` says what it does besides."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.fc, self.norm = kind, nn.Linear(4, 5), nn.BatchNorm1d(4)

    def forward(self, x):
        if self.kind == "norm":
            x = self.norm(x)
        if self.kind == "mixed":
            x = x - x.mean(0)
        y = self.fc(x)
        if self.kind == "scalar":
            return y, y.square().mean()
        return (y, y.T) if self.kind == "last" else y


LABELS = torch.tensor([0, -100, -100, -100, 1, 2, 2, 3, 4, -100, 1, 1, 0])
ROWS = TensorDataset(torch.randn(13, 4, generator=torch.Generator().manual_seed(3)), LABELS)
CLASS_WEIGHTS = torch.tensor([1.0, 9.0, 0.1, 3.0, 1.0])


def pairwise(out, y):
    return (out @ out.T).tanh().mean()


def without_gradients(out, y):
    return cross_entropy(out[y >= 0], y[y >= 0])


@pytest.mark.parametrize(
    ("kind", "loss"),
    [
        ("plain", cross_entropy),  # divides by the labels that are not ignored
        ("plain", lambda out, y: cross_entropy(out, y, weight=CLASS_WEIGHTS)),
        ("plain", lambda out, y: cross_entropy(out, y, reduction="sum")),
        ("plain", pairwise),
        ("plain", without_gradients),
        ("plain", lambda out, y: out.mul_(2).square().mean()),
        ("scalar", lambda out, y: cross_entropy(out[0], y) + out[1]),
        ("last", lambda out, y: cross_entropy(out[1].T, y)),
    ],
)
def test_parts_of_a_batch_give_the_gradients_of_its_loss(kind, loss, monkeypatch, said):
    torch.manual_seed(0)
    whole = capture(Rows(kind), (torch.zeros(2, 4),))
    halved = whole.copy()
    task = Task(example=(torch.zeros(2, 4),), score=None, loss=loss, train=ROWS, batch_size=13)
    how = Training(epochs=3, lr=0.1, optimizer="sgd", momentum=0.0, warmup=0.0, device="cpu")
    expected = fit(whole, task, replace(how, clip_norm=None))
    short_of_memory(monkeypatch, 5)
    found = fit(halved, task, replace(how, clip_norm=None))
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in expected])
    for name, weight in whole.state_dict().items():
        torch.testing.assert_close(halved.state_dict()[name], weight, rtol=1e-5, atol=1e-6)
    assert "differs" not in said[-4] and any("with 4 at a time" in line for line in said)


def short_of_memory(monkeypatch, most):
    call = batches.call

    def short(model, inputs):
        if len(inputs) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return call(model, inputs)

    monkeypatch.setattr(batches, "call", short)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("norm", "batch norm takes its statistics of 4 examples, so the result differs"),
        ("mixed", "an example's output depends on the others beside it, so the result differs"),
    ],
)
def test_what_parts_of_a_batch_cannot_give_is_said(kind, words, monkeypatch, said):
    model = capture(Rows(kind), (torch.zeros(2, 4),))
    task = Task((torch.zeros(2, 4),), score=None, loss=cross_entropy, train=ROWS, batch_size=13)
    short_of_memory(monkeypatch, 5)
    fit(model, task, Training(epochs=1, device="cpu"))
    assert words in [line for line in said if line.startswith("out of memory")][-1]


def test_moving_statistics_move_once_for_each_part(monkeypatch):
    model = capture(Rows("norm"), (torch.zeros(2, 4),))
    task = Task((torch.zeros(2, 4),), score=None, loss=cross_entropy, train=ROWS, batch_size=13)
    short_of_memory(monkeypatch, 7)
    fit(model, task, Training(epochs=1, device="cpu"))
    assert int(model.state_dict()["norm.num_batches_tracked"]) == 2


def test_dropout_is_the_same_in_both_passes(monkeypatch):
    seen = []

    class Watched(TaskLoss):
        def values(self, model, inputs, target):
            found = super().values(model, inputs, target)
            seen.append(found[0].detach())
            return found

    model = capture(nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5)), (torch.zeros(2, 4),))
    task = Task((torch.zeros(2, 4),), score=None, loss=cross_entropy, train=ROWS, batch_size=13)
    short_of_memory(monkeypatch, 7)
    fit(model, task, Training(epochs=1, device="cpu"), objective=Watched(task))
    first, second = seen[-4:-2], seen[-2:]
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert (first[0] == 0).any() and not torch.equal(first[0][:6] == 0, first[1] == 0)


def test_too_little_memory_for_one_example_is_said(model, monkeypatch):
    def never(model, inputs):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(batches, "call", never)
    with pytest.raises(UserError, match="out of memory at a batch of 1, which cannot be split"):
        fit(model, TASK, FAST)


def test_a_loss_that_is_not_finite_says_where(model):
    calls = []

    def loss(out, y):
        calls.append(1)
        return cross_entropy(out, y) * (float("nan") if len(calls) == 9 else 1)

    message = r"the loss is nan at epoch 2, batch 3 \(lr 0.00\d+\); use a smaller lr"
    with pytest.raises(UserError, match=message):
        fit(model, replace(TASK, loss=loss), FAST)
    assert not model(torch.zeros(2, 1, 6, 6)).isnan().any()


def test_gradients_that_are_not_finite_are_noticed(model):
    def loss(out, y):
        return (out * 0).abs().sqrt().sum()  # finite, with an infinite slope

    with pytest.raises(UserError, match="became NaN or infinite in epoch 1; use a smaller lr"):
        fit(model, replace(TASK, loss=loss), replace(FAST, clip_norm=None, batch_size=97))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda out, y: cross_entropy(out, y, reduction="none"), r"shape \(\), got \(16,\)"),
        (lambda out, y: cross_entropy(out, y).item(), r"shape \(\), got float"),
        (lambda out, y: cross_entropy(out.detach(), y), "does not depend on the model's weights"),
    ],
)
def test_a_wrong_loss_is_explained(model, loss, message):
    with pytest.raises(UserError, match=f"task.loss: .*{message}"):
        fit(model, replace(TASK, loss=loss), FAST)


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (lambda out, y: (out.argmax(1) == y).float().mean(), r"shape \(16,\), got \(\); do not av"),
        (lambda out, y: 0.5, r"shape \(16,\), got \(\)"),
        (lambda out, y: out[:, 0] / 0, "16 of 16 scores of a batch are NaN or infinite"),
    ],
)
def test_a_wrong_score_is_explained(model, score, message):
    with pytest.raises(UserError, match=f"task.score: .*{message}"):
        evaluate(model, TASK.validation, replace(TASK, score=score))


def test_evaluation_halves_a_batch_that_is_too_large(model, monkeypatch, said):
    expected, call = evaluate(model, TASK.validation, TASK), batches.call

    def short(model, inputs):
        if len(inputs) > 6:
            raise MemoryError
        return call(model, inputs)

    monkeypatch.setattr(batches, "call", short)
    assert torch.equal(evaluate(model, TASK.validation, TASK), expected)
    assert "out of memory at a batch of 16" in said[0]


def test_a_fixed_batch_is_trained_and_evaluated_as_captured():
    torch.manual_seed(0)
    model = capture(nn.Sequential(nn.Flatten(), nn.Linear(36, 2)), (torch.zeros(4, 1, 6, 6),))
    model = replace(model, inputs=(replace(model.inputs[0], dynamic={}),))
    history = fit(model, TASK, replace(FAST, epochs=8))
    assert history[-1]["score"] > 0.8
    fixed = evaluate(model, TASK.validation, TASK)
    open_batch = replace(model, inputs=(replace(model.inputs[0], dynamic={0: "batch"}),))
    assert torch.equal(fixed, evaluate(open_batch, TASK.validation, TASK))
    few = replace(TASK, train=examples(3))
    with pytest.raises(UserError, match="train: 3 examples do not fill the model's batch of 4"):
        fit(model, few, FAST)


class Records(Dataset):
    """Dict inputs and random augmentation, as a user's dataset has them."""

    def __len__(self):
        return 20

    def __getitem__(self, index):
        return {"x": torch.randn(4) + index % 2}, index % 2


def test_dict_inputs_and_augmentation_are_reproducible():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, x):
            return {"logits": self.fc(x)}

    torch.manual_seed(0)
    model = capture(Keyword(), {"x": torch.zeros(2, 4)})
    task = replace(
        TASK,
        example={"x": torch.zeros(2, 4)},
        train=Records(),
        validation=None,
        batch_size=8,
        loss=lambda out, y: cross_entropy(out["logits"], y),
    )
    one, other = model.copy(), model.copy()
    assert fit(one, task, FAST) == fit(other, task, FAST)
    assert same(one, other) and not same(one, model)


def test_frozen_weights_stay_and_nothing_to_train_raises(model):
    model.graph.head.weight.requires_grad_(False)
    frozen = model.graph.head.weight.clone()
    fit(model, TASK, FAST)
    assert torch.equal(model.graph.head.weight, frozen)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(UserError, match="model: has nothing to train"):
        FineTune().apply(model, TASK)


def test_float16_weights_are_refused(model):
    model.graph.head.half()
    with pytest.raises(UserError, match=r'head.weight is float16.* train before Cast\("fp16"\)'):
        fit(model, TASK, FAST)


def test_a_task_without_loss_or_data_is_refused(model):
    with pytest.raises(UserError, match="task: has no loss, which training needs"):
        fit(model, replace(TASK, loss=None), FAST)
    with pytest.raises(UserError, match="task: has no train split"):
        fit(model, replace(TASK, train=None), FAST)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs: expected a number above 0, got 0"),
        ({"epochs": float("nan")}, "epochs: expected a number above 0, got nan"),
        ({"optimizer": "adam"}, 'optimizer: expected "adamw" or "sgd", got \'adam\''),
        ({"lr": -1}, "lr: expected a number above 0, such as 5e-4, got -1"),
        ({"momentum": 1}, "momentum: expected from 0 up, below 1, got 1"),
        ({"weight_decay": -1}, "weight_decay: expected a number from 0 up, got -1"),
        ({"warmup": 1.0}, "warmup: expected a share of the steps, below 1, got 1.0"),
        ({"clip_norm": 0}, "clip_norm: expected a number above 0, or None, got 0"),
        ({"batch_size": 0}, "batch_size: expected a whole number from 1 up, got 0"),
        ({"group_lasso": -0.1}, "group_lasso: expected a strength from 0 up; 0 is off, got -0.1"),
        ({"group_lasso": float("nan")}, "group_lasso: expected a strength from 0 up.* got nan"),
        ({"group_lasso": float("inf")}, "group_lasso: expected a strength from 0 up.* got inf"),
        ({"patience": 0}, "patience: expected a whole number of epochs from 1 up, got 0"),
        ({"device": "tpu"}, 'device: expected "cpu", "cuda" or "auto", got \'tpu\''),
    ],
)
def test_wrong_settings_are_refused_at_once(settings, message):
    for kind in (Training, FineTune):
        with pytest.raises(UserError, match=message):
            kind(**settings)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_said(model):
    with pytest.raises(UserError, match='device: "cuda" was asked for, but torch sees no GPU'):
        fit(model, TASK, replace(FAST, device="cuda"))


def test_fine_tune_has_the_settings_of_training_and_leaves_its_input(model, tmp_path):
    assert [(f.name, f.default) for f in fields(FineTune)] == [
        (f.name, f.default) for f in fields(Training)
    ]
    before, step = model.copy(), FineTune(**asdict(FAST))
    tuned = step.apply(model, TASK, Setting(scratch=tmp_path))
    assert (tmp_path / "fine_tune.safetensors").exists()
    assert same(before, model) and not same(tuned, model)
    model.save(tmp_path / "m.safetensors")
    assert same(step.apply(Model.load(tmp_path / "m.safetensors"), TASK), tuned)
