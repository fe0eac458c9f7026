"""A TensorFlow model reaches the door for ONNX files through tf2onnx, as docs/doors.md says.

TensorFlow need not be where the tests run: PAREDOWN_TENSORFLOW names the Python of an environment
that has it, with tf2onnx beside it; without that, the one that runs is asked.
"""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import paredown
from paredown.graph.doors.files import DOORS

TENSORFLOW = os.environ.get("PAREDOWN_TENSORFLOW", sys.executable)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(".onnx" not in DOORS, reason="there is no door for ONNX files"),
]

MAKE = """
import sys

import numpy as np
import tensorflow as tf

folder = sys.argv[1]
tf.random.set_seed(0)
draw = np.random.default_rng(0)


class Net(tf.Module):
    def __init__(self):
        self.kernel = tf.Variable(draw.normal(size=(3, 3, 3, 8)).astype("float32"))
        self.scale = tf.Variable(draw.uniform(0.5, 1, 8).astype("float32"))
        self.head = tf.Variable(draw.normal(size=(8, 4)).astype("float32"))

    @tf.function(input_signature=[tf.TensorSpec((None, 16, 16, 3), tf.float32, name="pixels")])
    def __call__(self, pixels):
        x = tf.nn.conv2d(pixels, self.kernel, strides=2, padding="SAME")
        x, *_ = tf.nn.relu(x * self.scale), None
        x = tf.nn.max_pool2d(x, 3, 2, "SAME")
        return {"logits": tf.reduce_mean(x, (1, 2)) @ self.head}


net = Net()
tf.saved_model.save(net, f"{folder}/saved")
small = tf.lite.TFLiteConverter.from_saved_model(f"{folder}/saved").convert()
open(f"{folder}/net.tflite", "wb").write(small)
pixels = draw.normal(size=(3, 16, 16, 3)).astype("float32")
np.savez(f"{folder}/samples.npz", pixels=pixels, logits=net(pixels)["logits"].numpy())
"""


def in_tensorflow(*words):
    """Run a Python that has TensorFlow; the environment of ours would shadow what it has."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [TENSORFLOW, *words], env=kept, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a SavedModel, a file for TensorFlow Lite, and samples with their outputs."""
    asked = subprocess.run(
        [TENSORFLOW, "-c", "import tensorflow, tf2onnx"], capture_output=True, check=False
    )
    if asked.returncode:
        pytest.skip("neither here nor at PAREDOWN_TENSORFLOW are tensorflow and tf2onnx installed")
    folder = tmp_path_factory.mktemp("tensorflow")
    in_tensorflow("-c", MAKE, str(folder))
    return folder


@pytest.mark.parametrize("given", [("--saved-model", "saved"), ("--tflite", "net.tflite")])
def test_it_comes_in_through_tf2onnx_and_computes_the_same(given, made, tmp_path):
    option, name = given
    path = tmp_path / "net.onnx"
    convert = ("-m", "tf2onnx.convert", option, str(made / name), "--opset", "17")
    in_tensorflow(*convert, "--output", str(path))
    samples = np.load(made / "samples.npz")
    pixels, wanted = torch.from_numpy(samples["pixels"]), samples["logits"]
    model = paredown.capture(path, (pixels[:1],))
    found = model(**{model.inputs[0].name: pixels})
    found = next(iter(found.values())) if isinstance(found, dict) else found
    np.testing.assert_allclose(found.detach().numpy(), wanted, rtol=1e-4, atol=1e-4)
    data = [({model.inputs[0].name: pixel}, 0) for pixel in pixels]
    task = paredown.Task(
        {model.inputs[0].name: pixels[:1]}, score=paredown.accuracy, calibration=data
    )
    small = paredown.apply(model, [paredown.Quantize("int8")], task)
    file = paredown.export(small, paredown.Target(), tmp_path / "small.onnx")
    (got,) = paredown.open(file.path)(pixels.numpy())
    assert np.abs(got - wanted).max() < 0.1 * np.abs(wanted).max()
