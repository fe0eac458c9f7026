"""The Open Inference Protocol v2 as pure functions: bytes to tensors and back."""

import gzip
import json
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paredown.ship.serve import bodies, protocol, tensors
from paredown.ship.serve.refused import Refused

NUMBERS = [name for name in tensors.DTYPES if name not in ("BYTES", "BF16")]


def asked(*inputs, **beside):
    return json.dumps({"inputs": list(inputs), **beside}).encode()


def one(datatype="FP32", shape=(2,), data=(1, 2), **beside):
    item = {"name": "x", "datatype": datatype, "shape": list(shape), **beside}
    return item if data is None else item | {"data": data}


def some(datatype, shape=(2, 3)):
    dtype = np.dtype(tensors.DTYPES[datatype])
    return (np.arange(np.prod(shape)).reshape(shape) % 2).astype(dtype)


@pytest.mark.parametrize("datatype", NUMBERS)
@pytest.mark.parametrize("nested", [False, True])
def test_json_gives_each_datatype(datatype, nested):
    array = some(datatype)
    data = array.tolist() if nested else array.ravel().tolist()
    found = protocol.request_of(asked(one(datatype, array.shape, data))).inputs["x"]
    assert found.dtype == array.dtype and np.array_equal(found, array)


@pytest.mark.parametrize("datatype", NUMBERS)
def test_bytes_go_there_and_back(datatype):
    array = some(datatype)
    raw = tensors.to_bytes(array)
    text = asked(one(datatype, array.shape, None, parameters={"binary_data_size": len(raw)}))
    request = protocol.request_of(text + raw, str(len(text)))
    assert np.array_equal(request.inputs["x"], array)
    body, headers = protocol.answer(
        protocol.Request("", {}, {}, binary=True), "m", "1", {"y": array}
    )
    said = json.loads(body[: int(headers[protocol.HEADER])])
    assert said["outputs"][0]["datatype"] == datatype
    assert body.endswith(raw) and said["outputs"][0]["parameters"] == {"binary_data_size": len(raw)}


def test_texts_go_there_and_back():
    made = np.array([b"a", "ü".encode(), b""], dtype=object)
    raw = tensors.to_bytes(made)
    assert tensors.of_bytes("x", "BYTES", (3,), memoryview(raw)).tolist() == made.tolist()
    assert tensors.of_data("x", "BYTES", (3,), ["a", "ü", ""]).tolist() == made.tolist()
    assert tensors.to_data(made) == ["a", "ü", ""]


def test_bfloat16_is_the_upper_half_of_float32():
    values = np.array([1.0, -2.5, 3.140625], dtype=np.float32)
    raw = (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    assert tensors.of_bytes("x", "BF16", (3,), memoryview(raw)).tolist() == values.tolist()


def test_an_answer_echoes_the_id_and_gives_what_is_asked_for():
    outputs = {"a": np.ones((1, 2), np.float32), "b": np.zeros(1, np.int64)}
    wanted = [{"name": "b"}, {"name": "a", "parameters": {"binary_data": True}}]
    request = protocol.request_of(asked(one(), id="q-1", outputs=wanted))
    body, headers = protocol.answer(request, "m", "2", outputs)
    length = int(headers[protocol.HEADER])
    said = json.loads(body[:length])
    assert (said["id"], said["model_name"], said["model_version"]) == ("q-1", "m", "2")
    assert [(o["name"], o.get("data")) for o in said["outputs"]] == [("b", [0]), ("a", None)]
    assert np.frombuffer(body[length:], "<f4").tolist() == [1, 1]
    with pytest.raises(Refused, match="output 'c' is not one of a, b"):
        protocol.answer(
            protocol.request_of(asked(one(), outputs=[{"name": "c"}])), "m", "", outputs
        )


def test_numbers_that_json_does_not_have_become_null():
    outputs = {"y": np.array([np.nan, np.inf, 1.0], np.float32)}
    body, _ = protocol.answer(protocol.Request("", {}, {}), "m", "1", outputs)
    assert json.loads(body)["outputs"][0]["data"] == [None, None, 1.0]


MALFORMED = {
    "nothing": b"",
    "no json": b"{",
    "a list": b"[]",
    "no inputs": b"{}",
    "inputs none": asked(),
    "an input is a number": asked(3),
    "no name": asked({"shape": [1], "datatype": "FP32", "data": [1]}),
    "twice": asked(one(), one()),
    "no datatype": asked({"name": "x", "shape": [1], "data": [1]}),
    "datatype null": asked(one(None)),
    "datatype a list": asked(one(["FP32"])),
    "datatype unknown": asked(one("FP31")),
    "shape a text": asked(one() | {"shape": "2"}),
    "shape negative": asked(one(shape=(-1, -2))),
    "shape of floats": asked(one() | {"shape": [2.0]}),
    "shape of true": asked(one() | {"shape": [True, 2]}),
    "shape huge": asked(one() | {"shape": [2**40, 2**40]}),
    "shape huge by zero": asked(one() | {"shape": [2**62, 4, 3]}),
    "dims without end": asked(one() | {"shape": [1] * 40}),
    "too few": asked(one(data=[1])),
    "too many": asked(one(data=[1, 2, 3])),
    "data empty": asked(one(data=[])),
    "no data": asked(one(data=None)),
    "data null": asked(one() | {"data": None}),
    "data a number": asked(one() | {"data": 3}),
    "texts": asked(one(data=["1", "2"])),
    "null in data": asked(one(data=[1, None])),
    "true as number": asked(one("INT32", data=[True, 1])),
    "fractions as integers": asked(one("INT32", data=[1.5, 1])),
    "out of range": asked(one("UINT8", data=[-1, 1])),
    "far out of range": asked(one("INT64", data=[2**63, 1])),
    "not in float32": asked(one(data=[1e39, 1])),
    "not in float16": asked(one("FP16", data=[1e5, 1])),
    "1 as bool": asked(one("BOOL", data=[1, 0])),
    "ragged": asked(one(shape=(2, 2), data=[[1, 2], [3]])),
    "nested otherwise": asked(one(shape=(2, 2), data=[[1, 2, 3, 4]])),
    "nested deeper": asked(one(data=[[1], [2]])),
    "half nested": asked(one(shape=(2, 1), data=[[1], 2])),
    "numbers for texts": asked(one("BYTES", data=[1, 2])),
    "id a number": asked(one(), id=3),
    "id long": asked(one(), id="x" * 2000),
    "parameters a list": asked(one(), parameters=[]),
    "binary_data_output a text": asked(one(), parameters={"binary_data_output": "yes"}),
    "outputs an object": asked(one(), outputs={}),
    "output twice": asked(one(), outputs=[{"name": "y"}, {"name": "y"}]),
    "binary size without bytes": asked(one(data=None, parameters={"binary_data_size": 8})),
    "both": asked(one(parameters={"binary_data_size": 0})),
    "nan": b'{"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [NaN]}]}',
    "deep": b'{"inputs": ' + b"[" * 200 + b"]" * 200 + b"}",
    "very deep": b"[" * 100_000,
    "no utf-8": b'{"inputs": "\xff"}',
    "bom": b"\xef\xbb\xbf{}",
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_request_is_refused_in_words(case):
    with pytest.raises(Refused) as told:
        protocol.request_of(MALFORMED[case])
    assert told.value.status in (400, 413) and len(str(told.value)) > 10


@pytest.mark.parametrize(
    "case, said",
    [
        ("datatype null", "expected 'datatype' to be a text"),
        ("datatype a list", "expected 'datatype' to be a text"),
        ("data empty", "expected 2 elements for shape \\[2\\], got 0"),
    ],
)
def test_what_is_wrong_is_said(case, said):
    with pytest.raises(Refused, match=said):
        protocol.request_of(MALFORMED[case])


def test_no_elements_are_data_of_an_empty_shape():
    for shape, data in (((0,), []), ((0, 3), []), ((2, 0), [[], []]), ((2, 0), [])):
        found = protocol.request_of(asked(one(shape=shape, data=data))).inputs["x"]
        assert found.shape == shape


@pytest.mark.parametrize("header", ["", "-1", "x", "1e3", "99999999", "0x10", "1" * 5000, "²"])
def test_a_header_that_is_no_length_is_refused(header):
    with pytest.raises(Refused, match="Inference-Header-Content-Length"):
        protocol.request_of(asked(one()), header)


def test_raw_bytes_must_be_all_used_and_enough():
    for size, raw in ((8, bytes(7)), (8, bytes(9)), (4, bytes(4)), (-1, b""), ("8", bytes(8))):
        text = asked(one(data=None, parameters={"binary_data_size": size}))
        with pytest.raises(Refused):
            protocol.request_of(text + raw, str(len(text)))


def test_what_is_not_supported_is_said_so():
    shared = one(data=None, parameters={"shared_memory_region": "r"})
    classes = {"name": "y", "parameters": {"classification": 3}}
    for body in (asked(shared), asked(one(), outputs=[classes])):
        with pytest.raises(Refused) as told:
            protocol.request_of(body)
        assert told.value.status == 501


def test_a_small_body_may_not_become_a_large_array():
    texts = [one("FP64", (2**20,), [0]) | {"name": f"x{n}"} for n in range(9)]
    with pytest.raises(Refused):
        protocol.request_of(asked(*texts))
    with pytest.raises(Refused, match="64"):
        bodies.unpacked(gzip.compress(bytes(10**6)), "gzip", 64)


def test_bodies_are_unpacked():
    assert bodies.unpacked(gzip.compress(b"text"), "gzip") == b"text"
    assert bodies.unpacked(zlib.compress(b"text"), " Deflate ") == b"text"
    for body, encoding, status in (
        (b"no", "gzip", 400),
        (gzip.compress(b"text")[:-4], "gzip", 400),
        (gzip.compress(b"text") + b"x", "gzip", 400),
        (b"", "gzip", 400),
        (b"x", "br", 415),
    ):
        with pytest.raises(Refused) as told:
            bodies.unpacked(body, encoding)
        assert told.value.status == status


def test_depth_does_not_count_brackets_in_texts():
    bodies.check_depth(json.dumps({"a": "[" * 500, 'b\\"': ['"[[', "\\"] * 200}).encode(), 3)
    with pytest.raises(Refused):
        bodies.check_depth(b'["\\"", ' + b"[" * 101, 100)


def test_a_text_without_end_is_looked_through_once():
    bodies.check_depth(b"[[" * 51 + b"]]" * 51 + b'"\\' * 500_000, 102)  # quadratic: for hours


@given(st.binary(max_size=200), st.none() | st.integers(-1, 300))
def test_any_bytes_are_answered_or_refused(body, length):
    try:
        protocol.request_of(body, None if length is None else str(length))
    except Refused as told:
        assert 400 <= told.status < 500 or told.status == 501


NAMES = st.sampled_from(["inputs", "outputs", "name", "shape", "datatype", "data", "parameters"])
LEAVES = st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from(["x", "FP32", "INT8"])
VALUES = st.recursive(LEAVES, lambda v: st.lists(v, max_size=3) | st.dictionaries(NAMES, v))


@given(VALUES)
def test_any_json_is_answered_or_refused(value):
    for body in (value, {"inputs": [value]}, {"inputs": [one()], "outputs": value}):
        try:
            protocol.request_of(json.dumps(body).encode())
        except Refused as told:
            assert told.status in (400, 413, 501)
