# ruff: noqa: F811 (fixtures are imported)
"""Every verb through the doors: a model without source, and samples beside it."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from torch import nn

import paredown
from paredown.core.errors import UserError
from paredown.core.results import Run
from paredown.core.source import Samples, Source, source_of
from paredown.data import splits
from paredown.data.load import task_of
from paredown.graph.doors import files
from paredown.graph.doors.opened import Opened, Wanted
from paredown.run import arrival
from paredown.ship.serve.examples import Examples
from tests.test_run import here, paredown_cli  # noqa: F401

NO_ACCURACY = "The score is fidelity to the original, not accuracy."
RECIPE = '[[step]]\nname = "quantize"\n'


def net(classes=4):
    """It tells apart where the brightest corner is."""
    torch.manual_seed(0)
    corners = torch.zeros(4, 1, 8, 8)
    corners[0, 0, :4, :4] = corners[1, 0, :4, 4:] = corners[2, 0, 4:, :4] = 1
    corners[3, 0, 4:, 4:] = 1
    made = nn.Sequential(nn.Conv2d(1, 32, 8), nn.ReLU(), nn.Flatten(), nn.Linear(32, classes))
    with torch.no_grad():
        made[0].weight.mul_(0.1)[:4] += corners / 16
        made[3].weight.mul_(0.1)[:4, :4] += 4 * torch.eye(4)
    return made.eval()


def pictures(count=60):
    return np.random.default_rng(0).random((count, 1, 8, 8), np.float32)


@pytest.fixture(scope="module")
def files_of(tmp_path_factory):
    """A folder with the model as ONNX and as a graph, samples with and without labels, a recipe."""
    folder = tmp_path_factory.mktemp("doors")
    model = paredown.capture(net(), (torch.zeros(1, 1, 8, 8),))
    paredown.export(model, paredown.Target(), folder / "net.onnx")
    model.save(folder / "net.safetensors")
    x = pictures()
    with torch.no_grad():
        y = net()(torch.tensor(x)).argmax(1).numpy()
    np.savez(folder / "x.npz", input=x)
    np.savez(folder / "xy.npz", input=x, label=y)
    (folder / "int8.toml").write_text(RECIPE)
    return folder


@pytest.fixture
def inside(files_of, tmp_path, monkeypatch):
    shutil.copytree(files_of, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


ASKED = ("--recipe", "int8.toml", "--rounds", 2, "--out", "r")


@pytest.fixture(scope="module")
def finished(files_of):
    """The folder after a run of the ONNX file on samples without labels, in this process."""
    before = Path.cwd()
    os.chdir(files_of)
    try:
        model, task = paredown.load("net.onnx", "x.npz", seed=3)
        steps = [paredown.Quantize("int8")]
        source = Source.of(Path("net.onnx"), Samples(Path("x.npz")), 3)
        goals, target = paredown.Goals(size="0.9x"), paredown.Target(rounds=2)
        paredown.compress(model, task, goals, target, steps, "r", 3, "paredown run", source)
    finally:
        os.chdir(before)
    return files_of


@pytest.fixture
def ran(finished, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- verbs that look --------------------------------------------------------------------------


def test_check_says_what_it_took_and_that_the_file_agrees(inside, paredown_cli):
    code, out, _ = paredown_cli("check", "net.onnx", "--data", "x.npz")
    lines = out.splitlines()
    assert code == 0
    assert lines[0].startswith("note: the task is taken for classification (the output is 4 num")
    assert any("captured model and onnxruntime running the file agree" in each for each in lines)
    code, out, _ = paredown_cli("check", "net.onnx", "--data", "xy.npz")
    assert code == 0 and "labels are classes" in out


def test_a_file_that_its_runtime_runs_otherwise_is_refused(inside, paredown_cli, monkeypatch):
    def wrong(path):
        opened = files_open(path)
        with torch.no_grad():
            next(iter(opened.module.parameters())).mul_(2)
        return opened

    files_open = files.open_file
    monkeypatch.setattr(files, "open_file", wrong)
    code, out, _ = paredown_cli("check", "net.onnx", "--data", "x.npz")
    assert code == 1 and "differs from what onnxruntime makes of the file" in out
    code, _, err = paredown_cli("run", "net.onnx", "--data", "x.npz", *ASKED)
    assert code == 1 and "differs from what onnxruntime" in err and not Path("r").exists()


def test_verbs_that_need_samples_say_so(inside, paredown_cli):
    for verb in ("run", "check", "baseline", "plan"):
        code, out, err = paredown_cli(verb, "net.onnx")
        assert code == 1 and "is a model without its task" in out + err and "--data" in out + err
    code, out, _ = paredown_cli("inspect", "net.onnx")
    assert code == 0 and "can be cut" in out
    code, _, err = paredown_cli("run", "net.onnx", "--data", "x.npz", "--task", "clasification")
    assert code == 1 and "did you mean 'classification'" in err


def test_plan_and_baseline_take_samples(inside, paredown_cli):
    words = ("net.onnx", "--data", "x.npz", "--rounds", 2, "--json")
    code, out, _ = paredown_cli("baseline", *words)
    assert code == 0 and json.loads(out)["score"] == 1.0
    code, out, _ = paredown_cli("plan", *words, "--size", "0.5x")
    assert code == 0 and json.loads(out)["recipes"][0]["title"] == "int8"


# --- a run --------------------------------------------------------------------------------------


def test_a_run_from_samples_tells_what_its_score_is(finished):
    run = Run.load(finished / "r")
    assert run.details["source"] == {
        "file": "net.onnx",
        "data": "x.npz",
        "task": "classification",
        "seed": 3,
        "sha256": Source.of(finished / "net.onnx", Samples()).sha256,
    }
    told = run.details["fidelity"]
    assert (told["kind"], told["examples"], told["confidence"]) == ("classification", 24, 0.95)
    assert told["differ"] / 24 == told["disagreement"] <= told["bound"] <= 1
    assert told["largest_change"] > 0 and 0 <= told["within_reach"] <= 1
    assert "The score is fidelity to the original, not accuracy: on 24 test ex" in run.verdict
    assert run.details["score"] == "fidelity to the original: same top class"
    assert "the task is taken for classification" in run.details["notes"][0]
    identity = json.loads((finished / "r" / "identity.json").read_text())["identity"]
    assert identity["task"] == {"kind": "classification", "labels": False}
    page = (finished / "r" / "report.html").read_text()
    assert '<section id="fidelity">' in page and "Disagreement with the original" in page


def test_replay_finds_model_and_samples_again(ran, paredown_cli):
    code, out, _ = paredown_cli("replay", "r", "--json")
    assert code == 0 and json.loads(out)["same"]
    Path("x.npz").rename("moved.npz")
    code, _, err = paredown_cli("replay", "r")
    assert code == 1 and "x.npz: no such samples here; name them with --data" in err
    code, out, _ = paredown_cli("replay", "r", "--data", "moved.npz", "--json")
    assert code == 0 and json.loads(out)["same"]
    code, _, err = paredown_cli("replay", "r", "--data", "moved.npz", "--task", "regression")
    assert code == 1 and "the kind of the task is not the one of the run" in err
    np.savez("other.npz", input=pictures(61)[1:])
    code, _, err = paredown_cli("replay", "r", "--data", "other.npz")
    assert code == 1 and "is not the one of the run" in err


def test_explain_and_validate_take_what_the_run_was_started_from(ran, paredown_cli):
    code, out, _ = paredown_cli("explain", "r", "--json")
    assert code == 0 and json.loads(out)
    words = ("--isa", "none", "--rounds", 2, "--json")
    code, out, _ = paredown_cli("validate", "r", *words)
    [found] = json.loads(out)["validations"]
    assert (
        code == 0
        and found["measured"]["compressed"]["score"] > 0.5
        and found["notes"] == [NO_ACCURACY]
    )
    named = ("--file", "net.onnx", "--data", "x.npz")
    code, out, _ = paredown_cli("validate", "r/model.onnx", *named, *words)
    [found] = json.loads(out)["validations"]
    assert code == 0 and found["measured"]["compressed"]["examples"] == 24
    code, out, _ = paredown_cli("validate", "net.onnx", "--data", "x.npz", *words)
    [found] = json.loads(out)["validations"]
    assert code == 0 and found["measured"]["compressed"]["score"] == 1.0
    assert "No original is named (--file): the file is held against itself." in found["notes"]


def test_what_a_run_was_started_from_is_found_or_named(ran):
    run = Run.load("r")
    assert source_of(run, "replay").data == "x.npz"
    named = source_of(run, "replay", Path("net.safetensors"), Samples(Path("xy.npz"), "regression"))
    assert (named.file, named.data, named.task, named.seed) == (
        "net.safetensors",
        "xy.npz",
        "regression",
        3,
    )
    Path("net.onnx").write_bytes(b"another")
    with pytest.raises(UserError, match="is not the file that the run was started from"):
        source_of(run, "serve", same=True)
    Path("net.onnx").unlink()
    with pytest.raises(UserError, match=r"net\.onnx: no such file here; name it with --file"):
        source_of(run, "replay")


def test_a_server_finds_the_examples_of_samples(ran):
    kept = Examples(Path("state"), Source("net.safetensors", "x.npz"))
    Path("state").mkdir()
    kept.make(["input"])
    assert len(kept.read()) == 18 and kept.read()[0][0].shape == (1, 1, 8, 8)
    gone = Examples(Path("state"), Source("net.safetensors", "gone.npz"))
    with pytest.raises(UserError, match=r"with gone\.npz: its examples cannot be read: .*no such"):
        gone.make(["input"])


# --- a door that prepares -----------------------------------------------------------------------


class Letters(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(32, 8), nn.Linear(8, 2)

    def forward(self, ids):
        return self.head(self.table(ids).mean(1))


def prepared(raw):
    codes = [ord(letter) % 32 for letter in raw["text"].ljust(6)[:6]]
    return {"ids": torch.tensor(codes)}


def open_letters(path):
    return Opened(
        Letters().eval(),
        (Wanted("ids", "int64", (None, 6)),),
        {"ids": torch.zeros(1, 6, dtype=torch.long)},
        outputs=("logits",),
        preprocess=prepared,
        columns=("text",),
        kind="classification",
        classes=("no", "yes"),
        notes=("letters are counted",),
    )


@pytest.fixture
def letters(tmp_path, monkeypatch):
    monkeypatch.setitem(files.DOORS, ".letters", f"{__name__}:open_letters")
    monkeypatch.chdir(tmp_path)
    Path("net.letters").touch()
    rows = [{"text": f"text {n}", "label": ("yes", "no")[n % 2]} for n in range(20)]
    Path("x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_a_door_prepares_raw_samples_and_names_the_classes(letters, paredown_cli):
    model, task = paredown.load("net.letters", "x.jsonl")
    assert task.classes == ("no", "yes") and task.preprocess is prepared
    inputs, target = task.train[0]
    number = int(inputs["text"].split()[1])
    assert int(target) == (number + 1) % 2
    batch, _ = next(splits.batches(splits.prepared(task).train, 4))
    assert batch["ids"].shape == (4, 6)
    assert task.score.notes[0].startswith("the task is taken for classification (as the file says)")
    assert "letters are counted" in model.notes
    code, out, _ = paredown_cli("check", "net.letters", "--data", "x.jsonl")
    assert code == 0 and "ok preprocessed and scored one batch of validation" in out
    source = Source("net.letters", "x.jsonl")
    assert len(task_of(source).test) == 8


def test_samples_that_are_prepared_already(letters):
    np.savez("ids.npz", ids=np.arange(120).reshape(20, 6) % 32)
    _, task = paredown.load("net.letters", "ids.npz")
    assert task.preprocess is None and task.train[0][0]["ids"].shape == (6,)


def test_a_text_that_cannot_be_prepared_is_named(letters, paredown_cli):
    Path("y.jsonl").write_text("\n".join(json.dumps({"text": n}) for n in range(20)))
    with pytest.raises(UserError, match="the model's own preprocessing failed: AttributeError"):
        paredown.load("net.letters", "y.jsonl")


# --- pictures, and splits of their own ----------------------------------------------------------


def test_a_folder_of_pictures_with_its_own_splits(inside, paredown_cli):
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("validation", 3), ("test", 3)):
        for name in "abcd":
            folder = Path("pictures", split, name)
            folder.mkdir(parents=True)
            for n in range(count):
                Image.fromarray(rng.integers(0, 255, (8, 8), np.uint8)).save(folder / f"{n}.png")
    _, task = paredown.load("net.safetensors", "pictures")
    assert [len(getattr(task, name)) for name in ("train", "validation", "test")] == [16, 12, 12]
    assert task.classes == ("a", "b", "c", "d")
    assert any("gets them as they are, as float32" in note for note in task.score.notes)
    shutil.rmtree("pictures/test/b")
    _, fewer = paredown.load("net.safetensors", "pictures")
    assert sorted({int(target) for _, target in (fewer.test[n] for n in range(9))}) == [0, 2, 3]
    assert any("0 is 'a', 3 is 'd'" in note for note in fewer.score.notes)
    Path("pictures/train/a/0.png").write_bytes(b"\x89PNG no more")
    code, out, err = paredown_cli("check", "net.safetensors", "--data", "pictures")
    assert code == 1 and "train/a/0.png: the picture cannot be read" in out + err


# --- every kind -----------------------------------------------------------------------------------


class Tokens(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.table, self.head = nn.Embedding(20, 16), nn.Linear(16, width)

    def forward(self, ids, attention_mask):
        return {"logits": self.head(self.table(ids) * attention_mask[..., None])}


class Boxes(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 32), nn.ReLU())
        self.where, self.rated = nn.Linear(32, 5 * 4), nn.Linear(32, 5 * 4)

    def forward(self, x):
        x = self.body(x)
        logits = 4 * self.rated(x).unflatten(1, (5, 4))
        return {"logits": logits, "pred_boxes": self.where(x).unflatten(1, (5, 4)).sigmoid()}


def several(**columns):
    return {name: each.astype(np.float32) for name, each in columns.items()}


def every_kind():
    rng = np.random.default_rng(0)
    x, images = rng.normal(size=(60, 6)), rng.normal(size=(60, 1, 8, 8))
    ids, mask = rng.integers(0, 20, (60, 7)), np.tile(np.arange(7) < 5, (60, 1)).astype(np.int64)
    body = nn.Linear(6, 256), nn.ReLU()
    spots = nn.Sequential(nn.Conv2d(1, 64, 5, padding=2), nn.ReLU(), nn.Conv2d(64, 3, 5, padding=2))
    return {
        "regression": (nn.Sequential(*body, nn.Linear(256, 1)), several(input=x)),
        "embedding": (nn.Sequential(*body, nn.Linear(256, 128)), several(input=x)),
        "segmentation": (spots, several(input=images)),
        "tokens": (Tokens(20), {"ids": ids, "attention_mask": mask}),
        "detection": (Boxes(), several(x=x)),
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["regression", "embedding", "segmentation", "tokens", "detection"])
def test_a_run_of_every_kind_bounds_what_differs(tmp_path, kind):
    torch.manual_seed(0)
    module, columns = every_kind()[kind]
    example = {name: torch.tensor(each[:1]) for name, each in columns.items()}
    given = tuple(example.values()) if "input" in example else example
    paredown.capture(module.eval(), given).save(tmp_path / "net.safetensors")
    np.savez(tmp_path / "x.npz", **columns)
    model, task = paredown.load(tmp_path / "net.safetensors", tmp_path / "x.npz")
    assert task.score.answer.kind == kind
    target, steps = paredown.Target(rounds=2), [paredown.Quantize("int8")]
    goals = paredown.Goals(size="0.9x")
    run = paredown.compress(model, task, goals, target, steps, tmp_path / "r")
    told = run.details["fidelity"]
    assert told["kind"] == kind and told["disagreement"] < told["bound"] <= 1
    assert run.on_device["original"].score > 0.999
    assert run.on_device["compressed"].score == pytest.approx(1 - told["disagreement"])
    bounded = "drops by no more than that" in run.verdict
    assert bounded == (kind in ("segmentation", "tokens"))
    assert (kind == "embedding") == ("nearest neighbours" in run.verdict)
    assert ("within_reach" in told) == (kind in ("segmentation", "tokens"))


@pytest.mark.parametrize("kind", ["FLOAT16", "DOUBLE"])
def test_a_file_of_other_floats_is_held_against_its_runtime(tmp_path, kind):
    number = getattr(onnx.TensorProto, kind)
    values = np.random.default_rng(0).normal(size=(6, 3))
    weight = onnx.numpy_helper.from_array(
        values.astype(onnx.helper.tensor_dtype_to_np_dtype(number)), "w"
    )
    ends = [
        onnx.helper.make_tensor_value_info(name, number, ["N", size])
        for name, size in (("x", 6), ("y", 3))
    ]
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = onnx.helper.make_graph([node], "g", ends[:1], ends[1:], [weight])
    opset = [onnx.helper.make_opsetid("", 17)]
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=opset, ir_version=8), tmp_path / "net.onnx"
    )
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(1).random((20, 6), np.float32))
    model, task = paredown.load(tmp_path / "net.onnx", tmp_path / "x.npz")
    assert "on 6 samples the captured model and onnxruntime running the file agree" in arrival.told(
        tmp_path / "net.onnx", model, task
    )


def test_the_same_run_goes_on_with_another_number_of_threads(ran):
    model, task = paredown.load("net.onnx", "x.npz", seed=3)
    for name in ("train", "validation", "test"):  # sums in another order
        getattr(task, name).outputs[0] += np.float32(1e-6)
    steps, target = [paredown.Quantize("int8")], paredown.Target(rounds=2)
    again = paredown.compress(model, task, paredown.Goals(size="0.9x"), target, steps, "r", 3)
    assert again.artifact.sha256 == Run.load("r").artifact.sha256
