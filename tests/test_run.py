"""Whole runs, from a user's file to a proven artifact: finished, missed, killed, resumed."""

import contextlib
import dataclasses
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import paredown
from paredown import cli
from paredown.core import files
from paredown.core.errors import UserError
from paredown.core.goals import Goals
from paredown.core.measurement import Comparison, Measurement
from paredown.core.results import Run, Trial
from paredown.core.task import Target, Task
from paredown.graph.doors.python_file import load as load_user
from paredown.report.page import render
from paredown.run import compress
from paredown.run import stages as stages_of_runs
from paredown.run.ledger import RECORDS, Ledger
from paredown.run.preflight import check, unrepeated
from paredown.run.stages import Point, State
from paredown.search.decide import Standing
from paredown.search.proposal import Attempt, Proposal
from paredown.steps import recipe
from paredown.targets.devices import device, local, probe

HERE = Path(__file__).parent
KILL_AT, COUNT_IN = "TEST_KILL_AT", "TEST_COUNT_IN"  # environment of a child; see `main`

TINY = '''
import os
import signal

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import paredown


def images(seed, count=60):
    """Which quarter of an 8 x 8 image is bright, under noise."""
    label = torch.arange(count) % 4
    image = 0.6 * torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    for n, quarter in enumerate(label.tolist()):
        row, column = divmod(quarter, 2)
        image[n, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 1
    return TensorDataset(image, label)


def task(**changes):
    fields = {
        "example": (torch.zeros(1, 1, 8, 8),),
        "score": paredown.accuracy,
        "loss": F.cross_entropy,
        "train": images(0),
        "validation": images(1),
        "test": images(2),
        "classes": ("north-west", "north-east", "south-west", "south-east"),
        "batch_size": 20,
    }
    return paredown.Task(**(fields | changes))


def model():
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 32, 3, 2, 1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(128, 4)),
    )
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    image, label = images(0).tensors
    for _ in range(15):
        optimizer.zero_grad()
        F.cross_entropy(net(image), label).backward()
        optimizer.step()
    return net.eval()
'''
NO_TRAIN = "old = task\ndef task():\n    return old(train=None, loss=None, calibration=images(0))\n"
INT8 = '[[step]]\nname = "quantize"\n'
TRAINED_INT8 = f'{INT8}[[step]]\nname = "fine_tune"\nepochs = 3\n'


def test_a_machine_that_speeds_up_makes_no_recipe_pay(monkeypatch):
    first = Measurement(100_000, 0.9, latency_ms_p50=4.0)
    even = Comparison(speedup=1.02, speedup_low=0.98, speedup_high=1.06)
    came = {  # each with the original beside it, a while after the baseline
        "int8": (100_000, 2.9, 3.0),
        "fp16": (50_000, 3.05, 3.0),
    }

    def tried(state, item, attempt, best, number):
        size, own, beside = came[attempt.title]
        measured = (dataclasses.replace(first, size_bytes=size, latency_ms_p50=own), first)
        standing = Standing(measured[0], dataclasses.replace(first, latency_ms_p50=beside), even)
        trial = Trial([], attempt.title, "", "", True, "", measured[0], even, 0.1, "")
        return trial, Point(attempt.title, best.file, (), standing, (number,))

    monkeypatch.setattr(compress, "tried", tried)
    goals = Goals(latency="0.8x")
    state = State(None, None, goals, Target(), None, Path(), first, 0, False)
    proposals = [Proposal(name, "", (Attempt((), name, "", ""),)) for name in came]
    trials, best = compress._search(state, proposals)
    assert [trial.title for trial in trials] == ["int8", "fp16"]  # int8 did not end the search
    assert best.stage == "fp16"


class Here(local.Probe):
    """A device without processes, on which an inference takes a ms for each 100 KB of its file."""

    def __enter__(self):
        self.session = probe.Session()
        names = self.session.open(str(self.file), str(self.runtime_file), self.threads)
        self.input_names, self.output_names = names["inputs"], names["outputs"]
        return self

    def __exit__(self, *_):
        pass

    def run(self, inputs, outputs):
        self.session.run(str(inputs), str(outputs))
        return list(probe.read_batches(str(outputs)))

    def time(self, inputs, count, warmup=0):
        return np.full(count, self.file.stat().st_size / 1e5), None

    def memory(self):
        return 50_000_000

    def describe(self):
        return {"device": "local", **self.session.versions(), "threads": str(self.threads)}


BY_NAME = f"{__name__}:here_at"


def here_at(address):
    return Here


def main():
    """The command line on `Here`, killed at a failpoint by its number, or counting them."""
    device.DEVICES["local"] = BY_NAME
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell ignores it
    kill_at, count_in, passed = int(os.environ.get(KILL_AT, 0)), os.environ.get(COUNT_IN), 0

    def failpoint(name, short=None):
        nonlocal passed
        passed += 1
        if passed == kill_at:
            if short is not None and kill_at % 2:
                short()
            os.kill(os.getpid(), signal.SIGKILL)
        if count_in:
            Path(count_in).write_text(str(passed))

    if kill_at or count_in:
        files.failpoint = failpoint
    cli.main()


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setitem(device.DEVICES, "local", BY_NAME)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)  # the runtime's, not the tests'


@pytest.fixture
def user(tmp_path, monkeypatch):
    """A folder to work in, and what writes a user's file there: `TINY` and changes to it."""
    monkeypatch.chdir(tmp_path)

    def write(changes="", name="net.py"):
        Path(name).write_text(f"{TINY}\n{changes}")
        return name

    return write


@pytest.fixture
def paredown_cli(here, monkeypatch, capsys):
    """Run the command line in this process: exit code, standard output, standard error."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["paredown", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return end.value.code or 0, out, err

    return call


def load(folder):
    return Run.load(folder)


def stages(folder):
    """The keys of the finished stages, oldest first; a torn record has none."""
    keys = []
    for line in (Path(folder) / RECORDS).read_text().splitlines():
        with contextlib.suppress(ValueError, IndexError):
            keys.append(json.loads(line.split(" ", 2)[2])["key"])
    return keys


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


# --- whole runs ------------------------------------------------------------------------------


def test_a_whole_run(undisturbed, monkeypatch):
    monkeypatch.chdir(undisturbed)
    written = {"model.onnx", "original.onnx", "recipe.toml", "report.html", "run.json"}
    written |= {"golden.npz"}
    assert set(names("whole")) == written | {".lock", "identity.json", "ledger.jsonl", "stages"}
    run = load("whole")
    assert Run.from_json(run.to_json()).within(Path("whole")) == run
    assert run.met and run.verdict == "Every goal is met by the exported file."
    assert run.artifact.size_bytes == Path("whole/model.onnx").stat().st_size
    assert run.artifact.size_bytes <= 0.25 * run.original.size_bytes
    steps = recipe.load("whole/recipe.toml")
    kinds = [paredown.PruneChannels, paredown.FineTune, paredown.Quantize]
    assert [type(step) for step in steps] == kinds
    prune, int8 = run.trials
    assert prune.kept and "size 59" in prune.decision and "faster" in prune.decision
    assert int8.kept and len(prune.steps) == 2
    assert run.on_device["compressed"].split == "test" and run.baseline.split == "validation"
    assert run.comparison.speedup > 2  # on `Here`, in proportion to the size
    predict = paredown.open("whole/model.onnx")
    assert predict(np.zeros((3, 1, 8, 8), np.float32))[0].shape == (3, 4)
    assert "<html" in Path("whole/report.html").read_text()


def test_details_are_filled(undisturbed):
    found = load(undisturbed / "whole").details
    assert {row["dtype_after"] for row in found["layers"]} == {"int8"} and len(found["layers"]) == 4
    sums = [(sum(row["before"]), sum(row["after"])) for row in found["histograms"]]
    assert all(before >= after > 0 for before, after in sums)
    assert any(before > after for before, after in sums)  # channels went
    assert len(found["histograms"]) == 4
    assert found["classes"][0]["name"] == "north-west"
    assert sum(row["examples"] for row in found["classes"]) == 60
    assert found["flip_counts"]["examples"] == 60
    assert found["census"]["integer_ops"]["QLinearConv"] == 3
    assert set(found["latency_samples_ms"]) == {"original", "compressed"}
    assert found["reproduce"][1] == "paredown replay whole"


def test_a_missed_goal_keeps_the_best_file_and_says_which(user, paredown_cli):
    code, out, _ = paredown_cli("run", user(), "--size", "1B", "--out", "r")
    run = load("r")
    assert code == 3 and not run.met
    assert "Goals missed. Size is" in run.verdict and "the goal is at most 1 B" in run.verdict
    assert "The best file is kept." in run.verdict and run.verdict in out
    assert "8-bit integers" in [trial.title for trial in run.trials]
    assert len(run.trials) == sum(len(row["steps"]) for row in run.plan) - sum(
        step.startswith(("FineTune", "Binarize")) for row in run.plan for step in row["steps"]
    )  # every attempt of every recipe was tried
    assert run.artifact.size_bytes < 0.5 * run.original.size_bytes


UNFORGIVING = """
old = task
first = []
def score(output, target):  # 1 where the output is that of the original
    first.append(output)
    return ((output - first[0]).abs().amax(1) < 1e-4).float()
def task():
    return old(score=score, batch_size=60, train=None, calibration=images(0))
"""


def test_a_drop_that_is_not_allowed_is_undone(user, paredown_cli):
    code, out, _ = paredown_cli(
        "run", user(UNFORGIVING), "--size", "0.5x", "--max-drop", "1%", "--out", "r"
    )
    run = load("r")
    assert code == 3 and not any(trial.kept for trial in run.trials)
    assert "the score fell by" in out and "the goal allows 1" in out
    assert "No step paid; the original is kept." in run.verdict
    assert run.artifact.sha256 == run.original.sha256
    assert run.details["score"] == ""  # a function named score says no more than "Score"
    assert Path("r/recipe.toml").read_text() == ""


@pytest.mark.parametrize("recipe_file", [None, TRAINED_INT8])
def test_goals_that_the_original_meets_change_nothing(user, paredown_cli, recipe_file):
    extra = []
    if recipe_file:
        Path("own.toml").write_text(recipe_file)
        extra = ["--recipe", "own.toml"]
    code, out, _ = paredown_cli("run", user(), "--size", "10MB", "--out", "r", *extra)
    run = load("r")
    assert code == 0 and run.met and run.trials == []
    assert "nothing is changed" in out and "nothing was changed" in run.verdict
    assert run.artifact.sha256 == run.original.sha256


@pytest.mark.parametrize("goals", [[], ["--max-drop", "50%"]])
def test_without_an_amount_the_first_recipe_that_pays_is_enough(user, paredown_cli, goals):
    code, out, _ = paredown_cli("run", user(NO_TRAIN), *goals, "--out", "r")
    run = load("r")
    assert code == 0 and [trial.kept for trial in run.trials] == [True]
    assert recipe.load("r/recipe.toml") == [paredown.Quantize()]
    assert run.verdict.startswith("Every goal is met" if goals else "No goal was set.")
    assert "the search ended at the first recipe that pays" in out
    assert re.search(r"Ask for it by --size 0\.1\d?x", out) and run.details["in_reach"] in out


def test_a_recipe_of_ones_own(user, paredown_cli):
    Path("own.toml").write_text('[[step]]\nname = "cast"\ndtype = "fp16"\n' + TRAINED_INT8)
    code, out, _ = paredown_cli(
        "run", user(), "--recipe", "own.toml", "--size", "0.6x", "--out", "r"
    )
    run = load("r")
    assert code == 0 and recipe.load("r/recipe.toml") == [paredown.Cast("fp16")]
    assert "Every goal is met, so Quantize() is not needed." in out
    assert [row["title"] for row in run.plan] == ["as asked"]


def test_without_training_data_int8_is_all_there_is(user, paredown_cli):
    code, _, _ = paredown_cli("run", user(NO_TRAIN), "--size", "0.5x", "--out", "r")
    run = load("r")
    assert code == 0 and [trial.steps for trial in run.trials] == [["Quantize()"]]
    assert "no training" in run.plan[0]["reason"]
    assert not any("FineTune" in step for row in run.plan for step in row["steps"])


def test_the_runtime_pytorch(user, paredown_cli):
    code, _, _ = paredown_cli("run", user(), "--runtime", "pytorch", "--size", "0.6x", "--out", "r")
    run = load("r")
    assert code == 0 and Path(run.artifact.path).name == "model.safetensors"
    assert run.artifact.runtime == "pytorch" and "torch" in run.baseline.where["runtime"]
    assert run.met and paredown_cli("replay", "r")[0] == 0


def test_the_same_on_real_processes(user, monkeypatch):
    """One run whose files are opened in processes; two rounds of timing keep it short."""
    model, task = load_user(Path(user(NO_TRAIN)))
    run = paredown.compress(model, task, Goals(size="0.5x"), paredown.Target(rounds=2), out="r")
    assert run.met and run.on_device["compressed"].latency_ms_p50 > 0
    assert run.on_device["compressed"].memory_bytes > 1e6


# --- kinds of tasks --------------------------------------------------------------------------


def data(target):
    def split(seed):
        x = torch.randn(24, 16, generator=torch.Generator().manual_seed(seed))
        return TensorDataset(x, target(x))

    return {name: split(n) for n, name in enumerate(("calibration", "validation", "test"))}


def widened(outputs):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 128), nn.ReLU(), nn.Linear(128, outputs))


class TwoHeads(nn.Module):
    """{"label": (B, 3), "size": (B, 1)}."""

    def __init__(self):
        super().__init__()
        self.body = widened(64)
        self.label, self.size = nn.Linear(64, 3), nn.Linear(64, 1)

    def forward(self, x):
        y = self.body(x).relu()
        return {"label": self.label(y), "size": self.size(y)}


class FixedBatch(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = widened(3)

    def forward(self, x):
        return self.body(x.reshape(4, 16))


def regression():
    task = Task((torch.zeros(1, 16),), paredown.squared_error, **data(lambda x: x[:, :2]))
    return widened(2), task


def multilabel():
    several = data(lambda x: (x[:, :5] > 0).float())
    return widened(5), Task((torch.zeros(1, 16),), paredown.multilabel_accuracy, **several)


def tokens():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Unflatten(1, (4, 4)), nn.Linear(4, 200), nn.ReLU(), nn.Linear(200, 6))
    every = data(lambda x: (x.reshape(-1, 4, 4).sum(-1) > 0).long())
    return net, Task((torch.zeros(1, 16),), paredown.token_accuracy, **every)


def dictionary():
    score = lambda out, y: paredown.accuracy(out["label"], y)  # noqa: E731
    return TwoHeads(), Task((torch.zeros(1, 16),), score, **data(lambda x: x[:, :3].argmax(1)))


def fixed_batch():
    labels = data(lambda x: x[:, :3].argmax(1))
    return FixedBatch(), Task((torch.zeros(4, 16),), paredown.accuracy, **labels)


def places(x):
    """One of two classes for each place of (B, 4, 4), and a third that does not count."""
    return torch.where(x.abs() > 2, 255, (x > 0).long()).reshape(-1, 4, 4)


def segmentation():
    torch.manual_seed(0)
    first, last = nn.Conv2d(1, 64, 3, padding=1), nn.Conv2d(64, 3, 1)
    net = nn.Sequential(nn.Unflatten(1, (1, 4, 4)), first, nn.ReLU(), last)
    score = lambda out, y: (out.argmax(1) == y).float().mean((1, 2))  # noqa: E731
    task = Task((torch.zeros(1, 16),), score, **data(places), ignore=255, classes=("a", "b", "c"))
    return net, task


KINDS = [regression, dictionary, segmentation]
MORE = [pytest.param(kind, marks=pytest.mark.slow) for kind in (multilabel, tokens, fixed_batch)]


@pytest.mark.parametrize("kind", [*KINDS, *MORE], ids=lambda kind: kind.__name__)
def test_kinds_of_tasks(here, tmp_path, kind):
    model, task = kind()
    run = paredown.compress(model, task, Goals(size="0.8x", max_drop="60%"), out=tmp_path / "r")
    assert run.met, run.verdict
    assert run.trials[0].kept, run.trials[0].decision
    assert Run.load(tmp_path / "r") == run
    assert run.baseline.score_in_points == (kind is not regression)
    by_class = kind in (dictionary, fixed_batch, segmentation)
    assert bool(run.details["classes"]) == by_class
    page = paredown.report(run, tmp_path / "page.html").read_text()
    if kind is segmentation:
        assert "Intersection over union by class" in page
        x, y = (t.numpy() for t in task.test.tensors)
        ours = paredown.open(run.artifact.path)(x)[0].argmax(1)
        for row, label in zip(run.details["classes"], range(2), strict=True):
            here, there = (ours == label) & (y != 255), y == label
            assert row["after"] == pytest.approx((here & there).sum() / (here | there).sum())
            assert row["name"] == "ab"[label]
            assert row["examples"] == there.any((1, 2)).sum()
    artifact, digest = paredown.replay(tmp_path / "r", *kind())
    assert artifact.sha256 == digest


# --- stopped and started again ---------------------------------------------------------------


DRIVER = [sys.executable, "-c", "import test_run; test_run.main()"]
PLACES = f"{HERE.parent}{os.pathsep}{HERE}"  # of this checkout
ENVIRONMENT = os.environ | {"PYTHONPATH": PLACES, "OMP_NUM_THREADS": "1"}


def child(*words, cwd=None, **environment):
    """The command line in a process of its own; its code is minus the signal that ended it."""
    return subprocess.run(
        [*DRIVER, *words],
        env=ENVIRONMENT | environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


NARROW = f"""
[[step]]
name = "prune_channels"
ratio = 0.4
amount = "parameters"
[[step]]
name = "fine_tune"
epochs = 10
lr = 1e-3
{INT8}"""
COMMAND = ("run", "net.py", "--recipe", "narrow.toml", "--size", "0.25x", "--max-drop", "50%")


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """A folder with the user's file and the artifact of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "net.py").write_text(TINY)
    (folder / "narrow.toml").write_text(NARROW)
    done = child(*COMMAND, "--out", "whole", cwd=folder, **{COUNT_IN: str(folder / "count")})
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return folder


def assert_goes_on(folder, out, killed):
    """The same command on ``out`` finishes it, to the bytes of the run that nothing stopped."""
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    ledger = Path(out) / RECORDS
    before = stages(out)[:-1] if ledger.exists() else []  # the last one may be torn
    done = child(*COMMAND, "--out", out)
    assert (done.returncode, done.stderr) == (0, "")
    after = stages(out)
    assert after[: len(before)] == before and len(after) == len(set(after))
    assert (Path(out) / "model.onnx").read_bytes() == (folder / "whole/model.onnx").read_bytes()
    assert not [name for name in names(out) if files.is_temporary(name)]
    assert not [name for name in names(Path(out) / "stages") if files.is_temporary(name)]
    ours, theirs = load(out), load(folder / "whole")
    assert [trial.stage for trial in ours.trials] == [trial.stage for trial in theirs.trials]


def share(folder, part):
    """The number of the failpoint at that share of the run's."""
    return max(1, int(int((folder / "count").read_text()) * part))


@pytest.mark.parametrize("part", [0.6])
def test_a_killed_run_goes_on(undisturbed, monkeypatch, tmp_path, part):
    monkeypatch.chdir(undisturbed)
    out = str(tmp_path / "r")
    killed = child(*COMMAND, "--out", out, **{KILL_AT: str(share(undisturbed, part))})
    assert_goes_on(undisturbed, out, killed)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(40))
def test_a_run_killed_at_any_failpoint_goes_on(undisturbed, monkeypatch, tmp_path, part):
    test_a_killed_run_goes_on(undisturbed, monkeypatch, tmp_path, part / 40)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_a_run_killed_at_any_time_goes_on(undisturbed, monkeypatch, tmp_path, seed):
    monkeypatch.chdir(undisturbed)
    out, chance = str(tmp_path / "r"), random.Random(seed)
    command = [*DRIVER, *COMMAND, "--out", out]
    running = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    while not (Path(out) / RECORDS).exists() and running.poll() is None:
        time.sleep(0.01)
    time.sleep(chance.uniform(0, 4))
    running.kill()
    running.wait()
    if running.returncode == -signal.SIGKILL:
        assert_goes_on(undisturbed, out, running)


STOP_IN_TRAINING = """
from pathlib import Path
old = task
def loss(output, target):
    if "STOP" in os.environ and list(Path("r").rglob("fine_tune.safetensors")):  # after one epoch
        os.kill(os.getpid(), int(os.environ["STOP"]))
    return F.cross_entropy(output, target)
def task():
    return old(loss=loss)
"""


@pytest.mark.parametrize(
    ("by", "code"),
    [(signal.SIGINT, 130), pytest.param(signal.SIGKILL, -signal.SIGKILL, marks=pytest.mark.slow)],
)
def test_training_goes_on_from_its_last_epoch(user, paredown_cli, by, code):
    Path("own.toml").write_text(TRAINED_INT8)
    command = ("run", user(STOP_IN_TRAINING), "--recipe", "own.toml", "--size", "0.5x", "--out")
    stopped = child(*command, "r", STOP=str(int(by)))
    assert stopped.returncode == code
    said = "error: interrupted. What was finished is kept; the same command goes on from there."
    assert stopped.stderr == (f"{said}\n" if code == 130 else "")
    assert len(list(Path("r/scratch").rglob("fine_tune.safetensors"))) == 1
    done = child(*command, "r")
    assert done.returncode == 0 and done.stdout.count("  epoch ") == 2
    assert "going on from fine_tune.safetensors after epoch 1" in done.stdout
    assert not Path("r/scratch").exists()
    assert paredown_cli(*command, "whole")[1].count("  epoch ") == 3
    assert Path("r/model.onnx").read_bytes() == Path("whole/model.onnx").read_bytes()


def test_a_finished_run_is_shown_again(user, paredown_cli, monkeypatch):
    command = ("run", user(NO_TRAIN), "--size", "0.5x", "--out", "r")
    paredown_cli(*command)
    first, records = Path("r/run.json").read_bytes(), stages("r")
    Path("r/model.onnx").unlink()
    monkeypatch.setattr(stages_of_runs, "measure", None)  # nothing is measured again
    monkeypatch.setattr(stages_of_runs, "_lowered", None)
    code, out, err = paredown_cli(*command)
    assert (code, err) == (0, "") and "This run is finished" in out
    assert Path("r/run.json").read_bytes() == first and stages("r") == records
    assert Path("r/model.onnx").stat().st_size == load("r").artifact.size_bytes


def test_other_goals_are_asked_of_what_is_finished(user, paredown_cli, monkeypatch):
    Path("own.toml").write_text(TRAINED_INT8)
    command = ("run", user(), "--recipe", "own.toml", "--out", "r")
    paredown_cli(*command, "--size", "0.2x")
    first, records = load("r"), stages("r")
    assert first.outcome == "missed"
    for name in ("measure", "_apply"):
        monkeypatch.setattr(stages_of_runs, name, None)  # nothing is trained or measured again
    code, out, _ = paredown_cli(*command, "--size", "0.5x", "--latency", "0.9x")
    second = load("r")
    assert code == 0 and second.met and second.goals["latency"]["value"] == 0.9
    assert stages("r")[: len(records)] == records and len(stages("r")) == len(records) + 1
    assert second.artifact.sha256 == first.artifact.sha256
    assert [t.stage for t in second.trials] == [t.stage for t in first.trials]
    paredown_cli(*command, "--size", "0.5x", "--max-drop", "0%", "--latency", "0.9x")
    allowed = "a fall of 0" in load("r").verdict or load("r").trials[0].kept
    assert allowed and load("r").checks[0].goal == "max_drop"
    code, out, _ = paredown_cli(*command, "--size", "0.2x")  # and the first is still known
    assert code == 3 and "This run is finished" in out and load("r") == first


def test_what_attempts_have_in_common_is_made_and_measured_once(user, paredown_cli, monkeypatch):
    Path("int8.toml").write_text(INT8)
    Path("mixed.toml").write_text(f"{INT8}max_drop = 0.9\n")  # leaves nothing in float
    Path("trained.toml").write_text(TRAINED_INT8)
    command = ("run", user(), "--size", "0.1x", "--out", "r", "--recipe")
    paredown_cli(*command, "int8.toml")
    made, measured = [], []
    apply, measure = stages_of_runs._apply_step, stages_of_runs.measure

    def applied(state, model, step, setting):
        made.append(type(step).__name__)
        return apply(state, model, step, setting)

    def counted(files, *given, **named):
        measured.append(files)
        return measure(files, *given, **named)

    monkeypatch.setattr(stages_of_runs, "_apply_step", applied)
    monkeypatch.setattr(stages_of_runs, "measure", counted)
    paredown_cli(*command, "trained.toml")
    assert made == ["FineTune"]
    made.clear()
    measured.clear()
    paredown_cli(*command, "mixed.toml")
    assert made == ["Quantize"] and measured == []


def test_of_all_that_was_measured_the_nearest_is_the_artifact(monkeypatch):
    first = Measurement(100_000, 0.9, latency_ms_p50=4.0)
    came = {  # bytes, ms, kept; each recipe is two of them
        "cut": (25_000, 2.9, True),
        "cut, int8": (9_000, 3.8, False),
        "factors": (60_000, 3.0, True),
        "factors, int8": (28_000, 2.6, False),
    }

    def tried(state, item, attempt, best, number):
        size, ms, kept = came[attempt.title]
        found = dataclasses.replace(first, size_bytes=size, latency_ms_p50=ms)
        trial = Trial([], attempt.title, "", "", kept, "", found, None, 0.1, "")
        return trial, Point(attempt.title, best.file, (), Standing(found, first), (number,))

    monkeypatch.setattr(compress, "tried", tried)
    goals = Goals(size="0.3x", latency="0.5x")
    state = State(None, None, goals, Target(), None, Path(), first, 0, False)
    attempts = {name: Attempt((), name, "", "") for name in came}
    recipes = [("cut", "cut, int8"), ("factors", "factors, int8")]
    proposals = [Proposal(each[0], "", tuple(attempts[n] for n in each)) for each in recipes]
    trials, best = compress._search(state, proposals[:1])
    assert best.stage == "cut"  # which the next one, smaller and slower, does not beat
    trials, best = compress._search(state, proposals)
    assert best.stage == "factors, int8"  # though it was undone
    shipped = compress._shipped(trials, best)
    assert [trial.shipped for trial in shipped] == [False, False, False, True]
    assert shipped[3].kept and "nothing that was measured comes nearer" in shipped[3].decision


def test_what_was_undone_is_not_tried_again_on_the_same_file(monkeypatch):
    first = Measurement(100_000, 0.9, latency_ms_p50=4.0)
    asked = []

    def tried(state, item, attempt, best, number):
        asked.append(attempt.title)
        kept = attempt.title == "1"
        trial = Trial([], attempt.title, "", "", kept, "", first, None, 0.1, "")
        return trial, Point(attempt.title, best.file, (), Standing(first, first), (number,))

    monkeypatch.setattr(compress, "tried", tried)
    state = State(None, None, Goals(size="0.1x"), Target(), None, Path(), first, 0, False)
    cut, other = (paredown.PruneChannels(0.2),), (paredown.Quantize(),)
    steps = [cut, cut, cut, other]  # the first is kept, the second undone, the third the same
    attempts = tuple(Attempt(each, str(n), "", "") for n, each in enumerate(steps, 1))
    compress._search(state, [Proposal("", "", attempts)])
    assert asked == ["1", "2", "4"]


def test_what_the_data_cannot_prove_is_said_and_with_proof_missed(user, paredown_cli):
    command = ("run", user(NO_TRAIN), "--size", "0.5x", "--max-drop", "1%", "--out", "r")
    code, out, _ = paredown_cli(*command)
    assert code == 0 and load("r").met and load("r").outcome == "open"
    said = "Every goal is met by the exported file as it was measured, but this data cannot prove"
    assert said in out and "would be needed to prove a drop of at most 1 point" in load("r").verdict
    code, out, _ = paredown_cli(*command, "--proof")
    run = load("r")
    assert code == 5 and not run.met and run.outcome == "not proven"
    assert run.verdict.startswith("Goals not proven.") and run.artifact.size_bytes < 25_000
    assert "but it is not proven for score, as --proof asks, so what else there is" in out
    assert "All that was planned was tried for it." in run.verdict


USELESS = (
    "old = model\ndef model():\n    net = old()\n    net[-1].weight.data *= 0\n    return net\n"
)


def test_a_file_that_is_of_no_use_is_never_met_in_silence(user, paredown_cli):
    Path("own.toml").write_text(INT8)
    words = ("--recipe", "own.toml", "--size", "0.5x", "--out", "r")
    code, out, _ = paredown_cli("run", user(USELESS), *words)
    assert code == 0 and load("r").outcome == "open"
    assert "The file is of no use as far as this data can tell: on " in out
    assert "test examples it scores 25.00%" in out
    assert "are its weights the trained ones?" in load("r").verdict


def test_compress_writes_the_report_and_again_where_it_is_gone(user, here):
    model, task = load_user(Path(user(NO_TRAIN)))
    run = paredown.compress(model, task, Goals(size="0.5x"), out="r")
    page = Path("r/report.html")
    assert page.read_text() == render(run)
    page.unlink()
    assert paredown.compress(model, task, Goals(size="0.5x"), out="r") == run
    assert page.read_text() == render(run)


def test_a_damaged_stage_is_made_again(user, paredown_cli):
    command = ("run", user(NO_TRAIN), "--size", "0.5x", "--out", "r")
    paredown_cli(*command)
    sha256 = load("r").artifact.sha256
    path = Path(f"r/stages/{sha256}.onnx")
    path.write_bytes(path.read_bytes()[:-1])
    code, out, _ = paredown_cli(*command)
    assert code == 0 and "is damaged; it will be made again" in out
    assert (
        load("r").artifact.sha256 == sha256 and path.stat().st_size == load("r").artifact.size_bytes
    )


def test_without_out_the_same_command_goes_on_too(user, paredown_cli):
    user()
    paredown_cli("run", "net.py", "--size", "10MB")
    assert "This run is finished" in paredown_cli("run", "net.py", "--size", "10MB")[1]
    assert len(names("runs")) == 1
    paredown_cli("run", "net.py", "--size", "11MB")
    assert len(names("runs")) == 2


# --- made again ------------------------------------------------------------------------------


def test_replay(user, paredown_cli, monkeypatch):
    Path("own.toml").write_text(TRAINED_INT8)
    paredown_cli("run", user(), "--recipe", "own.toml", "--size", "0.5x", "--out", "r")
    before = names("r")
    code, out, err = paredown_cli("replay", "r")
    assert (code, err) == (0, "") and "the same file" in out and names("r") == before
    with monkeypatch.context() as other:
        other.setattr(recipe, "from_toml", lambda *_: [paredown.Cast()])
        code, out, _ = paredown_cli("replay", "r")
        assert code == 4 and "another file" in out
        code, out, _ = paredown_cli("replay", "r", "--json")
        assert code == 4 and json.loads(out)["same"] is False
    kept = json.loads(Path("r/run.json").read_text())["artifact"]["sha256"]
    Path("r/model.onnx").write_bytes(b"another")
    code, _, err = paredown_cli("replay", "r")
    found = hashlib.sha256(b"another").hexdigest()
    assert code == 1 and f"its SHA-256 is {found}, and run.json records {kept}" in err
    Path("r/model.onnx").unlink()
    code, _, err = paredown_cli("replay", "r")
    assert code == 1 and "model.onnx: cannot be read: No such file" in err and "again" in err


OTHER_TEST = "old = task\ndef task():\n    return old(test=images(9))\n"
OTHER_BATCHES = "old = task\ndef task():\n    return old(batch_size=7)\n"
OTHER_MODEL = (
    "old = model\ndef model():\n    net = old()\n    net[0].bias.data += 1\n    return net\n"
)


def test_replay_refuses_what_has_changed(user, paredown_cli):
    paredown_cli("run", user(), "--size", "10MB", "--out", "r")
    others = {
        OTHER_TEST: "the test split",
        OTHER_MODEL: "the model",
        OTHER_BATCHES: "the task's batch_size",
    }
    for changes, what in others.items():
        user(changes)
        code, _, err = paredown_cli("replay", "r")
        assert code == 1 and f"r: {what} is not the one of the run." in err
    Path("net.py").unlink()
    code, _, err = paredown_cli("replay", "r")
    assert code == 1 and "net.py: no such file here; name it with --file." in err
    assert paredown_cli("replay", "r", "--file", user(name="moved.py"))[0] == 0
    code, _, err = paredown_cli("replay", "nowhere")
    assert code == 1 and "holds no finished run" in err


# --- full and failing disks ------------------------------------------------------------------


def test_a_full_disk_is_not_the_fault_of_a_step(user, here, monkeypatch):
    model, task = load_user(Path(user(NO_TRAIN)))
    put, full = Ledger.put, OSError(28, "No space left on device")

    def refuse(self, data, suffix):
        if len(self.records()) > 2:
            raise UserError("stages: cannot be written: No space left on device.") from full
        return put(self, data, suffix)

    monkeypatch.setattr(Ledger, "put", refuse)
    with pytest.raises(UserError, match="No space left"):
        paredown.compress(model, task, Goals(size="0.5x"), out="r")
    monkeypatch.setattr(Ledger, "put", put)
    run = paredown.compress(model, task, Goals(size="0.5x"), out="r")
    assert run.met and all(trial.kept for trial in run.trials)


def test_a_full_disk(user, paredown_cli, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=220k", "tmpfs", disk]).returncode:
        pytest.skip("cannot mount a small disk here")
    try:
        command = ("run", user(NO_TRAIN), "--size", "0.5x", "--out", disk / "r")
        code, _, err = paredown_cli(*command)
        assert code == 1 and ("are free" in err or "No space left" in err)
        subprocess.run(["mount", "-o", "remount,size=9m", disk], check=True)
        assert paredown_cli(*command)[0] == 0
        assert all(trial.kept for trial in load(disk / "r").trials)
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize(
    ("failpoint", "said"),
    [
        ("file-before-write:enospc", "No space left on device"),
        ("ledger-after-write:eio", "Input/output error"),
    ],
)
def test_a_failing_disk_is_told_in_a_sentence(user, paredown_cli, monkeypatch, failpoint, said):
    monkeypatch.setenv(files.FAILPOINT, failpoint)
    code, _, err = paredown_cli("run", user(NO_TRAIN), "--size", "10MB", "--out", "r")
    assert code == 1 and err.startswith("error: r/") and said in err
    monkeypatch.delenv(files.FAILPOINT)
    assert paredown_cli("run", "net.py", "--size", "10MB", "--out", "r")[0] == 0


LABEL_MISSING = """
seen = 0
old = task
def loss(output, target):
    global seen
    seen += 1
    if seen > 5:
        raise ValueError("no such label")
    return F.cross_entropy(output, target)
def task():
    return old(loss=loss)
"""


def test_a_step_that_cannot_be_applied_is_undone_with_its_reason(user, here):
    model, task = load_user(Path(user(LABEL_MISSING)))
    steps = [paredown.FineTune(epochs=2), paredown.Quantize()]
    run = paredown.compress(model, task, Goals(size="0.25x"), steps=steps, out="r")
    assert not run.trials[0].kept and run.trials[0].measurement is None
    assert "failed: ValueError: no such label; it was given" in run.trials[0].decision


def test_the_callers_random_numbers_are_left_alone(user, here):
    model, task = load_user(Path(user(NO_TRAIN)))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    paredown.compress(model, task, Goals(size="10MB"), Target(), out="r")
    assert torch.equal(torch.rand(3), expected)


def test_another_batch_size_is_another_run(user, here):
    model, task = load_user(Path(user(NO_TRAIN)))
    paredown.compress(model, task, Goals(size="10MB"), out="r")
    changed = dataclasses.replace(task, batch_size=7)
    with pytest.raises(UserError, match="batch_size: was 20, is now 7"):
        paredown.compress(model, changed, Goals(size="10MB"), out="r")
    changed = dataclasses.replace(task, ignore=255)
    with pytest.raises(UserError, match=r"ignore\.?0?: was \(nothing\), is now \[?255"):
        paredown.compress(model, changed, Goals(size="10MB"), out="r")
    with pytest.raises(UserError, match="the task's ignore is not the one of the run"):
        paredown.replay("r", model, changed)


def test_another_score_loss_or_processing_is_another_run(user, here):
    model, task = load_user(Path(user()))
    kept = dataclasses.replace(task)
    paredown.compress(model, task, Goals(size="10MB"), out="r")
    paredown.compress(model, kept, Goals(size="11MB"), out="r")
    changes = {
        "score": (
            lambda out, y: task.score(out, y) * 0.9,
            "score or task.postprocess, gave 1 .* gives 0.9",
        ),
        "postprocess": (lambda out: -out, "postprocess, gave 1 of the original on .* gives 0"),
        "preprocess": (lambda x: x * 0 + 1, "data.test.fingerprint: was"),
        "loss": (lambda out, y: task.loss(out, y) * 2, "task.loss, gave .* first batch of train"),
    }
    for name, (function, said) in changes.items():
        changed = dataclasses.replace(task, **{name: function})
        with pytest.raises(UserError, match=f"{said}(.|\n)*Choose another --out"):
            paredown.compress(model, changed, Goals(size="10MB"), out="r")


class Augmented(torch.utils.data.Dataset):
    """Examples with noise of each of the three generators, and of one of its own where given."""

    def __init__(self, data, own=None):
        self.data, self.own = data, own

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        x, y = self.data[index]
        drawn = torch.randn(()) + random.gauss(0, 1) + np.random.randn()
        drawn = drawn if self.own is None else drawn + self.own.random()
        return x + 0.01 * float(drawn), y


def test_check_says_where_data_are_others_each_time(user):
    task = load_user(Path(user()))[1]
    own = dataclasses.replace(task, test=Augmented(task.test, np.random.default_rng()))
    assert (
        unrepeated(task) == unrepeated(dataclasses.replace(task, test=Augmented(task.test))) == []
    )
    [told] = unrepeated(own)
    assert told.startswith("test: example 0 is another one when it is read again")


@pytest.mark.slow
def test_random_data_are_gone_on_with_and_replayed(user, here):
    model, task = load_user(Path(user()))
    data = {name: Augmented(getattr(task, name)) for name in ("train", "validation", "test")}
    task = dataclasses.replace(task, **data)
    steps = [paredown.Quantize("int8")]
    for seed in (1, 2):
        torch.manual_seed(seed), random.seed(seed), np.random.seed(seed)
        run = paredown.compress(model, task, Goals(size="0.9x"), steps=steps, out="r")
    assert run.artifact.recipe
    random.seed(5), np.random.seed(5)
    artifact, digest = paredown.replay("r", model, task)
    assert artifact.sha256 == digest
    assert not [line for line in check(model, task, Target()).notes if "read again" in line]
    own = dataclasses.replace(task, test=Augmented(task.test, np.random.default_rng()))
    notes = [line for line in check(model, own, Target()).notes if "read again" in line]
    assert len(notes) == 1 and notes[0].startswith("test: example 0 is another one")
    with pytest.raises(UserError, match="`paredown check` says whether the data are others each"):
        paredown.compress(model, own, Goals(size="0.9x"), steps=steps, out="r")
