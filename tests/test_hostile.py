"""Files that others made: damaged, or made to do harm. Whatever they hold, a sentence comes back.

``PAREDOWN_SOAK=N`` opens 100 N mutations of each format in place of a few.
"""

import os
import random
import subprocess
import sys
import time

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from torch import nn

import paredown
from paredown import Target
from paredown.core import cache
from paredown.core.errors import UserError
from paredown.core.results import Run
from paredown.graph.doors.onnx import wire
from paredown.graph.model import Model
from paredown.steps import recipe
from paredown.targets import foreign
from paredown.targets.runtimes import RUNTIMES, runtime

MUTATIONS = 100 * int(os.environ.get("PAREDOWN_SOAK", "0")) or 25
LONGEST_S = 10.0  # that a file of some kilobytes may take


@pytest.fixture(autouse=True)
def nothing_is_known(monkeypatch):
    monkeypatch.setenv(cache.VARIABLE, cache.OFF)


def outside(folder, location="w.bin", offset=None, length=None, name="model.onnx"):
    """An ONNX file whose weight lies where it says, and 64 bytes of weights in ``w.bin``."""
    weight = helper.make_tensor("w", onnx.TensorProto.FLOAT, [16], np.zeros(16, np.float32))
    weight.ClearField("float_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        if value is not None:
            weight.external_data.add(key=key, value=str(value))
    ends = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [16]) for n in "xy"]
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])], "g", ends[:1], ends[1:], [weight]
    )
    opset = [helper.make_opsetid("", 20)]
    made = helper.make_model(graph, opset_imports=opset, ir_version=10)
    (folder / "w.bin").write_bytes(np.arange(16, dtype=np.float32).tobytes())
    (folder / name).write_bytes(made.SerializeToString())
    return folder / name


def test_weights_beside_a_file_are_read(tmp_path):
    for given in ({}, {"offset": 0, "length": 64}):
        found = paredown.open(outside(tmp_path, **given))(np.zeros(16, np.float32))[0]
        assert np.array_equal(found, np.arange(16))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"location": "../secret.bin"}, "in another folder"),
        ({"location": "/etc/hostname"}, "in another folder"),
        ({"location": "inner/../../secret.bin"}, "in another folder"),
        ({"location": "*/_ORT_MEM_ADDR_/*", "offset": 4096, "length": 64}, "in another folder"),
        ({"location": ".."}, "in another folder"),
        ({"location": ""}, "which names no file"),
        ({"location": "a\0b"}, "which names no file"),
        ({"location": "gone.bin"}, "which is missing beside it"),
        ({"location": "folder"}, "which is a link or no file"),
        ({"location": "link.bin"}, "which is a link or no file"),
        ({"location": "hard.bin"}, "which is a link or no file"),
        ({"offset": -64, "length": 64}, "is damaged, or belongs to another model"),
        ({"offset": 0, "length": 2**50}, "is damaged, or belongs to another model"),
        ({"offset": 32, "length": 64}, "is damaged, or belongs to another model"),
        ({"length": -1}, "is damaged, or belongs to another model"),
        ({"offset": "four"}, "is no ONNX file, or a damaged one"),
    ],
)
def test_a_file_reads_no_other_than_its_own(tmp_path, given, said):
    secret = tmp_path / "secret.bin"
    secret.write_bytes(bytes(64))
    here = tmp_path / "here"
    (here / "folder").mkdir(parents=True)
    (here / "inner").mkdir()
    (here / "link.bin").symlink_to(secret)
    os.link(secret, here / "hard.bin")
    file = outside(here, **given)
    for use in (paredown.open, paredown.pack):
        if use is paredown.pack and said.startswith("is no ONNX"):
            continue  # packed as any other bytes
        with pytest.raises(UserError, match=said):
            use(file)
    assert not list(here.glob("*.pare"))


def test_tensors_are_found_wherever_a_file_may_hold_them(tmp_path):
    """In nodes, in graphs within them, in sparse tensors, functions and what is for training."""
    model = onnx.load(outside(tmp_path, "0.bin"), load_external_data=False)
    weight = model.graph.initializer[0]

    def named(place):
        made = onnx.TensorProto()
        made.CopyFrom(weight)
        made.external_data[0].value = f"{place}.bin"
        return made

    inner = helper.make_graph([], "inner", [], [], [named(1)])
    node = helper.make_node("If", ["c"], ["z"], then_branch=inner)
    node.attribute.append(helper.make_attribute("value", named(2)))
    node.attribute.add(
        name="s", type=onnx.AttributeProto.SPARSE_TENSOR
    ).sparse_tensor.values.CopyFrom(named(3))
    model.graph.node.append(node)
    model.graph.sparse_initializer.add().indices.CopyFrom(named(4))
    model.functions.add().node.add().attribute.append(helper.make_attribute("value", named(5)))
    model.training_info.add().algorithm.initializer.append(named(6))
    (tmp_path / "all.onnx").write_bytes(model.SerializeToString())
    found = {each.location for each in wire.outside(tmp_path / "all.onnx")}
    assert found == {f"{place}.bin" for place in range(7)}


def message(field, data):
    """A field of a protocol buffer that is a message itself."""
    length, size = b"", len(data)
    while size > 127:
        length, size = length + bytes([size & 127 | 128]), size >> 7
    return bytes([field << 3 | 2]) + length + bytes([size]) + data


def test_graphs_within_graphs_have_an_end(tmp_path):
    graph = b""
    for _ in range(wire.MAX_DEPTH + 2):  # in an attribute, that in a node, that in a graph
        graph = message(1, message(5, message(6, graph)))
    file = tmp_path / "deep.onnx"
    file.write_bytes(message(7, graph))  # the model's
    with pytest.raises(UserError, match="more than 64 deep"):
        paredown.open(file)


def test_a_file_that_ends_its_runtime_ends_a_child_alone(tmp_path):
    """Of an OpenVINO file its elements lie deeper in each other than its parser's stack is."""
    file = tmp_path / "deep.xml"
    depth = 300_000
    file.write_text('<?xml version="1.0"?><net name="n" version="11">' + "<a>" * depth)
    file.with_suffix(".bin").write_bytes(b"")
    code = (
        "import sys, paredown\n"
        "from paredown.core.errors import UserError\n"
        "try: paredown.open(sys.argv[1])\n"
        "except UserError as error: print('told:', error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and done.stdout.startswith("told:"), done.stderr[-500:]


# --- mutations -------------------------------------------------------------------------------


def mutated(data, rng):
    """The bytes with some of them flipped, gone, repeated, put between, or made large numbers."""
    made = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5, 20])):
        at, how = rng.randrange(max(1, len(made))), rng.randrange(6)
        if how == 0:
            made[at] ^= 1 << rng.randrange(8)
        elif how == 1:
            made[at] = rng.choice([0, 1, 127, 128, 255])
        elif how == 2:
            del made[at : at + rng.choice([1, 4, 64, 1000])]
        elif how == 3:
            made[at:at] = rng.randbytes(rng.choice([1, 4, 16]))
        elif how == 4:
            other = rng.randrange(max(1, len(made)))
            made[at : at + 16] = made[other : other + 16]
        else:
            made[at : at + 8] = (2 ** rng.choice([31, 32, 50, 63]) - 1).to_bytes(8, "little")
        made = made or bytearray(1)
    return bytes(made)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A file of each format, of a small net."""
    folder = tmp_path_factory.mktemp("whole")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
    model = paredown.capture(net, (torch.randn(1, 1, 8, 8),))
    for name in RUNTIMES:
        paredown.export(model, Target(runtime=name), folder / f"{name}{runtime(name).SUFFIX}")
    model.save(folder / "model.safetensors")
    paredown.pack(folder / "onnxruntime.onnx", folder / "model.pare")
    steps = [paredown.PruneChannels(0.3), paredown.FineTune(epochs=1), paredown.Quantize("int8")]
    (folder / "recipe.toml").write_text(recipe.to_toml(steps))
    return folder


def bounded(use, mutations, file, data):
    """Use mutations of a file; how many were refused in a sentence. Anything else is an error."""
    rng, refused = random.Random(0), 0
    for number in range(mutations):
        file.write_bytes(mutated(data, rng))
        began = time.monotonic()
        try:
            use(file)
        except UserError:
            refused += 1
        assert time.monotonic() - began < LONGEST_S, number
    return refused


@pytest.mark.parametrize("name", RUNTIMES)
def test_mutations_of_an_artifact_open_or_are_refused(whole, tmp_path, name):
    kind = runtime(name)
    file = tmp_path / f"mutated{kind.SUFFIX}"
    for companion in kind.COMPANIONS:
        beside = (whole / name).with_suffix(companion)
        file.with_suffix(companion).write_bytes(beside.read_bytes())
    data = (whole / f"{name}{kind.SUFFIX}").read_bytes()
    assert bounded(lambda file: foreign.check(file, name), MUTATIONS, file, data) > MUTATIONS / 10


@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("model.safetensors", Model.load),
        ("model.pare", lambda file: paredown.unpack(file, file.parent / "out")),
        ("onnxruntime.onnx", lambda file: paredown.pack(file, file.parent / "made.pare")),
        ("recipe.toml", recipe.load),
    ],
)
def test_mutations_of_what_is_read_here_are_read_or_refused(whole, tmp_path, name, use):
    file = tmp_path / name
    bounded(use, 4 * MUTATIONS, file, (whole / name).read_bytes())


def test_mutations_of_a_run_are_read_or_refused(tmp_path):
    text = b'{"name": "n", "trials": [], "target": {"threads": 1}, "goals": {"size": "0.3x"}}'
    bounded(lambda file: Run.load(file.parent), 4 * MUTATIONS, tmp_path / "run.json", text)
    (tmp_path / "run.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="is damaged"):
        Run.load(tmp_path)
