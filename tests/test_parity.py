"""What counts as agreement between a file and the model that it was made of."""

import numpy as np
import pytest
import torch
from onnxscript.rewriter import _matcher
from torch import nn
from torch.utils.data import TensorDataset

import paredown
from paredown.core.errors import UserError
from paredown.core.task import Task
from paredown.targets import parity
from paredown.targets.runtimes import onnxruntime

pytestmark = pytest.mark.filterwarnings("ignore")


class Chaotic(nn.Module):
    """Forty layers that each double what rounding has moved, to where outputs differ by a tenth."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(32, 32) for _ in range(40)])
        for layer in self.layers:
            nn.init.orthogonal_(layer.weight)

    def forward(self, x):
        for layer in self.layers:
            x = torch.relu(layer(x) * 1.6 - 0.1) + 0.1 * x
        return x


class File:
    """Stands for an open file: gives these outputs."""

    output_names = ("output",)

    def __init__(self, *outputs):
        self.outputs = outputs

    def __call__(self, *arrays):
        if arrays[0].shape[0] != len(self.outputs[0]):
            raise UserError("model: expected the example's shape.")
        return self.outputs


@pytest.fixture(scope="module")
def chaotic():
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(64, 32), torch.zeros(64))
    task = Task(example=(torch.randn(16, 32),), score=None, calibration=data)
    return paredown.apply(Chaotic(), [paredown.Quantize("int8")], task).eval()


def otherwise(model, seed):
    """The model's output where ties fall otherwise."""
    return parity.other_ties(model.graph, [model.inputs[0].example], seed)[0].numpy()


def never(model, path):
    raise AssertionError("looked for the worst tensor")


def test_ties_that_fall_otherwise_are_agreement_enough(chaotic, tmp_path, monkeypatch):
    got = otherwise(chaotic, 7)
    found = parity.agreement_db(chaotic(chaotic.inputs[0].example).detach().numpy(), got)
    monkeypatch.setattr(parity, "QUANTIZED_DB", found + 3)  # what a deeper network falls below
    parity.confirm(chaotic, tmp_path / "file", File(got), never)


@pytest.mark.parametrize("share", [0.3, 1.0, 3.0])
def test_other_differences_are_not(chaotic, tmp_path, share):
    exact = chaotic(chaotic.inputs[0].example).detach().numpy()
    noise = np.random.default_rng(0).normal(size=exact.shape).astype(np.float32)
    wrong = exact + share * exact.std() * noise
    with pytest.raises(UserError, match=r"output 'output' differs .*'layer' at 3 dB"):
        parity.confirm(chaotic, tmp_path / "file", File(wrong), lambda *_: (3.0, "layer"))


def test_where_ties_alone_decide_outputs_do_not_count(chaotic, tmp_path, monkeypatch):
    monkeypatch.setattr(parity, "TELLING_DB", 1000.0)
    monkeypatch.setattr(parity, "QUANTIZED_DB", 1000.0)
    with pytest.raises(AssertionError, match="worst tensor"):
        parity.confirm(chaotic, tmp_path / "file", File(otherwise(chaotic, 7)), never)


class Small(nn.Module):
    """Something small beside a layer, without which zeros give no numbers."""

    def __init__(self, after):
        super().__init__()
        self.layer = nn.Linear(8, 8, bias=False)
        self.after = after

    def forward(self, x):
        return self.after(self.layer(x))


SMALL = {
    "norm": lambda h: h / (h.norm(dim=-1, keepdim=True) + 1e-8),
    "log": lambda h: torch.log(h.abs() + 1e-9),
    "root": lambda h: 1 / (h.square().sqrt() + 1e-8),
    "mean square": lambda h: h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-12),
    "subtracted": lambda h: 1 / (h.abs() - -1e-8),
    "factor": lambda h: h * 1.000005 - h,
    "divisor": lambda h: h / 0.999995 - h,
}


@pytest.mark.parametrize("name", SMALL)
def test_small_constants_stay(name, tmp_path):
    torch.manual_seed(0)
    module = Small(SMALL[name])
    model = paredown.capture(module, (torch.randn(4, 8),))
    predictor = onnxruntime.open(onnxruntime.lower(model, tmp_path / "model.onnx"))
    for x in (torch.randn(4, 8), torch.zeros(4, 8), 1e-8 * torch.randn(4, 8)):
        (got,) = predictor(x.numpy())
        assert parity.agreement_db(module(x).detach().numpy(), got) > 80


def test_rules_of_several_outputs_look_only_from_their_first_op(tmp_path, monkeypatch):
    """Else every node looks through all slices, and a deep model's time to write is quadratic."""
    seen: list[str] = []
    tried = _matcher.SimplePatternMatcher._multi_match

    def counted(self, candidate, check_removable):
        seen.append(candidate[0].op_type)
        return tried(self, candidate, check_removable)

    monkeypatch.setattr(_matcher.SimplePatternMatcher, "_multi_match", counted)
    halves = Small(lambda h: torch.cat([h[:, 4:].relu(), h[:, :4]], 1))
    model = paredown.capture(halves, (torch.randn(2, 8),))
    onnxruntime.lower(model, tmp_path / "halves.onnx")
    assert set(seen) == {"Slice"}


class Plain:
    """Stands for an open file: what it computes is another module's."""

    output_names = ("output",)

    def __init__(self, module):
        self.module = module

    def __call__(self, *arrays):
        return (self.module(*map(torch.from_numpy, arrays)).detach().numpy(),)


@pytest.mark.parametrize(
    ("after", "other", "said"),
    [
        (lambda h: h / (h.norm() + 1e-8), lambda h: h / h.norm(), "inputs of zeros"),
        (lambda h: h.clamp(max=99.0), lambda h: h, "1000 times the example's values"),
        (lambda h: h.clamp(max=9.0), lambda h: h, "the task's data"),
    ],
)
def test_what_the_example_does_not_show_is_found(after, other, said, tmp_path):
    right, wrong = Small(after), Small(other)
    wrong.layer = right.layer
    model = paredown.capture(right, (torch.randn(4, 8),))
    data = [[50 * torch.randn(4, 8)]] if "data" in said else []
    parity.confirm(model, tmp_path / "file", Plain(right), data=data)
    with pytest.raises(UserError, match=f"'output' differs from the model's on {said}"):
        parity.confirm(model, tmp_path / "file", Plain(wrong), data=data)


@pytest.mark.parametrize(
    "after",
    [
        lambda h: h.topk(3, -1).indices.float(),  # zeros rank either way
        lambda h: h / h.norm(),  # no number at all
        lambda h: h.exp(),  # infinite where large
        nn.LayerNorm(8),
    ],
)
def test_where_a_model_gives_no_numbers_a_file_may_give_any(after, tmp_path):
    module = Small(after)
    model = paredown.capture(module, (torch.randn(4, 8),))

    class Otherwise(Plain):
        def __call__(self, *arrays):
            (made,) = super().__call__(*arrays)
            if not arrays[0].any():
                made = made[:, ::-1].copy()
            return (np.nan_to_num(made),)

    parity.confirm(model, tmp_path / "file", Otherwise(module))


class Amplifying(nn.Module):
    """Each sine makes a hundredfold of what rounding has moved."""

    def forward(self, x):
        for _ in range(2):
            x = (300 * x).sin() + 0.1 * x
        return x


def test_a_float_file_may_differ_by_what_rounding_makes(tmp_path):
    torch.manual_seed(0)
    model = paredown.capture(Amplifying(), (torch.randn(16, 32),))
    x = model.inputs[0].example
    exact = model(x).numpy()
    moved = parity.other_roundings(model.graph, [x], 7)[0].numpy()
    found = parity.agreement_db(exact, moved)
    assert 20 < found < 60

    class File(Plain):
        def __call__(self, *arrays):
            return (moved,) if np.array_equal(arrays[0], x.numpy()) else super().__call__(*arrays)

    parity.confirm(model, tmp_path / "file", File(Amplifying()))
    noise = np.random.default_rng(0).normal(size=exact.shape).astype(np.float32)
    moved = exact + 10 ** ((15 - found) / 20) * exact.std() * noise
    with pytest.raises(UserError, match=r"'output' differs from the model's \(agreement"):
        parity.confirm(model, tmp_path / "file", File(Amplifying()))


@pytest.mark.parametrize("apart", [4e-7, 4e-6])
def test_what_a_sigmoid_gives_has_its_own_error(tmp_path, apart):
    """Far from its middle it gives next to nothing, and kernels approximate it."""
    net = nn.Sequential(nn.Linear(4, 3), nn.Sigmoid(), nn.Unflatten(1, (3, 1)))
    net[0].bias.data -= 20
    model = paredown.capture(net.eval(), (torch.randn(2, 4),))

    class Approximated:
        output_names = ("output",)

        def __call__(self, x):
            return [net(torch.tensor(x)).detach().numpy() + np.float32(apart)]

    if apart < parity.UNIT_ERROR:
        parity.confirm(model, tmp_path / "file", Approximated())
    else:
        with pytest.raises(UserError, match="differs from the model's"):
            parity.confirm(model, tmp_path / "file", Approximated())
