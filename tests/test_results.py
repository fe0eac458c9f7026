"""A finished run as a user sees it: printed, in a notebook, in a narrow terminal."""

import dataclasses

import pytest
import torch

import paredown
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
