"""Capture and storage: what comes in is what runs, and a hostile file runs nothing."""

import json
import re
import subprocess
import sys
from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from paredown.core.errors import UserError
from paredown.graph import store
from paredown.graph.capture import capture
from paredown.graph.doors.module import ONLY_EVALUATION
from paredown.graph.model import Model
from paredown.graph.structure import Outputs
from tests.architectures.blocks import Attention, DropPath

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore")


def run(model: Model) -> list[Tensor]:
    with torch.no_grad():
        return list(model.graph(*[item.example.clone() for item in model.inputs]))


def reload(model: Model, folder: Path) -> Model:
    """Through a file; it is the same bytes again and gives the same outputs to the bit."""
    model.save(folder / "model.safetensors")
    loaded = Model.load(folder / "model.safetensors")
    assert store.encode(loaded) == (folder / "model.safetensors").read_bytes()
    for ours, theirs in zip(run(model), run(loaded), strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    return loaded


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()


# --- inputs ----------------------------------------------------------------------------------


class Mixed(nn.Module):
    """A list of tensors, a dict, a flag and a number, some of them keywords."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, pair, extra, flag=True, scale=2.0):
        x = self.fc(pair[0] + pair[1]) * scale
        return x + extra["bias"] if flag else x


def mixed_inputs(batch: int) -> dict:
    pair = [torch.randn(batch, 4), torch.randn(batch, 4)]
    return {"pair": pair, "extra": {"bias": torch.randn(batch, 3)}}


@pytest.mark.parametrize("more", [{}, {"flag": False}, {"scale": -1.0, "flag": True}])
def test_keyword_inputs_of_mixed_structure(more, tmp_path):
    module = Mixed().eval()
    model = capture(module, mixed_inputs(2) | more)
    assert [item.name for item in model.inputs] == ["pair.0", "pair.1", "extra.bias"]
    for made in (model, reload(model, tmp_path)):
        new = mixed_inputs(5) | more
        torch.testing.assert_close(made(**new), module(**new))


def test_positional_inputs_of_mixed_structure():
    module = Mixed().eval()
    new = mixed_inputs(3)
    model = capture(module, (*mixed_inputs(2).values(), True, 0.5))
    expected = module(*new.values(), True, 0.5)
    torch.testing.assert_close(model(*new.values(), True, 0.5), expected)
    with pytest.raises(UserError, match=r"captured with \(pair.0, pair.1, extra.bias\)"):
        model(*new.values(), False, 0.5)  # another constant is another model


def test_keywords_may_come_in_any_order():
    module = Mixed().eval()
    inputs = mixed_inputs(2)
    model = capture(module, inputs)
    turned = dict(reversed(inputs.items()))
    torch.testing.assert_close(model(**turned), module(**inputs))


def test_a_call_with_other_inputs_is_refused():
    model = capture(small(), (torch.randn(2, 4),))
    for call, message in (
        (lambda: model(), r"this call has \(nothing\)"),
        (lambda: model(torch.zeros(2, 4), torch.zeros(2, 4)), r"captured with \(input\)"),
        (lambda: model(torch.zeros(2, 5)), r"expected shape \(\?, 4\), got \(2, 5\) \(\? varies\)"),
        (lambda: model(torch.zeros(2, 1, 4)), r"got \(2, 1, 4\)"),
    ):
        with pytest.raises(UserError, match=message):
            call()


class Sequence(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, tokens, mask):
        return (self.fc(tokens) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def test_dimensions_vary_by_name(tmp_path):
    module = Sequence().eval()
    example = (torch.randn(1, 6, 4), torch.ones(1, 6))
    model = capture(module, example, ({1: "length"}, {1: "length"}))
    assert [item.dynamic for item in model.inputs] == [{0: "batch", 1: "length"}] * 2
    assert model.inputs[0].example.shape == (1, 6, 4)  # as deployed, though captured wider
    for made in (model, reload(model, tmp_path)):
        for batch, length in ((1, 3), (4, 9)):
            new = torch.randn(batch, length, 4), torch.ones(batch, length)
            torch.testing.assert_close(made(*new), module(*new))
    fixed = capture(module, example)
    assert fixed.inputs[0].dynamic == {0: "batch"}
    with pytest.raises(UserError, match=r"expected shape \(\?, 6, 4\), got \(1, 3, 4\)"):
        fixed(torch.randn(1, 3, 4), torch.ones(1, 3))


def test_dimensions_vary_by_keyword():
    example = {"tokens": torch.randn(2, 6, 4), "mask": torch.ones(2, 6)}
    dynamic = {"tokens": {1: "length"}, "mask": {1: "length"}}
    model = capture(Sequence().eval(), example, dynamic)
    assert model.inputs[1].dynamic == {0: "batch", 1: "length"}


class Fixed(nn.Module):
    def forward(self, x):
        return x.reshape(2, -1) if x.shape[0] == 2 else x.reshape(x.shape[0] * 3, -1)


def test_a_dimension_that_cannot_vary_is_noted_and_kept(tmp_path):
    model = capture(Fixed(), (torch.randn(2, 6),))
    assert any("dimension 0 (batch) of input 'x' became fixed at 2" in n for n in model.notes)
    assert reload(model, tmp_path).notes == model.notes
    with pytest.raises(UserError, match="its dimensions were captured as fixed"):
        model(torch.randn(4, 6))


def test_a_dynamic_dimension_that_is_not_there():
    with pytest.raises(UserError, match=r"dynamic: dimension 5 is not one of \(2, 4\)"):
        capture(small(), (torch.randn(2, 4),), ({5: "length"},))


# --- outputs ---------------------------------------------------------------------------------

Pair = namedtuple("Pair", ["first", "second"])


@dataclass
class Answer:
    logits: Tensor
    hidden: tuple
    note: str = "fine"


class Named(OrderedDict):
    """As a transformers ModelOutput: a mapping with attributes that leaves out what is None."""

    def __getattr__(self, name):
        if name not in self:
            raise AttributeError(name)
        return self[name]


OUTPUTS = {
    "tuple": lambda a, b: (a, (b, None, 3)),
    "list": lambda a, b: [a, [b]],
    "dict": lambda a, b: {"logits": a, "aux": {"x": b, "loss": None}},
    "named tuple": lambda a, b: Pair(a, b),
    "dataclass": lambda a, b: Answer(a, (b, a)),
    "model output": lambda a, b: Named(logits=a, hidden=b),
}


class Output(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.fc, self.kind = nn.Linear(4, 3), kind

    def forward(self, x):
        y = self.fc(x)
        return OUTPUTS[self.kind](y, y.sum(1))


@pytest.mark.parametrize("kind", OUTPUTS)
def test_outputs_keep_their_structure(kind, tmp_path):
    module = Output(kind).eval()
    model = capture(module, (torch.randn(2, 4),))
    new = torch.randn(3, 4)
    for made in (model, reload(model, tmp_path)):
        ours, theirs = made(new), module(new)
        assert type(ours) is type(theirs)
        assert str(ours).replace("\n", "") == str(theirs).replace("\n", "")


def test_outputs_of_a_class_that_is_not_imported(tmp_path):
    capture(Output("dataclass").eval(), (torch.randn(2, 4),)).save(tmp_path / "m.safetensors")
    data = edited((tmp_path / "m.safetensors").read_bytes(), lambda h: rename_output(h, "nowhere"))
    out = Model.decode(data, "m")(torch.randn(2, 4))
    assert type(out) is Outputs and out.logits is out["logits"] and out.note == "fine"
    with pytest.raises(AttributeError, match="missing"):
        out.missing  # noqa: B018


def rename_output(header, module):
    header["outputs"]["object"] = f"{module}:Answer"


class Opaque(nn.Module):
    def forward(self, x):
        return {"y": x * 2, "config": object()}


def test_what_is_no_tensor_is_left_out_and_noted():
    model = capture(Opaque(), (torch.randn(2, 4),))
    assert "output 'config' is a object, not a tensor, and is left out" in model.notes
    assert model(torch.ones(2, 4))["config"] is None


# --- files -----------------------------------------------------------------------------------

USER_FILE = """
import torch
from helper import WIDTH
from paredown import Task

def model():
    torch.manual_seed(1)
    return torch.nn.Linear(WIDTH, 2)

def task():
    data = torch.utils.data.TensorDataset(torch.randn(8, WIDTH), torch.zeros(8))
    return Task(example=(torch.randn(1, 5, WIDTH),), dynamic=({1: "length"},),
                score=lambda out, y: -out.sum((1, 2)), validation=data)
"""


def test_a_python_file(tmp_path, monkeypatch):
    (tmp_path / "helper.py").write_text("WIDTH = 4\n")
    (tmp_path / "mine.py").write_text(USER_FILE)
    monkeypatch.delitem(sys.modules, "helper", raising=False)
    before = list(sys.path)
    for path in (tmp_path / "mine.py", str(tmp_path / "mine.py")):
        model = capture(path)
        assert sys.path == before
        assert model.inputs[0].dynamic == {0: "batch", 1: "length"}
        torch.manual_seed(1)
        torch.testing.assert_close(model.state_dict()["weight"], nn.Linear(4, 2).weight.detach())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", r"bad\.py: defines no function model\(\); it needs model\(\) and task\(\)"),
        ("def model(): pass", r"bad\.py: defines no function task\(\)"),
        ("model = task = 3", r"defines no function model\(\)"),
        ("def f(:", r"bad\.py: SyntaxError"),
        ("import torch\n1 / 0\n", r"bad\.py: bad\.py:2 `1 / 0`: ZeroDivisionError: division by"),
        (
            "def model():\n    return [][1]\ndef task():\n    from paredown import Task\n"
            "    import torch\n    return Task(example=(torch.zeros(1),), score=None)",
            r"bad\.py: model\(\) failed: bad\.py:2 `return \[\]\[1\]`: IndexError: list index",
        ),
        ("def model(): pass\ndef task():\n    1 / 0", r"task\(\) failed: bad\.py:3 `1 / 0`: Zero"),
    ],
)
def test_a_python_file_with_a_mistake(text, message, tmp_path):
    (tmp_path / "bad.py").write_text(text)
    with pytest.raises(UserError, match=message):
        capture(tmp_path / "bad.py")


@pytest.mark.parametrize("name", ["gone.py", "gone.pt2", "gone.safetensors", "gone.bin"])
def test_a_missing_file(name, tmp_path):
    with pytest.raises(UserError, match=rf"{name}: no such file"):
        capture(tmp_path / name)


def test_a_file_of_another_kind(tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"1234")
    with pytest.raises(UserError, match=r"weights\.bin: .*expected a Python file"):
        capture(tmp_path / "weights.bin")
    (tmp_path / "broken.pt2").write_bytes(b"1234")
    with pytest.raises(UserError, match=r"broken\.pt2: not a readable \.pt2 program"):
        capture(tmp_path / "broken.pt2")
    with pytest.raises(UserError, match="not a paredown model, or a damaged one"):
        (tmp_path / "broken.safetensors").write_bytes(b"1234")
        capture(tmp_path / "broken.safetensors")
    with pytest.raises(UserError, match="no such file"):
        Model.load(tmp_path)  # a folder


def test_a_pt2_file(tmp_path):
    module = Sequence().eval()
    example = (torch.randn(2, 6, 4), torch.ones(2, 6))
    dims = {0: torch.export.Dim("b", min=1), 1: torch.export.Dim("n", min=2)}
    program = torch.export.export(module, example, dynamic_shapes=(dims, dims))
    torch.export.save(program, tmp_path / "model.pt2")
    model = capture(tmp_path / "model.pt2")
    assert any(note.startswith("model.pt2 was exported already") for note in model.notes)
    assert [sorted(item.dynamic) for item in model.inputs] == [[0, 1], [0, 1]]
    assert set(model.state_dict()) == set(module.state_dict())
    new = torch.randn(3, 9, 4), torch.ones(3, 9)
    torch.testing.assert_close(reload(model, tmp_path)(*new), module(*new))


# --- state -----------------------------------------------------------------------------------


class Tied(nn.Module):
    """Two ties, a buffer that is not saved, a counter, and a parameter that no op reads."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.head = nn.Linear(4, 9, bias=False)
        self.head.weight = self.embedding.weight
        self.unused = nn.Parameter(torch.ones(3))
        self.register_buffer("table", torch.randn(4), persistent=False)
        self.register_buffer("steps", torch.tensor(3))

    def forward(self, ids):
        return self.head(self.second(self.first(self.embedding(ids)).relu()) + self.table)


def test_ties_buffers_and_unused_weights_survive(tmp_path):
    module = Tied().eval()
    model = capture(module, (torch.randint(9, (2, 5)),))
    for made in (model, reload(model, tmp_path), model.copy()):
        assert list(made.state_dict()) and set(made.state_dict()) == set(module.state_dict())
        graph = made.graph
        assert graph.head.weight is graph.embedding.weight
        assert graph.second.weight is graph.first.weight
        assert isinstance(graph.unused, nn.Parameter) and not isinstance(graph.table, nn.Parameter)
        count = sum(p.numel() for p in module.parameters())
        assert sum(p.numel() for p in made.parameters()) == count
        made.train()
        made(torch.randint(9, (2, 5))).sum().backward()
        assert graph.head.weight.grad is graph.embedding.weight.grad is not None
        made.eval()
        made.graph.zero_grad()


def test_capture_leaves_the_module_as_it_was():
    module = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)).train()
    before = {name: t.clone() for name, t in module.state_dict().items()}
    model = capture(module, (torch.randn(4, 4),))
    assert module.training and module[2].training
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert all(torch.equal(before[name], t) for name, t in module.state_dict().items())
    model.load_state_dict(before)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


# --- training and evaluation -----------------------------------------------------------------


class FlooredDropPath(nn.Module):
    """Drop-path as older libraries write it: floor(keep + rand)."""

    def forward(self, x):
        if not self.training:
            return x
        keep = 0.7
        mask = (keep + torch.rand((x.shape[0],) + (1,) * (x.ndim - 1), dtype=x.dtype)).floor_()
        return x.div(keep) * mask


class ComparedDropPath(nn.Module):
    """Drop-path by comparison, which cannot be switched off in a graph."""

    def forward(self, x):
        if not self.training:
            return x
        return x * (torch.rand(x.shape[0], 1, 1) < 0.7) / 0.7


RANDOM = {
    "dropout": lambda: nn.Dropout(0.3),
    "in-place dropout": lambda: nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.3, inplace=True)),
    "feature dropout": lambda: nn.Dropout1d(0.5),
    "alpha dropout": lambda: nn.AlphaDropout(0.3),
    "bernoulli drop-path": lambda: DropPath(0.5),
    "floored drop-path": FlooredDropPath,
    "attention dropout": lambda: Attention(8, 2, 0.5),
    "randomised relu": lambda: nn.RReLU(),
    "recurrent dropout": lambda: Recurrent(),
}


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(8, 8, 2, batch_first=True, dropout=0.5)

    def forward(self, x):
        return self.lstm(x)[0]


@pytest.mark.parametrize("kind", RANDOM)
def test_training_is_random_and_evaluation_is_eager(kind, tmp_path):
    torch.manual_seed(0)
    module = nn.Sequential(RANDOM[kind](), nn.Linear(8, 3)).eval()
    x = torch.randn(6, 5, 8)
    model = capture(module, (x,))
    assert ONLY_EVALUATION not in model.notes
    for made in (model, reload(model, tmp_path), model.copy(), reload(model, tmp_path).copy()):
        made.train()
        drawn = [made(x) for _ in range(4)]
        assert any(not torch.equal(drawn[0], other) for other in drawn[1:]), "nothing was random"
        module.train()
        torch.manual_seed(7)
        theirs = module(x)
        torch.manual_seed(7)
        torch.testing.assert_close(made(x), theirs)  # the same draws as the module's
        module.eval()
        made.eval()
        assert torch.equal(made(x), made(x))
        torch.testing.assert_close(made(x), module(x))


def test_what_cannot_be_switched_is_captured_in_evaluation_and_said():
    module = nn.Sequential(ComparedDropPath(), nn.Linear(8, 3)).eval()
    x = torch.randn(6, 5, 8)
    model = capture(module, (x,))
    assert ONLY_EVALUATION in model.notes
    torch.testing.assert_close(model(x), module(x))
    assert torch.equal(model.train()(x), module(x))


class Norms(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.instance = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)

    def forward(self, x):
        return self.instance(self.norm(self.conv(x)))


def test_statistics_move_in_training_only(tmp_path):
    torch.manual_seed(0)
    module = Norms()
    x = torch.randn(4, 3, 8, 8)
    model = capture(module, (x,))
    for made in (model, reload(model, tmp_path)):
        before = {name: t.clone() for name, t in made.state_dict().items()}
        made.eval()(x)
        assert all(torch.equal(before[name], t) for name, t in made.state_dict().items())
        made.train()(x)
        theirs = Norms()
        theirs.load_state_dict(before)
        torch.testing.assert_close(theirs.train()(x), made.copy()(x), atol=1e-4, rtol=1e-4)
        for name, tensor in theirs.state_dict().items():
            torch.testing.assert_close(made.state_dict()[name], tensor, msg=name)
            moves = "running" in name or name == "norm.num_batches_tracked"  # torch's own choice
            assert torch.equal(before[name], tensor) != moves, name
        made.eval()


@pytest.mark.parametrize("count", [1, 2])
def test_a_norm_that_averages_over_all_batches_leaves_the_rest_its_training(count, tmp_path):
    torch.manual_seed(0)
    norms = [nn.BatchNorm1d(4, momentum=None) for _ in range(count)]
    module = nn.Sequential(nn.Linear(4, 4), *norms, nn.Dropout(0.5), nn.BatchNorm1d(4)).eval()
    model = capture(module, (torch.randn(4, 4),))
    assert len(model.notes) == 1 and "momentum=None: in training" in model.notes[0]
    assert module[1].momentum is None
    x = torch.randn(8, 4)
    torch.testing.assert_close(model(x), module(x))
    for made in (model, reload(model, tmp_path)):
        made.train()
        module.train()
        torch.manual_seed(1)
        ours = made(x)
        torch.manual_seed(1)
        torch.testing.assert_close(ours, module(x))
        moved = made.state_dict()["1.running_mean"]
        torch.testing.assert_close(moved, 0.1 * module[0](x).mean(0).detach())


class CountedTwice(nn.Module):
    """One norm that runs twice, and so counts two batches a call."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x):
        return self.norm(self.norm(x) + 1)


def test_a_norm_that_runs_twice_counts_in_training_only():
    model = capture(CountedTwice().eval(), (torch.randn(4, 4),))
    before = store.encode(model)
    model(torch.randn(4, 4))
    assert store.encode(model) == before
    model.train()(torch.randn(4, 4))
    assert int(model.state_dict()["norm.num_batches_tracked"]) == 2


def test_switching_back_and_forth_changes_nothing():
    model = capture(nn.Sequential(Attention(8, 2, 0.5), DropPath(0.3)), (torch.randn(2, 5, 8),))
    once = store.encode(model)
    code = model.graph.code
    assert model.train().graph.code != code
    assert model.train().eval().eval().graph.code == code
    assert store.encode(model) == once


# --- what cannot be captured -----------------------------------------------------------------


class Branch(nn.Module):
    def forward(self, x):
        if x.sum() > 0:
            return x * 2
        return x


class Item(nn.Module):
    def forward(self, x):
        return x.repeat(1, int(x.abs().sum().item()) + 1)


class Numpy(nn.Module):
    def forward(self, x):
        return torch.from_numpy(x.detach().numpy() * 2)


class Random(nn.Module):
    def forward(self, x):
        return x + torch.rand(4)


class Raises(nn.Module):
    def forward(self, x):
        raise RuntimeError("out of cheese\nand more lines")


class Nothing(nn.Module):
    def forward(self, x):
        return None


class Conditional(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return torch.cond(x.sum() > 0, self.one, self.two, (x,))


class Loop(nn.Module):
    def forward(self, x):
        from torch._higher_order_ops.while_loop import while_loop

        count = torch.zeros((), dtype=torch.long)
        return while_loop(lambda n, h: n < 3, lambda n, h: (n + 1, h * 2), (count, x))[1]


class QuietConditional(Conditional):
    def forward(self, x):
        with torch.no_grad():
            return super().forward(x)


@pytest.mark.parametrize("kind", [Conditional, Loop, QuietConditional])
def test_what_computes_in_graphs_of_its_own_is_refused(kind):
    with pytest.raises(
        UserError, match=r"(cond|while_loop) computes in graphs of its own"
    ) as caught:
        capture(kind(), (torch.ones(2, 4),))
    assert f"{Path(__file__).name}:" in str(caught.value) and "torch.where" in str(caught.value)


def line_of(text: str) -> int:
    lines = Path(__file__).read_text().splitlines()
    return 1 + next(n for n, line in enumerate(lines) if line.strip().startswith(text))


@pytest.mark.parametrize(
    ("kind", "line", "reason", "hint"),
    [
        (Branch, "if x.sum() > 0", "data-dependent", "by torch.where"),
        (Item, "return x.repeat(1, int(", "data-dependent", "instead of .item() or .tolist()"),
        (Numpy, "return torch.from_numpy(", "numpy", ""),
        (Raises, "raise RuntimeError(", "RuntimeError: out of cheese", "in eager mode"),
        (Random, "", "differs from one call to the next on the same input", "depend on its inputs"),
        (Nothing, "", "its output holds no tensor", ""),
    ],
)
def test_the_message_names_line_reason_and_hint(kind, line, reason, hint, capfd):
    with pytest.raises(UserError) as caught:
        capture(kind(), (torch.ones(2, 4),))
    text = str(caught.value)
    assert text.startswith("model: ") and "\n" not in text and "Traceback" not in text
    assert reason in text and hint in text
    if line:
        assert f"{Path(__file__).name}:{line_of(line)} `{line}" in text
    noise = capfd.readouterr()
    assert len(noise.out + noise.err) < 300, "pages of torch's graph beside the message"


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ((torch.zeros(2, 5),), r"cannot be multiplied .* has the shapes|have the shapes the model"),
        ((torch.zeros(2, 4), torch.zeros(2)), r"example: does not fit Sequential\.forward\(\)"),
        ({"x": torch.zeros(2, 4)}, r"does not fit .* missing a required argument: 'input'"),
        ((), "example: "),
        (("text",), "example: holds no tensor"),
        ((torch.zeros(2, 4, dtype=torch.long),), "same dtype, but got"),
        (None, "needs the inputs as deployed"),
        (5, "example: "),
    ],
)
def test_a_wrong_example(example, message):
    with pytest.raises(UserError, match=message):
        capture(small(), example)


@pytest.mark.parametrize(
    "dynamic",
    [({1: "length"}, {1: "length"}), {"tokens": {1: "length"}, "masc": {1: "length"}}, 3],
)
def test_dynamic_that_does_not_fit_the_example(dynamic):
    example = {"tokens": torch.randn(2, 6, 4), "mask": torch.ones(2, 6)}
    with pytest.raises(UserError, match="dynamic: "):
        capture(Sequence().eval(), example, dynamic)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "build",
    [lambda: nn.LazyLinear(2), lambda: torch.jit.trace(nn.Linear(4, 2), torch.zeros(2, 4))],
    ids=["lazy", "scripted"],
)
def test_modules_that_torch_export_does_not_take(build):
    with pytest.raises(UserError):
        capture(build(), (torch.zeros(2, 4),))


def test_weights_that_are_not_numbers():
    module = small()
    with torch.no_grad():
        module[0].weight[0, :2] = torch.tensor([float("nan"), float("inf")])
    with pytest.raises(UserError, match=r"0\.weight: 2 of 32 weights are NaN or infinite"):
        capture(module, (torch.zeros(2, 4),))
    norm = nn.BatchNorm1d(4)
    norm.running_var[1] = float("nan")
    with pytest.raises(UserError, match="running_var: 1 of 4"):
        capture(norm, (torch.zeros(2, 4),))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_another_precision_are_refused_before_anything_is_written(dtype, tmp_path):
    module, example = small().to(dtype), (torch.zeros(2, 4, dtype=dtype),)
    program = torch.export.export(module, example)
    torch.export.save(program, tmp_path / "m.pt2")
    for call in (lambda: capture(module, example), lambda: capture(tmp_path / "m.pt2")):
        with pytest.raises(UserError, match=rf"0\.weight: is {dtype}; .* call \.float\(\) on"):
            call()
    module[0].float()
    with pytest.raises(UserError, match=rf"2\.weight: is {dtype}"):  # one layer alone
        capture(module, example)
    model = capture(module.float(), (example[0].float(),))
    assert model(torch.zeros(2, 4)).dtype is torch.float32


class Floats(nn.Module):
    def forward(self, x):
        return x.float() * 2


def test_an_input_that_no_array_can_be():
    with pytest.raises(UserError, match=r"input 'x' is torch\.bfloat16"):
        capture(Floats(), (torch.zeros(2, 4, dtype=torch.bfloat16),))
    assert capture(Floats(), (torch.zeros(2, 4, dtype=torch.float64),)).notes == ()


def test_the_meta_device():
    with torch.device("meta"):
        module = nn.Linear(4, 2)
    with pytest.raises(UserError, match="weight: is on the meta device; load the weights"):
        capture(module, (torch.zeros(2, 4),))


@pytest.mark.parametrize("thing", [None, 3, nn.Linear, torch.zeros(2)])
def test_what_is_no_module(thing):
    with pytest.raises(UserError, match=r"model: expected an nn\.Module, got"):
        capture(thing, (torch.zeros(2, 4),))


def test_a_captured_model_is_captured_already():
    model = capture(small(), (torch.zeros(2, 4),))
    assert capture(model, None) is model


# --- hostile files ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored() -> bytes:
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    return store.encode(capture(module, (torch.zeros(2, 4),)))


def edited(data: bytes, change, outer: bool = False) -> bytes:
    """The file with its header changed in place by ``change``, lengths put right."""
    size = int.from_bytes(data[:8], "little")
    raw = json.loads(data[8 : 8 + size])
    header = json.loads(raw["__metadata__"]["paredown"])
    change(raw if outer else header)
    if not outer:
        raw["__metadata__"]["paredown"] = json.dumps(header)
    text = json.dumps(raw).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def node(header, op):
    return next(row for row in header["graph"]["nodes"] if row["op"] == op)


def test_an_edit_that_changes_nothing_is_read(stored):
    assert store.encode(Model.decode(edited(stored, lambda header: None), "x")) == stored


@pytest.mark.parametrize(
    "target",
    [
        *("os::system:", "os::system", "builtins.eval", "builtins::eval:", "_operator.call"),
        *("operator.attrgetter", "posix.system", "aten::add.__class__:", "aten::__dict__:"),
        *("aten::no_such_op:", "aten::linear.no_such_overload:", "higher_order:cond", "", "aten::"),
        *("aten::from_file:", "aten::save:", "quantized::linear:", "torch._C._jit_eval", 5, None),
    ],
)
def test_an_op_that_is_not_atens_is_refused(stored, target):
    data = edited(stored, lambda header: node(header, "call_function").update(target=target))
    with pytest.raises(UserError, match="x: not a paredown model, or a damaged one"):
        Model.decode(data, "x")


def hostile(path: Path) -> dict:
    """Ways to make Python run ``code``: name -> the change of a header."""
    code = f"__import__('pathlib').Path({str(path)!r}).touch()"
    dotless = f"getattr(getattr(__import__('pathlib'), 'Path')({str(path)!r}), 'touch')()"
    name = f'a") or {dotless} or getattr(self, "0'

    def read(header):
        node(header, "get_attr")["target"] = name

    def tie(header):
        header["ties"] = {name: "0.bias"}
        node(header, "get_attr")["target"] = name

    def method(header):
        row = node(header, "call_function")
        row |= {"op": "call_method", "target": "__reduce_ex__"}

    def keyword(header):
        key = f"bias=None) if {code} else (lambda **k: None)(a"
        node(header, "call_function")["kwargs"] = {"dict": {key: 1}}

    def training(header):
        row = next(row for row in header["graph"]["nodes"] if "training" in row)
        row["training"] = [["target", "os::system"]]

    def training_keyword(header):
        row = next(row for row in header["graph"]["nodes"] if "training" in row)
        row["training"] = [[f"train) if {code} else (x", True]]

    def popen(header):
        fields = {"args": {"const": ["touch", str(path)]}, "stdin": "*"}
        header["outputs"] = {"object": "subprocess:Popen", "fields": fields}

    return {
        "placeholder": lambda h: node(h, "placeholder").update(target=f"x={code}"),
        "output": lambda h: node(h, "output").update(target=f"output={code}"),
        "name": lambda h: node(h, "call_function").update(name=f"x={code}"),
        "get_attr": read,
        "get_attr of the module": lambda h: node(h, "get_attr").update(target="forward.__func__"),
        "tie": tie,
        "call_method": method,
        "call_module": lambda h: node(h, "call_function").update(op="call_module", target="0"),
        "keyword": keyword,
        "training": training,
        "training keyword": training_keyword,
        "output class": popen,
    }


@pytest.mark.parametrize("kind", hostile(Path("x")))
def test_nothing_in_a_file_is_executed(stored, kind, tmp_path):
    made = tmp_path / "executed"
    assert subprocess.Popen  # imported: its name could be found
    try:
        model = Model.decode(edited(stored, hostile(made)[kind]), "x")
        out = model(torch.zeros(2, 4))
        model.train()(torch.zeros(2, 4))
    except UserError:
        out = None
    assert not isinstance(out, subprocess.Popen)
    assert not made.exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h.update(format=99),
        lambda h: h.pop("graph"),
        lambda h: h.update(graph=[]),
        lambda h: h["graph"].update(nodes=[]),
        lambda h: h["graph"]["nodes"].pop(),
        lambda h: h["graph"]["nodes"].append(h["graph"]["nodes"][-1]),
        lambda h: h["graph"]["nodes"].reverse(),
        lambda h: h["graph"]["nodes"].insert(1, h["graph"]["nodes"][0]),
        lambda h: node(h, "call_function").update(args=[]),
        lambda h: node(h, "call_function").update(args={"tuple": [{"node": "nobody"}]}),
        lambda h: node(h, "call_function").update(args={"tuple": [{"dtype": "torch.nope"}]}),
        lambda h: node(h, "call_function").update(args={"tuple": [{"float": "much"}]}),
        lambda h: node(h, "call_function").update(args={"two": 1, "keys": 2}),
        lambda h: h.update(inputs=[]),
        lambda h: h["inputs"][0].update(name=5),
        lambda h: h["inputs"][0].update(dynamic={"9": "batch"}),
        lambda h: h["inputs"][0].update(dynamic={"zero": "batch"}),
        lambda h: h["inputs"].append(h["inputs"][0]),
        lambda h: h.update(outputs={"tuple": ["*", "*"]}),
        lambda h: h.update(outputs=7),
        lambda h: h.update(outputs={"object": 3, "fields": {"a": "*"}}),
        lambda h: h.update(arguments="*"),
        lambda h: h.update(notes=7),
        lambda h: h.update(notes=[7]),
        lambda h: h.update(ties={"a": "nobody"}),
        lambda h: h.update(ties={"forward": "0.bias"}),
        lambda h: h.update(ties={"0.bias.x": "0.weight"}),
        lambda h: h.update(ties={"__class__.x": "0.weight"}),
        lambda h: h.update(parameters=3),
        lambda h: h.pop("transient"),
    ],
)
def test_a_header_whose_parts_do_not_fit_is_refused(stored, change):
    with pytest.raises(UserError, match="x: not a paredown model, or a damaged one"):
        Model.decode(edited(stored, change), "x")


def test_a_header_without_a_graph(stored):
    data = edited(stored, lambda raw: raw.pop("__metadata__"), outer=True)
    with pytest.raises(UserError, match="no graph in its header"):
        Model.decode(data, "x")


def test_a_name_that_stands_twice(stored):
    size = int.from_bytes(stored[:8], "little")
    text = stored[8 : 8 + size]
    entry = re.search(rb'"state:0\.bias":\{[^}]*\}', text)[0]
    text = text.replace(entry, entry + b"," + entry)
    data = len(text).to_bytes(8, "little") + text + stored[8 + size :]
    with pytest.raises(UserError, match="a name stands twice in its header"):
        Model.decode(data, "x")


def test_weights_that_are_not_numbers_are_refused_on_the_way_in(stored):
    model = Model.decode(stored, "x")
    with torch.no_grad():
        model.graph.state_dict()["0.bias"][0] = float("nan")
    with pytest.raises(UserError, match=r"0\.bias holds NaN"):
        Model.decode(store.encode(model), "x")


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 200, -200, -1])
def test_a_truncated_file(stored, keep):
    with pytest.raises(UserError, match="not a paredown model, or a damaged one"):
        Model.decode(stored[:keep], "x")


@pytest.mark.parametrize(
    "data",
    [
        b"PK\x03\x04" * 50,
        b"\x80\x04\x95cposix\nsystem\n(S'true'\ntR.",
        b"\xff" * 64,
        (1 << 62).to_bytes(8, "little") + b"{}",
        (100_000_000).to_bytes(8, "little") + b"{}" + b" " * 1000,
        (100_000).to_bytes(8, "little") + b"[" * 100_000,
        (2).to_bytes(8, "little") + b"{}",
        (4).to_bytes(8, "little") + b"null",
    ],
)
def test_what_is_no_model_file(data):
    with pytest.raises(UserError, match="x: not a paredown model, or a damaged one"):
        Model.decode(data, "x")


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_mutated_files_never_raise_anything_else(stored, data):
    size = 8 + int.from_bytes(stored[:8], "little")
    raw = bytearray(stored)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, min(len(raw), size + 64) - 1))
        raw[place] = data.draw(st.sampled_from(b'0123456789"{}[],:.xa_\\\x00\xff'))
    if data.draw(st.booleans()):
        start = data.draw(st.integers(0, size))
        length = data.draw(st.integers(0, 30))
        raw[start : start + length] = data.draw(st.binary(max_size=30))
    try:
        model = Model.decode(bytes(raw), "x")
    except UserError as error:
        assert str(error).startswith("x: ")
    else:
        assert isinstance(model, Model)


def leaves(value, path=()):
    """The paths of everything inside a JSON value."""
    yield path
    if isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(item, (*path, key))


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_headers_with_other_values_never_raise_anything_else(stored, data):
    def change(header):
        for _ in range(data.draw(st.integers(1, 3))):
            path = data.draw(st.sampled_from([p for p in leaves(header) if p]))
            owner = header
            for key in path[:-1]:
                owner = owner[key]
            values = [None, True, -1, 0, 10**30, "", "*", "x", [], {}, ["a"], {"node": "linear"}]
            owner[path[-1]] = data.draw(st.sampled_from(values))

    try:
        model = Model.decode(edited(stored, change), "x")
    except UserError as error:
        assert str(error).startswith("x: ")
    else:
        assert isinstance(model, Model)
