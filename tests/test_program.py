"""Exported programs made of a captured graph without tracing it: the same values, any size."""

import pytest
import torch
from torch import Tensor, nn

from paredown.core.task import Task
from paredown.graph.capture import capture
from paredown.graph.functional import Untraceable, make_functional
from paredown.graph.model import Model
from paredown.graph.program import Program, lowered, reexport
from paredown.steps.pruning.prune_channels import PruneChannels
from paredown.targets.runtimes import onnxruntime
from tests.architectures import make, with_batch
from tests.architectures.captured import captured

pytestmark = pytest.mark.filterwarnings("ignore")
aten = torch.ops.aten
# Convolutions and their norms, regions without gradients, sizes that vary, tied weights, in-place
# ops, recurrent layers, windows that are rolled.
SOME = ("resnet8", "mobilenet_v3", "convnext", "llama", "gpt2", "lstm")
MORE = [pytest.param(name, marks=pytest.mark.slow) for name in ("t5", "swin", "yolo")]


def model_of(name: str) -> tuple[Model, list[Tensor]]:
    """An architecture, and the tensors of three examples."""
    made, example = captured(name)
    model = made.eval()
    three = with_batch(example, 3)
    args, kwargs = ((), three) if isinstance(three, dict) else (three, {})
    return model, model.bind(args, kwargs)


def assert_same(program, model: Model, leaves: list[Tensor]) -> None:
    with torch.no_grad():
        expected = model.graph(*[leaf.clone() for leaf in leaves])
        got = program.module()(*[leaf.clone() for leaf in leaves])
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [*SOME, *MORE])
def test_same_values_before_and_after_decomposition(name):
    model, leaves = model_of(name)
    program = reexport(model)
    assert type(program) is Program
    assert_same(program, model, leaves)
    made = program.run_decompositions()
    table = torch.export.default_decompositions().materialize()
    left = {node.target for node in made.graph.nodes if node.target in table}
    assert left <= {aten.sym_size.int}
    assert_same(made, model, leaves)


@pytest.mark.parametrize("name", ["beit", "mixtral"])
def test_what_cannot_be_taken_as_it_stands_is_traced(name):
    model, leaves = model_of(name)
    program = reexport(model)
    assert type(program) is not Program
    assert_same(program, model, leaves)


def test_only_the_ops_of_the_table_change():
    model, leaves = model_of("gpt2")
    before = [node.target for node in reexport(model).graph.nodes]
    made = reexport(model).run_decompositions({aten.gelu.default: lambda x, **_: x.clone()})
    after = [node.target for node in made.graph.nodes]
    assert aten.layer_norm.default in before
    assert after.count(aten.layer_norm.default) == before.count(aten.layer_norm.default)


def test_the_model_stays_as_it_was():
    model, leaves = model_of("convnext")
    code, state = model.graph.code, {k: v.clone() for k, v in model.state_dict().items()}
    reexport(model).run_decompositions()
    assert model.graph.code == code
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_after_channels_are_cut():
    module, example = make("resnet8")
    model = capture(module, example).eval()
    task = Task(example=example, score=None)
    small = PruneChannels(ratio=0.5, reconstruct=False).apply(model, task)
    program = reexport(small)
    assert type(program) is Program
    assert_same(program, small, [with_batch(example, 3)[0]])


class SharesMemory(nn.Module):
    """Adds to a tensor of which a view was taken before."""

    def forward(self, x: Tensor) -> Tensor:
        doubled = x * 2
        first = doubled[:, :1]
        doubled.add_(1)
        return first + doubled


class AddsInPlace(nn.Module):
    """Adds to tensors that nobody else reads, and reads them later under both names."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        made = self.layer(x)
        again = made.add_(1).relu_()
        return made * again.mul_(3)


class ChangesItsInput(nn.Module):
    """Adds to its input."""

    def forward(self, x: Tensor) -> Tensor:
        x.add_(1)
        return x * 2


@pytest.mark.parametrize(
    ("module", "alone"),
    [(SharesMemory(), False), (AddsInPlace(), True), (ChangesItsInput(), False)],
)
def test_ops_in_place(module, alone, tmp_path):
    example = torch.randn(2, 4)
    expected = module(example.clone())
    model = capture(module, (example.clone(),)).eval()
    program = reexport(model)
    assert (type(program) is Program) is alone
    got = program.module()(example.clone())
    torch.testing.assert_close(got[0], expected)
    path = onnxruntime.lower(model, tmp_path / "x.onnx")
    torch.testing.assert_close(
        torch.from_numpy(onnxruntime.open(path)(example.numpy())[0]), expected
    )


def test_a_changed_input_is_not_made_functional():
    model = capture(ChangesItsInput(), (torch.randn(2, 4),)).eval()
    with pytest.raises(Untraceable):
        make_functional(model.copy().graph)


def test_where_lowering_fails_it_is_given_a_traced_program():
    model, _ = model_of("resnet8")
    seen = []

    def lower(program):
        seen.append(type(program))
        if type(program) is Program:
            raise RuntimeError("an op that I do not know")
        return "file"

    assert lowered(model, lower) == "file"
    assert seen[0] is Program and len(seen) == 2
    with pytest.raises(ZeroDivisionError):
        lowered(model, lambda program: 1 / 0)
