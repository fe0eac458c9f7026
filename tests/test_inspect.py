# ruff: noqa: F811 (fixtures are imported)
"""`paredown inspect`: what it tells is what the analysis finds and what a cut then saves."""

import functools
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import paredown
from paredown.core.terminal import WIDEST, broken
from paredown.core.units import human
from paredown.explain.inspect import inspect_model
from paredown.graph.coupling.coupling import analyze
from paredown.graph.coupling.cut import cut
from tests.architectures import make
from tests.architectures.captured import captured
from tests.test_house import commands, complaint, readme
from tests.test_run import here, paredown_cli, user  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore")
DOCS = Path(__file__).parent.parent / "docs"


@functools.cache
def model_of(name):
    return captured(name)[0]


def lines(out):
    return [line.rstrip() for line in out.splitlines()]


def weights(model):
    return sum(p.numel() for p in model.parameters())


# --- what is found ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet8", "vit", "gru_bidirectional"])
def test_half_of_a_group_saves_what_is_told(name):
    model = model_of(name)
    coupling = analyze(model)
    found = inspect_model(model, coupling)
    assert [g.name for g in found.groups] == [g.name for g in coupling.groups]
    assert found.costs.parameters == weights(model)
    for group in found.groups:
        kept = np.arange(group.units) % 2 == 1  # any half costs the same
        kept[-1] = True
        if kept.sum() != group.units - group.units // 2:
            kept = np.arange(group.units) >= group.units // 2
        small = cut(model, coupling, {group.name: kept})
        assert weights(model) - weights(small) == group.half.parameters > 0
        assert analyze(small).costs().macs == found.costs.macs - group.half.macs


UNITS = {
    "resnet8": {"channels"},
    "vit": {"channels", "heads of 12", "neurons"},
    "vit_eager": {"channels", "heads of 8", "neurons"},
    "gru_bidirectional": {"neurons"},
    "sknet": {"channels", "neurons"},  # its softmax is over branches, not over attention
    "group_norm": {"channels", "groups of 4 channels"},
    "t5": {"heads of 8", "neurons"},  # each head has one bias of its own besides
}


@pytest.mark.parametrize("name", UNITS)
def test_what_a_unit_is(name):
    assert {group.unit for group in inspect_model(model_of(name)).groups} >= UNITS[name]


def test_heads_are_named_only_where_there_are_heads():
    for name in ("sknet", "resnet8", "gru_bidirectional", "group_norm"):
        assert not any("head" in group.unit for group in inspect_model(model_of(name)).groups)


def test_dimensions_of_heads():
    model = model_of("vit")
    units = {g.unit: g.units for g in inspect_model(model, analyze(model, "head_dim")).groups}
    assert units["dimensions of every head"] == 12 and not any("heads of" in u for u in units)


def test_who_sees_how_many_units_there_are_is_told_by_the_users_name():
    stream, head, *_ = inspect_model(model_of("vit")).groups
    assert (stream.exact, stream.seen_by) == (False, "layer_norm in norm")
    assert (head.exact, head.seen_by) == (True, "")


class Picks(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide, self.narrow = nn.Linear(4, 8), nn.Linear(3, 2)

    def forward(self, x):
        return self.narrow(
            torch.linalg.norm(self.wide(x)[:, 2:5], ord=3, dim=1, keepdim=True) + x[:, :3]
        )


def test_pins_come_most_first_with_their_layers():
    found = inspect_model(model_of("resnet8"))
    counts = [pin.indices for pin in found.pins]
    assert counts == sorted(counts, reverse=True) and sum(counts) > 0
    assert {pin.layer for pin in found.pins if pin.op.startswith("aten.conv2d")} >= {"stem.0"}
    assert "the outputs of the model keep their size" in {pin.why for pin in found.pins}


def test_ops_without_a_rule_are_told_with_their_layer():
    model = paredown.capture(Picks(), (torch.randn(2, 4),))
    found = inspect_model(model)
    assert set(found.unknown) == set(analyze(model).unknown)
    for op, layers in found.unknown.items():
        assert layers and any(op == pin.op and "no rule" in pin.why for pin in found.pins)


# --- the command -----------------------------------------------------------------------------


def test_what_a_person_reads(user, paredown_cli):
    code, out, err = paredown_cli("inspect", user())
    assert (code, err) == (0, "")
    told = lines(out)
    assert told[0] == "Sequential: 14.6 k parameters, 120 k multiply-adds, 58.5 KB"
    assert max(map(len, told)) <= WIDEST
    (row,) = [line for line in told if line.startswith("0 ")]
    # 8 channels: 80 and 16 parameters of layers 0 and 1, 32 x 8 x 9 of layer 3; 64 + 16 places
    assert re.fullmatch(r"0 +16 channels +7 of 0, 1, 3 +yes +2\.4 k +41\.5 k +9\.66 KB", row)
    assert any(line.startswith("Coverage: 100.0% of the weights") for line in told)
    assert any("10  " not in line and "the outputs of the model" in line for line in told)
    assert not Path("runs").exists()


def test_everything_for_machines(user, paredown_cli):
    user("print('loading')")
    code, out, _ = paredown_cli("inspect", "net.py", "--json")
    found = json.loads(out)
    model = paredown.capture("net.py")
    coupling = analyze(model)
    assert code == 0 and found["costs"]["parameters"] == weights(model)
    assert found["coverage"] == coupling.coverage
    for told, group in zip(found["groups"], coupling.groups, strict=True):
        members = [(m.name, m.dim, m.role, m.indices.shape[1]) for m in group.members]
        keys = ("name", "dim", "role", "indices_per_unit")
        assert [tuple(m[k] for k in keys) for m in told["members"]] == members
    assert sum(pin["indices"] for pin in found["pins"]) == sum(coupling.pinned_by.values())


def test_saved_and_exported_models_can_be_inspected(tmp_path, paredown_cli):
    model = model_of("resnet8")
    model.save(tmp_path / "net.safetensors")
    module, example = make("resnet8")
    torch.export.save(torch.export.export(module, example), tmp_path / "net.pt2")
    tables = []
    for name in ("net.safetensors", "net.pt2"):
        code, out, _ = paredown_cli("inspect", tmp_path / name, "--json")
        assert code == 0
        found = json.loads(out)
        tables.append([(g["name"], g["units"], g["half"]["macs"]) for g in found["groups"]])
    assert tables[0] == tables[1] != []


def test_a_parameter_is_explained_and_a_typo_is_seen(user, paredown_cli):
    user()
    code, out, _ = paredown_cli("inspect", "net.py", "--parameter", "3.weight")
    assert code == 0
    assert lines(out)[:2] == [
        "dimension 0 of 32: group '3' (32 units)",
        "dimension 1 of 16: group '0' (16 units)",
    ]
    _, out, _ = paredown_cli("inspect", "net.py", "--parameter", "3.weight", "--json")
    assert json.loads(out)["dimensions"][2] == "dimension 2 of 3: stays whole"
    code, _, err = paredown_cli("inspect", "net.py", "--parameter", "3.wieght")
    assert code == 1 and "no parameter is called '3.wieght'; did you mean '3.weight'?" in err


def test_policies_reach_the_analysis(tmp_path, paredown_cli):
    model_of("group_norm").save(tmp_path / "net.safetensors")
    found = {}
    for policy in ("groups", "within"):
        words = ("inspect", tmp_path / "net.safetensors", "--group-norm", policy, "--json")
        found[policy] = json.loads(paredown_cli(*words)[1])["groups"][0]
    assert (found["groups"]["unit"], found["groups"]["exact"]) == ("groups of 4 channels", True)
    assert (found["within"]["unit"], found["within"]["exact"]) == ("sets of 4 channels", False)
    code, _, err = paredown_cli("inspect", tmp_path / "net.safetensors", "--attention", "tails")
    assert code == 1 and "attention: expected 'heads' or 'head_dim', got 'tails'" in err


def test_a_model_without_groups_says_so(user, paredown_cli):
    user("def model():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 4))")
    code, out, _ = paredown_cli("inspect", "net.py")
    assert code == 0 and "No group: nothing in this model can be cut" in out
    assert "Coverage" not in out and "the outputs of the model keep their size" in out
    assert json.loads(paredown_cli("inspect", "net.py", "--json")[1])["groups"] == []


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nowhere.py", r"nowhere\.py: no such file"),
        ("nowhere.safetensors", r"nowhere\.safetensors: no such file"),
        ("net.onnx", r"net\.onnx: is no ONNX file, or a damaged one: an empty file"),
        ("net.bin", r"expected a Python file with model\(\) and task\(\)"),
    ],
)
def test_a_wrong_file_is_a_sentence(paredown_cli, tmp_path, monkeypatch, name, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.onnx").touch()
    (tmp_path / "net.bin").touch()
    code, _, err = paredown_cli("inspect", name)
    assert code == 1 and re.search(said, err)


def test_help_teaches(paredown_cli):
    code, out, _ = paredown_cli("inspect", "--help")
    text = " ".join(re.sub("[│╭╮╰╯─]", " ", out).split())
    assert code == 0 and "Say what structured pruning can cut" in text
    assert '"heads"' in text and '"within"' in text


@pytest.mark.parametrize("width", [70, 80, 100])
def test_long_names_wrap_without_loss(width):
    from rich.console import Console

    from paredown.explain.inspect import groups_table

    found = inspect_model(model_of("swin"))
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(groups_table(found.groups, width))
    text = console.export_text()
    assert max(map(len, lines(text))) <= width
    column = (width - 47) * 3 // 8
    first = "".join(line[:column].strip() for line in text.splitlines()[2:])
    assert first == "".join(group.name for group in found.groups)


def test_words_break_after_dots_and_figures_are_short():
    assert broken("one.two three", 8) == "one.two\nthree"
    assert "".join(broken("a.very_long.name_here", 6).split("\n")) == "a.very_long.name_here"
    assert [human("count", n) for n in (0, 999, 1000, 2.5e9)] == ["0", "999", "1 k", "2.5 G"]


# --- the page --------------------------------------------------------------------------------


def test_the_page_is_true(tmp_path, monkeypatch):
    """Its Python runs, on the README's own mine.py, and its commands parse."""
    page = (DOCS / "structured-pruning.md").read_text()
    own = re.search(r"^```python\n(import torch\n.*?def model\(\):.*?)^```", readme(), re.S | re.M)
    (tmp_path / "mine.py").write_text(own[1])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    names = {}
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.S | re.M)
    assert len(blocks) == 3
    for block in blocks:
        exec(block, names)
    from paredown.cli import app

    assert commands(page) and not [line for line in commands(page) if complaint(app, line)]


def test_the_page_and_the_steps_tell_of_the_same_criteria():
    from paredown.steps.pruning.criteria import CRITERIA

    page = (DOCS / "structured-pruning.md").read_text()
    assert re.findall(r'^\| `"(\w+)"`', page, re.M) and set(
        re.findall(r'^\| `"(\w+)"`', page, re.M)
    ) == set(CRITERIA)


def test_pictures_are_drawn_from_the_analysis():
    import sys

    sys.path.insert(0, str(DOCS))
    try:
        import make_structured_pruning as script
    finally:
        sys.path.pop(0)
    drawn = script.draw_groups()
    assert drawn == (DOCS / "coupled-groups.svg").read_text(), "draw it again"
    found = analyze(paredown.capture(script.ResidualBlock(), (torch.zeros(1, 3, 8, 8),)))
    assert all(f"{len(g.members)} dimensions" in drawn for g in found.groups)
    for residual in (False, True):
        model = script.chain(40, residual)
        ops = sum(node.op == "call_function" for node in model.graph.graph.nodes)
        assert 37 <= ops <= 40 and analyze(model).groups
