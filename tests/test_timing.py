"""How much faster one model's file is than another's: fresh processes, in turn, nothing left."""

import dataclasses
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from paredown.core import progress
from paredown.core.errors import UserError
from paredown.core.task import Target
from paredown.data import batches
from paredown.graph.capture import capture
from paredown.graph.model import Model
from paredown.measure import inputs, speedups, timing
from paredown.measure.looks import Question, answered, look
from paredown.targets.devices import local
from paredown.targets.runtimes import runtime

FEATURES = 256


def perceptron(width: int, depth: int = 2) -> Model:
    torch.manual_seed(0)
    layers = [nn.Linear(FEATURES, width), nn.ReLU()]
    for _ in range(depth - 2):
        layers += [nn.Linear(width, width), nn.ReLU()]
    module = nn.Sequential(*layers, nn.Linear(width, 10)).eval()
    return capture(module, (torch.randn(4, FEATURES),))


@pytest.fixture(scope="module")
def small() -> Model:
    return perceptron(64)


@pytest.fixture(scope="module")
def large() -> Model:
    return perceptron(1024, depth=4)  # over a hundred times the work


@dataclasses.dataclass
class Seen:
    """A call that timed a file."""

    pid: int
    file: Path
    threads: int
    inputs: list[np.ndarray]


@pytest.fixture
def seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Seen]:
    """What is timed, as it happens; temporary files lie in ``tmp_path``."""
    calls: list[Seen] = []
    timed = local.Probe.time

    def spy(self: local.Probe, inputs: Path, *args: Any) -> Any:
        assert self.file.exists()
        with np.load(inputs) as arrays:
            calls.append(Seen(self.pid, self.file, self.threads, list(arrays.values())))
        return timed(self, inputs, *args)

    monkeypatch.setattr(local.Probe, "time", spy)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return calls


def test_less_work_is_faster_and_more_is_slower(small: Model, large: Model) -> None:
    faster = timing.speedup(large, small, Target())
    assert 1 < faster.low <= faster.estimate <= faster.high and faster.estimate > 5
    slower = timing.speedup(small, large, Target(), rounds=2)
    assert slower.estimate < 1 / 5


def test_the_same_model_is_no_faster(large: Model) -> None:
    same = timing.speedup(large, large, Target())
    assert same.low <= 1 <= same.high or (same.low > 0.8 and same.high < 1.25)
    assert 0.67 < same.estimate < 1.5


def test_the_result_is_that_of_the_interleaved_latencies(
    small: Model, large: Model, seen: list[Seen], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[dict[str, timing.Timing]] = []
    interleaved = timing.interleaved

    def spy(*args: Any) -> dict[str, timing.Timing]:
        made.append(interleaved(*args))
        return made[-1]

    monkeypatch.setattr(timing, "interleaved", spy)
    found = timing.speedup(large, small, Target(), rounds=3)
    [timings] = made
    medians = [np.median(np.concatenate(timings[name].rounds)) for name in ("before", "after")]
    assert found.estimate == pytest.approx(medians[0] / medians[1])
    assert [len(each.rounds) for each in timings.values()] == [3, 3]
    processes = {call.pid: call.file.stem for call in seen}
    order = ["before", "after", "after", "before", "before", "after"]
    assert list(processes.values()) == order and os.getpid() not in processes


def test_nothing_is_left(small: Model, seen: list[Seen], tmp_path: Path) -> None:
    timing.speedup(small, small, Target(), rounds=2)
    assert {call.file.name for call in seen} == {"before.onnx", "after.onnx"}
    assert all(tmp_path in call.file.parents for call in seen)
    assert list(tmp_path.iterdir()) == []
    for pid in {call.pid for call in seen}:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_nothing_is_left_of_a_failure(
    small: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files: list[Path] = []

    def killed(self: local.Probe, *args: Any) -> Any:
        files.append(self.file)
        os.kill(self.pid, 9)
        self.memory()

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(local.Probe, "time", killed)
    with pytest.raises(UserError, match=r"before\.onnx: .*killed \(SIGKILL\)"):
        timing.speedup(small, small, Target())
    assert len(files) == 1 and list(tmp_path.iterdir()) == []


def test_threads_are_passed_on(small: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[bytes] = []
    timed = local.Probe.time

    def spy(self: local.Probe, *args: Any) -> Any:
        told.append(Path(f"/proc/{self.pid}/environ").read_bytes())
        assert self.threads == 2
        return timed(self, *args)

    if not Path("/proc/self/environ").exists():
        pytest.skip("this system does not tell a process's environment")
    monkeypatch.setattr(local.Probe, "time", spy)
    timing.speedup(small, small, Target(threads=2), rounds=2)
    assert told and all(b"OMP_NUM_THREADS=2" in each.split(b"\0") for each in told)


def test_the_example_is_timed_or_what_was_given(small: Model, seen: list[Seen]) -> None:
    own = small.inputs[0].example
    timing.speedup(small, small, Target(), rounds=2)
    assert all(np.array_equal(array, own) for call in seen for array in call.inputs)
    seen.clear()
    given = [torch.full_like(own, 1.0), (torch.full_like(own, 2.0),)]
    timing.speedup(small, small, Target(), given, rounds=2)
    assert {tuple(array[0, 0] for array in call.inputs) for call in seen} == {(1.0,), (1.0, 2.0)}


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([], "inputs: is empty; give at least one"),
        ([torch.zeros(4, FEATURES).double()], r"inputs\[0\] gives torch\.float64 for input"),
        ([torch.zeros(4, FEATURES), torch.zeros(4, 3)], r"inputs\[1\] does not fit the example"),
        ([torch.zeros(9, FEATURES)], r"inputs\[0\]: .* of shape \(4, 256\), got \(9, 256\)"),
    ],
)
def test_inputs_that_do_not_fit_are_told(small: Model, inputs: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        timing.speedup(small, small, Target(), inputs)


@pytest.mark.parametrize(
    ("target", "rounds", "message"),
    [
        (Target(runtime="tpu"), 4, "runtime: 'tpu' is not one of onnxruntime"),
        (Target(device="adb:1"), 4, "device: 'adb:1' is not one of local"),
        (Target(), 1, "rounds: expected a whole number from 2 up, got 1"),
    ],
)
def test_what_cannot_be_timed_is_refused(
    small: Model, seen: list[Seen], target: Target, rounds: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        timing.speedup(small, small, target, rounds=rounds)
    assert not seen


def test_models_with_other_inputs_are_refused(small: Model) -> None:
    other = capture(nn.Linear(3, 2), (torch.zeros(4, 3),))
    with pytest.raises(UserError, match=r"after: .* \(4, 256\), got .* \(4, 3\)"):
        timing.speedup(small, other, Target())


def test_a_trained_model_is_timed_as_deployed_and_left_as_it_was(seen: list[Seen]) -> None:
    module = nn.Sequential(nn.Linear(FEATURES, 8), nn.Dropout(0.5), nn.Linear(8, 2))
    model = capture(module, (torch.randn(4, FEATURES),)).train()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = torch.ones(4, FEATURES)
    timing.speedup(model, model, Target(), rounds=2)
    assert all(torch.equal(weights[name], now) for name, now in model.state_dict().items())
    assert not torch.equal(model(x), model(x)), "it still drops out"


@pytest.mark.parametrize(
    ("latency_ms", "samples"), [(0.01, 2000), (2.0, 1500), (6.0, 500), (10.0, 300), (4000.0, 20)]
)
def test_as_many_samples_as_the_time_allows(latency_ms: float, samples: int) -> None:
    assert 20 * timing._plan(latency_ms, 20)[0] == samples


def test_a_decision_takes_less_time_than_a_final_measurement() -> None:
    final = timing._plan(10.0, timing.TURNS * Target().rounds)
    share = timing.DECISION_ROUNDS / Target().rounds
    quick = timing._plan(10.0, timing.TURNS * timing.DECISION_ROUNDS, timing.BUDGET_MS * share)
    assert quick == final, "a turn is as long, and there are fewer"


@pytest.fixture
def exported(small: Model, large: Model, tmp_path: Path) -> dict[str, Path]:
    lower = runtime("onnxruntime").lower
    return {
        "original": lower(large, tmp_path / "large.onnx"),
        "candidate": lower(small, tmp_path / "small.onnx"),
        "twin": lower(small, tmp_path / "twin.onnx"),
    }


@pytest.mark.parametrize(
    ("questions", "rounds"),
    [
        (None, 9),  # nobody asks: all of them
        ([], 4),
        ([Question("original", "candidate", 1.0)], 4),  # over five times faster
        ([Question("original", "candidate", 1e6)], 4),  # and not a million times
        ([Question("candidate", "candidate", 1.0)], 9),  # as fast as itself, which no round decides
    ],
)
def test_rounds_end_as_soon_as_the_questions_are_answered(
    exported: dict[str, Path],
    small: Model,
    questions: list[Question] | None,
    rounds: int,
) -> None:
    batches = [inputs.deployed_example(small)]
    found = timing.interleaved(exported, Target(), batches, 9, 90.0, questions=questions)
    assert [len(each.rounds) for each in found.values()] == [rounds] * 3


@pytest.mark.parametrize(
    ("rounds", "scatter", "done"),
    [
        (10, 0.01, 10),
        (10, 1.0, 20),
        (9, 1.0, 9),  # who asks for few gets few
    ],
)
def test_a_disturbed_machine_is_timed_for_longer(
    exported: dict[str, Path],
    small: Model,
    monkeypatch: pytest.MonkeyPatch,
    rounds: int,
    scatter: float,
    done: int,
) -> None:
    rng, said = np.random.default_rng(0), []
    timed = local.Probe.time

    def shaken(self: local.Probe, *args: Any) -> Any:
        latencies, energy = timed(self, *args)
        return np.ones_like(latencies) * rng.lognormal(0, scatter), energy

    monkeypatch.setattr(local.Probe, "time", shaken)
    monkeypatch.setattr(progress, "say", said.append)
    batches, two = [inputs.deployed_example(small)], ("original", "candidate")
    files = {name: exported[name] for name in two}
    found = timing.interleaved(files, Target(), batches, rounds, 90.0)
    assert [len(each.rounds) for each in found.values()] == [done] * 2
    assert any("disturbed" in text for text in said) is (done > rounds)


def test_looking_early_finds_hardly_more_speed_ups_than_looking_once() -> None:
    """Of 600 pairs of equal programs, each round of which has a pace of its own."""
    rng = np.random.default_rng(0)
    once = looked = 0
    for _ in range(600):
        rounds = {name: list(rng.lognormal(0, 0.01, (10, 1))) for name in ("a", "b")}
        question = [Question("a", "b", 1.0)]
        early = any(
            answered(question, {name: each[:done] for name, each in rounds.items()})
            for done in range(10)
            if look(done)
        )
        interval = speedups.median_ratio(rounds["a"], rounds["b"])
        last = not interval.low <= 1 <= interval.high
        once, looked = once + last, looked + (early or last)
    assert once / 600 < 0.075 and looked - once <= 6  # 0.1 % at each of three looks: 1.8


def test_a_long_measurement_is_told_before(
    exported: dict[str, Path], small: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(progress, "say", said.append)
    batches = [inputs.deployed_example(small)]
    timing.interleaved(exported, Target(), batches, 2, 90.0)
    assert said == []
    monkeypatch.setattr(timing, "LONG_S", 0.01)
    timing.interleaved(exported, Target(), batches, 2, 90.0)
    assert len(said) == 1 and "timing 3 files: 2 rounds of" in said[0] and "--rounds" in said[0]


@pytest.mark.parametrize("length", [1, 3, 4])
def test_a_short_batch_is_padded_with_its_last_example(small: Model, length: int) -> None:
    x = torch.arange(float(length))[:, None].expand(length, FEATURES)
    [padded] = inputs.leaves(small, batches.padded(x, 4), "x")
    assert padded[:, 0].tolist() == [min(n, length - 1) for n in range(4)]
    [same] = inputs.leaves(small, x, "x")
    assert same is x


def test_named_inputs_come_in_the_order_of_the_model() -> None:
    class Named(nn.Module):
        def forward(self, *, first: Tensor, second: Tensor) -> Tensor:
            return first - second

    example = {"first": torch.ones(1, 2), "second": torch.zeros(1, 2)}
    model = capture(Named(), example)
    swapped = {"second": torch.zeros(1, 2), "first": torch.ones(1, 2)}
    found = inputs.leaves(model, swapped, "x")
    assert [tensor.tolist() for tensor in found] == [[[1.0, 1.0]], [[0.0, 0.0]]]
