"""Recurrent layers: how files hold them, in float and as integers."""

import itertools
from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import paredown
from paredown.core.errors import UserError
from paredown.targets.formats.executorch.shape import shape_for_xnnpack
from paredown.targets.formats.onnx import write

KINDS = {
    "lstm": (nn.LSTM, {}),
    "gru": (nn.GRU, {}),
    "rnn": (nn.RNN, {}),
    "rnn of relu": (nn.RNN, {"nonlinearity": "relu"}),
}


class Tagger(nn.Module):
    """A recurrent layer and a linear head; its last state too, and from a learned one or zeros."""

    def __init__(self, kind, learned=False, hidden=16, **settings):
        super().__init__()
        torch.manual_seed(0)
        made, more = KINDS[kind]
        self.rnn = made(12, hidden, **more, **settings)
        ways = 2 if self.rnn.bidirectional else 1
        self.head = nn.Linear(ways * hidden, 5)
        rows = ways * self.rnn.num_layers
        self.start = nn.Parameter(torch.randn(rows, 1, hidden)) if learned else None

    def forward(self, x):
        state = None
        if self.start is not None:
            state = self.start.expand(-1, x.shape[0 if self.rnn.batch_first else 1], -1)
            state = (state.contiguous(), state.contiguous() * 0.5)
            state = state if isinstance(self.rnn, nn.LSTM) else state[0]
        y, last = self.rnn(x, state)
        return self.head(y), last[0] if isinstance(last, tuple) else last


def captured(kind, **settings):
    net = Tagger(kind, **settings).eval()
    shape = (2, 5, 12) if net.rnn.batch_first else (5, 2, 12)
    return paredown.capture(net, (torch.randn(*shape),), dynamic=None)


def example(model):
    return [item.example for item in model.inputs]


def cosine(a, b):
    a, b = np.ravel(a).astype(np.float64), np.ravel(b).astype(np.float64)
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def task(model):
    return paredown.Task(example=tuple(example(model)), score=None)


def outputs(model, path, runtime="onnxruntime"):
    """The exported file's outputs, and its census."""
    artifact = paredown.export(model, paredown.Target(runtime), path)
    made = paredown.open(artifact.path)(*[leaf.numpy() for leaf in example(model)])
    return made, paredown.targets.runtimes.runtime(runtime).census(artifact.path), artifact


PLAIN = {"num_layers": 2, "batch_first": True}
BOTH_WAYS = {"bidirectional": True, "bias": False, "learned": True, "num_layers": 2}
FLOATS = [("lstm", BOTH_WAYS), ("gru", BOTH_WAYS), ("gru", PLAIN), ("rnn of relu", PLAIN)]


@pytest.mark.parametrize("kind, settings", FLOATS)
def test_an_onnx_file_holds_gates_in_its_own_order_and_computes_no_weight(kind, settings, tmp_path):
    model = captured(kind, **settings)
    made, _, artifact = outputs(model, tmp_path / "net.onnx")  # compared with the model there
    loaded = onnx.load(artifact.path).graph
    held = {tensor.name for tensor in loaded.initializer}
    layers = [node for node in loaded.node if node.op_type in ("LSTM", "GRU", "RNN")]
    assert len(layers) == 2
    assert all(name in held for node in layers for name in node.input[1:3])
    floats = sum(t.nbytes for t in model.state_dict().values())
    assert artifact.size_bytes < floats + 2500
    constants = [n.op_type for n in loaded.node if all(each in held for each in n.input)]
    assert set(constants) <= {"Slice", "Expand", "Mul"}, "of the learned state alone"


@pytest.mark.parametrize(
    "kind, both",
    [("lstm", False), pytest.param("gru", True, marks=pytest.mark.slow), ("rnn", False)],
)
def test_any_length_is_captured_and_written_where_the_runtime_takes_it(kind, both, tmp_path):
    """PyTorch's exporter goes through the steps and takes their number for fixed."""
    net = Tagger(kind, batch_first=True, num_layers=2, bidirectional=both).eval()
    model = paredown.capture(net, (torch.randn(1, 5, 12),), ({1: "length"},))
    assert model.inputs[0].dynamic == {0: "batch", 1: "length"} and not model.notes
    files = [paredown.export(model, paredown.Target(), tmp_path / "net.onnx")]
    if kind == "gru":
        files.append(paredown.export(model, paredown.Target("openvino"), tmp_path / "net.xml"))
    for steps in (1, 2, 5, 33):
        x = torch.randn(3, steps, 12)
        wanted = net(x)[0].detach()
        torch.testing.assert_close(model(x)[0], wanted)
        for file in files:
            made = torch.tensor(paredown.open(file.path)(x.numpy())[0])
            torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-5)
    if kind == "rnn":
        file = paredown.export(model, paredown.Target("executorch"), tmp_path / "net.pte")
        one = paredown.open(file.path)
        assert one(x[:, :5].numpy())[0].shape == (3, 5, 5)
        with pytest.raises(
            UserError, match=r"expected shape \(batch.*, 5, 12\), got \(3, 33, 12\)"
        ):
            one(x.numpy())


def test_a_matrix_that_something_else_reads_too_stays_once_in_the_file():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.GRU(32, 64, batch_first=True)

        def forward(self, x):
            return self.rnn(x)[0].sum(-1), (x.sum() * self.rnn.weight_ih_l0).sum(0)

    model = paredown.capture(Tied(), (torch.randn(1, 3, 32),))
    size = write.encode(model).size_bytes
    assert size < sum(t.nbytes for t in model.state_dict().values()) + 2500


def test_biases_that_are_alike_in_both_directions_are_written(tmp_path):
    """As of a net that came from Keras, which has one bias where torch has two."""
    net = Tagger("lstm", bidirectional=True, batch_first=True).eval()
    with torch.no_grad():
        net.rnn.bias_hh_l0.zero_()
        net.rnn.bias_hh_l0_reverse.zero_()
    model = paredown.capture(net, (torch.randn(2, 5, 12),))
    made = paredown.export(model, paredown.Target(), tmp_path / "net.onnx")
    with torch.no_grad():
        wanted = model(*example(model))
    for mine, its in zip(paredown.open(made.path)(example(model)[0].numpy()), wanted, strict=True):
        np.testing.assert_allclose(mine, its, rtol=1e-4, atol=1e-5)


def test_a_projection_is_refused_in_words(tmp_path):
    model = paredown.capture(nn.LSTM(8, 8, proj_size=4), (torch.randn(3, 1, 8),))
    with pytest.raises(UserError, match="projection"):
        paredown.export(model, paredown.Target(), tmp_path / "net.onnx")


def test_an_lstm_of_bytes_runs_on_them_in_onnx_runtime(tmp_path):
    net = Tagger("lstm", hidden=64, num_layers=2, batch_first=True, bidirectional=True).eval()
    model = paredown.capture(net, (torch.randn(2, 5, 12),))
    step = paredown.Quantize("int8-dynamic")
    assert not step.needs
    small = paredown.apply(net, [step], task(model))
    assert any("calibration" in note for note in small.notes)
    ours, census, artifact = outputs(small, tmp_path / "small.onnx")
    assert census.integer_ops["DynamicQuantizeLSTM"] == 2 and "LSTM" not in census.float_ops
    assert not census.unfused
    whole = paredown.export(model, paredown.Target(), tmp_path / "net.onnx")
    assert artifact.size_bytes < 0.3 * whole.size_bytes
    for got, wanted in zip(ours, net(*example(model)), strict=True):
        assert cosine(got, wanted.detach().numpy()) > 0.999


@pytest.mark.parametrize("kind, step", [("gru", "int8-dynamic"), ("lstm", 8), ("rnn", 4)])
def test_recurrent_weights_are_integers_in_an_onnx_file(kind, step, tmp_path):
    net = Tagger(kind, hidden=64, bidirectional=True).eval()
    model = paredown.capture(net, (torch.randn(5, 2, 12),))
    how = paredown.Quantize(step) if isinstance(step, str) else None
    how = how or paredown.QuantizeWeights(step, method="rtn", zero_point=step == 4 or None)
    small = paredown.apply(net, [how], task(model))
    ours, census, artifact = outputs(small, tmp_path / "small.onnx")
    assert sum(census.bytes_by_dtype.values()) < (0.2 if step == 4 else 0.3) * 4 * sum(
        p.numel() for p in net.parameters()
    )
    wanted = net(*example(model))[0].detach().numpy()
    assert cosine(ours[0], wanted) > (0.98 if step == 4 else 0.999)


def test_without_calibration_data_dynamic_ranges_take_what_needs_none():
    model = captured("lstm")
    setting = paredown.steps.step.ALONE
    step = paredown.Quantize("int8-dynamic")
    settled = step.settle(model, task(model), setting)
    assert settled.smooth == 0 and settled.correct_bias is False
    seen = paredown.Task(
        example=tuple(example(model)),
        score=None,
        calibration=torch.utils.data.TensorDataset(torch.randn(4, 2, 12), torch.zeros(4)),
    )
    assert step.settle(model, seen, setting) == step
    asked = paredown.Quantize("int8-dynamic", smooth=0.5)
    assert asked.needs == {"calibration"}


CASES = list(itertools.product(KINDS, (False, True), (False, True)))


@pytest.mark.parametrize("kind, both, first", CASES)
def test_xnnpack_is_given_linear_layers_that_compute_the_same(kind, both, first):
    settings = {"num_layers": 2, "bidirectional": both, "batch_first": first}
    model = captured(kind, learned=both, bias=not first, **settings)
    made = shape_for_xnnpack(model)
    counts = Counter(str(node.target) for node in made.graph.graph.nodes)
    assert counts["aten.linear.default"] == 1 + 2 * (2 if both else 1) * (1 + 5)
    assert not {"aten.lstm.input", "aten.gru.input"} & counts.keys()
    for ours, theirs in zip(made.graph(*example(model)), model.graph(*example(model)), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["openvino", "litert", "executorch"])
@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn"])
def test_recurrent_weights_are_integers_in_every_runtime(kind, runtime, tmp_path):
    net = Tagger(kind, hidden=64, bidirectional=True, batch_first=True).eval()
    model = paredown.capture(net, (torch.randn(1, 3, 12),), dynamic=({},))
    suffix = paredown.targets.runtimes.runtime(runtime).SUFFIX
    for step in (paredown.Quantize("int8-dynamic"), paredown.QuantizeWeights(8, method="rtn")):
        small = paredown.apply(net, [step], task(model), paredown.Target(runtime))
        ours, census, _ = outputs(small, tmp_path / f"small{suffix}", runtime)
        assert sum(census.bytes_by_dtype.values()) < 1.3 * sum(p.numel() for p in net.parameters())
        wanted = net(*example(model))[0].detach().numpy()
        assert cosine(ours[0], wanted) > 0.999


def test_openvino_opens_recurrent_layers_beside_static_ranges(tmp_path):
    net = Tagger("lstm", batch_first=True).eval()
    x = torch.randn(8, 5, 12)
    data = torch.utils.data.TensorDataset(x, torch.zeros(8))
    given = paredown.Task(example=(x[:1],), score=None, calibration=data)
    small = paredown.apply(net, [paredown.Quantize()], given, paredown.Target("openvino"))
    path = paredown.export(small, paredown.Target("openvino"), tmp_path / "net.xml").path
    assert cosine(paredown.open(path)(x[:1].numpy())[0], net(x[:1])[0].detach().numpy()) > 0.999


class Stateful(nn.Module):
    """Its first states are inputs, (B, 1, H)."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(8, 16, batch_first=True)

    def forward(self, x, h, c):
        first = h.transpose(0, 1).contiguous(), c.transpose(0, 1).contiguous()
        return self.rnn(x, first)[0]


@pytest.mark.parametrize("examples", [2, 5])
def test_states_of_another_batch_are_refused(examples):
    """PyTorch's op would read beyond them, and end the process."""
    given = torch.randn(2, 5, 8), torch.randn(2, 1, 16), torch.randn(2, 1, 16)
    model = paredown.capture(Stateful().eval(), given, ({1: "length"}, None, None))
    states = torch.randn(examples, 1, 16), torch.randn(examples, 1, 16)
    with pytest.raises(UserError, match=rf"'h': its dimension 0 \(batch\) is {examples}, and 3"):
        model(torch.randn(3, 7, 8), *states)
    assert model(torch.randn(3, 7, 8), *torch.randn(2, 3, 1, 16)).shape == (3, 7, 16)
