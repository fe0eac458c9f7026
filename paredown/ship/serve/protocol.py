"""The Open Inference Protocol v2: bytes of a request -> tensors, tensors -> bytes of an answer.

Nothing here knows of a server: the JSON form and the binary extension as pure functions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import orjson

from paredown.ship.serve import tensors
from paredown.ship.serve.bodies import check_depth
from paredown.ship.serve.refused import Refused

HEADER = "inference-header-content-length"  # of the JSON, where raw tensors follow it
BINARY, JSON = "application/octet-stream", "application/json"
MOST_INPUTS = 1024
LONGEST_ID = 1024  # characters, for it is kept until late labels come


@dataclass(frozen=True)
class Wanted:
    """An output that is asked for, and whether as raw bytes."""

    name: str
    binary: bool


@dataclass(frozen=True)
class Request:
    """What a client asks.

    Attributes:
        id: the client's own, echoed; "" where it gave none.
        inputs: arrays by name; `datatypes` says how they came.
        wanted: the outputs asked for; empty for all of them.
        binary: whether outputs come as raw bytes where nothing else is said.
        parameters: of the request, as they came.
    """

    id: str
    inputs: dict[str, np.ndarray]
    datatypes: dict[str, str]
    wanted: tuple[Wanted, ...] = ()
    binary: bool = False
    parameters: dict[str, Any] = field(default_factory=dict)


def request_of(body: bytes, header: str | None = None) -> Request:
    """The request in a body.

    Args:
        header: the value of `HEADER`, None where there is none.

    Raises:
        Refused: it is malformed; says where.

    Example:
        >>> text = b'{"inputs": [{"name": "x", "shape": [2], "datatype": "FP32", "data": [1, 2]}]}'
        >>> request_of(text).inputs
        {'x': array([1., 2.], dtype=float32)}
    """
    text, raw = _parts(body, header)
    asked = json_of(text)
    parameters = _parameters(asked, "parameters")
    binary = _flag(parameters, "binary_data_output", False)
    given = asked.get("inputs")
    if not isinstance(given, list) or not given:
        raise Refused(400, "inputs: expected a list of tensors.")
    if len(given) > MOST_INPUTS:
        raise Refused(400, f"inputs: {MOST_INPUTS} at most, got {len(given)}.")
    arrays, datatypes = _inputs(given, raw)
    wanted = _wanted(asked.get("outputs"), binary)
    return Request(_id(asked.get("id")), arrays, datatypes, wanted, binary, parameters)


def json_of(text: bytes | memoryview) -> dict[str, Any]:
    """The JSON object in a body.

    Raises:
        Refused: it is none, or nested too deeply.
    """
    check_depth(text)
    try:
        found = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise Refused(400, f"body: expected JSON: {error}.") from error
    return _object(found, "body")


def _parts(body: bytes, header: str | None) -> tuple[memoryview, memoryview]:
    """The JSON, and the raw bytes behind it."""
    whole = memoryview(body)
    if header is None:
        return whole, whole[:0]
    if not re.fullmatch("[0-9]{1,12}", header.strip()) or int(header) > len(body):
        expected = f"a number of bytes up to {len(body)}, those of the body"
        raise Refused(400, f"Inference-Header-Content-Length: expected {expected}.")
    return whole[: int(header)], whole[int(header) :]


def _object(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Refused(400, f"{name}: expected a JSON object.")
    return value


def _parameters(item: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The parameters of a request or tensor; some clients write null for none."""
    given = item.get("parameters")
    return {} if given is None else _object(given, name)


def _id(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, str) or len(value) > LONGEST_ID:
        raise Refused(400, f"id: expected a text of at most {LONGEST_ID} characters.")
    return value


def _flag(parameters: Mapping[str, Any], name: str, otherwise: bool) -> bool:
    value = parameters.get(name, otherwise)
    if not isinstance(value, bool):
        raise Refused(400, f"{name}: expected true or false.")
    return value


def _inputs(given: list[Any], raw: memoryview) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    arrays: dict[str, np.ndarray] = {}
    datatypes: dict[str, str] = {}
    left = tensors.MOST_BYTES
    for place, item in enumerate(given):
        name = _name(_object(item, f"inputs[{place}]"), f"inputs[{place}]")
        if name in arrays:
            raise Refused(400, f"input {name!r} is given twice.")
        datatype, shape = _datatype(item, name), tensors.shape_of(name, item.get("shape"))
        left -= tensors.room(name, datatype, shape)
        if left < 0:
            raise Refused(413, f"inputs: more than {tensors.MOST_BYTES} bytes as arrays.")
        arrays[name], raw = _array(item, name, datatype, shape, raw)
        datatypes[name] = datatype
    if raw:
        raise Refused(400, f"body: {len(raw)} bytes behind the last tensor.")
    return arrays, datatypes


def _array(
    item: dict[str, Any], name: str, datatype: str, shape: tuple[int, ...], raw: memoryview
) -> tuple[np.ndarray, memoryview]:
    """The tensor, and what of the raw bytes is left behind it."""
    parameters = _parameters(item, f"input {name!r}: parameters")
    size = parameters.get("binary_data_size")
    if any(key.startswith("shared_memory") for key in parameters):
        raise Refused(501, f"input {name!r}: shared memory is not supported; send the tensor.")
    if size is None:
        if "data" not in item:
            raise Refused(400, f"input {name!r}: expected 'data', or binary_data_size.")
        return tensors.of_data(name, datatype, shape, item["data"]), raw
    if "data" in item:
        raise Refused(400, f"input {name!r}: has both 'data' and binary_data_size.")
    if type(size) is not int or not 0 <= size <= len(raw):
        had = f"a number of bytes up to {len(raw)}, those that are left"
        raise Refused(400, f"input {name!r}: binary_data_size: expected {had}.")
    return tensors.of_bytes(name, datatype, shape, raw[:size]), raw[size:]


def _name(item: dict[str, Any], where: str) -> str:
    name = item.get("name")
    if not isinstance(name, str) or not name:
        raise Refused(400, f"{where}: expected a 'name'.")
    return name


def _datatype(item: dict[str, Any], name: str) -> str:
    datatype = item.get("datatype")
    if not isinstance(datatype, str):
        raise Refused(400, f"input {name!r}: expected 'datatype' to be a text, such as \"FP32\".")
    return datatype


def _wanted(given: Any, binary: bool) -> tuple[Wanted, ...]:
    if given is None:
        return ()
    if not isinstance(given, list):
        raise Refused(400, "outputs: expected a list.")
    found: dict[str, Wanted] = {}
    for place, item in enumerate(given):
        name = _name(_object(item, f"outputs[{place}]"), f"outputs[{place}]")
        parameters = _parameters(item, f"output {name!r}: parameters")
        if name in found:
            raise Refused(400, f"output {name!r} is asked for twice.")
        for key in parameters:
            if key == "classification" or key.startswith("shared_memory"):
                raise Refused(501, f"output {name!r}: {key} is not supported.")
        found[name] = Wanted(name, _flag(parameters, "binary_data", binary))
    return tuple(found.values())


def answer(
    request: Request, model: str, version: str, outputs: Mapping[str, np.ndarray]
) -> tuple[bytes, dict[str, str]]:
    """Body and headers of the answer to a request.

    Raises:
        Refused: it asks for an output that the model does not have.

    Example:
        >>> asked = Request("7", {}, {})
        >>> answer(asked, "m", "1", {"y": np.array([1.5])})[0].decode()[:47]
        '{"model_name":"m","model_version":"1","id":"7",'
    """
    wanted = request.wanted or tuple(Wanted(name, request.binary) for name in outputs)
    for each in wanted:
        if each.name not in outputs:
            names = ", ".join(outputs)
            raise Refused(400, f"output {each.name!r} is not one of {names}.")
    told, raw = _outputs(wanted, outputs)
    said: dict[str, Any] = {"model_name": model, "model_version": version}
    if request.id:
        said["id"] = request.id
    text = orjson.dumps(said | {"outputs": told}, option=orjson.OPT_SERIALIZE_NUMPY)
    if not any(each.binary for each in wanted):
        return text, {"content-type": JSON}
    return b"".join((text, *raw)), {"content-type": BINARY, HEADER: str(len(text))}


def _outputs(
    wanted: Sequence[Wanted], outputs: Mapping[str, np.ndarray]
) -> tuple[list[dict[str, Any]], list[bytes]]:
    told, raw = [], []
    for each in wanted:
        array = outputs[each.name]
        item: dict[str, Any] = {
            "name": each.name,
            "datatype": tensors.DATATYPES[array.dtype.name],
            "shape": list(array.shape),
        }
        if each.binary:
            raw.append(tensors.to_bytes(array))
            item["parameters"] = {"binary_data_size": len(raw[-1])}
        else:
            item["data"] = tensors.to_data(array)
        told.append(item)
    return told, raw


def error(text: str) -> bytes:
    """The body of a refusal.

    Example:
        >>> error("no")
        b'{"error":"no"}'
    """
    return orjson.dumps({"error": text})
