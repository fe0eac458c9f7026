"""Adaptive pooling of inputs whose size varies: windows are those of the input, in every file."""

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

import paredown
from paredown.core.errors import UserError
from paredown.graph import pools
from paredown.targets import parity
from paredown.targets.runtimes import runtime

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore")
PLANE = ({2: "height", 3: "width"},)
CASES = {
    "1 mean": (nn.AdaptiveAvgPool1d(4), (16,), ({2: "length"},), [(21,), (7,)]),
    "2 means": (nn.AdaptiveAvgPool2d((3, 2)), (12, 12), PLANE, [(13, 17), (9, 10)]),
    "one way": (nn.AdaptiveAvgPool2d((None, 2)), (12, 12), PLANE, [(13, 17), (9, 10)]),
    "width varies": (nn.AdaptiveAvgPool2d((1, 3)), (12, 12), ({3: "width"},), [(12, 17), (12, 10)]),
    "3 means": (
        nn.AdaptiveAvgPool3d((2, 1, 3)),
        (6, 6, 6),
        ({2: "d", 3: "h", 4: "w"},),
        [(7, 5, 8)],
    ),
    "1 maximum": (nn.AdaptiveMaxPool1d(4), (16,), ({2: "length"},), [(21,), (7,)]),
    "2 maxima": (nn.AdaptiveMaxPool2d((3, 2)), (12, 12), PLANE, [(13, 17), (9, 10)]),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("runtime_", ["onnxruntime", "openvino", "executorch"])
def test_windows_follow_the_size(name, runtime_, tmp_path):
    pool, places, dynamic, others = CASES[name]
    if runtime_ == "executorch" and len(places) == 3:
        pytest.skip("ExecuTorch sums no more than four dimensions")
    convolution = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(places)]
    net = nn.Sequential(convolution(2, 3, 1), pool).eval()
    model = paredown.capture(net, (torch.randn(2, 2, *places),), dynamic)
    assert not model.notes
    chosen = runtime(runtime_)
    predict = paredown.open(chosen.lower(model, tmp_path / f"model{chosen.SUFFIX}"))
    for sizes in [places, *others]:
        x = torch.randn(3, 2, *sizes)
        made = torch.tensor(predict(x.numpy())[0])
        torch.testing.assert_close(made, net(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [5, 6, 7, 12])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_the_mathematics(count, size):
    x = torch.randn(2, 3, count, 4)
    want = F.adaptive_avg_pool2d(x, (size, 4))
    torch.testing.assert_close(pools.adaptive_mean(x, (size, 4)), want)
    want = F.adaptive_max_pool2d(x, (size, 4))
    torch.testing.assert_close(pools.adaptive_maximum(x, (size, 4)), want)


def test_who_asks_where_the_largest_lie_is_left_alone():
    class Places(nn.Module):
        def forward(self, x):
            return F.adaptive_max_pool2d(x, (2, 2), return_indices=True)[1]

    graph: fx.GraphModule = paredown.capture(Places(), (torch.randn(2, 1, 6, 6),), PLANE).graph
    asked = [node for node in graph.graph.nodes if node.target in pools.POOLS]
    assert len(asked) == 1
    asked[0].args[0].meta.setdefault("val", torch.randn(2, 1, 6, 6))
    assert pools.function_of(asked[0]) is None


def test_a_file_that_has_the_examples_size_for_a_constant_is_refused(tmp_path):
    """As a writer would make it that takes a size for a number."""
    net = nn.Conv2d(2, 3, 1)
    model = paredown.capture(net, (torch.randn(2, 2, 12, 12),), PLANE)

    class File:
        output_names = ("output",)

        def __call__(self, x):
            made = net(torch.tensor(x)).detach().numpy()
            return [made * (x.shape[-1] / 12)]

    with pytest.raises(UserError, match=r"differs from .* on inputs of \(3, 2, 16, 16\)"):
        parity.confirm(model, tmp_path / "file", File())
