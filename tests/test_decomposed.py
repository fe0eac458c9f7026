"""The decomposed form: the same numbers as the fake quantizers', on integers that are stored."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from docs import make_architectures as page
from paredown.core.errors import UserError
from paredown.graph.capture import capture
from paredown.graph.model import Model
from paredown.graph.program import reexport
from paredown.graph.quantized.decomposed import DEQUANTIZE_CHANNEL, QUANTIZE, decompose
from paredown.graph.quantized.quantizers import fake_quantize, quantized_weights, quantizers
from paredown.steps.quantization.quantize import Quantize
from tests.architectures import ARCHITECTURES
from tests.architectures.captured import captured

pytestmark = pytest.mark.filterwarnings("ignore")
QUICK = ("resnet8", "unet", "bert")
EVERY = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in ARCHITECTURES
]


def quantized(name: str) -> Model:
    entry = ARCHITECTURES[name]
    model, example = captured(name)
    try:
        return Quantize("int8", embedding_bits=0).apply(
            model, page.calibration_task(entry, example)
        )
    except UserError as error:
        assert page.NO_INTEGERS in str(error)
        pytest.skip("nothing to quantize")


def run(model: Model) -> list[Tensor]:
    with torch.no_grad():
        return list(model.graph(*[item.example.clone() for item in model.inputs]))


@pytest.mark.parametrize("name", EVERY)
def test_decomposed_computes_the_same_bits(name):
    model = quantized(name)
    for fold in (True, False):
        made = decompose(model, fold_weights=fold)
        assert not quantizers(made.graph)
        pairs = zip(run(made), run(model), strict=True)
        assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
        integers = {k: v for k, v in made.state_dict().items() if k.endswith("_quantized")}
        expected = {f"{key}_quantized" for key in quantized_weights(model.graph)}
        assert set(integers) == (expected if fold else set())
        assert all(value.dtype is torch.int8 for value in integers.values())
    program = reexport(decompose(model)).module()
    again = program(*[item.example.clone() for item in model.inputs])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(again, run(model), strict=True))


@settings(max_examples=25)
@given(
    st.floats(1e-6, 1e6),
    st.integers(0, 255),
    st.lists(st.floats(-300, 300), min_size=1, max_size=40),
)
def test_shifted_bytes_give_the_same_values(scale, zero, levels):
    """Ties between two levels among them."""
    values = (torch.tensor(levels, dtype=torch.float64) * scale).float()
    values = torch.cat([values, (torch.arange(-300, 300) + 0.5).float() * scale])

    class Rounds(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return fake_quantize(x, scale, zero, 0, 255)

    model = capture(Rounds(), (values[None],))
    made = decompose(model)
    assert torch.equal(made(values[None]), model(values[None]))


def test_weights_that_two_layers_share_stay_one():
    model = quantized("tied_language_model")
    made = decompose(model)
    nodes = made.graph.graph.nodes
    stored = [node for node in nodes if node.target is DEQUANTIZE_CHANNEL]
    assert len(stored) == len(quantized_weights(model.graph))
    assert any(node.target is QUANTIZE for node in nodes)
    assert run(model) and quantizers(model.graph)  # the model itself is untouched
