"""The task's preprocessing and postprocessing in the server; every runtime in a worker."""

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch

import paredown
from paredown.core.source import Source
from paredown.ship.serve import examples, pipeline_worker, scoring
from paredown.ship.serve.child import Opening
from paredown.ship.serve.refused import Refused
from paredown.ship.serve.workers import Fault, Limits, Worker
from paredown.targets.runtimes import runtime, source
from tests.test_serve_runs import Served, inputs, model, run_folder, weights

TASK = """
import torch, paredown

ROWS = torch.randn(40, 4, generator=torch.Generator().manual_seed(3))

class Texts(torch.utils.data.Dataset):
    def __len__(self):
        return len(ROWS)
    def __getitem__(self, place):
        return " ".join(f"{value:.3f}" for value in ROWS[place].tolist()), 0

def task():
    return paredown.Task(
        example=(ROWS[:1],), score=paredown.accuracy, validation=Texts(),
        preprocess=lambda text: torch.tensor([float(word) for word in text.split()]),
        postprocess=lambda output: {
            "class": output["y"].argmax(1).tolist(),
            "said": [f"{max(row):.1f}" for row in output["y"].tolist()],
        },
    )

def model():
    return torch.nn.Linear(4, 3)
"""


@pytest.fixture
def task_file(tmp_path):
    (tmp_path / "texts.py").write_text(TASK)
    return tmp_path / "texts.py"


def objects(*texts):
    array = np.empty(len(texts), object)
    array[:] = [text.encode() for text in texts]
    return array


def test_a_pipeline_takes_texts_and_gives_what_the_task_makes(tmp_path, task_file):
    file = model(tmp_path / "model.onnx")
    made = pipeline_worker.Model(str(file), "", 1, Source(str(task_file)).to_json())
    made.warm_up()
    assert made.signature["inputs"] == [
        {"name": "input", "dtype": "str", "shape": [["batch", 1, None]]}
    ]
    assert [(o["name"], o["dtype"], o["shape"]) for o in made.signature["outputs"]] == [
        ("class", "int64", [-1]),
        ("said", "str", [-1]),
    ]
    assert made.signature["batched"]
    (classes, said), spent = made.run([objects("1 2 3 4", "-1 0 1 0.5")])
    scores = np.float32([[1, 2, 3, 4], [-1, 0, 1, 0.5]]) @ weights()
    assert classes.tolist() == scores.argmax(1).tolist()
    assert [each.decode() for each in said] == [f"{row.max():.1f}" for row in scores]
    assert set(spent) == {"preprocess_ms", "compute_ms", "postprocess_ms"}
    assert all(value >= 0 for value in spent.values())


@pytest.mark.slow
def test_raw_examples_are_read_of_the_task(tmp_path, task_file):
    kept = examples.Examples(tmp_path, Source(str(task_file)), raw=True)
    kept.make(["input"])
    rows = kept.read()
    assert len(rows) == 40 and len(rows[0][0].item().split()) == 4
    ready = examples.Examples(tmp_path, Source(str(task_file)))
    ready.make(["x"])
    values = [float(word) for word in rows[7][0].item().split()]
    assert ready.read()[7][0].shape == (1, 4) and np.allclose(ready.read()[7][0], values)


def test_a_task_that_fails_is_told(tmp_path):
    (tmp_path / "wrong.py").write_text("def task():\n    return 3\ndef model(): pass\n")
    with pytest.raises(paredown.UserError, match=r"not a paredown\.Task"):
        examples.Examples(tmp_path, Source(str(tmp_path / "wrong.py"))).make(["x"])
    with pytest.raises(paredown.UserError, match="--file"):
        examples.Examples(tmp_path, None).make(["x"])


def test_a_golden_set_does_where_there_is_no_task(tmp_path):
    arrays = {
        f"inputs.{n}.{place}": np.full((2, 3), 10 * n + place) for n in range(3) for place in (0, 1)
    }
    np.savez(tmp_path / "golden.npz", **arrays, **{"outputs.0.0": np.zeros((2, 1))})
    kept = examples.Examples(tmp_path, None, golden=tmp_path / "golden.npz")
    kept.make(["a", "b"])
    rows = kept.read()
    assert [[leaf.shape for leaf in row] for row in rows] == [[(1, 3), (1, 3)]] * 6
    assert [[leaf[0, 0] for leaf in row] for row in rows[1:3]] == [[0, 1], [10, 11]]
    for damaged in (b"", b"PK no zip", (tmp_path / "golden.npz").read_bytes()[:200]):
        (tmp_path / "golden.npz").write_bytes(damaged)
        with pytest.raises(paredown.UserError, match="no golden set can be read"):
            kept.make(["a", "b"])


@pytest.mark.slow
def test_a_server_runs_end_to_end(tmp_path, task_file):
    folder = run_folder(tmp_path / "run")
    with Served(folder, "--file", task_file, "--end-to-end") as served:
        served.until(lambda status: status["stage"] == "shadow", 60)
        tensor = {
            "name": "input",
            "shape": [2],
            "datatype": "BYTES",
            "data": ["1 2 3 4", "4 3 2 1"],
        }
        path = "/v2/models/tiny/infer"
        status, said = served.post(path, {"inputs": [tensor]})
        assert status == 200, said
        scores = np.float32([[1, 2, 3, 4], [4, 3, 2, 1]]) @ weights()
        first, second = said["outputs"]
        assert first["data"] == scores.argmax(1).tolist() and second["datatype"] == "BYTES"
        status, said = served.post(path, {"inputs": [tensor | {"data": ["1 2", "a"]}]})
        assert status == 400 and "does not take" in said["error"]
        metrics = served.get("/metrics").decode()
        assert "paredown_preprocess_duration_us" in metrics
        assert "Traceback" not in served.log.read_text()


def test_late_labels_are_scored_by_the_task(tmp_path):
    text = "import torch, paredown\ndef model(): pass\ndef task():\n    return paredown.Task("
    text += "(torch.zeros(1, 4),), score=lambda out, y: -(out['y'][:, 0] - y).abs())\n"
    (tmp_path / "late.py").write_text(text)

    async def scored():
        score = scoring.ByTask(Source(str(tmp_path / "late.py")), ["y"], None)
        outputs = {"y": np.float32([[1.5, 0], [3.5, 0]])}
        try:
            with pytest.raises(Refused, match="does not score it"):
                await score(outputs, [1, 2, 3])
            with pytest.raises(Refused, match="expected numbers"):
                await score(outputs, "a")
            return await score(outputs, [1.0, 3.0])
        finally:
            await score.end()

    assert asyncio.run(scored()) == -0.5


async def asked(file, runtime, *requests):
    worker = Worker("original", Opening(file, source(runtime)), Limits())
    worker.start()
    try:
        assert await worker.first_start(), worker.why
        answers = await asyncio.gather(
            *(worker.infer(each) for each in requests), return_exceptions=True
        )
        return worker.signature, answers, worker.counts
    finally:
        await worker.stop()


@pytest.mark.slow
def test_every_runtime_answers_in_a_worker(tmp_path, runtime_name):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    captured = paredown.capture(net.eval(), (torch.zeros(1, 4),))
    path = tmp_path / f"model{runtime(runtime_name).SUFFIX}"
    made = paredown.export(captured, paredown.Target(runtime_name), path)
    rows = [inputs(count, count) for count in (1, 2, 5, 1)]
    signature, answers, counts = asyncio.run(
        asked(Path(made.path), runtime_name, *([each] for each in rows))
    )
    assert signature.batched and signature.outputs[0]["shape"] == [-1, 3]
    for x, answer in zip(rows, answers, strict=True):
        assert not isinstance(answer, Fault), answer
        expected = net(torch.from_numpy(x)).detach().numpy()
        assert np.allclose(next(iter(answer.outputs.values())), expected, atol=1e-4)
    assert counts.examples == 9 and counts.executions < 4
