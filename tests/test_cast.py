"""Half precision: every architecture keeps its interface and output; no overflow goes unsaid."""

import pytest
import torch
from torch import nn

from paredown.graph.capture import capture
from paredown.graph.model import Model
from paredown.steps.cast import DTYPES, Cast, narrow, out_of_range
from paredown.types import Task, UserError
from tests.architectures import make

torch.set_num_threads(1)
TASK = Task(example=(torch.zeros(1, 8),), score=lambda out, y: out[:, 0])
ERROR = {"fp16": 0.01, "bf16": 0.08}
VARIED = [
    *("resnet8", "mobilenet_v3", "densenet", "unet", "dcgan", "conv3d", "vit", "swin"),
    *("bert", "gpt2", "llama", "t5", "fnet", "lstm", "gru_bidirectional", "recommender"),
    *("stochastic_depth", "outputs_dict", "tied_language_model", "swiglu_decoder", "graph_net"),
]


def run(model: Model) -> list[torch.Tensor]:
    with torch.no_grad():
        return list(model.graph(*[item.example.clone() for item in model.inputs]))


@pytest.mark.parametrize("name", VARIED)
def test_every_architecture_casts(name, tmp_path):
    module, example = make(name)
    model = capture(module, example if isinstance(example, dict) else tuple(example))
    before = {key: t.clone() for key, t in model.state_dict().items()}
    code = model.graph.code
    for dtype, error in ERROR.items():
        half = Cast(dtype).apply(model, TASK)
        assert {p.dtype for p in half.parameters()} == {DTYPES[dtype]}
        for old, new in zip(run(model), run(half), strict=True):
            assert new.dtype == old.dtype and new.shape == old.shape
            if old.is_floating_point():
                assert (new - old).norm() <= error * old.norm()
        half.save(tmp_path / "half.safetensors")
        loaded = Model.load(tmp_path / "half.safetensors")
        assert all(torch.equal(a, b) for a, b in zip(run(half), run(loaded), strict=True))
    assert model.graph.code == code
    assert all(torch.equal(before[key], t) for key, t in model.state_dict().items())


def test_a_loaded_model_casts_to_the_same_bits(tmp_path):
    module, example = make("llama")
    model = capture(module, example)
    model.save(tmp_path / "m.safetensors")
    loaded = Model.load(tmp_path / "m.safetensors")
    pairs = zip(
        run(Cast("bf16").apply(model, TASK)), run(Cast("bf16").apply(loaded, TASK)), strict=True
    )
    assert all(torch.equal(a, b) for a, b in pairs)


class Rotary(nn.Module):
    """Angles of far positions, which bfloat16 cannot tell apart."""

    def __init__(self):
        super().__init__()
        self.register_buffer("rates", 1 / 10000 ** (torch.arange(4) / 4), persistent=False)
        self.fc = nn.Linear(8, 8)

    def forward(self, ids, x):
        angles = ids.float()[:, None] * self.rates
        return self.fc(x * torch.cat([angles.cos(), angles.sin()], 1))


def test_positions_stay_exact():
    ids, x = torch.arange(1000, 1016), torch.randn(16, 8)
    half = Cast("bf16").apply(model := capture(Rotary(), (ids, x)), TASK)
    assert half.graph.rates.dtype == torch.float32
    difference = (half(ids, x) - model(ids, x)).norm() / model(ids, x).norm()
    assert difference < 0.02


class FromScratch(nn.Module):
    """Float tensors that no dtype names, a quotient of integers, and a mask of huge numbers."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.register_buffer("lowest", torch.tensor(torch.finfo(torch.float32).min))

    def forward(self, x, lengths):
        share = lengths / 8
        mask = torch.full((8, 8), float("-inf")).triu(1)
        keep = (torch.arange(8)[None] < lengths[:, None]).float()
        logits = self.fc(x) + mask[0].exp() + (1 - keep) * torch.finfo(torch.float32).min
        logits = torch.where(keep.bool(), logits, self.lowest)
        return torch.softmax(logits, 1, dtype=torch.float32) * share[:, None] + torch.zeros(8)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_unnamed_dtypes_and_masks_follow(dtype):
    inputs = torch.randn(4, 8), torch.tensor([1, 3, 5, 8])
    model = capture(FromScratch(), inputs)
    half = Cast(dtype).apply(model, TASK)
    assert half(*inputs).dtype == torch.float32
    torch.testing.assert_close(half(*inputs), model(*inputs), atol=0.02, rtol=0.05)


def test_a_cast_model_trains_on_in_bf16():
    model = capture(
        nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 2)), (torch.zeros(2, 8),)
    )
    half = Cast("bf16").apply(model, TASK).train()
    half(torch.randn(4, 8)).square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in half.parameters())


def test_integers_and_masked_zeros_stay():
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
    model = capture(module, (torch.randn(2, 1, 6, 6),))
    model.masks["0.weight"] = torch.rand(4, 1, 3, 3) > 0.5
    with torch.no_grad():
        getattr(model.graph, "0").weight.mul_(model.masks["0.weight"])
    half = Cast("fp16").apply(model, TASK)
    state = half.state_dict()
    assert state["1.num_batches_tracked"].dtype == torch.int64
    assert state["1.running_var"].dtype == torch.float16
    assert torch.equal(half.masks["0.weight"], model.masks["0.weight"])
    assert not state["0.weight"][~half.masks["0.weight"]].any()


def test_narrow_bounds_only_what_overflows():
    found = narrow(torch.tensor([1e30, -1e30, float("inf"), float("nan"), 3.0]), torch.float16)
    assert found[:2].tolist() == [65504.0, -65504.0]
    assert found[2].isinf() and found[3].isnan() and found[4] == 3
    assert out_of_range(torch.tensor([65504.0, 65519.0, 65520.0]), torch.float16) == 1


def test_weights_out_of_range_are_named():
    model = capture(nn.Sequential(nn.Linear(4, 4)), (torch.zeros(2, 4),))
    with torch.no_grad():
        getattr(model.graph, "0").weight[1, :2] = 1e5
    with pytest.raises(
        UserError, match=r'weights beyond 65504, .* 0.weight \(2\); use Cast\("bf16"\)'
    ):
        Cast("fp16").apply(model, TASK)
    Cast("bf16").apply(model, TASK)


def test_an_output_that_overflows_is_refused():
    layer = nn.Linear(4, 2)
    with torch.no_grad():
        layer.weight.fill_(3e4)
    model = capture(layer, (torch.ones(2, 4),))
    with pytest.raises(UserError, match=r'4 of 4 outputs .* infinite in fp16; use Cast\("bf16"\)'):
        Cast("fp16").apply(model, TASK)
    assert Cast("bf16").apply(model, TASK)(torch.ones(2, 4)).isfinite().all()


def test_a_second_cast_and_an_unknown_dtype_are_refused():
    half = Cast("fp16").apply(capture(nn.Linear(4, 2), (torch.zeros(2, 4),)), TASK)
    with pytest.raises(
        UserError, match=r"changed nothing; the model has no float32 weights \(float16\)"
    ):
        Cast("bf16").apply(half, TASK)
    with pytest.raises(UserError, match='dtype: expected "fp16" or "bf16", got \'int8\''):
        Cast("int8")


def test_a_quantized_model_is_refused():
    class Quantized(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, x):
            return self.fc(torch.fake_quantize_per_tensor_affine(x, 0.1, 0, -128, 127))

    with pytest.raises(UserError, match="the model is quantized"):
        Cast().apply(capture(Quantized(), (torch.zeros(2, 4),)), TASK)
