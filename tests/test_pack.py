"""The container for delivery: the same bits back, as small as the entropy, and nothing trusted."""

import hashlib
import importlib
import lzma
import math
import os
import random
import resource
import struct
import subprocess
import sys
import zlib

import numpy as np
import onnx
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from torch import nn

import paredown
from paredown.core.errors import UserError
from paredown.ship.pack import blocks, entropy, find, groups, index, multiples, weights
from paredown.ship.pack.blocks import Layout
from paredown.ship.pack.container import contents, pack, packed_bytes, unpack
from paredown.ship.pack.entropy import Damaged

RNG = np.random.default_rng(0)
W = RNG.normal(0, 0.05, (256, 576)).astype(np.float32)


def pruned(weights, share):
    return np.where(np.abs(weights) < np.quantile(np.abs(weights), share), 0, weights)


def two_of_four(weights):
    groups = weights.reshape(-1, 4).copy()
    np.put_along_axis(groups, np.argsort(np.abs(groups), 1)[:, :2], 0, 1)
    return groups.reshape(weights.shape)


def shared(weights, count):
    values = np.linspace(weights.min(), weights.max(), count).astype(np.float32)
    return values[np.abs(weights[..., None] - values).argmin(-1)]


def int8(weights):
    return np.rint(weights / np.abs(weights).max(1, keepdims=True) * 127).astype(np.int8)


def smooth(rows, columns):
    """int8 weights of which each resembles the one before it."""
    values = RNG.normal(0, 1, (rows, columns))
    for column in range(1, columns):
        values[:, column] += 0.9 * values[:, column - 1]
    return int8(values)


KINDS = {
    "float32": W,
    "float16": W.astype(np.float16),
    "pruned": pruned(W, 0.9),
    "two_of_four": two_of_four(W),
    "shared": shared(W, 16),
    "pruned_shared": np.where(pruned(W, 0.9) == 0, 0, shared(W, 16)).astype(np.float32),
    "int8": int8(W),
    "int8_two_of_four": int8(two_of_four(W)),
    "int8_turned": np.ascontiguousarray(int8(two_of_four(W)).T),
}


def layout(array):
    return Layout(array.itemsize, array.shape[1], array.dtype.kind == "f")


def packed(array):
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    made = blocks.encode(data, layout(array))
    assert np.array_equal(blocks.decode(made, len(data)), data)
    return made


def bound_bits(array):
    """The entropy of the values; of floats that of sign and exponent, the fraction in full; of
    2:4 zeros that of their patterns."""
    zeros = array == 0
    groups = zeros.reshape(-1, 4) @ np.array([1, 2, 4, 8])
    pattern = entropy.entropy_bits(np.bincount(groups))
    kept = array[~zeros]
    values, counts = np.unique(kept, return_counts=True)
    if len(values) <= 2048:
        whole = entropy.entropy_bits(np.unique(array, return_counts=True)[1])
        return min(whole, pattern + entropy.entropy_bits(counts))
    turned = kept.view(f"<u{kept.itemsize}")
    planes = turned.view(np.uint8).reshape(len(kept), -1).T
    exponents = kept.view(np.uint32) << 1 >> 24 if kept.itemsize == 4 else planes[1] & 127
    fraction = (24 if kept.itemsize == 4 else 9) * len(kept)
    bits = entropy.entropy_bits(np.unique(exponents, return_counts=True)[1]) + fraction
    return bits + (pattern if zeros.any() else 0)


# --- one block -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_takes_what_its_entropy_says(kind):
    array = KINDS[kind]
    if kind == "int8_turned":
        bits = bound_bits(np.ascontiguousarray(array.T))
    else:
        bits = bound_bits(array)
    assert 8 * len(packed(array)) <= 1.01 * bits + 8 * 400  # tables of frequencies aside


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_is_no_larger_than_what_others_make_of_it(kind):
    array = np.ascontiguousarray(KINDS[kind])
    made = len(packed(array))
    assert made < len(zstandard.compress(array.tobytes(), 19))
    assert made < len(lzma.compress(array.tobytes(), preset=9 | lzma.PRESET_EXTREME))


def test_rows_of_different_spread_have_their_own_tables():
    spread = np.exp(RNG.normal(0, 0.8, (256, 1)))
    array = np.clip(np.rint(RNG.normal(0, 12, (256, 1024)) * spread), -127, 127).astype(np.int8)
    whole = entropy.entropy_bits(np.unique(array, return_counts=True)[1])
    rows = sum(entropy.entropy_bits(np.unique(row, return_counts=True)[1]) for row in array)
    bits = 8 * len(packed(array))
    assert bits < 0.97 * whole and bits < 1.03 * rows


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([1, 2, 4, 8]),
    st.integers(0, 700),
    st.integers(0, 40),
    st.booleans(),
    st.integers(1, 300),
    st.integers(0, 2**32 - 1),
)
def test_any_block_comes_back(width, count, columns, floats, values, seed):
    rng = np.random.default_rng(seed)
    table = rng.integers(0, 2**63, values, np.uint64).astype(f"<u{width}")
    array = rng.choice(table, count) * rng.integers(0, 2, count).astype(f"<u{width}")
    data = array.astype(f"<u{width}").view(np.uint8)
    fits = columns if columns and count % columns == 0 else 0
    made = blocks.encode(data, Layout(width, fits, floats))
    assert np.array_equal(blocks.decode(made, len(data)), data) and len(made) <= len(data) + 1


def test_bytes_that_no_one_can_shorten_cost_one_more():
    data = RNG.integers(0, 256, 5000, np.uint8)
    assert len(blocks.encode(data, Layout(1, 500))) == 5001


def test_a_few_symbols_of_many():
    symbols = np.array([[0, 4095, 7, 7]], np.uint16)
    coded = entropy.encode(symbols, entropy.plan(symbols, 4096))
    assert np.array_equal(entropy.decode(coded, 1, 4), symbols)


# --- quantized tensors and their scales ------------------------------------------------------


def coded_bits(array):
    data = array.reshape(-1).view(np.uint8)
    chunk = groups.encode(data, Layout(shapes=(array.shape,)))
    assert np.array_equal(groups.decode(chunk, len(data)), data)
    return 8 * len(chunk)


@pytest.mark.parametrize("axis", [0, 1])
def test_weights_that_resemble_their_neighbours(axis):
    """Far below the entropy of their values, along rows or columns."""
    array = np.ascontiguousarray(np.swapaxes(smooth(256, 64), 0, axis))
    plain = entropy.entropy_bits(np.unique(array, return_counts=True)[1])
    assert coded_bits(array) < 0.9 * plain


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1)])  # of ONNX, and of LiteRT
def test_kernels_whose_taps_resemble_each_other(order):
    kernels = RNG.normal(0, 1, (64, 32, 3, 3)) + RNG.normal(0, 2, (64, 32, 1, 1))
    array = np.ascontiguousarray(int8(kernels.reshape(64, -1)).reshape(64, 32, 3, 3))
    array = np.ascontiguousarray(array.transpose(order))
    plain = entropy.entropy_bits(np.unique(array, return_counts=True)[1])
    assert coded_bits(array) < 0.95 * plain


def test_dead_rows_and_columns_cost_little():
    array = int8(W[:128, :128])
    array[RNG.permutation(128)[:80]] = 0
    array[:, RNG.permutation(128)[:60]] = 0
    live = array[array.any(1)][:, array.any(0)]
    plain = entropy.entropy_bits(np.unique(live, return_counts=True)[1])
    assert coded_bits(array) < 1.3 * plain


def test_weights_without_a_pattern_cost_no_more_than_their_entropy():
    array = int8(W)
    plain = entropy.entropy_bits(np.unique(array, return_counts=True)[1])
    assert coded_bits(array) < 1.004 * plain + 8 * 250


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=4), min_size=1, max_size=5),
    st.integers(1, 256),
    st.integers(0, 2**32 - 1),
)
def test_any_tensors_come_back(shapes, values, seed):
    rng = np.random.default_rng(seed)
    data = rng.integers(0, values, sum(map(math.prod, shapes)), np.uint8)
    hows, at = [], 0
    for shape in shapes:
        tensor = data[at : at + math.prod(shape)]
        hows.append(weights.chosen(tensor, tuple(shape))[0])
        at += len(tensor)
    assert np.array_equal(weights.decode(weights.encode(data, hows), len(data)), data)


def test_scales_of_a_bias_are_not_stored_again():
    """Nor the range of a quantized tensor, of which one end is 127 times the scale."""
    scales = np.exp(RNG.normal(size=200)).astype(np.float32)
    bias = scales * np.float32(0.0123)
    ends = np.where(RNG.random(200) < 0.5, 127, RNG.uniform(90, 127, 200)) * scales
    vectors = [scales, bias, ends.astype(np.float32), np.array([0, np.nan, np.inf, -0.0], "<f4")]
    data = np.concatenate(vectors).view(np.uint8)
    lengths = [len(each) for each in vectors]
    assert np.array_equal(multiples.decode(multiples.encode(data, lengths), len(data)), data)
    alone = len(multiples.encode(scales.view(np.uint8), [200]))
    assert len(multiples.encode(data[:1600], [200, 200])) < alone + 30
    assert len(multiples.encode(data, lengths)) < alone + 0.65 * 800


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([254, 255]), st.binary(max_size=300), st.integers(0, 100_000))
def test_coded_tensors_of_anyone(tag, data, size):
    try:
        assert groups.decode(bytes([tag]) + data, size).nbytes == size
    except Damaged:
        pass
    except BaseException as error:  # what the container catches
        known = (ValueError, TypeError, IndexError, OverflowError, MemoryError)
        assert isinstance(error, known) or type(error).__name__ == "PanicException"


@pytest.mark.parametrize("size", [1, 40, 5000])
def test_what_is_strange_is_no_larger_than_others_make_of_it(size, tmp_path):
    """But for the name and the SHA-256 that a container holds."""
    for number, data in enumerate([RNG.bytes(size), b"one two three " * size, bytes(size)]):
        path = tmp_path / f"{number}.onnx"
        path.write_bytes(data)
        made = pack(path).stat().st_size - len(path.name) - 32
        assert made <= len(zstandard.compress(data, 19)) + 32
        assert made <= len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))


# --- files -----------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 64, 3), nn.Linear(64, 300)

    def forward(self, x):
        return self.head(self.conv(x).relu().mean((2, 3)))


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """Name -> a file of each runtime that is there."""
    folder = tmp_path_factory.mktemp("artifacts")
    torch.manual_seed(0)
    model = paredown.capture(Net(), (torch.randn(1, 3, 8, 8),))
    onnx_file = paredown.export(model, paredown.Target(), folder / "model.onnx").path
    model.save(folder / "model.safetensors")
    text = folder / "model.xml"
    text.write_text("<net>" + "<layer id='1'/>" * 300 + "</net>")
    noise = folder / "model.bin"
    noise.write_bytes(W.tobytes() + int8(W).tobytes() + b"the end")
    return [folder / name for name in (onnx_file, "model.safetensors", text, noise)]


def test_every_file_comes_back_bit_for_bit(artifacts, tmp_path):
    for path in (each for each in artifacts if each.suffix != ".xml"):
        made = pack(path, tmp_path / f"{path.name}.pare")
        found = contents(made)
        assert found.files[0].name == path.name and found.size_bytes == path.stat().st_size
        assert found.files[0].sha256 == hashlib.sha256(path.read_bytes()).digest()
        assert sum(part.size_bytes for part in found.parts) == path.stat().st_size
        back = unpack(made, tmp_path / "back")
        assert back.read_bytes() == path.read_bytes() and back.name == path.name
        again = pack(path, tmp_path / "again.pare")
        assert again.read_bytes() == made.read_bytes()
        raw = path.read_bytes()
        assert made.stat().st_size < len(zstandard.compress(raw, 19))
        assert made.stat().st_size < len(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME))


def test_several_files_go_together(artifacts, tmp_path, monkeypatch):
    container = importlib.import_module("paredown.ship.pack.container")
    monkeypatch.setattr(container, "parts", lambda path: artifacts[2:])
    made = pack(artifacts[2], tmp_path / "all.pare")
    back = unpack(made, tmp_path / "back")
    assert back.name == "model.xml" and back.read_bytes() == artifacts[2].read_bytes()
    assert (tmp_path / "back" / "model.bin").read_bytes() == artifacts[3].read_bytes()


def test_the_same_tensor_is_stored_once(tmp_path):
    tensors = [numpy_helper.from_array(W, name) for name in ("a", "b", "c")]
    nodes = [helper.make_node("Add", ["a", "b"], ["y"])]
    graph = helper.make_graph(nodes, "g", [], [], tensors)
    path = tmp_path / "model.onnx"
    path.write_bytes(helper.make_model(graph).SerializeToString())
    made = pack(path)
    assert made.stat().st_size < 1.1 * len(packed(W))
    assert any("once for 3" in part.coding for part in contents(made).parts)
    assert unpack(made, tmp_path / "back").read_bytes() == path.read_bytes()


def test_tensors_are_found(artifacts):
    for path in artifacts[:2]:
        data = np.frombuffer(path.read_bytes(), np.uint8)
        found = {(t.end - t.start, t.layout) for t in find.tensors(path, data)}
        assert (64 * 300 * 4, Layout(4, 64, True)) in found
        assert (64 * 27 * 4, Layout(4, 27, True)) in found
    loaded = onnx.load(str(artifacts[0]))
    assert len(loaded.graph.initializer) >= 4


@pytest.mark.parametrize("text", [b"", b"\x08", b"\x3a\xff\xff\xff\xff\x0f", b"TFL3" * 20])
def test_a_file_that_is_not_what_its_name_says(text, tmp_path):
    for suffix in (".onnx", ".safetensors", ".tflite", ".weights"):
        path = tmp_path / f"model{suffix}"
        path.write_bytes(b"\x10\x00\x00\x00" + text)
        assert unpack(pack(path), tmp_path / "back").read_bytes() == path.read_bytes()


def test_open_takes_a_container(artifacts, tmp_path):
    x = RNG.normal(size=(2, 3, 8, 8)).astype(np.float32)
    for path in artifacts[:2]:
        predictor = paredown.open(pack(path, tmp_path / f"{path.name}.pare"))
        assert np.array_equal(predictor(x)[0], paredown.open(path)(x)[0])
    del predictor


def test_memory_stays_bounded(tmp_path):
    """Packing and unpacking 64 MB takes little more than a chunk at a time."""
    path = tmp_path / "large.bin"
    with path.open("wb") as stream:
        for _ in range(8):
            stream.write(RNG.normal(0, 1, 2**21).astype(np.float32).tobytes())
    code = """
import sys
from paredown import pack, unpack
made = pack(sys.argv[1])
unpack(made, sys.argv[2])
status = open("/proc/self/status").read()
anonymous = int(status.split("RssAnon:")[1].split()[0])
print(anonymous)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(path), str(tmp_path / "back")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) < 400_000  # KB
    assert (tmp_path / "back" / "large.bin").stat().st_size == path.stat().st_size


# --- what is not trusted ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def container(tmp_path_factory):
    """A small file of every coding, packed."""
    folder = tmp_path_factory.mktemp("container")
    parts = [KINDS[kind][:48, :64] for kind in ("float32", "pruned", "shared")]
    scales = np.exp(RNG.normal(size=40)).astype(np.float32)
    parts += [smooth(64, 40), scales, scales * np.float32(0.07)]
    state = {f"p{n}": torch.from_numpy(np.ascontiguousarray(p)) for n, p in enumerate(parts)}
    from safetensors.torch import save_file

    save_file(state, folder / "model.safetensors")
    packed = pack(folder / "model.safetensors")
    codings = {part.coding for part in contents(packed).parts}
    assert codings >= {"neighbours", "multiples", "few values", "zeros apart", "byte planes"}
    return packed


def refused(data, folder, good=None):
    """Whether the container is refused in plain words, leaving nothing behind; or, where the change
    is of no consequence, holds the good file."""
    path = folder / "broken.pare"
    path.write_bytes(data)
    out = folder / "out"
    try:
        made = unpack(path, out)
    except UserError as error:
        text = str(error)
        assert text.startswith(str(path)) and "\n" not in text and len(text) < 400
        assert not out.exists() or not list(out.iterdir())
        return True
    same = good is not None and made.read_bytes() == good
    made.unlink()
    return same


def mutated(data, rng):
    """A few bytes changed, cut out, put in or swapped."""
    made = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(made))
        kind = rng.randrange(5)
        if kind == 0:
            made[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            made[at] = rng.randrange(256)
        elif kind == 2:
            del made[at : at + rng.randint(1, 64)]
        elif kind == 3:
            made[at:at] = rng.randbytes(rng.randint(1, 16))
        else:
            other = rng.randrange(len(made))
            made[at], made[other] = made[other], made[at]
        made = made or bytearray(b"\0")
    return bytes(made)


def with_new_crc(data):
    """The same damage with a checksum that fits, so that it reaches what lies behind."""
    head = struct.Struct("<4sBIII")
    if len(data) < head.size:
        return data
    magic, version, packed_bytes, _, size = head.unpack_from(data)
    crc = zlib.crc32(data[head.size : head.size + packed_bytes])
    return head.pack(magic, version, packed_bytes, crc, size) + data[head.size :]


@pytest.mark.parametrize(
    ("seed", "count"), [(0, 2_000), pytest.param(1, 10_000, marks=pytest.mark.slow)]
)
def test_thousands_of_mutations(container, tmp_path, seed, count):
    data, rng = container.read_bytes(), random.Random(seed)
    good = unpack(container, tmp_path / "good").read_bytes()
    for number in range(count):
        changed = mutated(data, rng)
        if number % 2:
            changed = with_new_crc(changed)
        assert refused(changed, tmp_path, good), number


def mutated_index(container, rng):
    """An index whose numbers were changed, its checksum right and the chunks as they were."""
    data = container.read_bytes()
    length = index.head_bytes(data)
    size = struct.unpack_from("<I", data, 13)[0]
    stored = data[17:length]
    body = bytearray(stored if len(stored) == size else entropy.inflate(stored, size))
    for _ in range(rng.randint(1, 3)):
        body[rng.randrange(len(body))] = rng.choice([0, 1, 2, 4, 127, 128, 255, rng.randrange(256)])
    packed_body = entropy.deflate(bytes(body))
    head = struct.pack("<4sBIII", b"PARE", 2, len(packed_body), zlib.crc32(packed_body), len(body))
    return head + packed_body + data[length:]


def test_an_index_that_lies(container, tmp_path):
    """It may call the file by another name, and describe what no one decodes by, but no more."""
    good, rng = unpack(container, tmp_path / "good").read_bytes(), random.Random(1)
    for number in range(2000):
        assert refused(mutated_index(container, rng), tmp_path, good), number


def test_every_length_is_refused_but_the_whole(container, tmp_path):
    data = container.read_bytes()
    for length in range(0, len(data), 97):
        assert refused(data[:length], tmp_path), length
    assert refused(data + b"\0", tmp_path) and not refused(data, tmp_path)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300), st.integers(0, 100_000))
def test_coded_bytes_of_anyone(data, size):
    try:
        assert blocks.decode(data, size).nbytes == size
    except Damaged:
        pass
    except BaseException as error:  # what the container catches
        known = (ValueError, TypeError, IndexError, OverflowError, MemoryError)
        assert isinstance(error, known) or type(error).__name__ == "PanicException"


def container_of(name=b"a.onnx", size=4, sha=None, ranges=((0, 4),), chunk=None, flags=1):
    """A container written by hand."""
    chunk = blocks.encode(np.zeros(4, np.uint8), Layout()) if chunk is None else chunk
    sha = hashlib.sha256(bytes(4)).digest() if sha is None else sha
    stream = index.Stream(Layout(), tuple(ranges), False, (len(chunk),))
    made = index.Index((index.File(name.decode(), size, sha),), (stream,))
    return index.write(made) + chunk


def test_the_hand_written_one_is_good(tmp_path):
    assert not refused(container_of(), tmp_path)


@pytest.mark.parametrize(
    "name", [b"../a.onnx", b"/etc/passwd", b"a/b", b"..", b".hidden", b"a\nb", b"C:\\x", b" " * 201]
)
def test_names_that_reach_out(name, tmp_path):
    assert refused(container_of(name), tmp_path)


@pytest.mark.parametrize(
    "wrong",
    [
        dict(size=5),
        dict(ranges=((0, 3),)),
        dict(ranges=((0, 4), (4, 8))),
        dict(sha=bytes(32)),
        dict(chunk=b""),
        dict(chunk=bytes([99, 0, 0])),
        dict(size=2**62, ranges=((0, 2**62),)),
    ],
)
def test_what_does_not_add_up(wrong, tmp_path):
    assert refused(container_of(**wrong), tmp_path)


def test_a_container_that_claims_to_be_huge(tmp_path):
    chunks = 1 << 9
    size = chunks * index.CHUNK
    chunk = blocks.encode(np.zeros(index.CHUNK, np.uint8), Layout())
    stream = index.Stream(Layout(), ((0, size),), False, (len(chunk),) * chunks)
    made = index.Index((index.File("a.onnx", size, bytes(32)),), (stream,))
    (tmp_path / "bomb.pare").write_bytes(index.write(made) + chunk * chunks)
    with pytest.raises(UserError, match=r"claims to hold 4\.3 GB in 0\.\d MB"):
        unpack(tmp_path / "bomb.pare", tmp_path / "out")


# --- the disk and the user -------------------------------------------------------------------


def test_a_full_disk_leaves_nothing(tmp_path):
    path = tmp_path / "model.bin"
    path.write_bytes(RNG.bytes(200_000))
    code = """
import resource, signal, sys
from paredown import pack
from paredown import UserError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    pack(sys.argv[1])
except UserError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
    )
    assert "model.bin.pare: cannot be written: File too large" in done.stdout
    assert os.listdir(tmp_path) == ["model.bin"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 50_000


def test_no_room_to_unpack(container, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: os.terminal_size((0, 0)) and _usage())
    with pytest.raises(UserError, match=r"MB are needed and 0\.0 MB are free"):
        unpack(container, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def _usage():
    import collections

    return collections.namedtuple("usage", "total used free")(0, 0, 0)


def test_what_cannot_be_packed(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.onnx: no such file"):
        pack(tmp_path / "nothing.onnx")
    (tmp_path / "empty.onnx").touch()
    with pytest.raises(UserError, match="is empty"):
        pack(tmp_path / "empty.onnx")
    with pytest.raises(UserError, match="no such file"):
        unpack(tmp_path / "nothing.pare")
    with pytest.raises(UserError, match=r"it is no \.pare container"):
        (tmp_path / "a.pare").write_bytes(b"PK\3\4" * 30)
        unpack(tmp_path / "a.pare")
    with pytest.raises(UserError, match="of version 9"):
        (tmp_path / "a.pare").write_bytes(b"PARE\x09" + bytes(60))
        unpack(tmp_path / "a.pare")
    for folder in (tmp_path, ".", "/"):
        with pytest.raises(UserError, match="expected the artifact of a runtime, got a folder"):
            pack(folder)
    (tmp_path / "run.json").touch()
    with pytest.raises(UserError, match=r"got a run's folder; pack its artifact, .*model\.tflite"):
        (tmp_path / "model.tflite").write_bytes(bytes(99))
        pack(tmp_path)
    packed = pack(tmp_path / "model.tflite").rename(tmp_path / "renamed.bin")
    with pytest.raises(UserError, match=r"renamed\.bin: is packed already; .* paredown unpack"):
        pack(packed)
    assert not (tmp_path / "renamed.bin.pare").exists()


def external(folder, location="weights.bin", name="model.onnx"):
    """An ONNX file whose weights lie in another file, as others write them."""
    weight = onnx.numpy_helper.from_array(np.arange(4096, dtype=np.float32), "weight")
    inner = onnx.numpy_helper.from_array(np.ones(2048, np.float32), "inner")
    nodes = [
        onnx.helper.make_node("Constant", [], ["one"], value=inner),
        onnx.helper.make_node("Add", ["x", "weight"], ["y"]),
    ]
    values = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [4096]) for n in "xy"]
    graph = onnx.helper.make_graph(nodes, "graph", values[:1], values[1:], [weight])
    made = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10
    )
    options = {"size_threshold": 0, "convert_attribute": True}
    (folder / location).parent.mkdir(exist_ok=True)
    onnx.save(made, folder / name, save_as_external_data=True, location=location, **options)
    return folder / name


def test_weights_beside_an_onnx_file_go_along(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    file = external(source)
    packed = pack(file, tmp_path / "model.pare")
    assert [each.name for each in contents(packed).files] == ["model.onnx", "weights.bin"]
    made = unpack(packed, tmp_path / "there")
    for name in ("model.onnx", "weights.bin"):
        assert (made.parent / name).read_bytes() == (source / name).read_bytes()
    x = np.zeros(4096, np.float32)
    assert np.array_equal(paredown.open(packed)(x)[0], np.arange(4096))
    assert packed_bytes(file) == pytest.approx(packed.stat().st_size, abs=8)


def test_weights_that_cannot_go_along_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"keeps weights in 'inner/w.bin', in another folder"):
        pack(external(tmp_path, "inner/w.bin"))
    (external(tmp_path).parent / "weights.bin").unlink()
    with pytest.raises(UserError, match=r"keeps weights in 'weights.bin', which is missing"):
        pack(tmp_path / "model.onnx")
    assert not list(tmp_path.glob("*.pare"))


def test_no_other_file_is_written_over(tmp_path):
    file = external(tmp_path)
    packed = pack(file)
    assert unpack(packed) == file  # the same files may be there
    for name in ("model.onnx", "weights.bin"):
        kept = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(b"mine")
        with pytest.raises(UserError, match=rf"{name}: is there already and is not what"):
            unpack(packed)
        assert (tmp_path / name).read_bytes() == b"mine"
        (tmp_path / name).write_bytes(kept)
    assert sorted(each.name for each in tmp_path.iterdir()) == sorted(
        ["model.onnx", "model.onnx.pare", "weights.bin"]
    )
    with pytest.raises(UserError, match=r"is what is to be packed"):
        pack(file, file)
