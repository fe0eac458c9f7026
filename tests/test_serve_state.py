"""The state's folder: what validation found, its profile, its examples; moves meanwhile."""

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest

from paredown.cli import serving
from paredown.core import source
from paredown.core.errors import UserError
from paredown.ship.guard.bound import Bound
from paredown.ship.guard.observation import Observation
from paredown.ship.guard.policy import Policy
from paredown.ship.guard.rollout import Rollout
from paredown.ship.guard.stages import Stage
from paredown.ship.serve import examples, validation
from paredown.ship.serve.compare import Agreement
from paredown.ship.serve.examples import Examples
from paredown.ship.serve.kept import Kept
from paredown.ship.serve.pair import Pair
from paredown.ship.serve.rollout_runner import Runner
from paredown.ship.serve.running import Serving
from paredown.ship.serve.service import Service
from tests.test_serve_evidence import Model, same
from tests.test_serve_runs import run_folder


class Started(Model):
    why = "is ready"

    async def first_start(self):
        return True


def begun(folder, candidate=same, during=None):
    """The service after a start over the folder, and what was said; ``during`` is done to the
    rollout while the candidate is validated."""
    if not (folder / examples.FILE).exists():
        rows = np.random.default_rng(0).normal(size=(64, 2)).astype(np.float32)
        np.savez(folder / examples.FILE, **{"0": rows})
    said = []

    def validated(x):
        if during is not None:
            during(service.rollout)
        return candidate(x)

    service = Service("tiny", Pair(Started(same), Started(validated), None, Agreement(), Kept()))
    source = Examples(folder, None)
    runner = Runner(service, Policy(), folder, ("one", "other"), source, said.append)

    async def run():
        runner.open()
        assert not service.alone
        await runner._begin()
        await runner.stop()

    asyncio.run(run())
    return service, said


def test_what_validation_found_is_kept_over_a_restart(tmp_path):
    service, said = begun(tmp_path)
    assert service.rollout.stage is Stage.SHADOW and service.rollout.bound.profile.histograms
    assert len(said) == 1 and said[0].startswith("Validated: ")
    again, said = begun(tmp_path)
    assert not said and again.rollout.bound.profile.histograms


FOREIGN = json.dumps({"format": 1, "histograms": {}}).encode()


@pytest.mark.parametrize("file", [validation.PROFILE, validation.FILE])
@pytest.mark.parametrize("damage", [b"", b"no json", FOREIGN, None])
def test_a_profile_that_is_not_the_candidates_is_made_again(tmp_path, file, damage):
    begun(tmp_path)
    whole = (tmp_path / validation.PROFILE).read_bytes()
    (tmp_path / file).unlink() if damage is None else (tmp_path / file).write_bytes(damage)
    service, said = begun(tmp_path)
    assert "gone, damaged or of something else: validating again" in said[0]
    assert service.rollout.stage is Stage.SHADOW
    asked = {each["name"]: each["asked"] for each in service.look()["guards"]}
    assert asked["input drift"] and asked["output drift"]
    assert (tmp_path / validation.PROFILE).read_bytes() == whole


def test_a_validation_that_breaks_leaves_the_original_alone(tmp_path):
    class Broken:
        def read(self):
            raise ZeroDivisionError("none")

    service = Service("tiny", Pair(Started(same), Started(same), None, Agreement(), Kept()))
    said = []
    runner = Runner(service, Policy(), tmp_path, ("one", "other"), Broken(), said.append)

    async def run():
        runner.open()
        runner.start()
        for _ in range(100):
            await asyncio.sleep(0.01)
            if service.alone:
                break
        await runner.stop()

    asyncio.run(run())
    assert service.alone == "validation failed: ZeroDivisionError: none"
    assert said[-1] == f"The original serves alone: {service.alone}"


def test_a_pause_during_validation_is_refused_in_words(tmp_path):
    told = []

    def pauses(rollout):
        with pytest.raises(UserError) as refused:
            rollout.pause("not yet", "me")
        told.append(str(refused.value))

    service, _ = begun(tmp_path, during=pauses)
    assert service.rollout.stage is Stage.SHADOW
    assert "at validate, and the candidate gets no request yet" in told[0]


@pytest.mark.parametrize("room", [True, False])
def test_an_abort_during_validation_stays(tmp_path, room):
    def aborts(rollout):
        if not room:
            rollout._journal._base.execute("PRAGMA max_page_count = 1")
        rollout.abort("enough " * 1000, "me")

    service, said = begun(tmp_path, during=aborts)
    assert service.rollout.stage is Stage.ROLLED_BACK and not service.alone
    assert not any("serves alone" in each for each in said)


def test_the_file_of_the_task_that_is_not_there_is_named(tmp_path):
    made = Examples(
        tmp_path, None, lacking="serve: jobs/digits.py: no such file here; name it with --file."
    )
    with pytest.raises(UserError, match=r"validate on\. serve: jobs/digits.py: no such file"):
        made.make(["x"])


def golden(path):
    np.savez(path, **{"inputs.0.0": np.zeros((3, 2), np.float32)})
    return path


def test_where_the_state_has_no_room_its_folder_is_named_and_not_the_task(tmp_path):
    made = Examples(tmp_path / "gone", None, golden=golden(tmp_path / "golden.npz"))
    with pytest.raises(UserError, match=r"gone/examples\.npz: the examples cannot be kept"):
        made.make(["x"])
    task = source.Source(str(tmp_path / "digits.py"))
    Path(task.file).write_text(
        "import torch, paredown\n"
        "rows = torch.utils.data.TensorDataset(torch.zeros(4, 2), torch.zeros(4))\n"
        "def task():\n"
        "    return paredown.Task(example=(torch.zeros(1, 2),), validation=rows,\n"
        "                         score=paredown.accuracy)\n"
        "def model():\n    return torch.nn.Linear(2, 2)\n"
    )
    with pytest.raises(UserError) as told:
        Examples(tmp_path / "gone", task).make(["x"])
    assert "gone/examples.npz: the examples cannot be kept" in str(told.value)
    assert "digits.py" not in str(told.value)
    Examples(tmp_path, task).make(["x"])
    assert len(Examples(tmp_path, task).read()) == 4


def test_examples_that_were_cut_off_are_read_anew(tmp_path):
    golden(tmp_path / "golden.npz")
    begun(tmp_path)
    whole = (tmp_path / examples.FILE).read_bytes()
    (tmp_path / examples.FILE).write_bytes(whole[:200])
    with pytest.raises(examples.UNREADABLE):
        Examples(tmp_path, None).read()
    made = Examples(tmp_path, None, golden=tmp_path / "golden.npz")
    made.make(["x"])
    assert len(made.read()) == 3 and not list(tmp_path.glob("*.part"))


TASKS = {
    "def task(): ...": True,
    "if 1:\n    from mine import task": True,
    "from mine import *": True,
    "from mine import job as task": True,
    "task = make()": True,
    "": False,
    "def model():\n    task = 1": False,
    "task()": False,
    "import task.of": False,
    "no python": False,
    "\0": False,
}


@pytest.mark.parametrize("text", TASKS)
def test_a_file_without_a_task_is_refused_before_the_start(tmp_path, text):
    (tmp_path / "mine.py").write_text(text)
    try:
        Serving(tmp_path, scoring=source.Source(str(tmp_path / "mine.py")))
    except UserError as told:
        assert not TASKS[text] and "expected a Python file with task()" in str(told)
    else:
        assert TASKS[text]


def test_the_score_says_how_many_labels_are_of_both_models():
    rollout = Rollout(Policy(), Bound(0.0, 0.01), None, "ab12")
    rollout.begin()
    rollout.validated(True, "by hand")

    def says():
        rollout.tick()
        [told] = [each for each in rollout.status()["guards"] if each["name"] == "score"]
        return told["says"]

    assert says() == "no label has come"
    for _ in range(7):
        rollout.observe(Observation("original", score=1.0))
    assert says() == "0 pairs of labels; 7 labels of one model alone"
    rollout.observe(Observation("candidate", score=1.0, score_of_other=1.0))
    assert "over 1 pair of labels" in says()


def shown(monkeypatch, capsys, found):
    monkeypatch.setattr(serving, "_asked", lambda *words: found)
    serving.status("http://127.0.0.1:1")
    return " ".join(capsys.readouterr().out.split())


def test_the_status_says_the_last_reason_and_what_is_not_on_the_disk(monkeypatch, capsys):
    found = {"model": "tiny", "stage": "rolled back", "weight": 0, "journal": "disk is full"}
    said = shown(monkeypatch, capsys, found | {"events": [{"reason": "too [slow]"}]})
    assert "Last move: too [slow]" in said and "a new one starts anew" in said
    assert "Not on the disk yet: the state cannot be written: disk is full" in said
    said = shown(monkeypatch, capsys, found | {"stage": "shadow", "journal": "", "events": []})
    assert said == "tiny: shadow, 0 % of the requests"
    monkeypatch.setattr(serving, "_asked", lambda *words: found)
    monkeypatch.setattr("paredown.ship.serve.token.read", lambda file: "token")
    serving.abort("http://127.0.0.1:1", "enough", "token")
    assert "disk is full" in capsys.readouterr().out


def test_the_runs_own_file_is_looked_for_where_it_would_be(tmp_path, monkeypatch):
    folder = run_folder(tmp_path / "run")
    told = json.loads((folder / "run.json").read_text())
    told["details"]["source"] = {"file": "my digits.py"}
    (folder / "run.json").write_text(json.dumps(told))
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "my digits.py"
    assert source.found(folder, "serve")[1] == (
        "serve: my digits.py: no such file here; name it with --file."
    )
    file.write_text("x = 1\n")
    assert source.found(folder, "serve") == (source.Source("my digits.py"), "")
    kept = source.Source.of(Path("my digits.py"), source.Samples())
    told["details"]["source"] = json.loads(kept.to_json())
    (folder / "run.json").write_text(json.dumps(told))
    assert source.found(folder, "serve") == (kept, "")
    file.write_text("x = 2\n")
    assert "is not the file that the run was started from" in source.found(folder, "s")[1]
    assert "no such folder" in source.found(tmp_path / "none", "serve")[1]
