"""A finished run as a user sees it: printed, in a notebook, in a narrow terminal."""

import dataclasses
import json

import pytest
import torch

import paredown
from paredown.core.errors import UserError
from paredown.core.goals import GoalCheck
from paredown.core.results import Artifact
from paredown.run.words import print_run
from tests.test_predictor import run_with

EXAMPLE = (torch.zeros(1, 4),)


@pytest.fixture
def run():
    artifact = Artifact("/somewhere/runs/<mine>/model.onnx", "onnxruntime", "0" * 64, 8910, "")
    figures = dataclasses.replace(paredown.Measurement(25100), score=0.9367, latency_ms_p50=0.00741)
    smaller = dataclasses.replace(figures, size_bytes=8910, score=0.92)
    return dataclasses.replace(
        run_with(artifact),
        name="<mine>",
        verdict="Every goal is met by the exported file.",
        on_device={"original": figures, "compressed": smaller},
        checks=[GoalCheck("size", 1e4, 8910, True, "Size is 8.91 KB; the goal is at most 10 KB.")],
        details={"layers": [{"name": "x"}] * 1000, "folder": "runs/<mine>"},
    )


def test_a_run_prints_as_a_small_table(run):
    assert repr(run).splitlines() == [
        "Run '<mine>'",
        "  Every goal is met by the exported file.",
        "                     original     compressed",
        "  score                93.67%         92.00%",
        "  size                25.1 KB        8.91 KB",
        "  latency             7.41 us        7.41 us",
        "  /somewhere/runs/<mine>/model.onnx",
    ]


def test_a_notebook_shows_it_as_a_table(run):
    page = run._repr_html_()
    assert page.count("<tr>") == 4 and "<td>8.91 KB</td>" in page
    assert "&lt;mine&gt;" in page and "<mine>" not in page


@pytest.mark.parametrize("columns", [60, 100])
def test_the_command_lines_table_fits_a_narrow_terminal(run, columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    print_run(run)
    said = capsys.readouterr().out
    table = [line for line in said.splitlines() if line[:1] in "┏┃┡│└"]
    assert table and max(map(len, table)) <= columns and "…" not in "".join(table)
    assert ("goal" in table[1]) == (columns == 100)
    assert ("met: Size is 8.91 KB" in said) == (columns == 60)


def test_progress_is_shown_in_python_when_asked(capsys):
    model = paredown.capture(torch.nn.Linear(4, 2), EXAMPLE)
    task = paredown.Task(EXAMPLE, paredown.accuracy)
    paredown.apply(model, [paredown.PruneWeights(0.5)], task)
    assert capsys.readouterr() == ("", "")
    with paredown.progress():
        paredown.apply(model, [paredown.PruneWeights(0.5)], task)
    assert "PruneWeights" in capsys.readouterr().err


WRONG = [  # the way to a field of run.json, what stands there (... deletes it), what is said
    (("seed",), ..., "field 'seed' is missing"),
    (("seed",), "0", "field 'seed': expected a whole number, got '0'"),
    (("met",), 1, "field 'met': expected true or false, got 1"),
    (("baseline", "size_bytes"), ..., "field 'baseline.size_bytes' is missing"),
    (("baseline", "score"), True, "field 'baseline.score': expected a number, got True"),
    (("baseline", "energy_source"), "sun", "field 'baseline.energy_source': expected one of meas"),
    (("baseline",), None, "field 'baseline': expected an object, got None"),
    (("checks", 0, "bound"), [], "field 'checks[0].bound': expected a number, got a list"),
    (("checks",), {}, "field 'checks': expected a list, got a dict"),
    (("artifact", "path"), 3, "field 'artifact.path': expected a text, got 3"),
    (("on_device", "original"), "x", "field 'on_device.original': expected an object, got 'x'"),
    (("format",), 9, "field 'format' is unknown to this version of paredown"),
    (("target", "threads"), "1", "field 'target.threads': expected a whole number, got '1'"),
    (("target", "threads"), 0, "threads: expected a whole number from 1 to 1024, got 0"),
    (("target", "colour"), "red", "field 'target.colour' is unknown"),
    (("details", "layers"), 3, "field 'details.layers': expected a list, got 3"),
]


@pytest.mark.parametrize(("way", "value", "said"), WRONG)
def test_a_field_of_a_run_that_is_not_as_it_should_be_is_named(run, tmp_path, way, value, said):
    raw = json.loads(run.to_json()) | {"target": {"threads": 1}}
    inner = raw
    for key in way[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[way[-1]]
    else:
        inner[way[-1]] = value
    (tmp_path / "run.json").write_text(json.dumps(raw))
    with pytest.raises(UserError) as caught:
        paredown.Run.load(tmp_path)
    text = str(caught.value)
    assert text.startswith(f"{tmp_path / 'run.json'}: is damaged: {said}")
    assert text.endswith("; the same paredown run command writes it again.")


def test_what_a_run_does_not_hold_is_told(run, tmp_path):
    lacking = dataclasses.replace(run, details={"classes": [{"name": "a"}]})
    with pytest.raises(UserError, match=r"its section 'classes' shows: KeyError: 'before'\. Wher"):
        paredown.report(lacking, tmp_path / "report.html")
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"field 'details\.batch_size' is missing"):
        lacking.detail("batch_size")
    for text in ("[]", "nothing", "[" * 100_000, "\udcff"):
        (tmp_path / "run.json").write_text(text, errors="surrogateescape")
        with pytest.raises(UserError, match=r"run\.json: is damaged: "):
            paredown.Run.load(tmp_path)
