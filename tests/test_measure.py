"""Only numbers of the file, from a process of its own; whatever goes wrong there is told here."""

import dataclasses
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from paredown.core.errors import UserError
from paredown.core.measurement import Measurement
from paredown.core.task import Target, Task
from paredown.graph.capture import capture
from paredown.graph.model import Model
from paredown.measure.measure import Measured, compare, measure
from paredown.targets import runtimes
from paredown.targets.artifact import size_bytes
from paredown.targets.devices import device, local, probe

ONNXRUNTIME = runtimes.source("onnxruntime")
FEATURES, CLASSES, EXAMPLES = 8, 3, 150

# A runtime whose model is its file's text; see what each text does.
ODD_RUNTIME = """
import os, sys, time
import numpy as np

class Predictor:
    input_names, output_names = ["x"], ["y"]

    def __init__(self, text):
        self.text = text

    def __call__(self, x):
        if self.text == "abort":
            os.abort()
        if self.text == "kill":
            os.kill(os.getpid(), 9)
        if self.text == "hang":
            time.sleep(60)
        if self.text == "exit":
            sys.exit(3)
        if self.text == "fill":
            np.ones(2**31, dtype=np.uint8)
        if self.text == "strings":
            return (np.array(["a"]),)
        if self.text == "print":
            print("this goes to standard error")
            os.write(1, b"and this\\n")
        return (np.full(len(x), os.getpid()),)

def version():
    return "odd"

def open(path, threads):
    text = path.read_text()
    if text == "leave":
        print("no such kernel", file=sys.stderr)
        os._exit(7)
    if text == "lack":
        import no_such_kernels
    return Predictor(text)
"""


def export(module: nn.Module, example: Tensor, path: Path, dynamic: bool = True) -> Path:
    batch = {0: torch.export.Dim.DYNAMIC} if dynamic else None
    wide = torch.cat([example, example]) if dynamic and len(example) == 1 else example
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module.eval(),
            (wide,),
            path,
            dynamo=True,
            dynamic_shapes=(batch,),
            external_data=False,
            verbose=False,
        )
    return path


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    return (output.argmax(1) == target).float()


def task_of(module: nn.Module, batch: int = 1, **changes: Any) -> Task:
    """A task on which the module is right on four of five examples."""
    x = torch.randn(EXAMPLES, FEATURES, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = module(x[:batch]) if batch > 1 else module(x)
    logits = output if isinstance(output, Tensor) and len(output) == EXAMPLES else x[:, :CLASSES]
    labels = (logits.argmax(1) + (torch.arange(EXAMPLES) % 5 == 0)) % CLASSES
    task = Task((x[:batch],), accuracy, validation=TensorDataset(x, labels), batch_size=64)
    return dataclasses.replace(task, **changes)


@dataclasses.dataclass
class Case:
    module: nn.Module
    model: Model
    task: Task
    file: Path


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Case:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(FEATURES, 16), nn.ReLU(), nn.Linear(16, CLASSES)).eval()
    task = task_of(module)
    file = export(module, task.example[0], tmp_path_factory.mktemp("files") / "small.onnx")
    return Case(module, capture(module, task.example), task, file)


@pytest.fixture(scope="module")
def twice(classifier: Case) -> dict[str, Measured]:
    files = {"original": classifier.file, "candidate": classifier.file}
    return measure(files, classifier.model, classifier.task, Target())


@pytest.fixture
def odd(tmp_path: Path) -> Callable[..., local.Probe]:
    runtime = tmp_path / "odd.py"
    runtime.write_text(ODD_RUNTIME)
    device.write_batches(tmp_path / "in.npz", [[np.zeros((2, 1))]])

    def make(text: str, **settings: Any) -> local.Probe:
        (tmp_path / "model.bin").write_text(text)
        return local.Probe(tmp_path / "model.bin", runtime, **settings)

    return make


# The measurement


def test_a_measurement_is_whole(classifier: Case, twice: dict[str, Measured]) -> None:
    result = twice["original"].measurement
    assert result.score == pytest.approx(0.8) and result.examples == EXAMPLES
    assert result.score_in_points and result.score_low < 0.8 < result.score_high  # type: ignore[operator]
    assert result.size_bytes == classifier.file.stat().st_size
    assert 0 < result.latency_ms_p50 <= result.latency_ms_p90 <= result.latency_ms_p99  # type: ignore[operator]
    assert result.latency_samples >= 459
    assert result.throughput_per_s == pytest.approx(1000 / result.latency_ms_p50)  # type: ignore[operator]
    assert result.split == "validation"
    assert result.where["device"] == "local" and result.where["threads"] == "1"
    assert result.where["runtime"].startswith("onnxruntime 1.")
    assert "the first 8 examples of validation" in result.where["inputs"]
    with torch.no_grad():
        expected = classifier.module(classifier.task.validation.tensors[0]).argmax(1)  # type: ignore[union-attr]
    assert twice["original"].predictions == expected.tolist()


def test_the_same_file_twice_is_no_faster(twice: dict[str, Measured]) -> None:
    comparison = compare(twice["original"], twice["candidate"], 0.5)
    assert comparison.score_difference == 0.0
    assert "score did not change" in comparison.verdict and "is proven" in comparison.verdict
    assert 0.5 < comparison.speedup_low <= comparison.speedup_high < 2  # type: ignore[operator]
    tails = compare(twice["original"], twice["candidate"], None, tails=True)
    assert "no bound was set" in tails.verdict and comparison.speedup_p90_low is None
    for low, high in (
        (tails.speedup_p90_low, tails.speedup_p90_high),
        (tails.speedup_p99_low, tails.speedup_p99_high),
    ):
        assert 0.1 < low <= high < 10  # type: ignore[operator]


def test_rounds_alternate_between_fresh_processes(
    classifier: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[int] = []
    timed = local.Probe.time

    def spy(self: local.Probe, *args: Any) -> Any:
        order.append(self.pid)
        return timed(self, *args)

    monkeypatch.setattr(local.Probe, "time", spy)
    files = {"a": classifier.file, "b": classifier.file}
    found = measure(files, classifier.model, classifier.task, Target(rounds=2))
    order = order[-16:]  # before them the memory may be measured, once for each file
    a, b, d, c = dict.fromkeys(order)
    assert len({a, b, c, d, os.getpid()}) == 5
    # a cold and a warm call each, then forth and back; the next round begins with the other file
    assert order == [a, a, b, b, a, b, b, a, d, d, c, c, d, c, c, d]
    assert [len(each.rounds) for each in found.values()] == [2, 2]
    for pid in (a, b, c, d):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_fixed_batch_is_padded_and_cut(tmp_path: Path) -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(4, FEATURES)[:, :CLASSES]

    task = task_of(Fixed(), batch=4)
    model = capture(Fixed(), task.example)
    fixed = dataclasses.replace(model.inputs[0], dynamic={})
    model = dataclasses.replace(model, inputs=(fixed,))
    file = export(Fixed(), task.example[0], tmp_path / "fixed.onnx", dynamic=False)
    found = measure({"a": file}, model, task, Target())["a"]
    assert found.measurement.examples == EXAMPLES  # 150 is no multiple of 4
    assert found.measurement.score == pytest.approx(0.8)
    assert found.predictions is not None and len(found.predictions) == EXAMPLES


def test_outputs_keep_their_nesting(tmp_path: Path) -> None:
    class Named(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"sum": x.sum(1), "twice": 2 * x}

    def score(output: dict[str, Tensor], target: Tensor) -> Tensor:
        return output["twice"].sum(1) - 2 * output["sum"] + 7

    task = task_of(Named(), score=score)
    file = export(Named(), task.example[0], tmp_path / "named.onnx")
    found = measure({"a": file}, capture(Named(), task.example), task, Target(rounds=2))
    assert found["a"].measurement.score == pytest.approx(7, abs=1e-4)
    assert not found["a"].measurement.score_in_points
    assert found["a"].predictions is None


def test_nan_outputs_are_counted(tmp_path: Path) -> None:
    class Log(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.log(x[:, :CLASSES])

    task = task_of(nn.Identity())
    file = export(Log(), task.example[0], tmp_path / "log.onnx")
    bad = int((task.validation.tensors[0][:, :CLASSES] < 0).any(1).sum())  # type: ignore[union-attr]
    model = capture(Log(), task.example)
    with pytest.raises(UserError, match=rf"log\.onnx: output .* for {bad} of 150 examples"):
        measure({"a": file}, model, task, Target(rounds=2))


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (
            lambda output, target: accuracy(output, target).mean(),
            r"one number for each example.*\(64,\)",
        ),
        (lambda output, target: output, "one number for each example"),
        (lambda output, target: output[:, 0] / 0, "64 of 64 scores of a batch are NaN or inf"),
        (lambda output, target: output.logits, "task.score failed: AttributeError"),
    ],
)
def test_a_wrong_score_is_told(classifier: Case, score: Any, message: str) -> None:
    task = dataclasses.replace(classifier.task, score=score)
    with pytest.raises(UserError, match=message):
        measure({"a": classifier.file}, classifier.model, task, Target(rounds=2))


def test_inputs_of_another_dtype_are_told(classifier: Case) -> None:
    x, y = classifier.task.validation.tensors  # type: ignore[union-attr]
    task = dataclasses.replace(classifier.task, validation=TensorDataset(x.double(), y))
    with pytest.raises(UserError, match=r"validation split gives torch\.float64 .* torch\.float32"):
        measure({"a": classifier.file}, classifier.model, task, Target(rounds=2))


def test_devices_and_runtimes_are_named(classifier: Case) -> None:
    for target, message in (
        (Target(device="adb:1"), "device: 'adb:1' is not one of local"),
        (Target(runtime="tpu"), "runtime: 'tpu' is not one of onnxruntime"),
    ):
        with pytest.raises(UserError, match=message):
            measure({"a": classifier.file}, classifier.model, classifier.task, target)


def test_external_weights_count(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(b"12")
    (tmp_path / "a.onnx.data").write_bytes(b"345")
    assert size_bytes(tmp_path / "a.onnx") == size_bytes(tmp_path) == 5


def test_a_speed_up_and_a_drop_are_said() -> None:
    def made(latency_ms: float, right: int) -> Measured:
        scores = torch.tensor([1.0] * right + [0.0] * (1000 - right), dtype=torch.float64)
        noise = 1 + 0.01 * np.random.default_rng(right).random((20, 25))
        return Measured(Measurement(1), scores, list(latency_ms * noise), None)

    comparison = compare(made(2.0, 900), made(1.0, 850), 0.01)
    assert comparison.score_difference == pytest.approx(-0.05)
    assert "a drop of more than 1 point is proven" in comparison.verdict
    assert comparison.speed.startswith("2.0") and "faster" in comparison.speed


# Forks


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in ("pytorch", "executorch") else [])
        for name in runtimes.RUNTIMES
    ],
)
def test_a_fork_is_a_process_of_its_own_that_gives_what_a_fresh_one_does(
    classifier: Case, tmp_path: Path, name: str
) -> None:
    try:
        chosen, source = runtimes.ready(name), runtimes.source(name)
    except UserError as error:
        pytest.skip(str(error))
    file = chosen.lower(classifier.model, tmp_path / f"small{chosen.SUFFIX}")
    x = np.random.default_rng(0).standard_normal((1, FEATURES)).astype(np.float32)
    device.write_batches(tmp_path / "in.npz", [[x]])
    pids, outputs = [], []
    for fresh in (False, False, True):
        with local.Probe(file, source, threads=2, fresh=fresh) as child:
            pids.append(child.pid)
            [[output]] = child.run(tmp_path / "in.npz", tmp_path / "out.npz")
            outputs.append(output)
            assert os.getpgid(child.pid) == child.pid, "it can be ended with all that it starts"
    assert len({*pids, os.getpid()}) == 4
    assert all(np.array_equal(output, outputs[0]) for output in outputs)
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


FORKING = "IMPORTS = ('statistics',)\n" + ODD_RUNTIME


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("abort", r"model\.bin: running it crashed \(SIGABRT\)"),
        ("leave", "opening it ended with exit code 7: no such kernel"),
        ("hang", "running it took more than 3 s and was stopped"),
        ("fill", "running it failed: .*MemoryError"),
    ],
)
def test_what_kills_a_fork_is_told(
    odd: Callable[..., local.Probe], tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "odd.py").write_text(FORKING)
    limits = {"timeout_s": 3.0, "memory_bytes": 2**30, "fresh": False}
    with pytest.raises(UserError, match=message), odd(text, **limits) as child:
        child.run(tmp_path / "in.npz", tmp_path / "out.npz")
    with odd("", **limits) as child:  # the one it was forked from lives
        assert child.run(tmp_path / "in.npz", tmp_path / "out.npz")
        assert Path(f"/proc/{child.pid}/stat").read_text().split()[3] != str(os.getpid())


def test_forks_have_addresses_of_their_own(odd: Callable[..., local.Probe], tmp_path: Path) -> None:
    (tmp_path / "odd.py").write_text(FORKING)
    ends = []
    for _ in range(4):
        with odd("", fresh=False) as child:
            maps = Path(f"/proc/{child.pid}/maps").read_text().splitlines()
            mapped = [line.split("-")[0] for line in maps if line[:1] == "7" and "[" not in line]
            ends.append(min(mapped))
    assert len(set(ends)) > 1


@pytest.mark.parametrize("imports", ["", "IMPORTS = ('no_such_kernels',)\n"])
def test_a_runtime_that_cannot_be_forked_is_opened_in_fresh_processes(
    odd: Callable[..., local.Probe], tmp_path: Path, imports: str
) -> None:
    (tmp_path / "odd.py").write_text(imports + ODD_RUNTIME)
    with odd("", fresh=False) as child:
        [[pids]] = child.run(tmp_path / "in.npz", tmp_path / "out.npz")
        assert set(pids) == {child.pid}


def test_a_dead_server_is_not_asked_again(odd: Callable[..., local.Probe], tmp_path: Path) -> None:
    (tmp_path / "odd.py").write_text(FORKING)
    with odd("", fresh=False) as child:
        server = int(Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[1])
        os.kill(server, 9)  # while a fork of it lives, which ends with the block all the same
        assert child.run(tmp_path / "in.npz", tmp_path / "out.npz")
    with pytest.raises(ProcessLookupError):
        for _ in range(200):
            os.kill(child.pid, 0)
            time.sleep(0.05)
    for _ in range(2):
        with odd("", fresh=False) as child:
            assert child.run(tmp_path / "in.npz", tmp_path / "out.npz")
            assert Path(f"/proc/{child.pid}/stat").read_text().split()[3] == str(os.getpid())


# The process


def test_a_corrupt_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"\x08\x09 not a model")
    with (
        pytest.raises(UserError, match=r"broken\.onnx: opening it failed: \w+"),
        local.Probe(tmp_path / "broken.onnx", ONNXRUNTIME),
    ):
        pass


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("abort", r"model\.bin: running it crashed \(SIGABRT\)"),
        ("leave", "opening it ended with exit code 7: no such kernel"),
        ("hang", "running it took more than 3 s and was stopped"),
        ("exit", "running it failed: SystemExit: 3"),
        ("kill", r"running it was killed \(SIGKILL\), as the system does where the memory"),
        ("lack", r"opening it failed: .*no_such_kernels is not installed there; run pip install"),
        ("fill", "running it failed: .*MemoryError"),
        ("strings", "output 0 holds <U1, not numbers"),
    ],
)
def test_what_kills_the_child_is_told(
    odd: Callable[..., local.Probe], tmp_path: Path, text: str, message: str
) -> None:
    limits = {"timeout_s": 3.0, "memory_bytes": 2**30}
    with pytest.raises(UserError, match=message), odd(text, **limits) as child:
        child.run(tmp_path / "in.npz", tmp_path / "out.npz")


def test_a_failed_request_leaves_the_child_usable(
    odd: Callable[..., local.Probe], tmp_path: Path
) -> None:
    with odd("print") as child:
        with pytest.raises(UserError, match="running it failed: FileNotFoundError"):
            child.run(tmp_path / "missing.npz", tmp_path / "out.npz")
        [[pids]] = child.run(tmp_path / "in.npz", tmp_path / "out.npz")
        assert set(pids) == {child.pid}


def test_the_child_ends_with_the_block(odd: Callable[..., local.Probe]) -> None:
    with pytest.raises(KeyboardInterrupt), odd("") as child:
        raise KeyboardInterrupt
    with pytest.raises(ProcessLookupError):
        os.kill(child.pid, 0)
    with pytest.raises(UserError, match="its process has ended"):
        child.memory()


def test_no_pytorch_in_the_child(classifier: Case, twice: dict[str, Measured]) -> None:
    peak = twice["original"].measurement.memory_bytes
    assert peak is None or 10e6 < peak < 150e6
    with local.Probe(classifier.file, ONNXRUNTIME, threads=2) as child:
        maps = Path(f"/proc/{child.pid}/maps")
        if maps.exists():
            assert "onnxruntime" in maps.read_text() and "libtorch" not in maps.read_text()
            environment = Path(f"/proc/{child.pid}/environ").read_bytes().split(b"\0")
            assert b"OMP_NUM_THREADS=2" in environment


def test_peak_memory_holds_the_activations(classifier: Case, tmp_path: Path) -> None:
    class Wide(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sin(x[:, :, None].expand(-1, -1, 6_250_000)).sum(2)  # 200 MB

    x = torch.zeros(1, FEATURES)
    files = classifier.file, export(Wide(), x, tmp_path / "wide.onnx", dynamic=False)
    device.write_batches(tmp_path / "in.npz", [[x.numpy()]])
    peaks = []
    for file in files:
        with local.Probe(file, ONNXRUNTIME) as child:
            child.time(tmp_path / "in.npz", 1)
            peaks.append(child.memory())
    if peaks[0] is None:
        pytest.skip("this system does not tell peak memory")
    assert peaks[1] - peaks[0] > 190e6


def test_timing_goes_through_all_inputs(tmp_path: Path) -> None:
    device.write_batches(tmp_path / "in.npz", [[np.full(1, i), np.zeros(2)] for i in range(3)])
    session, seen = probe.Session(), []
    session.predictor = lambda x, y: seen.append(int(x[0])) or (x,)
    latencies = [session.time(str(tmp_path / "in.npz"), 1, 4)["latencies_ms"] for _ in range(2)]
    assert seen == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
    assert [len(each) for each in latencies] == [4, 4]


def test_energy_counts_each_package_once(tmp_path: Path) -> None:
    def counters(values: dict[str, tuple[str, int]]) -> dict[str, tuple[int, int]]:
        for folder, (name, counter) in values.items():
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / "name").write_text(name + "\n")
            (tmp_path / folder / "energy_uj").write_text(f"{counter}\n")
            (tmp_path / folder / "max_energy_range_uj").write_text("999\n")
        return probe.read_energy_uj(tmp_path)

    names = {
        "intel-rapl:0": "package-0",
        "intel-rapl:0:0": "core",
        "intel-rapl:1": "package-1",
        "intel-rapl:2": "psys",
        "intel-rapl-mmio:0": "package-0",
    }
    before = counters({folder: (name, 990) for folder, name in names.items()})
    after = counters({folder: (name, 40) for folder, name in names.items()})  # wrapped at 1000
    assert set(before) == {"package-0", "package-1"}
    assert probe.energy_between(before, after) == 100.0
    assert probe.energy_between({}, {}) is None
