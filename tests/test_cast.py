"""Half precision: every architecture keeps its interface and output; no overflow goes unsaid."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from docs import make_architectures as page
from paredown.core.errors import UserError
from paredown.core.task import Task
from paredown.graph.capture import capture
from paredown.graph.model import Model
from paredown.steps.quantization.cast import DTYPES, Cast
from paredown.steps.quantization.cast_plan import single_sums
from paredown.steps.quantization.cast_rewrite import narrow
from paredown.targets.formats.onnx import half as onnx_half
from paredown.targets.runtimes import onnxruntime
from tests.architectures import ARCHITECTURES, make
from tests.architectures.captured import captured

torch.set_num_threads(1)
TASK = Task(example=(torch.zeros(1, 8),), score=lambda out, y: out[:, 0])
ERROR = {"fp16": 0.01, "bf16": 0.08}
TIMES = 4  # what rounding the weights alone changes, which random weights may amplify
BRIEF = ("resnet8", "vit", "lstm", "graph_net")  # the rest are slow


def run(model: Model) -> list[torch.Tensor]:
    with torch.no_grad():
        return list(model.graph(*[item.example.clone() for item in model.inputs]))


def unseen(name: str) -> list[list[torch.Tensor]]:
    """Inputs that the cast has not seen."""
    drawn = [page.draw(ARCHITECTURES[name], seed) for seed in (5, 6)]
    return [list(d.values() if isinstance(d, dict) else d) for d in drawn]


def rounded(model: Model, dtype: torch.dtype) -> Model:
    """Its weights as 16 bits hold them, in 32-bit arithmetic."""
    made = model.copy()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(parameter.to(dtype).float())
    return made


def check_outputs(before: list, after: list, alone: list, error: float):
    """No value became NaN or infinite, and none moved far."""
    for old, new, weights in zip(before, after, alone, strict=True):
        assert new.dtype == old.dtype and new.shape == old.shape
        if old.is_floating_point():
            seen = old.isfinite()
            assert bool(new[seen].isfinite().all())
            moved = TIMES * (weights[seen] - old[seen]).norm()
            assert (new[seen] - old[seen]).norm() <= max(moved, error * old[seen].norm())


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in BRIEF else pytest.mark.slow) for n in ARCHITECTURES],
)
def test_every_architecture_casts(name, tmp_path):
    model, example = captured(name)
    entry = ARCHITECTURES[name]
    before = {key: t.clone() for key, t in model.state_dict().items()}
    code, task = model.graph.code, page.calibration_task(entry, example)
    for dtype, error in ERROR.items():
        half, alone = Cast(dtype).apply(model, task), rounded(model, DTYPES[dtype])
        models = model, half, alone
        narrowed = [p.numel() for p in half.parameters() if p.dtype is DTYPES[dtype]]
        assert sum(narrowed) > 0.99 * sum(p.numel() for p in half.parameters())
        for leaves in ([item.example for item in model.inputs], *unseen(name)):
            with torch.no_grad():
                outs = [list(m.graph(*[leaf.clone() for leaf in leaves])) for m in models]
            check_outputs(*outs, error)
        half.save(tmp_path / "half.safetensors")
        loaded = Model.load(tmp_path / "half.safetensors")
        assert all(torch.equal(a, b) for a, b in zip(run(half), run(loaded), strict=True))
        if dtype == "fp16":
            check_file(models, unseen(name), tmp_path)
    assert model.graph.code == code
    assert all(torch.equal(before[key], t) for key, t in model.state_dict().items())


def check_file(models: tuple[Model, Model, Model], batches: list, folder):
    """What ONNX Runtime makes of it, on inputs that neither has seen."""
    model, half, alone = models
    predictor = onnxruntime.open(onnxruntime.lower(half, folder / "half.onnx"))
    for leaves in batches:
        with torch.no_grad():
            expected, weights = (
                list(m.graph(*[t.clone() for t in leaves])) for m in (model, alone)
            )
        got = [torch.from_numpy(a) for a in predictor(*[leaf.numpy() for leaf in leaves])]
        check_outputs(expected, got, weights, ERROR["fp16"])


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


class Products(TorchDispatchMode):
    """Counts the 16-bit matrix products of linear layers."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        half = any(isinstance(arg, torch.Tensor) and arg.dtype == torch.float16 for arg in args)
        self.count += half and "mm" in str(func)
        return func(*args, **(kwargs or {}))


def test_what_is_only_looked_at_is_summed_in_float32():
    model, task, x = hot_task(calibration=True)
    with Products() as products:
        Cast("fp16").apply(model, task)
    assert products.count == 2  # each layer that can be 16-bit once, on the example
    images, kernel = torch.randn(2, 8, 9, 9).half(), torch.randn(4, 8, 3, 3).half()
    found = single_sums(torch.ops.aten.conv2d.default, (images, kernel), {})
    exact = nn.functional.conv2d(images, kernel)
    torch.testing.assert_close(found, exact, rtol=2e-3, atol=2e-2)


class Hot(nn.Module):
    """Its second layer reaches a thousand times what its input does; the third mends it."""

    def __init__(self):
        super().__init__()
        self.first, self.hot, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        with torch.no_grad():
            self.hot.weight.mul_(1000)

    def forward(self, x):
        return self.last(self.hot(self.first(x).relu()) / 1000)


def hot_task(calibration: bool) -> tuple[Model, Task, torch.Tensor]:
    """A task whose calibration data alone, and there one example, drives a layer over the top."""
    torch.manual_seed(0)
    x = torch.randn(32, 8)
    x[17] *= 1000
    task = Task(
        (x[:1],), TASK.score, calibration=[(item, 0) for item in x] if calibration else None
    )
    return capture(Hot(), task.example), task, x


def dtypes(model: Model) -> dict[str, torch.dtype]:
    return {name: p.dtype for name, p in model.named_parameters() if "weight" in name}


def test_what_overflows_on_calibration_data_alone_stays_float32(tmp_path):
    model, task, x = hot_task(calibration=True)
    half = Cast("fp16").apply(model, task)
    single, narrow_ = torch.float32, torch.float16
    assert dtypes(half) == {"first.weight": narrow_, "hot.weight": single, "last.weight": narrow_}
    [note] = half.notes
    assert note.startswith("Cast: stays float32, since values leave the range of float16, ")
    assert "hot (up to " in note and "first" not in note and "last" not in note
    path = onnxruntime.lower(half, tmp_path / "half.onnx")
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(half(x), expected, rtol=0.02, atol=0.02)
    got = torch.from_numpy(onnxruntime.open(path)(x.numpy())[0])
    torch.testing.assert_close(got, expected, rtol=0.02, atol=0.02)
    half.save(tmp_path / "half.safetensors")
    assert torch.equal(Model.load(tmp_path / "half.safetensors")(x), half(x))


def test_without_calibration_data_the_example_decides():
    model, task, x = hot_task(calibration=False)
    half = Cast("fp16").apply(model, task)
    assert set(dtypes(half).values()) == {torch.float16} and half.notes == ()
    assert not half(x).isfinite().all()  # which is why calibration data is worth having
    wide = Cast("bf16").apply(*hot_task(calibration=True)[:2])
    assert set(dtypes(wide).values()) == {torch.bfloat16} and wide(x).isfinite().all()


def test_weights_out_of_range_stay_float32():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    with torch.no_grad():
        net[0].weight[1, :2] = 1e5
    model = capture(net, (torch.zeros(2, 4),))
    half = Cast("fp16").apply(model, TASK)
    assert dtypes(half) == {"0.weight": torch.float32, "2.weight": torch.float16}
    assert "0 (up to 1e+05)" in half.notes[0]
    x = torch.tensor([[1e-3, -1e-3, 0.5, 1.0]])
    torch.testing.assert_close(half(x), model(x), rtol=0.01, atol=0.01)


def test_where_nothing_is_left_the_model_is_refused():
    layer = nn.Linear(4, 2)
    with torch.no_grad():
        layer.weight.fill_(3e4)
    model = capture(layer, (torch.ones(2, 4),))
    with pytest.raises(UserError, match=r'changed nothing; in every layer .* Use Cast\("bf16"\)'):
        Cast("fp16").apply(model, TASK)
    assert Cast("bf16").apply(model, TASK)(torch.ones(2, 4)).isfinite().all()


class Fragile(nn.Module):
    """What 16 bits lose without a large number: a tiny scale, a norm of nothing, a difference."""

    def __init__(self):
        super().__init__()
        self.fc, self.scale = nn.Linear(8, 8), nn.Parameter(torch.full((8,), 3.3e-7))

    def forward(self, x):
        unit = nn.functional.normalize(x, dim=1)  # clamped at 1e-12
        near = 2000.0 + x[:, :1].abs()
        return self.fc(unit) + 1e6 * (self.scale * x) / (near - 1999.0)


def test_tiny_numbers_and_differences_are_kept(tmp_path):
    x = torch.randn(6, 8) * 0.01
    x[2] = 0
    model = capture(Fragile(), (x[:2],))
    half = Cast("fp16").apply(model, Task((x[:2],), TASK.score, calibration=[(r, 0) for r in x]))
    assert dtypes(half) == {"fc.weight": torch.float16}
    assert half.state_dict()["scale"].dtype == torch.float32
    got = torch.from_numpy(
        onnxruntime.open(onnxruntime.lower(half, tmp_path / "m.onnx"))(x.numpy())[0]
    )
    for out in (half(x), got):
        assert out.isfinite().all()
        torch.testing.assert_close(out, model(x), rtol=0.02, atol=0.02)


class Vanishing(nn.Module):
    """A quotient by what is 0 in 16 bits, though no value is out of range."""

    def forward(self, x):
        return 1 / ((x + 3000.1) - (x + 3000.0)) + self.fc(x)

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)


def test_what_becomes_infinite_is_found_by_running():
    model = capture(Vanishing(), (torch.rand(2, 8),))
    half = Cast("fp16").apply(model, TASK)
    x = torch.rand(3, 8)
    assert half.state_dict()["fc.weight"].dtype == torch.float16 and half(x).isfinite().all()
    torch.testing.assert_close(half(x), model(x), rtol=0.01, atol=0.01)


class InPlace(nn.Module):
    """A sum written over an operand, which another op reads afterwards through a view."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        y = self.one(x)
        rows = y.view(-1, 2, 4)
        y.add_(x * 7e4)
        return self.two(rows.flatten(1) / 1e5) + y / 1e5


def test_values_that_share_memory_are_of_one_width():
    x = torch.randn(4, 8)
    model = capture(InPlace(), (x[:2],))
    half = Cast("fp16").apply(model, TASK)
    assert half.state_dict()["two.weight"].dtype == torch.float16
    torch.testing.assert_close(half(x), model(x), rtol=0.01, atol=0.01)


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


class Turned(nn.Module):
    """A product with what was turned, a float16 value on either side."""

    def __init__(self, order, right=False, between=None):
        super().__init__()
        self.order, self.right = order, right
        self.between = between or (lambda x: x)
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        turned = self.between(x.permute(self.order))
        return self.weight @ turned if self.right else turned @ self.weight


ATTENTION = nn.MultiheadAttention(8, 2, batch_first=True)
TURNED = {
    "attention": (lambda: Called(ATTENTION), (2, 4, 8)),
    "encoder": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (2, 4, 8)),
    "left": (lambda: Turned((1, 0, 2)), (2, 4, 8)),
    "turned within": (lambda: Turned((1, 2, 0)), (8, 4, 2)),
    "right": (lambda: Turned((1, 2, 0), right=True), (4, 2, 8)),
    "four axes": (lambda: Turned((1, 2, 0, 3)), (2, 4, 3, 8)),
    "twice": (lambda: Turned((1, 0, 2), between=lambda x: x.transpose(1, 2)), (8, 4, 2)),
    "reshaped": (lambda: Turned((1, 0, 2), between=lambda x: x.reshape(4, 2, 8)), (2, 4, 8)),
    "shared": (lambda: Turned((1, 0, 2), between=lambda x: x + x @ torch.eye(8)), (2, 4, 8)),
}


class Called(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize("name", TURNED)
def test_a_session_opens_products_of_what_was_turned(name, tmp_path):
    torch.manual_seed(0)
    make, shape = TURNED[name]
    model = capture(make().eval(), (torch.randn(shape),))
    half = Cast("fp16").apply(model, None)
    predictor = onnxruntime.open(onnxruntime.lower(half, tmp_path / "half.onnx"))
    x = torch.randn(shape)
    exact, got = [model(x).detach()], [torch.from_numpy(predictor(x.numpy())[0])]
    check_outputs(exact, got, exact, ERROR["fp16"])


def test_a_file_that_crashes_its_runtime_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_half, "widen_transposes", lambda graph: None)
    model = capture(Turned((1, 0, 2)), (torch.randn(2, 4, 8),))
    half = Cast("fp16").apply(model, None)
    with pytest.raises(UserError, match=r"half.onnx: opening it crashed \(SIGSEGV\)"):
        onnxruntime.lower(half, tmp_path / "half.onnx")
    assert not list(tmp_path.iterdir())
    onnxruntime.lower(model, tmp_path / "float.onnx")  # with a process anew
