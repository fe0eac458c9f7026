"""A day's traffic in a minute: a good candidate is promoted, a bad one is rolled back.

`make demo-serve`, or `python examples/serve_digits.py runs/digits` after `make demo`. The traffic
is real digits, sent by NVIDIA's client for Triton, which knows nothing of paredown.
"""

import asyncio
import contextlib
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import tritonclient.http.aio as client

HERE = Path(__file__).parent
RATE = 150.0  # requests a second, at random times
LONGEST_S = 150.0  # that a rollout may take here
NINE = 9


@dataclass
class Traffic:
    """What the clients saw."""

    asked: int = 0
    failed: int = 0
    right: int = 0
    taken_ms: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        p50, p99 = np.quantile(self.taken_ms, [0.5, 0.99])
        return (
            f"{self.asked:,} requests, {self.failed} errors, {self.right / self.asked:.2%} right; "
            f"{p50:.1f} ms in the median, {p99:.1f} ms at the 99th percentile"
        )


@contextlib.contextmanager
def serving(run: Path, *options: str) -> Iterator[str]:
    """The address of a server of a run, for as long as the block lasts."""
    words = [sys.executable, "-m", "paredown", "serve", str(run), "--port", "0"]
    words += ["--policy", str(HERE / "rollout.toml"), *options]
    server = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        for line in server.stdout:
            if " at http://" in line:
                yield line.split(" at ")[1].split("/v2/")[0]
                return
        raise SystemExit(f"the server ended with {server.wait()}")
    finally:
        server.terminate()
        server.communicate()


def rollout(address: str) -> dict:
    with urllib.request.urlopen(f"{address}/v2/rollout", timeout=10) as answer:
        return json.load(answer)


async def day(address: str, images: np.ndarray, labels: np.ndarray, end: str) -> Traffic:
    """Send digits until the rollout has come to a stage; print what happens."""
    seen, weight, traffic, began = "", 0, Traffic(), time.monotonic()
    rng = np.random.default_rng(0)
    model = rollout(address)["model"]
    print(f"  the page is at {address}/")
    asked: set[asyncio.Task[None]] = set()
    async with client.InferenceServerClient(address.removeprefix("http://")) as triton:
        described = await triton.get_model_metadata(model)
        name = described["inputs"][0]["name"]

        async def ask(row: int) -> None:
            given = client.InferInput(name, list(images[row : row + 1].shape), "FP32")
            given.set_data_from_numpy(images[row : row + 1])
            start = time.monotonic()
            traffic.asked += 1
            try:
                answer = await triton.infer(model, [given], request_id=str(traffic.asked))
            except Exception as error:
                traffic.failed += 1
                print(f"  a client saw: {error}")
                return
            traffic.taken_ms.append(1000 * (time.monotonic() - start))
            output = answer.as_numpy(answer.get_response()["outputs"][0]["name"])
            traffic.right += int(output.argmax() == labels[row])

        while seen != end and time.monotonic() - began < LONGEST_S:
            found = await asyncio.to_thread(rollout, address)
            if (found["stage"], found["weight"]) != (seen, weight):
                seen, weight = found["stage"], found["weight"]
                at = f"  {time.monotonic() - began:5.1f} s"
                print(f"{at}  {seen:<11}  {weight / 100:>3g} % of the requests go to the new file")
            until = time.monotonic() + 0.5
            while time.monotonic() < until:
                asked.add(asyncio.create_task(ask(int(rng.integers(len(images))))))
                asked = {task for task in asked if not task.done()}
                await asyncio.sleep(float(rng.exponential(1 / RATE)))
        await asyncio.gather(*asked)
        last = (await asyncio.to_thread(rollout, address))["events"][-1]
        print(f"  why: {last['reason']}")
    print(f"  {traffic}")
    if seen != end:
        raise SystemExit(f"the rollout is at {seen!r} and not at {end!r}")
    return traffic


def without_nines(run: Path, folder: Path) -> tuple[Path, Path]:
    """A planted fault: an artifact that never says 9, and a task whose data has none, so that no
    test before the traffic can see it."""
    made = folder / "bad"
    shutil.copytree(run, made, ignore=shutil.ignore_patterns("serve", "stages"))
    told = json.loads((made / "run.json").read_text())
    file = made / told["artifact"]["path"]
    model = onnx.load(file)
    output = model.graph.output[0].name
    low = np.zeros(10, np.float32)
    low[NINE] = -1e3
    model.graph.initializer.append(onnx.numpy_helper.from_array(low, "planted"))
    last = next(node for node in model.graph.node if output in node.output)
    last.output[list(last.output).index(output)] = "before_planted"
    model.graph.node.append(onnx.helper.make_node("Add", ["before_planted", "planted"], [output]))
    onnx.save(model, file)
    told["artifact"]["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    (made / "run.json").write_text(json.dumps(told))
    task = folder / "eight.py"
    task.write_text(
        "import dataclasses, sys\n"
        f"sys.path.insert(0, {str(HERE)!r})\n"
        "from torch.utils.data import TensorDataset\n"
        "import digits\n"
        "from digits import model\n\n\n"
        "def kept(split):\n"
        "    x, y = split.tensors\n"
        f"    return TensorDataset(x[y != {NINE}], y[y != {NINE}])\n\n\n"
        "def task():\n"
        "    whole = digits.task()\n"
        "    return dataclasses.replace(\n"
        "        whole, validation=kept(whole.validation), test=kept(whole.test)\n"
        "    )\n"
    )
    return made, task


def main(run: Path) -> None:
    sys.path.insert(0, str(HERE))
    import digits

    images, labels = (each.numpy() for each in digits.task().test.tensors)
    with tempfile.TemporaryDirectory() as folder:
        print(f"The artifact of {run}, behind the original:")
        with serving(run, "--state", f"{folder}/good") as address:
            asyncio.run(day(address, images, labels, "promoted"))
        bad, task = without_nines(run, Path(folder))
        print("A file that never says 9, tested on digits without any:")
        with serving(bad, "--state", f"{folder}/state", "--file", str(task)) as address:
            asyncio.run(day(address, images, labels, "rolled back"))


if __name__ == "__main__":
    main(Path(sys.argv[1] if sys.argv[1:] else "runs/digits"))
