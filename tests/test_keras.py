"""The door for Keras files: what Keras computes is computed, in layers that can be worked on."""

import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import paredown
from paredown.core.errors import UserError
from paredown.graph.coupling.coupling import analyze
from paredown.graph.doors.files import open_file
from paredown.graph.doors.module import capture_module
from paredown.targets.runtimes import onnxruntime

for needed in ("keras", "h5py"):  # not imported here, where nothing says on which backend
    if importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed}: pip install 'paredown[keras]'", allow_module_level=True)

from paredown.graph.doors.keras import convolutions, loaded  # noqa: E402

keras = loaded.library()
L = keras.layers
pytestmark = pytest.mark.filterwarnings("ignore")


def dense():
    relu = L.Dense(16, activation="relu")
    return keras.Sequential([keras.Input((8,)), relu, L.Dropout(0.2), L.Dense(3)])


def conv():
    return keras.Sequential(
        [
            keras.Input((16, 16, 3)),
            *(L.Conv2D(8, 3, padding="same", use_bias=False), L.BatchNormalization(), L.ReLU()),
            *(L.MaxPooling2D(), L.Conv2D(16, 3, strides=2, padding="same", activation="relu")),
            *(L.GlobalAveragePooling2D(), L.Dense(4, activation="softmax")),
        ]
    )


def flat():
    layers = [L.Conv2D(8, 3, activation="relu"), L.MaxPooling2D(3, 2, "same"), L.Flatten()]
    return keras.Sequential([keras.Input((9, 7, 3)), *layers, L.Dense(4)])


def depthwise():
    return keras.Sequential(
        [
            *(keras.Input((16, 16, 3)), L.Conv2D(8, 3, padding="same"), L.DepthwiseConv2D(3)),
            *(L.BatchNormalization(), L.ReLU(6.0), L.SeparableConv2D(12, 3, 2, "same")),
            *(L.GlobalMaxPooling2D(), L.Dense(4)),
        ]
    )


def residual():
    pixels = keras.Input((12, 12, 3))
    x = L.ReLU()(
        L.BatchNormalization()(L.Conv2D(8, 3, padding="same")(L.Rescaling(1 / 255)(pixels)))
    )
    y = L.BatchNormalization()(L.Conv2D(8, 3, padding="same")(L.RandomFlip()(x)))
    x = L.Activation("relu")(L.Add()([x, y]))
    squeezed = L.Reshape((1, 1, 8))(L.GlobalAveragePooling2D()(x))
    gate = L.Conv2D(8, 1, activation="sigmoid")(L.Conv2D(4, 1, activation="silu")(squeezed))
    x = L.Concatenate()([L.Multiply()([x, gate]), y])
    x = L.ZeroPadding2D(((0, 1), (0, 1)))(x)
    x = L.UpSampling2D()(L.DepthwiseConv2D(3, strides=2)(x))
    x = L.Cropping2D(1)(L.Conv2DTranspose(6, 4, strides=2, padding="same")(x))
    return keras.Model(pixels, L.Dense(5)(L.Flatten()(L.AveragePooling2D(2)(x))))


def recurrent():
    both = L.Bidirectional(L.LSTM(6, return_sequences=True, dropout=0.1))
    turned = L.SimpleRNN(5, return_sequences=True, go_backwards=True)
    layers = [both, L.GRU(8, return_sequences=True), turned, L.Bidirectional(L.GRU(4))]
    return keras.Sequential([keras.Input((10, 6)), *layers, L.Dense(2)])


def words():
    ids = keras.Input((12,), dtype="int32")
    x = L.LSTM(8)(L.SpatialDropout1D(0.1)(L.Embedding(50, 8)(ids)))
    return keras.Model(ids, L.Dense(1, activation="sigmoid")(x))


def series():
    return keras.Sequential(
        [
            *(keras.Input((20, 4)), L.Conv1D(8, 3, padding="causal", activation="gelu")),
            *(L.MaxPooling1D(2), L.SeparableConv1D(8, 3), L.GlobalMaxPooling1D(), L.Dense(3)),
        ]
    )


def two_inputs():
    left, right = keras.Input((8,), name="left"), keras.Input((4,), name="right")
    parts = [L.Dense(8, activation="relu")(left), L.Dense(8, activation="tanh")(right)]
    x = L.Concatenate()(parts)
    return keras.Model([left, right], {"yes": L.Dense(2)(x), "no": L.Dense(1)(x)})


def transformer():
    ids = keras.Input((10,), dtype="int32")
    x = L.Embedding(50, 16)(ids)
    x = L.LayerNormalization()(x + L.MultiHeadAttention(2, 8)(x, x, use_causal_mask=True))
    y = L.Dense(16)(L.Dense(32, activation="gelu")(x))
    return keras.Model(ids, L.Dense(3)(L.GlobalAveragePooling1D()(L.LayerNormalization()(x + y))))


def nested():
    inside = keras.Sequential([keras.Input((8, 8, 3)), L.Conv2D(6, 3), L.ReLU()], name="inside")
    pixels = keras.Input((8, 8, 3))
    twice = L.Dense(4, activation="hard_silu")
    x = L.Dense(4)(L.GlobalAveragePooling2D()(inside(pixels)))
    return keras.Model(pixels, twice(twice(x)))


NETS = (
    *(dense, conv, flat, depthwise, residual, recurrent),
    *(words, series, two_inputs, transformer, nested),
)


def saved(make, folder, name="net.keras"):
    """The model, its norms and biases no longer those of a new one, and its file."""
    keras.utils.set_random_seed(0)
    model = make()
    for weight in model.weights:
        if "moving_variance" in weight.path:
            weight.assign(keras.random.uniform(weight.shape) + 0.5)
        elif weight.dtype == "float32" and len(weight.shape) < 3 and "kernel" not in weight.path:
            weight.assign(weight + 0.1 * keras.random.normal(weight.shape))
    model.save(folder / name)
    return model, folder / name


def some(opened, count=3):
    """Inputs of a few examples."""
    rows = [
        {name: value.roll(n, -1) for name, value in opened.example.items()} for n in range(count)
    ]
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def flat_list(found):
    values = found.values() if isinstance(found, dict) else [found]
    return [np.asarray(value.detach()) for value in values]


def predicted(model, inputs):
    arrays = [np.asarray(value) for value in inputs.values()]
    found = model.predict(arrays if arrays[1:] else arrays[0], verbose=0)
    return list(found.values()) if isinstance(found, dict) else [found]


@pytest.mark.parametrize("make", NETS)
def test_what_keras_predicts_is_computed_in_torch_s_own_layers(make, tmp_path):
    model, path = saved(make, tmp_path)
    opened = open_file(path)
    inputs = some(opened)
    captured = capture_module(opened.module, opened.example, opened.dynamic)
    for mine, its in zip(flat_list(captured(**inputs)), predicted(model, inputs), strict=True):
        np.testing.assert_allclose(mine, its, atol=1e-4 * abs(its).max(), rtol=1e-4)
    assert not any("Keras's own code" in note for note in opened.notes)
    assert not captured.notes  # a batch that varies, and what training does
    assert set(captured.state_dict()) == set(opened.module.state_dict())
    assert analyze(captured).groups


WORKED = (
    (conv, "Conv", 2),
    (depthwise, "Conv", 4),
    (transformer, "MatMul", 6),
    pytest.param(recurrent, "LSTM", 1, marks=pytest.mark.slow),
)


@pytest.mark.parametrize(("make", "op", "least"), WORKED)
def test_it_is_cut_and_its_integers_fuse(make, op, least, tmp_path):
    _, path = saved(make, tmp_path)
    opened = open_file(path)
    model = capture_module(opened.module, opened.example, opened.dynamic)
    rows = some(opened, 8)
    data = [({name: value[n] for name, value in rows.items()}, 0) for n in range(8)]
    task = paredown.Task(opened.example, score=paredown.accuracy, calibration=data)
    halved = paredown.apply(model, [paredown.PruneChannels(0.5)], task)
    count = [sum(each.numel() for each in of.parameters()) for of in (model, halved)]
    assert count[1] < 0.75 * count[0]
    small = paredown.apply(halved, [paredown.Quantize("int8")], task)
    made = paredown.export(small, paredown.Target(), tmp_path / "net.onnx")
    census = onnxruntime.census(Path(made.path))
    assert sum(n for name, n in census.integer_ops.items() if op in name or "Gemm" in name) >= least
    assert not census.unfused, census
    got = paredown.open(made.path)(*(value.numpy() for value in rows.values()))
    wanted = flat_list(small(**rows))
    assert np.abs(got[0] - wanted[0]).max() <= 0.05 * max(np.abs(wanted[0]).max(), 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings", "convolutions"),
    [
        ("MobileNetV2", {"alpha": 0.35}, 52),
        ("EfficientNetB0", {}, 81),
        ("ResNet50V2", {}, 53),
    ],
)
def test_a_net_of_keras_applications(name, settings, convolutions, tmp_path):
    def make():
        kind = getattr(keras.applications, name)
        return kind(input_shape=(32, 32, 3), weights=None, classes=4, **settings)

    model, path = saved(make, tmp_path)
    opened = open_file(path)
    assert not any("Keras's own code" in note for note in opened.notes)
    rows = some(opened, 4)
    captured = capture_module(opened.module, opened.example, opened.dynamic)
    assert not captured.notes
    with torch.no_grad():
        np.testing.assert_allclose(captured(**rows), predicted(model, rows)[0], atol=1e-4)
    data = [({key: value[n] for key, value in rows.items()}, 0) for n in range(4)]
    task = paredown.Task(opened.example, score=paredown.accuracy, calibration=data)
    small = paredown.apply(captured, [paredown.PruneChannels(0.5), paredown.Quantize("int8")], task)
    made = paredown.export(small, paredown.Target(), tmp_path / "net.onnx")
    assert onnxruntime.census(Path(made.path)).integer_ops["QLinearConv"] == convolutions


def test_names_are_keras_s_own(tmp_path):
    opened = open_file(saved(two_inputs, tmp_path)[1])
    assert [(each.name, each.shape) for each in opened.inputs] == [
        ("left", (None, 8)),
        ("right", (None, 4)),
    ]
    assert set(opened.outputs) == {"yes", "no"} and opened.kind is None
    names = {name.partition(".")[2] for name in opened.module.state_dict()}
    assert names == {"weight", "bias"}
    opened = open_file(saved(conv, tmp_path)[1])
    assert opened.kind == "classification" and "softmax" in opened.notes[-1]
    assert opened.card["architecture"] == "Sequential"


def test_a_file_of_hdf5_is_read_too(tmp_path):
    model, path = saved(conv, tmp_path, "net.h5")
    opened = open_file(path)
    inputs = some(opened)
    with torch.no_grad():
        mine = opened.module(**inputs).numpy()
    np.testing.assert_allclose(mine, predicted(model, inputs)[0], atol=1e-5)


def test_layers_without_a_like_stay_keras_s_own_and_are_told(tmp_path):
    def make():
        pixels = keras.Input((9, 9, 3))
        x = L.PReLU(shared_axes=[1, 2])(L.Conv2D(4, 3)(pixels))
        x = L.AveragePooling2D(3, 2, padding="same")(x)
        return keras.Model(pixels, keras.ops.mean(x * 2.0 + x, axis=(1, 2)))

    model, path = saved(make, tmp_path)
    opened = open_file(path)
    assert "computed by Keras's own code" in opened.notes[0] and "p_re_lu" in opened.notes[0]
    inputs = some(opened)
    captured = capture_module(opened.module, opened.example, opened.dynamic)
    np.testing.assert_allclose(
        captured(**inputs).detach().numpy(), predicted(model, inputs)[0], atol=1e-5
    )


def test_masks_are_followed_and_told(tmp_path):
    def make():
        ids = keras.Input((5,), dtype="int32")
        return keras.Model(ids, L.Dense(2)(L.LSTM(4)(L.Embedding(20, 4, mask_zero=True)(ids))))

    model, path = saved(make, tmp_path)
    opened = open_file(path)
    assert "a mask goes through the model" in opened.notes[0]
    inputs = {next(iter(opened.example)): torch.tensor([[3, 4, 0, 0, 0], [1, 2, 3, 4, 5]])}
    with torch.no_grad():
        mine = opened.module(**inputs).numpy()
    np.testing.assert_allclose(mine, predicted(model, inputs)[0], atol=1e-5)


def test_sizes_that_the_file_leaves_open_vary(tmp_path):
    def make():
        layers = [L.Conv2D(4, 3, padding="same"), L.ReLU(), L.GlobalAveragePooling2D(), L.Dense(2)]
        return keras.Sequential([keras.Input((None, None, 3)), *layers])

    _, path = saved(make, tmp_path)
    opened = open_file(path)
    assert opened.inputs[0].shape == (None, None, None, 3)
    assert any("32 long where the file leaves its size open" in note for note in opened.notes)
    captured = capture_module(opened.module, opened.example, opened.dynamic)
    wide = {opened.inputs[0].name: torch.rand(2, 20, 41, 3)}
    with torch.no_grad():
        torch.testing.assert_close(captured(**wide), opened.module(**wide))


def test_a_model_of_half_precision_is_told(tmp_path):
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        opened = open_file(saved(dense, tmp_path)[1])
    finally:
        keras.config.set_dtype_policy(policy)
    assert any("in 16 bits (mixed_float16), here in 32" in note for note in opened.notes)


def test_same_is_padded_as_keras_pads_it():
    for size in range(4, 12):
        for reach, stride in ((2, 1), (3, 2), (5, 3), (4, 2)):
            (total,) = convolutions.padding((size,), (reach,), (stride,))
            assert (size + total - reach) // stride + 1 == -(-size // stride)


# --- what is refused -------------------------------------------------------------------------


def rewritten(path, **members):
    """The same zip with other members."""
    with zipfile.ZipFile(path) as archive:
        held = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in (held | members).items():
            if data is not None:
                archive.writestr(name, data)


def with_config(path, how):
    with zipfile.ZipFile(path) as archive:
        config = json.loads(archive.read("config.json"))
    rewritten(path, **{"config.json": json.dumps(how(config))})


def as_lambda(config):
    layer = config["config"]["layers"][-1]
    layer |= {"class_name": "Lambda", "config": {"name": "trick", "function": "os.abort"}}
    return config


def as_own(config):
    layer = config["config"]["layers"][-1]
    layer |= {"class_name": "Mine", "module": "os", "registered_name": "Custom>Mine"}
    return config


REFUSED = {
    "a lambda": (lambda p: with_config(p, as_lambda), r"'trick' is a lambda, Python code that"),
    "a class of one's own": (
        lambda p: with_config(p, as_own),
        r"of a class of one's own, Custom>Mine, whose code is not in the file",
    ),
    "no zip": (lambda p: p.write_bytes(b"no zip"), r"is truncated or damaged .*download it again"),
    "cut": (
        lambda p: p.write_bytes(p.read_bytes()[:-500]),
        r"is truncated or damaged",
    ),
    "no config": (lambda p: rewritten(p, **{"config.json": None}), r"has no config.json"),
    "no JSON": (lambda p: rewritten(p, **{"config.json": "{"}), r"its config is no JSON"),
    "no model": (lambda p: rewritten(p, **{"config.json": "{}"}), r"its config is of no model"),
    "no weights": (
        lambda p: rewritten(p, **{"model.weights.h5": None}),
        r"keras [\d.]+ cannot read it: ",
    ),
    "other weights": (
        lambda p: rewritten(p, **{"model.weights.h5": b"none"}),
        r"is truncated or damaged",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused_is_told(what, tmp_path):
    how, said = REFUSED[what]
    _, path = saved(dense, tmp_path)
    how(path)
    with pytest.raises(UserError, match=said) as told:
        open_file(path)
    assert str(told.value).endswith(".") and "\n" not in str(told.value)


def test_a_real_lambda_is_refused_in_both_forms(tmp_path):
    for name in ("net.keras", "net.h5"):
        model = keras.Sequential([keras.Input((4,)), L.Lambda(lambda x: x * 2, name="doubled")])
        model.save(tmp_path / name)
        with pytest.raises(UserError, match=r"'doubled' is a lambda, Python code"):
            open_file(tmp_path / name)


def test_a_class_of_one_s_own_is_told(tmp_path):
    class Doubled(L.Layer):
        def call(self, x):
            return 2 * x

    keras.Sequential([keras.Input((4,)), Doubled()]).save(tmp_path / "own.keras")
    with pytest.raises(UserError, match=r"is of a class of one's own, .*Doubled"):
        open_file(tmp_path / "own.keras")


def test_weights_alone_are_told(tmp_path):
    saved(dense, tmp_path)[0].save_weights(tmp_path / "net.weights.h5")
    with pytest.raises(UserError, match=r"holds weights without their model; build it in Python"):
        open_file(tmp_path / "net.weights.h5")
    (tmp_path / "cut.h5").write_bytes(b"\x89HDF\r\n")
    with pytest.raises(UserError, match=r"cut.h5: is truncated or damaged"):
        open_file(tmp_path / "cut.h5")


def test_weights_in_another_file_are_never_read(tmp_path):
    import h5py

    _, path = saved(dense, tmp_path, "net.h5")
    for name, link in (
        ("away", h5py.ExternalLink(str(tmp_path / "secret.h5"), "/x")),
        ("soft", h5py.SoftLink("/model_weights")),
    ):
        with h5py.File(path, "a") as file:
            file[name] = link
        with pytest.raises(UserError, match=rf"{name} points elsewhere"):
            open_file(path)
        with h5py.File(path, "a") as file:
            del file[name]
    (tmp_path / "raw").write_bytes(bytes(64))
    with h5py.File(path, "a") as file:
        file.create_dataset("far", (16,), "f4", external=[(str(tmp_path / "raw"), 0, 64)])
    with pytest.raises(UserError, match=r"far lies in another file"):
        open_file(path)


def test_texts_are_told(tmp_path):
    def as_texts(config):
        config["config"]["layers"][0]["config"]["dtype"] = "string"
        return config

    def make():
        return keras.Sequential([keras.Input((4,), dtype="int32"), L.Embedding(9, 2), L.Flatten()])

    _, path = saved(make, tmp_path)
    with_config(path, as_texts)
    with pytest.raises(UserError, match=r"takes texts, which no runtime's file does"):
        open_file(path)


def test_another_backend_is_told_and_the_environment_comes_back(tmp_path):
    code = (
        "import sys, types\n"
        "made = types.ModuleType('keras')\n"
        "made.config = types.SimpleNamespace(backend=lambda: 'jax')\n"
        "sys.modules['keras'] = made\n"
        "from paredown.graph.doors.keras import loaded\n"
        "loaded.library()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "imported with KERAS_BACKEND=jax; expected torch: set KERAS_BACKEND=torch" in done.stderr
    before = dict(os.environ)
    assert loaded.library() is keras and dict(os.environ) == before
