# ruff: noqa: F811 (fixtures are imported)
"""Distillation: the losses as their papers have them, which layer teaches which, and the step."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

import paredown
from docs import make_architectures as page
from paredown import Distill, FineTune, Goals, PruneWeights, Quantize, capture, compress, replay
from paredown.core import progress
from paredown.core.errors import UserError
from paredown.core.measurement import Measurement
from paredown.core.task import Target, Task
from paredown.data import splits
from paredown.graph import taps
from paredown.graph.doors import python_file
from paredown.graph.model import Model
from paredown.run import preflight
from paredown.search.plan import plan
from paredown.steps import recipe
from paredown.steps.step import Setting
from paredown.train import loop, parts
from paredown.train.distill import losses
from paredown.train.distill.inner_values import View
from paredown.train.distill.lesson import Teaching, prepare
from paredown.train.distill.outputs import outputs_of
from paredown.train.distill.student import captured as student_of
from paredown.train.distill.teacher import TAUGHT
from paredown.train.loop import fit
from paredown.train.settings import Training
from tests.architectures import ARCHITECTURES
from tests.architectures.blocks import EncoderBlock
from tests.architectures.captured import captured
from tests.test_run import here  # noqa: F401

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore")
QUICK = ("resnet8", "vit", "lstm", "siamese", "tied_language_model")
FAST = {"epochs": 4, "lr": 0.01, "device": "cpu", "batch_size": 16}
LONG = {**FAST, "epochs": 20}


class Images(nn.Module):
    """Three resolutions; (B, 1, 12, 12) -> (B, 3)."""

    def __init__(self, width: int):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, 1, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(width, 2 * width, 3, 2, 1), nn.ReLU(), nn.Dropout(0.1))
        self.end = nn.Sequential(nn.Conv2d(2 * width, 2 * width, 3, 2, 1), nn.ReLU())
        self.head = nn.Linear(2 * width, 3)

    def forward(self, x):
        return self.head(self.end(self.body(self.stem(x))).mean((2, 3)))


class Tokens(nn.Module):
    """A transformer; (B, L) -> {"logits": (B, L, 5), "length": (B,)}."""

    def __init__(self, width: int, blocks: int, heads: int):
        super().__init__()
        self.embedding = nn.Embedding(16, width)
        self.blocks = nn.ModuleList([EncoderBlock(width, heads) for _ in range(blocks)])
        self.head = nn.Linear(width, 5)

    def forward(self, ids):
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return {"logits": self.head(x), "ids": ids}


def pictures(count: int, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (count,), generator=generator)
    noise = torch.randn(count, 1, 12, 12, generator=generator)
    rows = torch.arange(12)[None, None, :, None] // 4 == labels[:, None, None, None]
    return TensorDataset(noise + 2.0 * rows, labels)


def words(count: int) -> TensorDataset:
    ids = torch.randint(16, (count, 6), generator=torch.Generator().manual_seed(0))
    return TensorDataset(ids, ids % 5)


TASK = Task(
    example=(torch.zeros(1, 1, 12, 12),),
    score=paredown.accuracy,
    loss=F.cross_entropy,
    train=pictures(96),
    validation=pictures(200, 1),
    test=pictures(200, 2),
    batch_size=16,
)
TEXT = Task(
    example=(torch.zeros(1, 6, dtype=torch.long),),
    score=lambda out, y: paredown.token_accuracy(out["logits"], y),
    loss=lambda out, y: F.cross_entropy(out["logits"].flatten(0, 1), y.flatten()),
    train=words(40),
    dynamic=({1: "length"},),
    batch_size=16,
)


@pytest.fixture(scope="module")
def master() -> Model:
    torch.manual_seed(0)
    return FineTune(**FAST).apply(capture(Images(8), TASK.example), TASK)


@pytest.fixture
def student() -> Model:
    torch.manual_seed(1)
    return capture(Images(3), TASK.example)


@pytest.fixture
def said(monkeypatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(progress, "say", lines.append)
    return lines


def transformer(width: int, blocks: int, heads: int) -> Model:
    torch.manual_seed(width)
    return capture(Tokens(width, blocks, heads), TEXT.example, TEXT.dynamic)


def outputs(model: Model, count: int = 200) -> torch.Tensor:
    with torch.no_grad():
        return model(TASK.test.tensors[0][:count])


def error(student: Model, teacher_: Model) -> float:
    """Mean KL of the test outputs."""
    pair = (F.log_softmax(outputs(m), -1) for m in (teacher_, student))
    return float(losses.divergence(*pair).mean())


def same(one: Model, other: Model) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --- losses ----------------------------------------------------------------------------------


def logits(count: int = 7, classes: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    pair = 3 * torch.randn(2, count, classes, dtype=torch.float64)
    return pair[0].requires_grad_(), pair[1], torch.randint(classes, (count,))


def test_softened_is_hintons():
    ours, theirs, _ = logits()
    q, log_p = (theirs / 3).softmax(-1), (ours / 3).log_softmax(-1)
    expected = 9 * F.kl_div(log_p, q, reduction="batchmean")
    torch.testing.assert_close(losses.softened(ours, theirs, temperature=3.0), expected)
    hot = losses.softened(ours, theirs, temperature=1e4)  # tends to half the squared error, centred
    centred = ours - theirs - (ours - theirs).mean(-1, keepdim=True)
    torch.testing.assert_close(hot, 0.5 * centred.square().mean(), rtol=1e-3, atol=1e-6)


def test_decoupled_is_softened_where_the_rest_weighs_what_the_teacher_leaves_it():
    ours, theirs, target = logits(1)
    left = float(1 - theirs.softmax(-1)[0, target[0]])
    found = losses.decoupled(ours, theirs, target, 1.0, left)
    torch.testing.assert_close(found, losses.softened(ours, theirs, temperature=1.0))
    by_teacher = losses.decoupled(ours, theirs, None, 2.0)
    assert by_teacher == losses.decoupled(ours, theirs, theirs.argmax(-1), 2.0)


@pytest.mark.parametrize("name", losses.OUTPUTS)
def test_classes_that_are_masked_out_leave_finite_gradients(name):
    ours, theirs, target = logits()
    gone = torch.zeros(5, dtype=torch.bool)
    gone[3] = True
    loss = losses.LOSSES[name](
        ours.masked_fill(gone, -torch.inf), theirs.masked_fill(gone, -torch.inf), target % 3, 2.0
    )
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(ours.grad).all() and ours.grad.any()
    assert not ours.grad[:, 3].any()


@pytest.mark.parametrize("name", losses.OUTPUTS)
@pytest.mark.parametrize("whose", ["both", "teacher"])
@pytest.mark.parametrize("target", [None, 0, 2])
def test_rows_with_one_class_left_leave_finite_gradients(name, whose, target):
    ours, theirs, _ = logits()
    gone = torch.zeros(7, 5, dtype=torch.bool)
    gone[:3, 1:] = True  # of three rows all classes but the first
    gone[3, 2:] = True
    labels = None if target is None else torch.full((7,), target)
    student = ours.masked_fill(gone, -torch.inf) if whose == "both" else ours * 1
    loss = losses.LOSSES[name](student, theirs.masked_fill(gone, -torch.inf), labels, 2.0)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(ours.grad).all() and ours.grad[4:].any()
    if whose == "both":
        assert not ours.grad[gone].any()


@pytest.mark.parametrize("name", losses.INTERNAL)
def test_inner_losses_are_zero_for_the_same_and_fall_by_their_gradient(name):
    torch.manual_seed(0)
    theirs, ours = torch.randn(2, 4, 6, 5, 5).softmax(-1)
    loss = losses.LOSSES[name]
    assert float(loss(theirs, theirs)) == pytest.approx(0, abs=1e-6)
    ours.requires_grad_()
    before = loss(ours, theirs)
    (gradient,) = torch.autograd.grad(before, ours)
    with torch.no_grad():
        moved = ours - 1e-3 * gradient / gradient.norm()
        assert loss(moved, theirs) < before and before > 0


def test_what_the_scale_of_a_channel_or_its_order_does_not_change():
    torch.manual_seed(0)
    x, y = torch.randn(2, 6, 4, 3, 3)
    for name in ("attention_transfer", "similarity"):
        loss = losses.LOSSES[name]
        torch.testing.assert_close(loss(x, y), loss(7 * x.flip(1), y.flip(1)))
    rotated = torch.linalg.qr(torch.randn(4, 4)).Q
    rows = x.mean((2, 3)), y.mean((2, 3))
    assert losses.linear_cka(rows[0], 5 * rows[0] @ rotated + 1) == pytest.approx(1)
    assert losses.linear_cka(*rows) == pytest.approx(losses.linear_cka(rows[1], rows[0] @ rotated))


@pytest.mark.parametrize("kind", ["plain", "causal", "bool", "float", "grouped"])
def test_attention_maps_are_those_of_the_op(kind):
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 5, 8), torch.randn(2, 2 if kind == "grouped" else 4, 5, 8)
    value = torch.eye(5).expand(*key.shape[:2], 5, 5)
    mask = {"bool": torch.rand(5, 5) > 0.3, "float": torch.randn(5, 5)}.get(kind)
    if kind == "bool":
        mask.fill_diagonal_(True)
    causal = kind == "causal"
    expected = F.scaled_dot_product_attention(
        query, key, value, mask, is_causal=causal, scale=0.5, enable_gqa=kind == "grouped"
    )
    found = taps.attention_map(query, key, mask, causal, 0.5)
    torch.testing.assert_close(found, expected)
    if kind == "bool":
        assert torch.isfinite(taps.attention_map(query, key, torch.zeros(5, 5).bool())).all()


# --- which layer -----------------------------------------------------------------------------


def learnt(lines: list[str]) -> list[tuple[str, str]]:
    found = [line.split() for line in lines if "from the teacher's" in line]
    return [(words_[1], words_[words_.index("teacher's") + 1]) for words_ in found]


def test_stages_of_each_resolution_are_found_and_told(student, master, said):
    prepare(master, student, TASK, Teaching(internal=("hints",)), related=False)
    assert said[0] == "  learning output: softened, temperature 4, classes in dimension 1"
    assert learnt(said) == [("stem", "stem"), ("body", "body"), ("end", "end")]


def test_hidden_states_of_a_deeper_teacher_are_matched_by_depth(said):
    deep, shallow = transformer(16, 6, 4), transformer(8, 3, 2)
    how = Teaching(internal=("hints", "attention_maps"))
    lesson = prepare(deep, shallow, TEXT, how, related=False)
    assert said[0] == "  learning output logits: softened, temperature 4, classes in dimension 2"
    assert [(a[-1], b[-1]) for a, b in learnt(said)[:3]] == [("0", "1"), ("1", "3"), ("2", "5")]
    maps = [pair for pair in lesson.pairs if pair.loss == "attention_maps"]
    assert len(maps) == 3 and [p.teacher.layer.split(".")[1][0] for p in maps] == ["1", "3", "5"]
    assert {key: tuple(t.shape) for key, t in lesson.extra.items() if "weight" in key} == {
        f"{n}.weight": (16, 8) for n in range(3)
    }


def test_cka_finds_the_layer_that_was_copied(master, said):
    how = Teaching(internal=("hints",), match="cka")
    other = master.copy()
    prepare(master, other, TASK, how, related=True)
    assert learnt(said) == [("stem", "stem"), ("body", "body"), ("end", "end")]
    assert all("CKA 1.00" in line for line in said[1:])


def test_named_layers_of_other_widths_and_resolutions(student, master, said):
    how = Teaching(internal=tuple(losses.INTERNAL[:3]), layers=("body=end", "stem"))
    lesson = prepare(master, student, TASK, how, related=False)
    assert learnt(said) == 3 * [("body", "end"), ("stem", "stem")]
    assert {key: tuple(t.shape) for key, t in lesson.extra.items()} == {
        "0.weight": (16, 6), "0.bias": (16,), "1.weight": (8, 3), "1.bias": (8,)
    }  # fmt: skip
    loss = lesson(student.copy().train(), *TASK.train[:8])
    loss.backward()
    assert torch.isfinite(loss) and all(t.grad.any() for t in lesson.extra.values())


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (("boddy",), "layers: the model has no layer called 'boddy'; did you mean 'body'"),
        (("body=ende",), "layers: the teacher has no layer called 'ende'; did you mean 'end'"),
    ],
)
def test_a_layer_that_does_not_exist_suggests_the_nearest(student, master, layers, message):
    how = Teaching(internal=("hints",), layers=layers)
    with pytest.raises(UserError, match=message):
        prepare(master, student, TASK, how, related=False)


def test_losses_that_do_not_fit_a_net_are_refused():
    flat = capture(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), (torch.zeros(1, 4),))
    task = replace(TASK, train=TensorDataset(torch.randn(8, 4), torch.arange(8) % 3))
    for name in ("attention_transfer", "attention_maps"):
        with pytest.raises(UserError, match=f"internal: {name} .* none"):
            prepare(flat, flat, task, Teaching(internal=(name,)), related=True)


def test_where_the_classes_are():
    class Three(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 3, 1)

        def forward(self, x):
            y = self.conv(x)
            return y, y.mean((2, 3)), y.argmax(1)

    images = torch.randn(2, 1, 5, 3)
    model = capture(Three(), (images,))
    view, found = View(model, [images], "model"), list(model.graph(images))
    labels = torch.randint(3, (2, 5, 3))
    made = outputs_of(model, view, found, labels, "auto")
    assert [(o.index, o.loss, o.classes) for o in made] == [(0, "softened", 1), (1, "squared", 1)]
    made = outputs_of(model, view, found, {"x": labels, "y": torch.zeros(2).long()}, "decoupled")
    assert [(o.loss, o.label) for o in made] == [("decoupled", 0), ("decoupled", 1)]
    assert {o.loss for o in outputs_of(model, view, found, None, "auto")} == {"squared"}
    assert {o.loss for o in outputs_of(model, view, found, None, "softened")} == {"softened"}


# --- the step --------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["auto", "decoupled", "squared"])
def test_a_student_takes_its_teachers_place_without_labels(student, master, loss, tmp_path):
    student.save(tmp_path / "student.safetensors")
    unlabelled = replace(TASK, train=TensorDataset(TASK.train.tensors[0]), loss=None)
    step = Distill(student=str(tmp_path / "student.safetensors"), alpha=0, loss=loss, **LONG)
    made = recipe.apply(master, [step], unlabelled)
    assert error(made, master) < 0.5 * error(student, master)
    assert made.graph.code == student.graph.code


def test_labels_are_asked_for_where_they_count(student):
    unlabelled = replace(TASK, train=TensorDataset(TASK.train.tensors[0]))
    with pytest.raises(UserError, match="train split has none; set alpha=0"):
        Distill(**FAST).apply(student, unlabelled)
    with pytest.raises(UserError, match=r"Distill\(\): needs loss of the task"):
        recipe.apply(student, [Distill()], replace(TASK, loss=None))
    with pytest.raises(UserError, match="needs train of the task"):
        recipe.apply(student, [Distill(alpha=0)], replace(TASK, train=None))


def test_the_recipes_original_teaches(master):
    steps = [PruneWeights(0.7), Distill(alpha=0, internal=("hints",), **LONG)]
    cut = recipe.apply(master, steps[:1], TASK)
    made = recipe.apply(master, steps, TASK)
    assert error(made, master) < 0.5 * error(cut, master)
    for name, mask in cut.masks.items():
        assert not made.state_dict()[name][~mask].any()
    assert set(made.state_dict()) == set(master.state_dict())  # no adaptor stays


def test_a_python_file_with_a_model_alone_is_a_student(master, tmp_path):
    path = tmp_path / "small.py"
    path.write_text(
        "import torch\nfrom tests.test_distill import Images\n\n\n"
        "def model():\n    return Images(3)\n"
    )
    steps = [Distill(student=str(path), epochs=0.2, internal=("similarity",)), Quantize()]
    assert recipe.from_toml(recipe.to_toml(steps)) == steps
    made = recipe.apply(master, steps[:1], TASK)
    assert made.state_dict()["head.weight"].shape == (3, 6)
    assert Distill(student=path) == Distill(student=str(path))
    again = recipe.apply(master, [Distill(student=Images(3), **FAST), Distill(**FAST)], TASK)
    assert again.state_dict()["head.weight"].shape == (3, 6)
    text = r"Distill\(student=<Images>\): student is no text; name a file"
    with pytest.raises(UserError, match=text):
        recipe.to_toml([Distill(student=Images(3))])


def test_a_student_that_is_not_there_or_comes_late_is_seen_before_any_work(master):
    steps = [PruneWeights(0.5), Distill(student="gone.py")]
    with pytest.raises(UserError) as caught:
        recipe.apply(master, steps, TASK)
    late, gone = str(caught.value).splitlines()
    assert "puts another model in place of what the steps before it made" in late
    assert "student: gone.py: no such file in " in gone and "defines model(), a saved" in gone
    [said] = Distill(student="").problems()
    assert said.startswith('student: expected a file, "zoo:" and a name, or an nn.Module, got')
    with pytest.raises(UserError, match="student: expected "):
        Distill(student=3)


def test_a_students_file_may_lie_beside_what_names_it(tmp_path, monkeypatch):
    """Of a recipe as of a task, and also where the current folder is another."""
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "small.py").write_text("from tests.test_distill import Images\n")
    (folder / "r.toml").write_text('[[step]]\nname = "distill"\nstudent = "small.py"\n')
    lines = ("import torch, paredown", "def task():", "    x = (torch.zeros(1, 1, 8, 8),)")
    text = "\n".join((*lines, "    return paredown.Task(x, paredown.accuracy, student='small.py')"))
    (folder / "net.py").write_text(f"{text}\ndef model():\n    return torch.nn.Identity()\n")
    for place, named in ((tmp_path, "own/small.py"), (folder, "small.py")):
        monkeypatch.chdir(place)
        where = Path(named).parent
        assert recipe.load(where / "r.toml")[0].student == named
        assert python_file.load(where / "net.py")[1].student == named
    monkeypatch.chdir(tmp_path)
    (folder / "small.py").rename("small.py")
    [step] = recipe.load("own/r.toml")
    assert step.student == "small.py" and step.problems() == []
    Path("small.py").unlink()
    assert "no such file in" in step.problems()[0] and "beside the file that" in step.problems()[0]


def test_a_student_without_parameters_is_refused(master):
    class Sums(nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :3]

    with pytest.raises(UserError, match="student: has no parameters"):
        recipe.apply(master, [Distill(student=Sums())], TASK)


def test_other_inputs_or_outputs_are_refused_before_any_work(master):
    wide = Images(8)
    wide.head = nn.Linear(16, 4)
    told = r"student: expected outputs as the original's, \(1, 3\) float32; got \(1, 4\) float32"
    for work in (recipe.apply, lambda *a: a[1][0].apply(a[0], a[2])):
        with pytest.raises(UserError, match=told):
            work(master, [Distill(student=wide)], TASK)
    other = transformer(8, 1, 2)
    with pytest.raises(
        UserError, match=r"inputs as the original's, x \(\?, 1, 12, 12\) float32; got"
    ):
        recipe.apply(master, [Distill(student=other)], TASK)
    with pytest.raises(UserError, match="student: "):
        recipe.apply(other, [Distill(student=Images(3), alpha=0)], TEXT)


class Named(nn.Module):
    """Two inputs by name."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, a, b):
        return self.layer(a) - self.layer(b)


class Turned(Named):
    def forward(self, b, a):
        return Named.forward(self, a, b)


def test_a_student_takes_inputs_by_name_in_the_originals_order():
    example = {"a": torch.randn(1, 4), "b": torch.randn(1, 4)}
    task = replace(TASK, example=example, dynamic=None)
    named, turned = capture(Named(), example), Turned()
    assert Distill(student=turned, alpha=0).unfit(named, task) == []
    made = student_of(turned, task)
    leaves = [item.example for item in named.inputs]
    assert torch.equal(made.graph(*leaves)[0], turned(**example))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0}, "temperature: expected a number above 0, got 0"),
        ({"temperature": -1.0}, "temperature: expected a number above 0"),
        ({"alpha": 1.5}, r"alpha: expected a share from 0 to 1, got 1\.5"),
        ({"alpha": -0.1}, "alpha: expected a share"),
        ({"alpha": 1}, "alpha: 1 leaves nothing to the teacher"),
        ({"beta": -1.0}, "beta: expected a weight"),
        ({"loss": "kl"}, 'loss: expected one of "auto", "softened".* got \'kl\''),
        ({"internal": ("hint",)}, 'internal: expected one of "hints"'),
        ({"match": "width"}, 'match: expected one of "depth", "cka"'),
        ({"layers": ("a",)}, "layers: only the losses of internal"),
        ({"layers": ("a=b=c",), "internal": ("hints",)}, 'layers: expected "student=teacher"'),
        ({"lr": 0}, "lr: expected"),
    ],
)
def test_settings_out_of_their_range(settings, message):
    with pytest.raises(UserError, match=message):
        Distill(**settings)


@pytest.mark.parametrize("loss", ["softened", "decoupled"])
def test_a_loss_of_classes_needs_classes(loss):
    one = capture(nn.Linear(4, 1), (torch.zeros(1, 4),))
    task = replace(TASK, train=TensorDataset(torch.randn(8, 4), torch.randn(8, 1)), loss=F.mse_loss)
    with pytest.raises(UserError, match=f'loss: "{loss}" compares classes, and no output has any'):
        Distill(loss=loss).apply(one, task)
    assert not same(Distill(epochs=1, lr=0.1).apply(one, replace(task, validation=None)), one)


def test_it_works_through_the_rounding(master, said):
    rounded = Quantize("int8").apply(PruneWeights(0.7).apply(master, TASK), TASK)
    step = Distill(alpha=0, internal=("hints", "attention_transfer"), **LONG)
    made = step.apply(rounded, TASK, Setting(original=master))
    assert error(made, master) < 0.7 * error(rounded, master)
    scales = [key for key in made.state_dict() if "scale" in key]
    assert scales and set(made.state_dict()) == set(rounded.state_dict())
    assert any(not torch.equal(made.state_dict()[k], rounded.state_dict()[k]) for k in scales)
    assert learnt(said)[:3] == [("stem", "stem"), ("body", "body"), ("end", "end")]


def test_tokens_whose_label_is_ignored_teach_nothing():
    deep, shallow = transformer(16, 2, 4), transformer(8, 1, 2)
    ids, labels = TEXT.train.tensors
    hidden = labels.clone()
    hidden[:, 3:] = -100
    lesson = prepare(deep, shallow, TEXT, Teaching(alpha=0), related=False)
    ours = shallow(ids)["logits"][:, :3].flatten(0, 1)
    theirs = deep(ids)["logits"][:, :3].flatten(0, 1)
    expected = losses.softened(ours, theirs)
    torch.testing.assert_close(lesson(shallow, ids, hidden), expected)


class Pixels(nn.Module):
    def __init__(self, classes=3):
        super().__init__()
        self.conv = nn.Conv2d(1, classes, 1)

    def forward(self, x):
        return self.conv(x)


def pixel_task(labels, **fields):
    images = torch.randn(len(labels), 1, 4, 4, generator=torch.Generator().manual_seed(0))
    example = (torch.zeros(1, 1, 4, 4),)
    return Task(example, score=None, train=TensorDataset(images, labels), batch_size=4, **fields)


def masks(last, count=12, classes=3):
    """Labels of which those of the last examples alone are ``last``."""
    made = torch.arange(count * 16).reshape(count, 4, 4) % classes
    made[-3:, :2] = last
    return made


@pytest.mark.parametrize("label", [255, -1, -100, 7])
@pytest.mark.parametrize("loss", ["auto", "softened", "decoupled"])
@pytest.mark.parametrize("given", [False, True])
def test_ignored_labels_anywhere_in_a_split_do_not_count(label, loss, given, said):
    """Wherever they are, the loss is one of classes; and those pixels change nothing of it."""
    torch.manual_seed(0)
    student, master = (capture(Pixels(), (torch.zeros(1, 1, 4, 4),)) for _ in range(2))
    for labels in (masks(label), masks(label).flip(0)):
        task = pixel_task(labels, ignore=label if given else None)
        lesson = prepare(master, student, task, Teaching(loss=loss, alpha=0), related=False)
        [output] = lesson.outputs
        assert output.loss == ("decoupled" if loss == "decoupled" else "softened")
        assert output.ignore == (label,)
        inputs, target = task.train.tensors
        found = lesson(student, inputs, target)
        rows = [m(inputs).movedim(1, -1)[target != label] for m in (student, master)]
        expected = losses.LOSSES[output.loss](*rows, target[target != label], 4.0)
        torch.testing.assert_close(found, expected)
    assert any(f"labels of {label} do not count" in line for line in said) == (label != -100)


def test_a_class_that_does_not_count_is_told_by_the_task():
    torch.manual_seed(0)
    student, master = (capture(Pixels(), (torch.zeros(1, 1, 4, 4),)) for _ in range(2))
    task = pixel_task(masks(255), ignore=(0, 255))
    lesson = prepare(master, student, task, Teaching(alpha=0), related=False)
    inputs, target = task.train.tensors
    counts = (target != 0) & (target != 255)
    rows = [m(inputs).movedim(1, -1)[counts] for m in (student, master)]
    torch.testing.assert_close(lesson(student, inputs, target), losses.softened(*rows))


@pytest.mark.parametrize(
    ("labels", "ignore", "shown"),
    [
        (torch.cat([masks(255), masks(-1)]), None, "-1, 255"),
        (torch.cat([masks(255), masks(-100)]), None, "-100, 255"),
        (masks(255), -1, "255"),
        (masks(0) + 1, None, "3"),  # they count from 1
        (masks(0) * 100, None, "100, 200"),
    ],
)
def test_labels_of_other_classes_are_refused_before_any_work(labels, ignore, shown):
    model = capture(Pixels(), (torch.zeros(1, 1, 4, 4),))
    task = pixel_task(labels, ignore=ignore)
    with pytest.raises(UserError, match=rf"0 to 2, and its labels are also {shown}; say with Task"):
        Distill(alpha=0, **FAST).apply(model, task)
    Distill(alpha=0, loss="squared", **{**FAST, "epochs": 1}).apply(model, task)


def test_a_label_that_turns_up_later_is_told(student, master):
    lesson = prepare(master, student, TASK, Teaching(loss="decoupled"), related=False)
    inputs, target = next(splits.batches(TASK.train, 4))
    for wrong in (255, -1, 3):
        target[2] = wrong
        with pytest.raises(UserError, match=rf"train split is {wrong}, and the classes are 0 to 2"):
            lesson(student, inputs, target)


def test_labels_of_a_byte_are_labels():
    model = capture(Pixels(), (torch.zeros(1, 1, 4, 4),))
    task = pixel_task(masks(255).to(torch.uint8))
    lesson = prepare(model, model, task, Teaching(loss="decoupled", alpha=0), related=True)
    assert lesson.outputs[0].ignore == (255,)
    assert float(lesson(model, *task.train.tensors)) == pytest.approx(0, abs=1e-6)


# --- resume, memory, cache -------------------------------------------------------------------

HOW = Teaching(internal=("hints",))


def lesson_of(master: Model, student: Model, task: Task = TASK):
    return prepare(master, student, task, HOW, related=False)


def test_a_killed_distillation_goes_on_to_the_same_bits(
    master, student, tmp_path, monkeypatch, said
):
    settings = Training(**FAST)
    whole, cut, again = student.copy(), student.copy(), student.copy()
    first = lesson_of(master, whole)
    history = fit(whole, TASK, settings, objective=first)
    write, path = loop.write, tmp_path / "c.safetensors"

    def kill(*args):
        write(*args)
        if args[-1].epoch == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "write", kill)
    with pytest.raises(KeyboardInterrupt):
        fit(cut, TASK, settings, path, lesson_of(master, cut))
    monkeypatch.setattr(loop, "write", write)
    second = lesson_of(master, again)
    assert fit(again, TASK, settings, path, second) == history and same(again, whole)
    assert all(torch.equal(second.extra[key], t) for key, t in first.extra.items())
    assert any("going on from c.safetensors after epoch 2" in line for line in said)
    other = prepare(master, student, TASK, Teaching(alpha=0.5), related=False)
    fit(student.copy(), TASK, replace(settings, epochs=1), path, other)
    assert any("is of another training" in line for line in said)


def test_too_little_memory_halves_the_batch(master, student, monkeypatch, said):
    said.clear()
    lesson, read = lesson_of(master, student), taps.read

    def short(graph, leaves, names):
        if len(leaves[0]) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return read(graph, leaves, names)

    monkeypatch.setattr("paredown.train.distill.lesson.read", short)
    rows = fit(student, replace(TASK, validation=None), Training(**FAST), objective=lesson)
    assert len(rows) == 4
    assert any("out of memory at a batch of 16: going on with 8 at a time" in line for line in said)


@pytest.mark.parametrize(
    "how",
    [
        Teaching(alpha=0.0),
        Teaching(alpha=0.5, loss="decoupled"),
        Teaching(internal=("similarity", "attention_transfer", "hints")),
    ],
    ids=lambda how: "-".join((how.loss, *how.internal)),
)
@pytest.mark.parametrize("cached", [False, True])
def test_parts_of_a_batch_teach_as_the_whole(how, cached, master, student):
    labels = TASK.train.tensors[1].clone()
    labels[3:11] = -100  # of the first part of a batch more than of the second
    task = replace(TASK, train=TensorDataset(TASK.train.tensors[0], labels))
    lesson = prepare(master, student, task, how, related=False)
    inputs, target = next(splits.batches(task.train, 16))
    if cached:
        target = {TAUGHT: lesson.says(inputs), "target": target}
    found = []
    for chunk in (16, 6):
        for parameter in (*student.parameters(), *lesson.extra.values()):
            parameter.grad = None
        loss = parts.gradients(student, lesson, (inputs, target), chunk, torch.device("cpu"))
        every = (*student.parameters(), *lesson.extra.values())
        found.append((loss, [p.grad.clone() for p in every if p.grad is not None]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5) and len(found[0][1]) > 3
    for whole, added in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(added, whole, rtol=1e-3, atol=1e-5)


class Plain(Dataset):
    """Examples that are no TensorDataset; with ``noise`` other ones each time."""

    def __init__(self, noise: float = 0.0, vary: bool = False):
        self.noise, self.vary = noise, vary

    def __len__(self):
        return len(TASK.train)

    def __getitem__(self, index):
        x, y = TASK.train[index]
        return x + self.noise * torch.randn(()), y


def test_a_teacher_that_is_asked_once_teaches_the_same(master, student, tmp_path, said):
    task = replace(TASK, train=Plain())
    step = Distill(student=student, internal=("hints",), **{**FAST, "epochs": 2})
    (tmp_path / "scratch").mkdir()
    setting = Setting(scratch=tmp_path / "scratch")
    kept = replace(step, cache=True).apply(master, task, setting)
    asked = step.apply(master, task)
    for key, value in asked.state_dict().items():
        torch.testing.assert_close(kept.state_dict()[key], value, rtol=1e-3, atol=1e-4)
    size = sum(path.stat().st_size for path in (tmp_path / "scratch").glob("teacher-*.npy"))
    values = 96 * (3 + 8 * 144 + 16 * 36 + 16 * 9)
    assert 0 <= size - 4 * values < 1000
    assert any("of 96 examples is kept on disk: 720 KB" in line for line in said)


def test_what_cannot_be_kept_is_refused(student, monkeypatch):
    step = Distill(cache=True, **FAST)
    with pytest.raises(UserError, match="cache: the training data give another input each time"):
        step.apply(student, replace(TASK, train=Plain(noise=1.0)))
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"cache: .* takes 1\.15 KB, and the disk has 1 KB left"):
        step.apply(student, TASK)


# --- all together ----------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_distils_from_its_original_and_replays(master, tmp_path, monkeypatch):
    steps = [Quantize(), Distill(internal=("hints",), cache=True, **FAST)]
    seen = []
    spy = lambda teacher, *rest: seen.append(teacher) or prepare(teacher, *rest)  # noqa: E731
    monkeypatch.setattr("paredown.steps.training.distill.prepare", spy)
    run = compress(master, TASK, Goals(max_drop=0.5), steps=steps, out=tmp_path / "run")
    assert [trial.kept for trial in run.trials] == [True]
    assert 'name = "distill"' in run.artifact.recipe
    assert len(seen) == 1 and same(seen[0], master)
    artifact, digest = replay(tmp_path / "run", master, TASK)
    assert digest == artifact.sha256


def test_a_run_puts_a_student_in_its_place_and_knows_it_by_its_weights(here, master, tmp_path):
    torch.manual_seed(1)
    module, out = Images(3), tmp_path / "run"
    goals, step = Goals(size="0.4x"), Distill(student=module, **FAST)
    run = compress(master, TASK, goals, steps=[step], out=out)
    assert [trial.kept for trial in run.trials] == [True] and run.met, run.verdict
    assert run.artifact.size_bytes < 0.4 * run.original.size_bytes
    [file] = out.glob("student-*.safetensors")
    assert str(file) in run.artifact.recipe and run.details["layers"] == []
    assert "student's" in run.details["explanation"]["problem"]
    artifact, digest = replay(out, master, TASK)
    assert digest == artifact.sha256
    with torch.no_grad():
        module.head.bias += 1  # another student is no finished stage
    again = compress(master, TASK, goals, steps=[step], out=out)
    assert again.trials[0].stage != run.trials[0].stage
    assert len(list(out.glob("student-*.safetensors"))) == 2
    file.unlink()
    named = [replace(step, student=str(file))]
    with pytest.raises(UserError, match="no such file"):
        compress(master, TASK, goals, steps=named, out=out)


def test_a_students_file_that_reads_another_is_known_by_what_it_makes(master, tmp_path):
    small, width = tmp_path / "small.py", tmp_path / "width_of_small.py"
    small.write_text(
        "from tests.test_distill import Images\nfrom width_of_small import width\n\n\n"
        "def model():\n    return Images(width())\n"
    )
    width.write_text("def width():\n    return 3\n")
    step = Distill(student=str(small))
    first = step.contents(TASK)
    assert first == step.contents(TASK) and list(first) == [str(small)]
    sys.modules.pop("width_of_small")
    width.write_text("def width():\n    return 4  # others\n")
    assert step.contents(TASK) != first
    sys.modules.pop("width_of_small")


def test_a_student_that_the_task_names_is_planned_first(master):
    named = replace(TASK, student=Images(3))
    baseline = Measurement(40_000, 0.9, latency_ms_p50=1.0)
    first, *rest = plan(master, named, Goals(size="0.3x"), baseline)
    assert first.title == "The student, then int8" and "0.1" in first.reason
    assert [type(step) for step in first.steps] == [Distill, Quantize]
    assert rest == plan(master, TASK, Goals(size="0.3x"), baseline)
    assert preflight.problems(master, named, Target()) == []
    unfit = replace(TASK, student=nn.Linear(4, 2), train=None)
    told = preflight.problems(master, unfit, Target())
    assert "no train split to teach it with" in told[-1] and told[0].startswith("task: student:")


def case(name: str):
    return pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)


@pytest.mark.parametrize("name", [case(name) for name in ARCHITECTURES])
def test_every_architecture_learns_from_its_original(name):
    entry = ARCHITECTURES[name]
    model, example = captured(name)
    task = page.calibration_task(entry, example)
    task = replace(task, train=task.calibration)
    changed = model if name == "dcgan" else Quantize("int8").apply(model, task)
    step = Distill(
        epochs=1, batch_size=4, alpha=0, internal=("hints", "similarity"), lr=1e-5, device="cpu"
    )
    made = step.apply(
        changed, task, Setting(original=model)
    )  # which raises where a loss is not finite
    leaves = [item.example for item in model.inputs]
    with torch.no_grad():
        ours, theirs = (m.graph(*[leaf.clone() for leaf in leaves]) for m in (made, model))
    assert [t.shape for t in ours] == [t.shape for t in theirs]
    assert not same(made, changed)
