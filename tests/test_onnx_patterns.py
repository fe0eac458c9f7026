"""What exporters pull apart is put together again, and computes the same."""

import math

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper

import paredown
from paredown.graph.coupling.coupling import analyze
from paredown.graph.doors.onnx.door import open_onnx
from tests.test_onnx_door import agrees, file_of, runtime

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore")

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
RNG = np.random.RandomState(0)


@pytest.fixture(autouse=True)
def _seeded():
    RNG.seed(0)
    torch.manual_seed(0)


def floats(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def named(word):
    """A number's name has no point, as those that exporters give have none."""
    return f"number_{word.replace('.', '_')}" if word[0].isdigit() else word


def lines(text):
    """Nodes as ``y = Op a b attribute=1``, one a line; a value's name is any word."""
    nodes = []
    for line in filter(None, (each.strip() for each in text.splitlines())):
        made, _, rest = line.partition(" = ")
        op, *words = rest.split()
        names = [named(word) if word != "_" else "" for word in words if "=" not in word]
        told = dict(word.split("=") for word in words if "=" in word)
        domain, _, op = op.rpartition(".")
        values = {key: eval(value) for key, value in told.items()}
        nodes.append(helper.make_node(op, names, made.split(), domain=domain, **values))
    return nodes


def numbers(text):
    """The words of the nodes that are numbers, as constants of their own names."""
    words = {word for line in text.splitlines() for word in line.partition(" = ")[2].split()[1:]}
    found = {}
    for word in words:
        try:
            found[named(word)] = np.float32(float(word))
        except ValueError:
            continue
    return found


def made(path, text, shape, known=None, opset=17, domains=(), like=FLOAT):
    """The file of these nodes from x to y, with what they need."""
    constants = {**numbers(text), **(known or {})}
    ends = [("x", like, ["n", *shape[1:]])], [("y", FLOAT, None)]
    return file_of(path, lines(text), *ends, constants, opset, domains)


def ops(model):
    targets = [node.target for node in model.graph.graph.nodes if node.op == "call_function"]
    return [str(each).split(".")[1] for each in targets if str(each).startswith("aten.")]


def checked(path, wanted, shape, known=(), size=2):
    """The model of a file, whose ops are these and whose outputs are ONNX Runtime's."""
    model = paredown.capture(path)
    assert ops(model) == wanted.split()
    assert agrees(model, path, {"x": torch.randn(size, *shape[1:])})
    return model


ERF = "a = Div x 1.4142135\nb = Erf a\nc = Add b 1.0\n"
CUBE = (
    "a = Pow x 3.0\nb = Mul a 0.044715\nc = Add x b\nd = Mul c 0.7978846\ne = Tanh d\n"
    "f = Add e 1.0\n"
)
ACTIVATIONS = {
    "gelu": (ERF + "d = Mul x c\ny = Mul d 0.5", "gelu"),
    "gelu_first_half": (ERF + "d = Mul x 0.5\ny = Mul d c", "gelu"),
    "gelu_scaled_sum": (ERF + "d = Mul c 0.5\ny = Mul x d", "gelu"),
    "gelu_by_two": (ERF + "d = Mul x c\ny = Div d 2.0", "gelu"),
    "gelu_tanh": (CUBE + "g = Mul x 0.5\ny = Mul g f", "gelu"),
    "gelu_tanh_squares": (
        "a = Mul x x\nb = Mul a 0.044715\nc = Add 1.0 b\nd = Mul x c\ne = Mul d 0.7978846\n"
        "f = Tanh e\ng = Add f 1.0\nh = Mul x g\ny = Mul h 0.5",
        "gelu",
    ),
    "not_gelu": (ERF + "d = Mul x c\ny = Mul d 0.6", "div erf add mul mul"),
    "silu": ("a = Sigmoid x\ny = Mul a x", "silu"),
    "hard_swish": ("a = HardSigmoid x alpha=1/6\ny = Mul x a", "hardswish"),
    "hard_swish_by_clip": (
        "a = Add x 3.0\nb = Clip a 0.0 6.0\nc = Mul x b\ny = Div c 6.0",
        "hardswish",
    ),
    "hard_sigmoid": ("a = Add x 3.0\nb = Clip a 0.0 6.0\ny = Div b 6.0", "hardsigmoid"),
    "mish": ("a = Softplus x\nb = Tanh a\ny = Mul x b", "mish"),
    "relu6": ("y = Clip x 0.0 6.0", "relu6"),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(tmp_path, name):
    text, wanted = ACTIVATIONS[name]
    checked(made(tmp_path / "m.onnx", text, (2, 6)), wanted, (2, 6))


CENTRED = "m = ReduceMean x axes=[-1]\nc = Sub x m\n"
NORMS = {
    "layer_norm": (
        CENTRED + "p = Pow c 2.0\nv = ReduceMean p axes=[-1]\ne = Add v 1e-5\ns = Sqrt e\n"
        "d = Div c s\nw = Mul d g\ny = Add w b",
        "layer_norm",
    ),
    "layer_norm_products": (
        CENTRED + "p = Mul c c\nv = ReduceMean p axes=[-1]\ne = Add v 1e-5\ns = Sqrt e\n"
        "r = Reciprocal s\nd = Mul c r\nw = Mul g d\ny = Add b w",
        "layer_norm",
    ),
    "layer_norm_twice": (  # TorchScript's exporter may compute the difference twice
        CENTRED + "k = Sub x m\np = Pow k 2.0\nv = ReduceMean p axes=[-1]\ne = Add v 1e-5\n"
        "s = Sqrt e\nd = Div c s\nw = Mul d g\ny = Add w b",
        "layer_norm",
    ),
    "rms_norm": (
        "p = Pow x 2.0\nv = ReduceMean p axes=[-1]\ne = Add v 1e-5\ns = Sqrt e\nd = Div x s\n"
        "y = Mul d g",
        "rms_norm",
    ),
    "not_over_the_last": (
        "p = Pow x 2.0\nv = ReduceMean p axes=[1]\ne = Add v 1e-5\ns = Sqrt e\nd = Div x s\n"
        "y = Mul d g",
        "pow mean add sqrt div mul",
    ),
}


@pytest.mark.parametrize("name", NORMS)
def test_norms_of_the_last_axis(tmp_path, name):
    text, wanted = NORMS[name]
    path = made(tmp_path / "m.onnx", text, (2, 5, 6), {"g": floats(6), "b": floats(6)})
    checked(path, wanted, (2, 5, 6))


def test_group_norm(tmp_path):
    text = (
        "r = Reshape x s\ni = InstanceNormalization r o z\nh = Shape x\nu = Reshape i h\n"
        "w = Mul u g\ny = Add w b"
    )
    known = {
        **{"s": np.array([0, 2, -1]), "o": np.ones(2, np.float32), "z": np.zeros(2, np.float32)},
        **{"g": floats(6, 1, 1), "b": floats(1, 6, 1, 1)},
    }
    path = made(tmp_path / "m.onnx", text, (2, 6, 4, 4), known)
    checked(path, "group_norm", (2, 6, 4, 4))


LAYERS = {
    "matmul": ("y = MatMul x w", {"w": (6, 3)}, "linear"),
    "matmul_bias": ("a = MatMul x w\ny = Add a b", {"w": (6, 3), "b": (3,)}, "linear"),
    "matmul_turned": (
        "t = Transpose w perm=[1,0]\na = MatMul x t\ny = Add b a",
        {"w": (3, 6), "b": (3,)},
        "linear",
    ),
    "gemm": ("y = Gemm x w b", {"w": (6, 3), "b": (1, 3)}, "linear"),
    "gemm_turned": ("y = Gemm x w b transB=1", {"w": (3, 6), "b": (3,)}, "linear"),
    "gemm_scaled": ("y = Gemm x w b alpha=0.5", {"w": (6, 3), "b": (3,)}, "mm mul add"),
    "a_weight_read_twice": ("a = MatMul x w\ny = MatMul a w", {"w": (6, 6)}, "linear linear"),
    "a_weight_read_otherwise": (
        "a = MatMul x w\nb = ReduceSum w\ny = Add a b",
        {"w": (6, 6)},
        "matmul sum add",
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_linear_layers(tmp_path, name):
    text, shapes, wanted = LAYERS[name]
    known = {key: floats(*shape) for key, shape in shapes.items()}
    path = made(tmp_path / "m.onnx", text, (2, 6), known)
    if name == "a_weight_read_otherwise":
        module = open_onnx(path).module
        x = torch.randn(2, 6)
        (theirs,) = runtime(path, {"x": x})
        assert np.allclose(module(x=x).detach().numpy(), theirs, 1e-4, 1e-4)
        return
    model = checked(path, wanted, (2, 6))
    assert set(model.state_dict()) == set(shapes)


def test_the_bias_of_a_convolution(tmp_path):
    text = "a = Conv x w pads=[1,1,1,1]\ny = Add a b"
    known = {"w": floats(5, 3, 3, 3), "b": floats(1, 5, 1, 1)}
    path = made(tmp_path / "m.onnx", text, (2, 3, 6, 6), known)
    assert checked(path, "conv2d", (2, 3, 6, 6)).state_dict()["b"].shape == (5,)


HEADS = (
    "q4 = Reshape q s\nk4 = Reshape k s\nv4 = Reshape v s\n"
    "qt = Transpose q4 perm=[0,2,1,3]\nvt = Transpose v4 perm=[0,2,1,3]\n"
)
JOINED = "o = Transpose c perm=[0,2,1,3]\nl = Reshape o j\ny = MatMul l wo"
ATTENTION = {
    "scaled_after": "t = Transpose k4 perm=[0,2,3,1]\na = MatMul qt t\nb = Mul a 0.5\n"
    "p = Softmax b axis=-1\nc = MatMul p vt\n",
    "divided": "t = Transpose k4 perm=[0,2,3,1]\na = MatMul qt t\nb = Div a 2.0\n"
    "p = Softmax b axis=-1\nc = MatMul p vt\n",
    "scaled_both": "kt = Transpose k4 perm=[0,2,1,3]\nt = Transpose kt perm=[0,1,3,2]\n"
    "qs = Mul qt 0.7071067\nks = Mul t 0.7071067\na = MatMul qs ks\np = Softmax a axis=-1\n"
    "c = MatMul p vt\n",
    "masked": "t = Transpose k4 perm=[0,2,3,1]\na = MatMul qt t\nb = Mul a 0.5\n"
    "m = Add b mask\np = Softmax m axis=-1\nc = MatMul p vt\n",
    "guarded": "t = Transpose k4 perm=[0,2,3,1]\na = MatMul qt t\nb = Mul a 0.5\n"
    "m = Add mask b\nsm = Softmax m axis=-1\nbad = IsNaN sm\np = Where bad 0.0 sm\n"
    "c = MatMul p vt\n",
}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention(tmp_path, name):
    text = "q = MatMul x wq\nk = MatMul x wk\nv = MatMul x wv\n" + HEADS + ATTENTION[name] + JOINED
    known = {
        **{name: floats(8, 8) for name in ("wq", "wk", "wv", "wo")},
        **{"s": np.array([0, 0, 2, 4]), "j": np.array([0, 0, 8]), "mask": floats(1, 1, 5, 5)},
    }
    path = made(tmp_path / "m.onnx", text, (2, 5, 8), known)
    model = paredown.capture(path)
    assert ops(model).count("scaled_dot_product_attention") == 1
    assert "softmax" not in ops(model) and "matmul" not in ops(model)
    assert agrees(model, path, {"x": torch.randn(3, 5, 8)})
    assert [group.size for group in analyze(model).groups] == [2]  # its heads


@pytest.mark.parametrize("kind, gates", [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
@pytest.mark.parametrize("ways", [1, 2])
def test_recurrent_layers(tmp_path, kind, gates, ways):
    known = {
        "w": floats(ways, gates * 5, 4),
        "r": floats(ways, gates * 5, 5),
        "b": floats(ways, 2 * gates * 5),
    }
    told = {"hidden_size": 5, "direction": "bidirectional" if ways == 2 else "forward"}
    if kind == "GRU":
        told["linear_before_reset"] = 1
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[1, 0, 2]),
        helper.make_node(kind, ["t", "w", "r", "b"], ["y", "h"], **told),
    ]
    shape = ["n", "length", 4]
    ends = [("x", FLOAT, shape)], [("y", FLOAT, None), ("h", FLOAT, None)]
    path = file_of(tmp_path / "m.onnx", nodes, *ends, known)
    model = paredown.capture(path)
    assert kind.lower() in " ".join(ops(model))
    assert sum(p.numel() for p in model.parameters()) == sum(a.size for a in known.values())
    for size in ((2, 6, 4), (3, 9, 4)):
        assert agrees(model, path, {"x": torch.randn(size)})


def test_a_table_that_is_a_product_too_is_one_parameter(tmp_path):
    table = floats(20, 8)
    nodes = lines("e = Gather table x\na = MatMul e w\nr = Relu a\ny = MatMul r turned")
    known = {"table": table, "w": floats(8, 8), "turned": table.T.copy()}
    ends = [("x", INT64, ["n", 6])], [("y", FLOAT, None)]
    path = file_of(tmp_path / "m.onnx", nodes, *ends, known)
    model = paredown.capture(path)
    assert set(model.state_dict()) == {"table", "w"}
    assert any("twice" in note for note in model.notes)
    assert agrees(model, path, {"x": torch.randint(0, 20, (2, 6))})


def rounded(array, axis=None):
    """Integers of 8 bits with a scale for all or for each place of an axis, and the scale."""
    axes = tuple(n for n in range(array.ndim) if n != axis) if axis is not None else None
    scale = (np.abs(array).max(axes) / 127).astype(np.float32)
    shape = [-1 if n == axis else 1 for n in range(array.ndim)]
    wide = scale.reshape(shape) if axis is not None else scale
    return np.rint(array / wide).astype(np.int8), scale


CODES = {"s": np.float32(0.05), "z": np.uint8(128), "t": np.float32(0.1), "u": np.uint8(0)}


def close_to_rounded(path, shape, bound):
    """How far the float model is from the file: no more than its rounding explains."""
    model = paredown.capture(path)
    assert any("quantized" in note for note in model.notes)
    x = torch.rand(4, *shape[1:]) * 4 - 2
    with torch.no_grad():
        ours = model(x=x).numpy()
    (theirs,) = runtime(path, {"x": x})
    assert np.abs(ours - theirs).max() <= bound * np.abs(theirs).max()
    return model


def test_pairs_of_quantization(tmp_path):
    codes, scale = rounded(floats(5, 3, 3, 3), 0)
    text = (
        "q = QuantizeLinear x s z\nd = DequantizeLinear q s z\n"
        "k = DequantizeLinear w ws wz axis=0\n"
        "c = Conv d k\nr = QuantizeLinear c t u\ny = DequantizeLinear r t u"
    )
    known = {**CODES, "w": codes, "ws": scale, "wz": np.zeros(5, np.int8)}
    path = made(tmp_path / "m.onnx", text, (4, 3, 8, 8), known)
    model = close_to_rounded(path, (4, 3, 8, 8), 0.05)
    assert ops(model) == ["conv2d", "relu"]  # the range of the second pair begins at zero
    wide = torch.from_numpy(scale).reshape(-1, 1, 1, 1) * torch.from_numpy(codes)
    assert torch.equal(model.state_dict()["w"], wide)


def test_ops_on_integers(tmp_path):
    codes, scale = rounded(floats(5, 3, 3, 3), 0)
    weights, other = rounded(floats(5, 4))
    text = (
        "q = QuantizeLinear x s z\nc = QLinearConv q s z w ws wz t u b\n"
        "f = Flatten c\ng = DequantizeLinear f t u\np = QuantizeLinear g t u\n"
        "m = QLinearMatMul p t u v vs vz o z\ny = DequantizeLinear m o z"
    )
    known = {
        **{"w": codes, "ws": scale, "wz": np.zeros(5, np.int8)},
        **{"b": np.arange(5, dtype=np.int32) * 100, "v": weights, "vs": other, "vz": np.int8(0)},
        **{**CODES, "t": np.float32(0.1), "s": np.float32(0.02), "o": np.float32(0.5)},
    }
    path = made(tmp_path / "m.onnx", text, (4, 3, 3, 3), known)
    model = close_to_rounded(path, (4, 3, 3, 3), 0.15)
    assert ops(model) == ["conv2d", "relu", "flatten", "relu", "linear"]


def test_products_that_round_as_they_go(tmp_path):
    codes, scale = rounded(floats(6, 3), 1)
    text = (
        "q s z = DynamicQuantizeLinear x\nm = MatMulInteger q w z\nc = Cast m to=1\n"
        "k = Mul s ws\ny = Mul c k"
    )
    path = made(tmp_path / "m.onnx", text, (4, 6), {"w": codes, "ws": scale})
    model = close_to_rounded(path, (4, 6), 0.05)
    assert ops(model) == ["linear"]


def test_weights_of_four_bits(tmp_path):
    packed = RNG.randint(0, 256, (5, 2, 8)).astype(np.uint8)
    text = "y = com.microsoft.MatMulNBits x w s K=32 N=5 bits=4 block_size=16"
    known = {"w": packed, "s": np.abs(floats(10))}
    path = made(tmp_path / "m.onnx", text, (4, 32), known, domains=("com.microsoft",))
    model = paredown.capture(path)
    assert ops(model) == ["linear"] and model.state_dict()["w"].shape == (5, 32)
    assert agrees(model, path, {"x": torch.randn(4, 32)})


MICROSOFT = {
    "gelu": ("y = com.microsoft.Gelu x", {}, "gelu"),
    "fast_gelu": ("y = com.microsoft.FastGelu x b", {"b": (6,)}, "add gelu"),
    "bias_gelu": ("y = com.microsoft.BiasGelu x b", {"b": (6,)}, "add gelu"),
    "quick_gelu": ("y = com.microsoft.QuickGelu x", {}, "mul sigmoid mul"),
    "product": (
        "y = com.microsoft.FusedMatMul x w alpha=0.5 transB=1",
        {"w": (3, 6)},
        "transpose matmul mul",
    ),
    "skip_norm": (
        "y _ _ s = com.microsoft.SkipLayerNormalization x x g b epsilon=1e-5",
        {"g": (6,), "b": (6,)},
        "add layer_norm",
    ),
}


@pytest.mark.parametrize("name", MICROSOFT)
def test_ops_of_optimised_files(tmp_path, name):
    text, shapes, wanted = MICROSOFT[name]
    known = {key: floats(*shape) for key, shape in shapes.items()}
    text = text.replace("y _ _ s", "y")
    path = made(tmp_path / "m.onnx", text, (2, 5, 6), known, domains=("com.microsoft",))
    checked(path, wanted, (2, 5, 6))


def test_what_is_read_elsewhere_stays(tmp_path):
    """A value within a pattern may be an output too."""
    nodes = lines(ERF + "d = Mul x c\ny = Mul d 0.5")
    ends = [("x", FLOAT, ["n", 6])], [("y", FLOAT, None), ("b", FLOAT, None)]
    path = file_of(tmp_path / "m.onnx", nodes, *ends, numbers(ERF + "d = Mul d 0.5"))
    model = paredown.capture(path)
    assert sorted(ops(model)) == ["div", "erf", "gelu"]
    assert agrees(model, path, {"x": torch.randn(2, 6)})
    assert math.isclose(float(model(x=torch.zeros(1, 6))["y"].sum()), 0.0)
