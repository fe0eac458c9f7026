"""Running a graph a node at a time: one interpreter for all that look inside."""

import re
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

import paredown
from paredown.graph.interpret import Pass, noting

PACKAGE = Path(paredown.__file__).parent


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        x = x.mul_(2)  # written into, so that the caller's tensor must not be this one
        return self.layer(x).relu() + 1


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return paredown.capture(Net(), (torch.randn(1, 3),)).eval()


def test_there_is_one_interpreter():
    """What looks inside a graph gives `Pass` a rule, and none has a way of its own to run it."""
    found = [
        str(path.relative_to(PACKAGE))
        for path in sorted(PACKAGE.rglob("*.py"))
        if re.search(r"\(fx\.Interpreter\)|\((torch\.fx\.)?Interpreter\):", path.read_text())
    ]
    assert found == ["graph/interpret.py"]


def test_outputs_are_the_graphs_and_the_inputs_stay(model):
    x = torch.randn(4, 3)
    kept = x.clone()
    run = Pass(model.graph)
    for _ in range(2):
        [found] = run.outputs([x])
        assert torch.equal(x, kept) and not found.requires_grad
        assert torch.equal(found, model(x.clone()))


def test_run_keeps_the_gradients_of_the_caller(model):
    [found] = Pass(model.graph).run(torch.randn(4, 3))
    assert found.requires_grad


def test_steps_give_what_a_whole_run_gives_and_free_as_they_go(model):
    x = torch.randn(4, 3)
    run, alive = Pass(model.graph).start([x]), {}
    for node in model.graph.graph.nodes:
        value = run.step(node)
        if isinstance(value, torch.Tensor) and node.op == "call_function":
            alive[node.name] = weakref.ref(value)
        last, value = value, None
        run.forget(node)
    assert torch.equal(last[0], model(x.clone()))
    assert alive["relu"]() is None
    again = [run.start([x]).step(node) for node in list(model.graph.graph.nodes)[:1]]
    assert len(run.env) == len(again)  # of the first pass nothing is left


def test_a_rule_may_look_replace_and_give_other_arguments(model):
    seen = []

    def rule(run, node):
        if node.name == "relu":
            (value,), rest = run.arguments(node)
            return run.compute(node, ((value - 100.0,), rest))
        value = run.compute(node)
        seen.append(node.name)
        return value * 3 if node.name.startswith("add") else value

    [found] = Pass(model.graph, rule).outputs([torch.randn(4, 3)])
    assert torch.equal(found, torch.full((4, 3), 3.0))
    assert "relu" not in seen and "linear" in seen


def test_noting_names_only_what_was_asked(model):
    found = {}
    rule = noting(lambda node, value: found.update({node.name: value}), {"relu", "nothing"})
    [output] = Pass(model.graph, rule).outputs([torch.randn(4, 3)])
    assert list(found) == ["relu"] and torch.equal(found["relu"] + 1, output)
