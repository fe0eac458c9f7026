"""The endpoint as clients see it: tritonclient, plain JSON as KServe's sends it, raw sockets."""

import asyncio
import contextlib
import gzip
import json
import socket
import time
import zlib

import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from prometheus_client.parser import text_string_to_metric_families
from tritonclient.utils import InferenceServerException

from tests.test_serve_protocol import MALFORMED, asked, one
from tests.test_serve_runs import Served, inputs, run_folder, weights

INFER = "/v2/models/tiny/infer"
SLOW = "dwell_s = 1000.0\nno_data_pause = 1000\nno_data_rollback = 2000\n"  # nothing moves


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = run_folder(tmp_path_factory.mktemp("http") / "run", quick=SLOW)
    with Served(folder) as found:
        found.until(lambda status: status["models"]["candidate"]["ready"])
        yield found


@pytest.fixture(scope="module")
def client(server):
    with triton.InferenceServerClient(server.host) as found:
        yield found


def tensors(x, binary=True, module=triton):
    given = module.InferInput("x", list(x.shape), "FP32")
    given.set_data_from_numpy(x, binary_data=binary)
    return [given]


def close(found, x):
    return np.allclose(found, x @ weights(), atol=0.02)


def raw(server, sent, seconds=10.0, half_close=False):
    """What comes back for bytes that are sent, and how long that took."""
    began = time.monotonic()
    host, port = server.host.split(":")
    with socket.create_connection((host, int(port)), timeout=seconds) as channel:
        found = b""
        with contextlib.suppress(OSError):  # it may be closed already
            channel.sendall(sent)
            if half_close:
                channel.shutdown(socket.SHUT_WR)
        try:
            while part := channel.recv(2**16):
                found += part
                if b"\r\n\r\n" in found and _whole(found):
                    break
        except TimeoutError:
            found += b"(open)"
        except ConnectionResetError:
            pass
    return found, time.monotonic() - began


def _whole(found):
    head, _, body = found.partition(b"\r\n\r\n")
    lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    return bool(lengths) and len(body) >= int(lengths[0].split(b":")[1])


def posted(path, body, *headers):
    lines = [f"POST {path} HTTP/1.1", "Host: here", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


# --- vendors' clients --------------------------------------------------------------------------


def test_triton_reads_the_server(client):
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("tiny")
    assert client.get_server_metadata()["name"] == "paredown"
    found = client.get_model_metadata("tiny")
    assert found["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}]
    assert found["outputs"] == [{"name": "y", "datatype": "FP32", "shape": [-1, 3]}]
    assert found["versions"] == ["1", "2"] and client.is_model_ready("tiny", "2")
    assert not client.is_model_ready("other")


def test_triton_asks_for_more(client):
    client.infer("tiny", tensors(inputs(3)), "2")
    config = client.get_model_config("tiny")
    assert config["max_batch_size"] == 32 and config["output"][0]["dims"] == [3]
    one, other = client.get_inference_statistics("tiny")["model_stats"]
    assert other["version"] == "2" and other["inference_count"] >= 3
    assert other["inference_stats"]["success"]["ns"] > 0
    assert client.get_inference_statistics()["model_stats"][0]["name"] == "tiny"
    assert [each["state"] for each in client.get_model_repository_index()] == ["READY"] * 2


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("sent", [True, False], ids=["binary", "json"])
@pytest.mark.parametrize("wanted", [None, True, False], ids=["all", "binary", "json"])
@pytest.mark.parametrize("version", ["", "1", "2"])
def test_triton_gets_answers(client, rows, sent, wanted, version):
    x = inputs(rows, seed=rows)
    asked_for = None if wanted is None else [triton.InferRequestedOutput("y", binary_data=wanted)]
    found = client.infer("tiny", tensors(x, sent), version, outputs=asked_for, request_id="q")
    assert close(found.as_numpy("y"), x)
    said = found.get_response()
    assert (
        said["id"] == "q" and said["model_version"] in ("1", "2") and said["model_name"] == "tiny"
    )
    assert not version or said["model_version"] == version


@pytest.mark.parametrize("packed", ["gzip", "deflate"])
@pytest.mark.parametrize("back", [None, "gzip", "deflate"])
def test_triton_may_compress(client, packed, back):
    x = inputs(3)
    found = client.infer(
        "tiny",
        tensors(x),
        request_compression_algorithm=packed,
        response_compression_algorithm=back,
        parameters={"routing_key": "someone"},
        priority=1,
        timeout=1000,
    )
    assert close(found.as_numpy("y"), x)


def test_triton_asks_asynchronously(client, server):
    x = inputs(2)
    pending = [client.async_infer("tiny", tensors(x)) for _ in range(8)]
    assert all(close(each.get_result().as_numpy("y"), x) for each in pending)

    async def many():
        async with triton_aio.InferenceServerClient(server.host) as other:
            assert await other.is_server_ready() and await other.is_model_ready("tiny")
            asked_for = [None, [triton_aio.InferRequestedOutput("y", binary_data=False)]]
            found = await asyncio.gather(
                *(
                    other.infer("tiny", tensors(x, sent, triton_aio), outputs=wanted)
                    for sent in (True, False)
                    for wanted in asked_for * 8
                )
            )
            return [each.as_numpy("y") for each in found]

    assert all(close(each, x) for each in asyncio.run(many()))


def test_triton_is_told_what_is_wrong(client):
    for given, said in (
        (tensors(inputs(1)[:, :3].copy()), "expected shape"),
        (
            [triton.InferInput("z", [1], "FP32").set_data_from_numpy(inputs(1)[0, :1])],
            "expected 'x'",
        ),
    ):
        with pytest.raises(InferenceServerException, match=said) as told:
            client.infer("tiny", given)
        assert told.value.status() == "400"
    with pytest.raises(InferenceServerException, match="no model 'other'"):
        client.infer("other", tensors(inputs(1)))


@pytest.mark.parametrize("nested", [True, False])
def test_kserve_sends_plain_json(server, nested):
    """Its REST client posts names, shapes and flat or nested data, an id and parameters; what
    copies its objects as they are writes null for what is not there."""
    x = inputs(2)
    tensor = {"name": "x", "shape": [2, 4], "datatype": "FP32", "parameters": {}}
    tensor["data"] = x.tolist() if nested else x.ravel().tolist()
    tensor["parameters"] = None if nested else {}
    said = {"id": "7d1", "model_name": "tiny", "inputs": [tensor], "parameters": {"routing": "a"}}
    said["outputs"] = None if nested else []
    status, found = server.post(INFER, said, **{"content-type": "application/json"})
    assert status == 200 and found["id"] == "7d1"
    assert close(np.reshape(found["outputs"][0]["data"], found["outputs"][0]["shape"]), x)


def test_kserve_sends_raw_bytes_behind_its_json(server):
    x = inputs(2)
    tensor = {"name": "x", "shape": [2, 4], "datatype": "FP32"}
    tensor["parameters"] = {"binary_data_size": x.nbytes}
    said = {"id": "7d2", "model_name": "tiny", "inputs": [tensor]}
    text = json.dumps(said | {"outputs": [{"name": "y", "parameters": {"binary_data": False}}]})
    headers = {LENGTH: str(len(text)), "content-type": "application/octet-stream"}
    status, found = server.post(INFER, text.encode() + x.tobytes(), **headers)
    assert status == 200 and found["id"] == "7d2"
    assert close(np.reshape(found["outputs"][0]["data"], (2, 3)), x)


def test_metrics_are_read_by_prometheus(server, client):
    client.infer("tiny", tensors(inputs(3)), "1")
    families = list(text_string_to_metric_families(server.get("/metrics").decode()))
    samples = [each for family in families for each in family.samples]
    found = {(s.name.removesuffix("_total"), s.labels.get("version")): s.value for s in samples}
    assert found["nv_inference_request_success", "1"] >= 1
    assert found["nv_inference_count", "1"] >= 3 and found["nv_inference_exec_count", "1"] >= 1
    assert found["nv_inference_pending_request_count", "1"] == 0
    for part in ("request", "queue", "compute_infer"):
        assert found[f"nv_inference_{part}_duration_us", "1"] > 0
    assert {f.name for f in families} >= {"paredown_rollout_weight", "paredown_rollout_stage"}


# --- malformed, by hand ------------------------------------------------------------------------

GOOD = asked(one(shape=(1, 4), data=[1, 2, 3, 4]))
RAW4 = np.ones(4, "<f4").tobytes()
HEAD = asked(one(shape=(1, 4), data=None, parameters={"binary_data_size": 16}))
LENGTH = "Inference-Header-Content-Length"
BODIES = {f"body {name}": posted(INFER, body) for name, body in MALFORMED.items()}
BODIES |= {
    f"v2 {name}": posted("/v2/models/tiny/versions/2/infer", b) for name, b in MALFORMED.items()
}
HERE = {
    "rank": asked(one(shape=(4,), data=[1] * 4)),
    "wide": asked(one(shape=(1, 5), data=[1] * 5)),
    "no rows": asked(one(shape=(0, 4), data=[])),
    "other dtype": asked(one("FP64", shape=(1, 4), data=[1] * 4)),
    "texts": asked(one("BYTES", shape=(1, 4), data=["a"] * 4)),
    "other name": asked(one(shape=(1, 4), data=[1] * 4) | {"name": "X"}),
    "one more": asked(one(shape=(1, 4), data=[1] * 4), one() | {"name": "z"}),
    "other output": asked(one(shape=(1, 4), data=[1] * 4), outputs=[{"name": "z"}]),
    "scalar": asked(one(shape=(), data=[1])),
}
BODIES |= {f"here {name}": posted(INFER, body) for name, body in HERE.items()}
LENGTHS = ["", "-1", "x", "1e3", "99999999", "0x10", "1" * 400, "0", "1", str(len(HEAD) - 1)]
LENGTHS += [str(len(HEAD) + 1), str(len(HEAD) + 16), " ", "+5", "5 5"]
BODIES |= {f"length {n}": posted(INFER, HEAD + RAW4, f"{LENGTH}: {n}") for n in LENGTHS}
WRONG_RAW = {"short": RAW4[:-1], "long": RAW4 + b"1", "none": b"", "double": RAW4 * 2}
BODIES |= {
    f"raw {name}": posted(INFER, HEAD + raw4, f"{LENGTH}: {len(HEAD)}")
    for name, raw4 in WRONG_RAW.items()
}
PACKED = {
    "no gzip": (GOOD, "gzip"),
    "half gzip": (gzip.compress(GOOD)[:-9], "gzip"),
    "no deflate": (GOOD, "deflate"),
    "unknown": (GOOD, "zstd"),
    "two": (GOOD, "gzip, deflate"),
    "deflate as gzip": (zlib.compress(GOOD), "gzip"),
    "bomb": (gzip.compress(bytes(2**26 + 1)), "gzip"),
}
BODIES |= {
    f"packed {name}": posted(INFER, body, f"Content-Encoding: {encoding}")
    for name, (body, encoding) in PACKED.items()
}
PATHS = ["/v2/models/other/infer", "/v2/models//infer", "/v2/models/tiny/versions/3/infer"]
PATHS += ["/v2/models/tiny/versions//infer", "/v2/models/%00/infer", "/v2/models/..%2f/infer"]
PATHS += ["/v2/models/tiny/infer/", "/v1/models/tiny:predict", "/v2/rollout/fly", "/x", "//", "/v3"]
PATHS += [
    "/v2/models/tiny/generate",
    "/v2/repository/indices",
    "/v2/models/%ff/infer",
    "/" + "a" * 9000,
]
PATHS += ["/v2/rollout/abort", "/v2/rollout/promote", "/v2/models/other/feedback"]
PATHS += ["/v2/models/tiny/feedback", "/v2/models/tiny/infer?x=%zz", "/v2/models/tiny%0d%0a/infer"]
BODIES |= {f"path {path[:40]}": posted(path, b"{}") for path in PATHS}
METHODS = ["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "FOO", "post", "CONNECT"]
BODIES |= {
    f"method {m}": f"{m} {INFER} HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\n\r\n".encode()
    for m in METHODS
}
BODIES |= {
    f"post {path}": posted(path, b"{}")
    for path in ("/v2", "/v2/health/live", "/v2/health/ready", "/v2/models/tiny", "/metrics", "/")
}
LINES = {
    "nonsense": b"\x00\x01\x02\r\n\r\n",
    "tls": bytes.fromhex("16030100c8010000c40303"),
    "http 0.9": b"GET /v2\r\n\r\n",
    "http 3": b"GET /v2 HTTP/3.0\r\n\r\n",
    "no path": b"GET HTTP/1.1\r\n\r\n",
    "spaces": b"GET  /v2  HTTP/1.1\r\nHost: h\r\n\r\n",
    "header without colon": b"GET /v2 HTTP/1.1\r\nHost\r\n\r\n",
    "header of nul": b"GET /v2 HTTP/1.1\r\nHost: \x00\r\n\r\n",
    "length twice": b"POST /v2 HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\n"
    b"Content-Length: 2\r\n\r\nx",
    "length negative": b"POST /v2 HTTP/1.1\r\nHost: h\r\nContent-Length: -1\r\n\r\n",
    "length text": b"POST /v2 HTTP/1.1\r\nHost: h\r\nContent-Length: a\r\n\r\n",
    "length huge": posted(INFER, b"").replace(
        b"Content-Length: 0", b"Content-Length: " + b"9" * 30
    ),
    "length large": posted(INFER, b"").replace(b"Content-Length: 0", b"Content-Length: 99999999"),
    "chunk bad": b"POST " + INFER.encode() + b" HTTP/1.1\r\nHost: h\r\n"
    b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    "chunk negative": b"POST " + INFER.encode() + b" HTTP/1.1\r\nHost: h\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n-1\r\n",
    "coding unknown": b"POST " + INFER.encode() + b" HTTP/1.1\r\nHost: h\r\n"
    b"Transfer-Encoding: magic\r\n\r\n",
    "headers many": b"GET /v2 HTTP/1.1\r\nHost: h\r\n" + b"A: b\r\n" * 500 + b"\r\n",
    "header long": b"GET /v2 HTTP/1.1\r\nHost: h\r\nA: " + b"b" * 2**20 + b"\r\n\r\n",
    "websocket": b"GET /v2 HTTP/1.1\r\nHost: h\r\nUpgrade: websocket\r\n"
    b"Connection: Upgrade\r\n\r\n",
    "http2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
}
BODIES |= {f"line {name}": line for name, line in LINES.items()}
ALLOWED = {
    "line headers many",
    "line websocket",
    "line http2",
    "line spaces",
    "path /v2/models/tiny/infer?x=%zz",
}
assert len(BODIES) >= 150


@pytest.mark.parametrize("case", BODIES)
def test_what_is_malformed_is_the_clients_mistake(server, case):
    """Answered with a 4xx in JSON without a traceback, or the connection is closed."""
    found, _ = raw(server, BODIES[case], 7.0, half_close=case.startswith("line"))
    assert b"Traceback" not in found and b".py" not in found and not found.endswith(b"(open)")
    if found and case not in ALLOWED:
        status = int(found.split(b" ")[1])
        assert 400 <= status < 500 or status == 501, found
        if not case.startswith(("line", "method CONNECT")) and status not in (414, 431):
            said = json.loads(found.partition(b"\r\n\r\n")[2])
            assert list(said) == ["error"] and said["error"]


def test_after_all_that_a_good_request_is_answered(server, client):
    x = inputs(4)
    assert close(client.infer("tiny", tensors(x)).as_numpy("y"), x)
    assert server.get("/v2/rollout")["models"]["original"]["starts"] == 1
    assert "Traceback" not in server.log.read_text()


def test_a_body_that_comes_slowly_is_given_up(server):
    head = posted(INFER, GOOD)[: -len(GOOD)]
    found, seconds = raw(server, head + GOOD[:5], 9.0)
    assert b" 408 " in found.split(b"\r\n")[0] and 4 < seconds < 8


@pytest.mark.slow
def test_headers_that_come_slowly_are_given_up(server):
    found, seconds = raw(server, b"POST /v2 HTTP/1.1\r\nHost: h\r\n", 9.0)
    assert not found.endswith(b"(open)") and seconds < 8


@pytest.mark.slow
def test_slow_clients_keep_nobody_else_out(server):
    host, port = server.host.split(":")
    slow = [socket.create_connection((host, int(port))) for _ in range(1000)]
    for channel in slow:
        channel.sendall(posted(INFER, GOOD)[:40])
    spent = []
    for _ in range(50):
        began = time.monotonic()
        assert server.get("/v2/health/ready")["ready"]
        spent.append(time.monotonic() - began)
    assert sorted(spent)[-1] < 0.5
    time.sleep(6)
    closed = 0
    for channel in slow:
        channel.settimeout(0.5)
        try:
            closed += not channel.recv(2**12).endswith(b"(open)")
        except ConnectionResetError:
            closed += 1
        channel.close()
    assert closed == 1000


def test_shared_memory_is_told_to_be_none(client):
    asked = [client.get_system_shared_memory_status, client.get_cuda_shared_memory_status]
    asked += [client.unregister_system_shared_memory, client.unregister_cuda_shared_memory]
    asked.append(lambda: client.register_system_shared_memory("r", "/r", 8))
    for each in asked:
        with pytest.raises(
            InferenceServerException, match="shared memory is not supported"
        ) as said:
            each()
        assert said.value.status() == "501"


# --- by hand, and late labels ------------------------------------------------------------------


def test_a_token_is_needed_and_a_reason(server):
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": server.token}):
        status, said = server.post("/v2/rollout/abort", {"reason": "x"}, **headers)
        assert status == 401 and "Bearer TOKEN" in said["error"]
    for reason in ("", " ", None, 3, "x" * 2000):
        assert server.act("abort", reason)[0] == 400
    status, said = server.act("resume")
    assert status == 409 and "expected paused" in said["error"]
    assert (server.folder / "serve" / "token").stat().st_mode & 0o777 == 0o600


def test_late_labels_score_both_models(server):
    x = inputs(8)
    right = (x @ weights()).argmax(1)
    for n in range(8):
        server.infer(x[n : n + 1], id=f"late-{n}")
    status, said = server.post(
        "/v2/models/tiny/feedback", {"id": "late-3", "target": int(right[3])}
    )
    assert status == 200 and said["scores"]["original"] == 1.0 and said["counted"]
    status, again = server.post("/v2/models/tiny/feedback", {"id": "late-3", "target": 99})
    assert status == 200 and again == {**said, "counted": False}
    assert server.post("/v2/models/tiny/feedback", {"id": "never", "target": 1})[0] == 404
    for wrong in ("a", [1, 2], None, 1.5, [[1], 2]):
        assert server.post("/v2/models/tiny/feedback", {"id": "late-4", "target": wrong})[0] == 400
