"""The rooms grow as docs/house.md says: each new thing is one new file and one line.

Each test writes them into a copy of the package, and asks what should take the new thing.
"""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


class Copy:
    """The package, its tests and pages in a folder of their own."""

    def __init__(self, folder: Path):
        self.folder = folder
        skip = shutil.ignore_patterns("__pycache__", "*.safetensors")
        for name in ("paredown", "tests", "docs"):
            shutil.copytree(ROOT / name, folder / name, ignore=skip)
        for name in ("README.md", "pyproject.toml"):
            shutil.copy(ROOT / name, folder / name)

    def new_file(self, path: str, text: str) -> None:
        assert not (self.folder / path).exists()
        (self.folder / path).write_text(text)

    def line(self, path: str, table: str, line: str) -> None:
        """One line at the end of a table, the only change to a file that was there."""
        text = (self.folder / path).read_text()
        made = [n for n in ast.parse(text).body if isinstance(n, ast.Assign | ast.AnnAssign)]
        node = next(n for n in made if re.match(rf"{table}\b", ast.unparse(n)))
        lines = text.splitlines(keepends=True)
        lines.insert(node.end_lineno - 1, f"    {line},\n")
        (self.folder / path).write_text("".join(lines))

    def run(self, *words: str, expected: int = 0) -> str:
        """What a command prints."""
        done = subprocess.run(
            [sys.executable, *words],
            cwd=self.folder,
            env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(self.folder), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == expected, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    def asked(self, code: str) -> str:
        return self.run("-c", code).strip()

    def tested(self, file: str, names: str) -> int:
        """How many of a file's tests of these names pass; none may fail."""
        out = self.run("-m", "pytest", "-q", "-p", "no:cacheprovider", file, "-k", names)
        return int(re.search(r"(\d+) passed", out)[1])


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    return Copy(tmp_path_factory.mktemp("house"))


PAGE = (ROOT / "docs" / "house.md").read_text()
TECHNIQUE = '''"""Halve every weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from paredown.core.task import Task
from paredown.graph.model import Model
from paredown.steps.step import ALONE, Entry, Setting, Step


''' + re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1]

NET = """
import torch
from torch.utils.data import TensorDataset
import paredown

def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))

def task():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 8, generator=generator)
    data = TensorDataset(x, x[:, :3].argmax(1))
    return paredown.Task(
        example=(x[:1],), score=paredown.accuracy, calibration=data, validation=data, test=data
    )
"""


@pytest.fixture(scope="module")
def technique(house):
    house.new_file("paredown/steps/pruning/halve_weights.py", TECHNIQUE)
    spelled = '"halve_weights": "paredown.steps.pruning.halve_weights:HalveWeights"'
    house.line("paredown/steps/__init__.py", "STEPS", spelled)
    return house


def test_a_technique_is_a_public_name_a_line_of_toml_and_a_row_of_the_readme(technique):
    code = "import paredown; from paredown.steps import recipe; step = paredown.HalveWeights(); "
    code += "assert recipe.from_toml(recipe.to_toml([step])) == [step]; print(paredown.__all__)"
    assert "'HalveWeights'" in technique.asked(code)
    technique.run("docs/make_techniques.py")
    assert (
        "| `HalveWeights()` | halves | never | always |"
        in (technique.folder / "README.md").read_text().splitlines()
    )


def test_a_technique_is_a_case_of_every_contract(technique):
    names = "halve_weights and not encoder and (frozen or untouched or structure or changes)"
    assert technique.tested("tests/test_contract.py", names) >= 4
    assert technique.tested("tests/test_house.py", "halve_weights or readme") >= 2


@pytest.mark.slow
def test_a_technique_keeps_the_whole_contract(technique):
    assert technique.tested("tests/test_contract.py", "halve_weights") > 60


@pytest.mark.slow
def test_a_technique_runs_from_the_command_line_into_the_report(technique):
    technique.new_file("net.py", NET)
    technique.new_file("recipe.toml", '[[step]]\nname = "halve_weights"\n')
    command = ("run", "net.py", "--recipe", "recipe.toml", "--size", "0.9x", "--out", "r")
    technique.run("-m", "paredown", *command, expected=3)  # it makes nothing smaller
    page = (technique.folder / "r" / "report.html").read_text()
    assert "HalveWeights()" in page


RANGES = '''"""The middle half of the values."""

from paredown.steps.quantization.range_methods import RangeMethod, percentile_range

MIDDLE = RangeMethod(lambda seen, _: percentile_range(seen, 60.0))
'''


@pytest.mark.slow
def test_a_range_method(house):
    house.new_file("paredown/steps/quantization/middle_range.py", RANGES)
    spelled = '"middle": "paredown.steps.quantization.middle_range:MIDDLE"'
    house.line("paredown/steps/quantization/ranges.py", "RANGES", spelled)
    assert house.tested("tests/test_quantize.py", "middle") >= 2
    code = f"""{NET}
from pathlib import Path
from paredown.explain.explanation import explain_file
step, made_task = paredown.Quantize(ranges="middle"), task()
small = paredown.apply(model(), [step], made_task)
original = paredown.capture(model(), made_task.example)
artifact = paredown.export(small, paredown.Target(), "middle.onnx")
found = explain_file(original, small, Path(artifact.path), "onnxruntime", made_task, [step], 5)
print(len(found.layers))
"""
    assert house.asked(code) == "2"


DEVICE = '''"""This machine, by another name."""

from paredown.targets.devices import local
from paredown.targets.devices.device import Device


def connect(address: str) -> Device:
    return local.connect("local")
'''


def test_a_device(house):
    house.new_file("paredown/targets/devices/twin.py", DEVICE)
    house.line(
        "paredown/targets/devices/device.py",
        "DEVICES",
        '"twin": "paredown.targets.devices.twin:connect"',
    )
    code = f"""{NET}
original = paredown.capture(model(), task().example)
file = paredown.export(original, paredown.Target(), "twin.onnx").path
from pathlib import Path
found = paredown.measure(
    {{"original": Path(file)}}, original, task(), paredown.Target(device="twin://here", rounds=2)
)
print(found["original"].measurement.latency_ms_p50 > 0)
"""
    assert house.asked(code) == "True"


@pytest.mark.slow
def test_a_weight_form(house):
    """Its record is a case of every test of records; tests/test_forms.py has what reads it."""
    record = 'replace(_INT8, name="int2", made_by="Two()", word="int2", grid=range(-2, 2))'
    house.line("paredown/graph/quantized/forms.py", "WEIGHT_FORMS", record)
    assert house.tested("tests/test_forms.py", "int2 and (integers or packing or grid)") >= 8


OFFER = '''"""Weights of half their size."""

from paredown.search.pieces import make
from paredown.search.proposal import Attempt, Proposal


def three_bits(situation):
    """Where a size is asked for."""
    if situation.goals.size is None:
        return []
    attempt = Attempt((make("quantize_weights", bits=4),), "Small weights", "why", "smaller")
    return [Proposal("small weights", "a size is asked for", (attempt,))]
'''


def test_an_offer(house):
    house.new_file("paredown/search/offers/three_bits.py", OFFER)
    spelled = '"paredown.search.offers.three_bits:three_bits"'
    house.line("paredown/search/offers/__init__.py", "OFFERS", spelled)
    assert house.tested("tests/test_plan.py", "every_offer") == 1
    (house.folder / "planned.py").write_text(NET)
    said = house.run("-m", "paredown", "plan", "planned.py", "--size", "0.9x")
    assert "small weights: a size is asked for" in said


FACTS = '''"""How the run was named."""


def facts(run):
    return {"letters": len(run.name)}
'''
TEMPLATE = '<section id="naming"><p>{{ letters }} letters: {{ run.name }}</p></section>\n'


@pytest.mark.slow
def test_a_section_of_the_report(house):
    house.new_file("paredown/report/sections/naming.py", FACTS)
    house.new_file("paredown/report/sections/naming.html", TEMPLATE)
    spelled = '"paredown.report.sections.naming:facts"'
    house.line("paredown/report/sections/__init__.py", "SECTIONS", spelled)
    assert house.tested("tests/test_report.py", "template or small_and_closed") >= 5
    code = "from tests.test_report import met_run, hostile_run; "
    code += "from paredown.report.page import render; "
    code += "print(render(met_run()).count('20 letters: ResNet-8 on CIFAR-10'), "
    code += "render(hostile_run()).count('<script'))"
    assert house.asked(code) == "1 0"


@pytest.mark.slow
def test_a_runtime(house):
    """Another runtime that writes ONNX files: its own file, by another suffix."""
    text = (ROOT / "paredown/targets/runtimes/onnxruntime.py").read_text()
    assert text.count('".onnx"') == 1
    house.new_file("paredown/targets/runtimes/twin.py", text.replace('".onnx"', '".twin"'))
    spelled = '"twin": "paredown.targets.runtimes.twin"'
    house.line("paredown/targets/runtimes/__init__.py", "RUNTIMES", spelled)
    assert house.tested("tests/test_runtimes.py", "twin and (has_all or float32-cnn)") >= 2
    code = f"""{NET}
original = paredown.capture(model(), task().example)
target = paredown.Target("twin", rounds=2)
from pathlib import Path
file = paredown.export(original, target, "model.twin").path
found = paredown.measure({{"original": Path(file)}}, original, task(), target)
print(found["original"].measurement.latency_ms_p50 > 0, paredown.open(file).input_names)
"""
    assert house.asked(code) == "True ['input']"
