"""Requests a second and latencies of servers over the same file, in turn on one machine.

python benchmarks/serving.py --mlserver VENV --kserve VENV    # about two minutes

The peers do not install beside paredown, so each is in a virtual environment of its own:
``pip install mlserver onnxruntime``, ``pip install kserve onnxruntime``. Neither opens an ONNX file
by itself; both get the same dozen lines around ONNX Runtime, on one thread, in the server's process
(MLServer's worker processes do not start with its newest event loop), where ours has its own.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import uvloop  # of the client, which must not be what is measured

CONNECTIONS, SECONDS, TURNS, FEATURES = 16, 4.0, 3, 16
SLOW_RATE = 100.0  # requests a second of the open loop, at which nothing waits for another
MLSERVER = """
import numpy as np, onnxruntime
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceResponse

class Onnx(MLModel):
    async def load(self):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession({file!r}, options)
        return True

    async def predict(self, payload):
        x = NumpyCodec.decode_input(payload.inputs[0])
        [y] = self.session.run(None, {{payload.inputs[0].name: x}})
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("y", y)])
"""
KSERVE = """
import onnxruntime
from kserve import InferOutput, InferResponse, Model, ModelServer

class Onnx(Model):
    def load(self):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession({file!r}, options)
        self.ready = True

    def predict(self, payload, headers=None, response_headers=None):
        given = payload.inputs[0]
        [y] = self.session.run(None, {{given.name: given.as_numpy()}})
        output = InferOutput("y", list(y.shape), "FP32", y.tolist())
        return InferResponse(payload.id or "1", self.name, [output])

model = Onnx("tiny")
model.load()
ModelServer(http_port={port}, enable_grpc=False, workers=1).start([model])
"""


def made_run(folder: Path) -> Path:
    """A run of a small perceptron, whose original is what is served."""
    import torch
    from torch import nn
    from torch.utils.data import TensorDataset

    import paredown

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(FEATURES, 32), nn.ReLU(), nn.Linear(32, 3)).eval()
    x = torch.randn(200, FEATURES)
    data = TensorDataset(x, net(x).argmax(1))
    task = paredown.Task((x[:1],), paredown.accuracy, validation=data, test=data)
    target = paredown.Target(rounds=2)
    paredown.compress(net, task, paredown.Goals(), target, [paredown.Cast()], folder / "tiny")
    return folder / "tiny"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextlib.contextmanager
def started(words: list[str], port: int, path: str, folder: Path) -> Iterator[None]:
    """A server in a process of its own, ready when the path answers."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    with (folder / "log.txt").open("w") as log:
        server = subprocess.Popen(words, cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        until = time.monotonic() + 90
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=2).read()
                break
            if server.poll() is not None or time.monotonic() > until:
                sys.exit(f"{words[0]}: {(folder / 'log.txt').read_text()[-2000:]}")
            time.sleep(0.1)
        yield
    finally:
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(20)
        server.kill()


@contextlib.contextmanager
def paredowns(run: Path, folder: Path) -> Iterator[int]:
    """Ours after a rollback: every request takes the way of a routed one, to the original."""
    port = free_port()
    words = [sys.executable, "-m", "paredown", "serve", str(run), "--port", str(port)]
    state = ["--state", str(folder / "state")]
    with started([*words, *state], port, "/v2/models/tiny/ready", folder):
        token = (folder / "state" / "token").read_text().strip()
        asked = urllib.request.Request(
            f"http://127.0.0.1:{port}/v2/rollout/abort",
            json.dumps({"reason": "the original is measured"}).encode(),
            {"Authorization": f"Bearer {token}"},
        )
        for _ in range(100):  # it is validated first
            with contextlib.suppress(OSError):
                urllib.request.urlopen(asked).read()
                break
            time.sleep(0.1)
        yield port


@contextlib.contextmanager
def mlservers(venv: Path, file: Path, folder: Path) -> Iterator[int]:
    port, others = free_port(), [free_port(), free_port()]
    settings = {"host": "127.0.0.1", "http_port": port, "grpc_port": others[0]}
    settings |= {"metrics_port": others[1], "parallel_workers": 0, "debug": False}
    (folder / "settings.json").write_text(json.dumps(settings))
    told = {"name": "tiny", "implementation": "onnx_model.Onnx"}
    (folder / "model-settings.json").write_text(json.dumps(told))
    (folder / "onnx_model.py").write_text(MLSERVER.format(file=str(file)))
    words = [str(venv / "bin" / "mlserver"), "start", "."]
    with started(words, port, "/v2/models/tiny/ready", folder):
        yield port


@contextlib.contextmanager
def kserves(venv: Path, file: Path, folder: Path) -> Iterator[int]:
    port = free_port()
    (folder / "server.py").write_text(KSERVE.format(file=str(file), port=port))
    words = [str(venv / "bin" / "python"), "server.py"]
    with started(words, port, "/v2/models/tiny/ready", folder):
        yield port


def request(name: str) -> bytes:
    """One row as plain JSON, which all of them take."""
    row = np.linspace(-1, 1, FEATURES).round(4).tolist()
    tensor = {"name": name, "shape": [1, FEATURES], "datatype": "FP32", "data": row}
    body = json.dumps({"inputs": [tensor]}).encode()
    head = (
        "POST /v2/models/tiny/infer HTTP/1.1\r\nHost: localhost\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, sent: bytes) -> None:
    writer.write(sent)
    head = await reader.readuntil(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200"):
        raise SystemExit(f"a server answered {head[:200]!r}")
    length = next(
        line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")
    )
    await reader.readexactly(int(length.split(b":")[1]))


async def closed(port: int, sent: bytes) -> float:
    """Requests a second of connections that each ask again as soon as they are answered."""
    done, until = 0, time.perf_counter() + SECONDS

    async def client() -> None:
        nonlocal done
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while time.perf_counter() < until:
            await ask(reader, writer, sent)
            done += 1
        writer.close()

    await asyncio.gather(*(client() for _ in range(CONNECTIONS)))
    return done / SECONDS


async def opened(port: int, sent: bytes) -> np.ndarray:
    """Latencies in ms of requests that come at random times, whatever the server does."""
    rng, found = np.random.default_rng(0), []
    free: asyncio.LifoQueue[tuple] = asyncio.LifoQueue()
    for _ in range(CONNECTIONS):
        free.put_nowait(await asyncio.open_connection("127.0.0.1", port))

    async def client(born: float) -> None:
        ends = await free.get()
        await ask(*ends, sent)
        found.append(1000 * (time.perf_counter() - born))
        free.put_nowait(ends)

    asked, until = [], time.perf_counter() + SECONDS
    while time.perf_counter() < until:
        asked.append(asyncio.create_task(client(time.perf_counter())))
        await asyncio.sleep(float(rng.exponential(1 / SLOW_RATE)))
    await asyncio.gather(*asked)
    return np.array(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mlserver", type=Path, required=True, help="its virtual environment")
    parser.add_argument("--kserve", type=Path, required=True, help="its virtual environment")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        folders = [Path(scratch) / name for name in ("ours", "mlserver", "kserve")]
        for folder in folders:
            folder.mkdir()
        run = made_run(Path(scratch))
        file = run / "original.onnx"
        sent = request("input")
        ports = {
            "paredown": stack.enter_context(paredowns(run, folders[0])),
            "MLServer": stack.enter_context(
                mlservers(chosen.mlserver.absolute(), file, folders[1])
            ),
            "KServe": stack.enter_context(kserves(chosen.kserve.absolute(), file, folders[2])),
        }
        for port in ports.values():  # warm
            uvloop.run(closed(port, sent))
        rates: dict[str, list[float]] = {name: [] for name in ports}
        latencies: dict[str, list[np.ndarray]] = {name: [] for name in ports}
        for _ in range(TURNS):
            for name, port in ports.items():
                rates[name].append(uvloop.run(closed(port, sent)))
                latencies[name].append(uvloop.run(opened(port, sent)))
    print(f"{CONNECTIONS} connections; medians of {TURNS} turns; open loop at {SLOW_RATE:g}/s")
    for name in ports:
        all_ms = np.concatenate(latencies[name])
        p50, p99 = np.quantile(all_ms, [0.5, 0.99])
        spread = f"{min(rates[name]):.0f} to {max(rates[name]):.0f}"
        print(
            f"{name:9} {np.median(rates[name]):7.0f} requests/s ({spread}), "
            f"p50 {p50:.2f} ms, p99 {p99:.2f} ms"
        )


if __name__ == "__main__":
    main()
