"""Sizes that vary: a captured graph is right at every size it takes, and says which it does not."""

import math

import pytest
import torch
from torch import nn

import paredown
from paredown.core.errors import UserError
from paredown.graph.capture import capture
from paredown.graph.doors import sizes
from paredown.graph.model import Model

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore")
LENGTHS = (1, 2, 3, 5, 15, 16, 17, 23, 24, 25, 32, 33, 40, 64, 65, 99, 100, 161, 333)


class Layer(nn.Module):
    """A linear layer, and what is done with it."""

    def __init__(self, way):
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.way = nn.Linear(8, 8), way

    def forward(self, x):
        return self.way(self.fc, x)


def pad_with_a_branch(fc, x):
    return fc(nn.functional.pad(x, (0, 0, 0, 4 - x.shape[1] % 4)) if x.shape[1] % 4 else x).sum(1)


def steps(fc, x):
    h = torch.zeros_like(x[:, 0])
    for step in range(x.shape[1]):
        h = fc(h + x[:, step]).tanh()
    return h


def two_branches(fc, x):
    h = fc(x)
    if x.shape[1] > 20:
        h = h + 1 if x.shape[1] > 40 else h * 2
    return h.sum(1)


# what is done -> the lengths that are taken: none but the example's 16, or least and most
LIMITED = {
    "square root": (lambda fc, x: fc(x).sum(1) / math.sqrt(x.shape[1]), None),
    "logarithm": (lambda fc, x: fc(x).sum(1) * math.log(x.shape[1]), None),
    "tensor of a float": (lambda fc, x: fc(x).sum(1) / torch.tensor(float(x.shape[1])), None),
    "parity": (lambda fc, x: fc(x).sum(1) if x.shape[1] % 2 else fc(x).mean(1), None),
    "padding": (pad_with_a_branch, None),
    "steps": (steps, None),
    "root's part": (lambda fc, x: fc(x)[:, : int(x.shape[1] ** 0.5)].sum(1), (16, 24)),
    "threshold": (lambda fc, x: fc(x).sum(1) if x.shape[1] > 24 else fc(x).mean(1), (1, 24)),
    "floor": (lambda fc, x: fc(x).sum(1) if x.shape[1] > 12 else fc(x).mean(1), (13, None)),
    "far threshold": (lambda fc, x: fc(x).sum(1) if x.shape[1] < 300 else fc(x), (1, 299)),
    "two branches": (two_branches, (1, 20)),
}


@pytest.mark.parametrize("kind", LIMITED)
def test_a_length_is_right_or_refused(kind, tmp_path):
    way, taken = LIMITED[kind]
    module = Layer(way).eval()
    model = capture(module, (torch.randn(1, 16, 8),), ({1: "length"},))
    assert [note.startswith("dimension 1 (length) of input 'x' ") for note in model.notes] == [True]
    model.save(tmp_path / "m.safetensors")
    least, most = taken or (16, 16)
    for made in (model, Model.load(tmp_path / "m.safetensors"), model.copy()):
        assert 0 in made.inputs[0].dynamic and (1 in made.inputs[0].dynamic) == (taken is not None)
        for length in LENGTHS:
            x = torch.randn(3, length, 8)
            if least <= length <= (most or length):
                torch.testing.assert_close(made(x), module(x), atol=1e-4, rtol=1e-4)
            else:
                with pytest.raises(UserError, match=r"input 'x': "):
                    made(x)


VARYING = {
    "mean": lambda fc, x: fc(x).sum(1) / x.shape[1],
    "tensor of a size": lambda fc, x: fc(x).sum(1) / torch.tensor(x.shape[1]),
    "padding": lambda fc, x: fc(nn.functional.pad(x, (0, 0, 0, -x.shape[1] % 4))).sum(1),
    "cut": lambda fc, x: fc(x[:, :20]).sum(1),
    "clamp": lambda fc, x: fc(x).sum(1) / max(x.shape[1], 20),
    "differences": lambda fc, x: fc(x).diff(dim=1).sum(1),
    "halves": lambda fc, x: fc(x).unflatten(1, (2, -1)).sum(1),
}


@pytest.mark.parametrize("kind", VARYING)
def test_a_length_that_the_module_takes_stays_open(kind):
    module = Layer(VARYING[kind]).eval()
    model = capture(module, (torch.zeros(1, 16, 8),), ({1: "length"},))
    assert model.notes == () and model.inputs[0].dynamic == {0: "batch", 1: "length"}
    for length in (2, 16, 40, 100, 334):
        x = torch.randn(2, length, 8)
        torch.testing.assert_close(model(x), module(x), atol=1e-4, rtol=1e-4)


BATCHES = {
    "split": lambda fc, x: torch.cat([fc(part) for part in x.split(4)]),
    "wide split": lambda fc, x: torch.cat([fc(part) for part in x.split(16)]),
    "chunk": lambda fc, x: torch.cat([fc(part) for part in x.chunk(2)]),
    "square root": lambda fc, x: fc(x) / math.sqrt(x.shape[0]),
    "threshold": lambda fc, x: fc(x) if x.shape[0] < 6 else fc(x) * 2,
    "far threshold": lambda fc, x: fc(x) if x.shape[0] < 500 else fc(x) * 2,
    "rows": lambda fc, x: torch.stack([fc(row) for row in x]),
}


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("batch", [1, 5])
def test_a_batch_is_right_or_refused(kind, batch):
    module = Layer(BATCHES[kind]).eval()
    model = capture(module, (torch.randn(batch, 8),))
    assert model.fixed_batch == batch
    assert any(f"(batch) of input 'x' became fixed at {batch}" in note for note in model.notes)
    x = torch.randn(batch, 8)
    torch.testing.assert_close(model(x), module(x))
    with pytest.raises(UserError, match="expected shape"):
        model(torch.randn(64, 8))


def test_a_length_varies_where_the_batch_does_not():
    module = Layer(lambda fc, x: torch.cat([fc(part) for part in x.split(4)]).sum(1)).eval()
    model = capture(module, (torch.randn(1, 16, 8),), ({1: "length"},))
    assert model.inputs[0].dynamic == {1: "length"} and model.fixed_batch == 1
    x = torch.randn(1, 33, 8)
    torch.testing.assert_close(model(x), module(x), atol=1e-4, rtol=1e-4)


def test_two_lengths_are_tried_together():
    def area(fc, x):  # (B, H, W, 8)
        return fc(x).sum((1, 2)) if x.shape[1] * x.shape[2] > 48 else fc(x).mean((1, 2))

    module = Layer(area).eval()
    model = capture(module, (torch.randn(1, 4, 4, 8),), ({1: "height", 2: "width"},))
    assert model.notes
    for height in (1, 4, 5, 12, 20):
        for width in (1, 4, 5, 12, 20):
            x = torch.randn(2, height, width, 8)
            try:
                made = model(x)
            except UserError:
                continue
            torch.testing.assert_close(made, module(x), atol=1e-4, rtol=1e-4)


def test_a_program_keeps_what_it_was_exported_for(tmp_path):
    dims = {0: torch.export.Dim.AUTO, 1: torch.export.Dim("n", max=24)}
    for way, taken in ((LIMITED["threshold"][0], {1: (1, 24)}), (LIMITED["parity"][0], None)):
        module = Layer(way).eval()
        shapes = {"x": dims if taken else dict.fromkeys(dims, torch.export.Dim.AUTO)}
        example = (torch.randn(2, 16, 8),)
        program = torch.export.export(module, example, dynamic_shapes=shapes, strict=False)
        torch.export.save(program, tmp_path / "m.pt2")
        model = capture(tmp_path / "m.pt2")
        assert (1 in model.inputs[0].dynamic) == (taken is not None)
        assert model.inputs[0].limits == (taken or {})
        assert any("was exported for no other sizes" in note for note in model.notes)


def test_a_limit_is_checked_in_a_file(tmp_path):
    from paredown.targets.runtimes import runtime

    module = Layer(LIMITED["threshold"][0]).eval()
    model = capture(module, (torch.randn(1, 16, 8),), ({1: "length"},))
    for name in ("onnxruntime", "pytorch"):
        chosen = runtime(name)
        predictor = paredown.open(chosen.lower(model, tmp_path / f"m{chosen.SUFFIX}"))
        x = torch.randn(2, 24, 8)
        (made,) = predictor(x.numpy())
        torch.testing.assert_close(torch.from_numpy(made), module(x).detach())
        with pytest.raises(
            UserError, match=r"input 'x': expected shape \(batch, length up to 24, 8\)"
        ):
            predictor(torch.randn(2, 25, 8).numpy())


def test_numbers_that_are_all_one_become_different_ones():
    (made,) = sizes.resized([torch.ones(1, 4)], {(0, 1): 6})
    assert made.shape == (1, 6) and len(made.unique()) == 6
