"""Weights of 4 bits: scales near the best, a file of half the bytes, the kernels of int8."""

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from docs import make_architectures as page
from paredown.core.errors import UserError
from paredown.core.task import Task
from paredown.graph.capture import capture
from paredown.graph.model import Model
from paredown.graph.quantized.forms import WEIGHT_FORMS, form_of
from paredown.graph.quantized.quantizers import quantized_weights, rounded, weight_forms
from paredown.graph.quantized.scales import channel_scales, closest_scales
from paredown.run.details import _layers
from paredown.steps.pruning.prune_weights import PruneWeights
from paredown.steps.quantization.quantize import Quantize
from paredown.steps.recipe import apply
from paredown.targets.runtimes import onnxruntime
from tests.architectures import ARCHITECTURES
from tests.architectures.captured import captured
from tests.test_architectures import FUSED, fused

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore")

WEIGHTS = {
    "normal": lambda: torch.randn(16, 144),
    "heavy": lambda: torch.distributions.StudentT(2.0).sample((16, 144)),
    "few": lambda: torch.randn(16, 9),
    "sparse": lambda: torch.randn(16, 144) * (torch.rand(16, 144) > 0.8),
    "equal": lambda: torch.full((16, 9), -0.3),
}


def errors(weight: Tensor, scales: Tensor, low: int, high: int) -> Tensor:
    """Squared error of each row's rounding."""
    return (
        ((weight / scales[:, None]).round().clamp(low, high) * scales[:, None] - weight)
        .square()
        .sum(1)
    )


@pytest.mark.parametrize("kind", WEIGHTS)
def test_closest_scales_are_as_good_as_brute_force(kind):
    torch.manual_seed(0)
    weight = WEIGHTS[kind]()
    low, high = WEIGHT_FORMS["int4"].low, WEIGHT_FORMS["int4"].high
    largest = channel_scales(weight, 0, high)
    tried = [errors(weight, largest * share, low, high) for share in np.linspace(0.05, 1.15, 400)]
    best = torch.stack(tried).amin(0)
    mine = errors(weight, closest_scales(weight, 0, low, high), low, high)
    assert float(mine.sum()) <= 1.02 * float(best.sum()) + 1e-9
    assert (mine <= errors(weight, largest, low, high) + 1e-9).all()


def test_closest_scales_of_nothing_and_of_another_axis():
    assert (closest_scales(torch.zeros(2, 3), 0, -8, 7) > 0).all()
    weight = torch.randn(4, 6, 3)
    turned = closest_scales(weight.transpose(0, 1), 0, -8, 7)
    assert torch.equal(closest_scales(weight, 1, -8, 7), turned)


class Net(nn.Module):
    """A tied linear layer between a first and a last one."""

    def __init__(self):
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3)
        self.one, self.two = nn.Linear(32, 32), nn.Linear(32, 32)
        self.two.weight = self.one.weight
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        x = self.body(self.stem(x).relu()).relu().mean((2, 3))
        return self.head(self.two(self.one(x).relu()))


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def task(images) -> Task:
    data = TensorDataset(images, torch.zeros(len(images)))
    return Task(example=(images[:1],), score=None, calibration=data)


@pytest.fixture(scope="module")
def net(images) -> Model:
    torch.manual_seed(0)
    return capture(Net().eval(), (images[:1],))


def bits(model: Model) -> dict[str, int]:
    return {name: form.bits for name, form in weight_forms(model.graph).items()}


def stored(path) -> dict[str, np.ndarray]:
    return {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(str(path)).graph.initializer}


def test_the_file_holds_half_the_bytes_and_runs_on_the_same_kernels(net, task, images, tmp_path):
    files, census, models = {}, {}, {}
    for scheme in ("int8", "int4"):
        models[scheme] = Quantize(scheme).apply(net, task)
        files[scheme] = onnxruntime.lower(models[scheme], tmp_path / f"{scheme}.onnx")
        census[scheme] = onnxruntime.census(files[scheme])
    assert census["int4"].integer_ops == census["int8"].integer_ops
    assert census["int4"].unfused == () and "Cast" not in census["int4"].float_ops
    state = net.state_dict()
    packed = (state["body.weight"].numel() + state["one.weight"].numel()) // 2
    assert census["int4"].bytes_by_dtype["int4"] == packed
    saved = census["int8"].bytes_by_dtype["int8"] - census["int4"].bytes_by_dtype["int8"]
    assert saved == 2 * packed
    assert files["int8"].stat().st_size - files["int4"].stat().st_size > 0.9 * packed
    got = onnxruntime.open(files["int4"])(images.numpy())[0]
    with torch.no_grad():
        ours = models["int4"](images).numpy()
    assert np.linalg.norm(got - ours) < 0.02 * np.linalg.norm(ours)
    rows = {row["name"]: row for row in _layers(net.graph, models["int4"].graph)}
    assert rows["body.weight"]["dtype_after"] == "int4"
    assert rows["body.weight"]["bytes_after"] == state["body.weight"].numel() // 2


@pytest.mark.parametrize(("edge_bits", "edges"), [(8, 8), (4, 4)])
def test_the_first_and_the_last_layer_keep_their_bits(net, task, edge_bits, edges):
    found = bits(Quantize("int4", edge_bits=edge_bits).apply(net, task))
    assert len(found) == 4 and len(net.state_dict()) > 8  # the tied weight is one
    assert list(found.values()) == [edges, 4, 4, edges]
    assert set(bits(Quantize(edge_bits=edge_bits).apply(net, task)).values()) == {8}


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_two_of_four_zeros_stay_in_the_file(net, task, scheme, tmp_path):
    pruned = apply(net, [PruneWeights(pattern="2:4"), Quantize(scheme, edge_bits=4)], task)
    held = stored(onnxruntime.lower(pruned, tmp_path / "net.onnx"))
    assert pruned.masks
    for name, node in quantized_weights(pruned.graph).items():
        integers = held.get(f"{name}_quantized", held.get(f"{name}_t_quantized"))
        assert integers.dtype.name == form_of(node).word
        assert sorted(integers.shape) == sorted(pruned.state_dict()[name].shape)
        if name in pruned.masks:
            gone = ~pruned.masks[name]
            assert int((integers == 0).sum()) >= int(gone.sum()) > 0
            assert not rounded(pruned.graph, node)[gone].any()


def test_wrong_bits_are_refused_at_once():
    for value in (2, 0, "8", None):
        with pytest.raises(
            UserError, match=r"edge_bits(: expected a whole number| must be 8 or 4), got"
        ):
            Quantize("int4", edge_bits=value)
    with pytest.raises(
        UserError, match=r"scheme 'int2' is not known; it can be \"int8\" or \"int4"
    ):
        Quantize("int2")


@fused
def test_the_same_ops_fuse(name, tmp_path):
    entry = ARCHITECTURES[name]
    model, example = captured(name)
    quantized = Quantize("int4").apply(model, page.calibration_task(entry, example))
    path = onnxruntime.lower(quantized, tmp_path / "model.onnx")
    census = onnxruntime.census(path)
    assert census.integer_ops == FUSED[name] and census.unfused == ()
    assert census.bytes_by_dtype["int4"] > 0
