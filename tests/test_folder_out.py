"""A run of a Hugging Face folder goes out as a folder again, and runs as its card says."""

import dataclasses
import hashlib
import json
import re
import subprocess
import sys

import pytest
import torch
import transformers as hf
from torch.utils.data import TensorDataset

import paredown
from paredown.core.errors import UserError
from paredown.graph.doors.files import open_file
from paredown.graph.doors.opened import Opened, Wanted
from paredown.report.card import card
from paredown.report.folder import as_taken, write_folder
from tests import folders

pytestmark = pytest.mark.filterwarnings("ignore")

ORIGIN = "---\nlicense: apache-2.0\nlanguage: [en]\nmodel_name: someone/films\n---\n# Films\n"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A run of two linear layers that came in a folder, and the folder that goes out."""
    folder = tmp_path_factory.mktemp("small")
    folders.change(folder / "config.json", lambda _: {"model_type": "own", "sizes": [8, 2]})
    (folder / "vocab.txt").write_text("a\nb\n")
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
    rows = torch.randn(24, 8)
    data = TensorDataset(rows, (rows[:, 0] > 0).long())
    opened = Opened(
        net,
        (Wanted("input", "float32", (None, 8)),),
        outputs=("logits",),
        files=(folder / "config.json", folder / "vocab.txt"),
        card={"name": "a|b\n# <script>", "license": ""},
        notes=("its texts are numbers",),
    )
    splits = dict(calibration=data, validation=data, test=data)
    run = paredown.compress(
        net,
        paredown.Task((rows[:1],), score=paredown.accuracy, **splits),
        paredown.Goals(size="0.99x"),
        paredown.Target(rounds=2),
        steps=[paredown.Cast("fp16")],
        out=folder / "run",
    )
    return run, opened, write_folder(run, opened, folder / "out")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of a small classifier of texts, and the folder that it came from."""
    folder = folders.sentiment(tmp_path_factory.mktemp("hf") / "films")
    (folder / "README.md").write_text(ORIGIN)
    opened = open_file(folder)
    texts = [f"{a} {b}" for a in folders.CORPUS for b in ("good", "bad", "one", "that")]
    data = [({"text": text}, number % 2) for number, text in enumerate(texts)]
    task = paredown.Task(
        opened.example,
        score=paredown.accuracy,
        calibration=data,
        validation=data,
        test=data,
        preprocess=opened.preprocess,
        dynamic=opened.dynamic,
    )
    run = paredown.compress(
        opened.module,
        task,
        paredown.Goals(size="0.9x"),
        paredown.Target(rounds=2),
        steps=[paredown.Quantize("int8")],
        out=folder.parent / "run",
    )
    return run, opened, write_folder(run, opened, folder.parent / "run" / "model")


def run_the_cards_code(out, *shown):
    """What the card's Python prints, run where the card lies."""
    blocks = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
    code = "\n".join(block + show for block, show in zip(blocks, shown, strict=True))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=out, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return [torch.tensor(json.loads(line)) for line in done.stdout.splitlines()[-len(shown) :]]


def test_any_run_goes_out_as_a_folder(small):
    run, opened, out = small
    names = {"README.md", "config.json", "model.onnx", "vocab.txt"}
    assert {path.name for path in out.iterdir()} == names
    written = json.loads((out / "config.json").read_text())
    assert written.pop("paredown")["sha256"] == run.artifact.sha256
    assert written == {"model_type": "own", "sizes": [8, 2]}
    assert (out / "vocab.txt").read_text() == "a\nb\n"
    text = (out / "README.md").read_text()
    assert "# a/b # &lt;script>, pared down" in text and "<script>" not in text
    assert "- Its texts are numbers." in text and 'name = "cast"' in text
    assert "licence: not told by the origin" in text and "license:" not in text
    assert str(out.parent) not in text
    shown = ("print(logits.tolist())\n", "print(outputs[0].tolist())\n")
    first, second = run_the_cards_code(out, *shown)
    assert torch.equal(first, second) and first.shape == (1, 2)
    with torch.no_grad():
        wanted = opened.module(torch.zeros(1, 8))
    torch.testing.assert_close(first, wanted, atol=1e-2, rtol=1e-2)


@pytest.mark.slow
def test_the_folder_has_all_that_the_file_needs(finished):
    run, opened, out = finished
    assert {path.name for path in out.iterdir()} == {
        "README.md",
        "config.json",
        "model.onnx",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    written = json.loads((out / "config.json").read_text())
    done = written["paredown"]
    assert done["sha256"] == hashlib.sha256((out / done["file"]).read_bytes()).hexdigest()
    assert done["runtime"] == "onnxruntime" and 'name = "quantize"' in done["recipe"]
    assert done["figures"]["compressed"]["size"] < done["figures"]["original"]["size"]
    assert done["met"] is run.met and done["figures"]["compressed"]["examples"] == 12
    theirs = json.loads(next(p for p in opened.files if p.name == "config.json").read_text())
    assert {name: written[name] for name in theirs} == theirs
    assert hf.AutoConfig.from_pretrained(out).id2label == {0: "bad", 1: "good"}
    assert hf.AutoTokenizer.from_pretrained(out)("good").input_ids == [
        *hf.AutoTokenizer.from_pretrained(opened.files[0].parent)("good").input_ids
    ]


@pytest.mark.slow
def test_the_card_says_what_it_is(finished):
    run, _, out = finished
    text = (out / "README.md").read_text()
    front = text.split("---")[1]
    assert 'license: "apache-2.0"' in front and 'base_model: "someone/films"' in front
    assert "# someone/films, pared down" in text and run.verdict.split(".")[0] in text
    for heading in ("Figures", "What was done", "How to run it", "Limits", "Origin"):
        assert f"\n## {heading}\n" in text
    assert run.artifact.sha256 in text and run.artifact.recipe.strip() in text
    assert re.search(r"\| Size on disk \| [\d.]+ KB \| [\d.]+ KB \| .* smaller \|", text)
    assert "Texts are cut and padded to 24 tokens" in text
    assert "classes: bad, good" in text
    assert "| `input_ids` | int64 | batch x length |" in text
    assert str(out.parent) not in text


@pytest.mark.slow
def test_the_card_s_code_runs_and_both_ways_agree(finished):
    shown = ("print(logits.tolist())\n", "print(outputs[0].tolist())\n")
    first, second = run_the_cards_code(finished[2], *shown)
    assert torch.allclose(first, second) and first.shape == (1, 2)


def test_a_card_of_a_file_that_paredown_alone_opens(small):
    run, opened, _ = small
    text = card(run, opened, "m.tflite")
    assert "predict = paredown.open('m.tflite')" in text and "import onnxruntime" not in text
    assert 'paredown.open("model.onnx")' in card(run)
    varied = dataclasses.replace(opened, inputs=(Wanted("x", "uint8", (None, 3, "width")),))
    assert "'x': np.zeros((1, 3, 1), 'uint8')" in card(run, varied)
    assert "| `x` | uint8 | batch x 3 x width |" in card(run, varied)


def test_a_file_that_takes_less_than_the_door_told(small):
    run, opened, _ = small
    more = dataclasses.replace(
        opened,
        inputs=(Wanted("mask", "int64", (None, 8), optional=True), *opened.inputs),
        usage='inputs = {"mask": 1, "input": 2}',
    )
    taken = as_taken(more, ["input"])
    assert [each.name for each in taken.inputs] == ["input"]
    text = card(run, taken, "model.onnx")
    assert "inputs = {name: inputs[name] for name in ['input']}" in text
    assert "predict(inputs['input'])" in text and "| `mask`" not in text
    assert as_taken(more, ["other"]) is more


def test_what_cannot_be_written_is_told(small, tmp_path):
    run, opened, _ = small
    with pytest.raises(UserError, match=r"has no artifact, so there is nothing to ship"):
        write_folder(dataclasses.replace(run, artifact=None), opened, tmp_path / "a")
    gone = dataclasses.replace(opened, files=(tmp_path / "tokenizer.json",))
    with pytest.raises(UserError, match=r"tokenizer.json: cannot be read"):
        write_folder(run, gone, tmp_path / "b")
    assert not list((tmp_path / "b").glob("README*"))
    other = dataclasses.replace(run.artifact, sha256="0" * 64)
    with pytest.raises(UserError, match=r"is damaged, or not the file of the run"):
        write_folder(dataclasses.replace(run, artifact=other), opened, tmp_path / "c")
    assert not (tmp_path / "c").exists()
