"""The house rules: which way imports go, what an import costs, and a README that is true."""

import ast
import graphlib
import importlib
import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "paredown"
FLOORS = (  # from the top; a room imports itself and the floors below it
    ("__init__", "__main__"),
    ("cli",),
    ("run",),
    ("report",),
    ("search", "explain"),
    ("ship", "steps"),
    ("measure", "train"),
    ("targets", "data"),
    ("graph",),
    ("zoo",),
    ("core",),
)
ROOMS = [room for floor in FLOORS[2:] for room in floor]
FAMILIES = ("steps", "targets.runtimes")  # the members that their dicts name never meet
OPTIONAL = ["onnxruntime", "openvino", "transformers", "keras", "sklearn", "onnx", "scipy.stats"]
LONGEST_FILE, LONGEST_FUNCTION, NINE_OF_TEN = 420, 45, 20  # lines


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def room(module):
    """What of the house a module stands in: a room, or the front door."""
    return module.split(".")[1] if "." in module else "__init__"


def floor(module):
    depths = [depth for depth, rooms in enumerate(FLOORS) if room(module) in rooms]
    assert depths, f"{module}: the house has {len(ROOMS)} rooms, and {room(module)!r} is none"
    return depths[0]


def imports(source, name):
    """The modules of the package that ``source`` imports: also inside functions, and for types."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: line {node.lineno} imports relatively"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in FILES else node.module)
    return {module for module in found if module.split(".")[0] == "paredown"} - {name}


GRAPH = {name: imports(path.read_text(), name) for name, path in FILES.items()}


def wrong_way(name, imported):
    """Whether a module may not import another, for where they stand."""
    if room(name) == room(imported):
        return False
    return floor(imported) <= floor(name)


def members(family):
    """The modules that the family's dict names."""
    text = PACKAGE.joinpath(*family.split("."), "__init__.py").read_text()
    return {name for name in FILES if re.search(rf"{re.escape(name)}[\"':]", text)}


def test_the_house_has_thirteen_rooms():
    assert len(ROOMS) == 13
    there = {path.name for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    loose = {f"{name}.py" for name in FLOORS[0]}
    assert there - {"__pycache__"} == {*ROOMS, *loose, "cli"}


@pytest.mark.parametrize("module", FILES)
def test_imports_only_go_down(module):
    for imported in GRAPH[module]:
        assert imported in FILES, f"{module} imports {imported}: no such file"
        assert not wrong_way(module, imported), f"{module} must not import {imported}"


@pytest.mark.parametrize("family", FAMILIES)
def test_members_of_a_family_never_import_each_other(family):
    inside = members(family)
    assert len(inside) > 4
    for module in (name for name in FILES if name.startswith(f"paredown.{family}.")):
        found = GRAPH[module] & inside
        assert not found, f"{module} must not import {', '.join(sorted(found))}"


def test_no_module_is_in_a_circle():
    try:
        graphlib.TopologicalSorter(GRAPH).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_the_import_rules_see_what_they_should():
    source = """
if TYPE_CHECKING:
    from paredown.report import charts
import paredown.stats, numpy
def f():
    from paredown.core import files, nothing
    from paredown.graph import mode
class C:
    from paredown.core.task import Task
"""
    seen = {"paredown.report.charts", "paredown.stats", "paredown.core.files", "paredown.core"}
    assert imports(source, "paredown.x") == seen | {"paredown.graph.mode", "paredown.core.task"}
    assert wrong_way("paredown.graph.model", "paredown.data.splits")
    assert wrong_way("paredown.graph.model", "paredown")
    assert wrong_way("paredown.measure.stats", "paredown.train.loop")  # beside it, not below
    assert not wrong_way("paredown.data.splits", "paredown.graph.model")


@pytest.mark.parametrize("folder", sorted({path.parent for path in FILES.values()} - {PACKAGE}))
def test_no_module_is_shadowed_by_a_name_of_its_folder(folder):
    """Else ``from paredown.folder import name`` gives one or the other by the order of lines."""
    modules = {path.stem for path in folder.glob("*.py")} | {p.name for p in folder.iterdir()}
    bound = set(vars(importlib.import_module(module_name(folder / "__init__.py"))))
    package = importlib.import_module(module_name(folder / "__init__.py"))
    for name in modules & bound - {"__init__", "__pycache__"}:
        assert inspect.ismodule(getattr(package, name)), f"{name} of {folder} is not the module"


def test_inside_the_house_nobody_goes_through_the_front_door():
    """There ``paredown.measure`` and ``paredown.report`` are functions, not rooms."""
    for name, path in FILES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                plain = all(alias.name.split(".")[0] != "paredown" for alias in node.names)
                assert plain, f"{name}: line {node.lineno}: import names from their module"
            if isinstance(node, ast.ImportFrom) and node.module == "paredown":
                pytest.fail(f"{name}: line {node.lineno}: import names from their module")


def test_no_private_name_is_used_by_another_module():
    for name, path in FILES.items():
        tree = ast.parse(path.read_text())
        modules = set()  # names here that are modules of the package
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("paredown"):
                for alias in node.names:
                    assert not alias.name.startswith("_"), f"{name} imports {alias.name}"
                    if f"{node.module}.{alias.name}" in FILES:
                        modules.add(alias.asname or alias.name)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                inside = node.value.id in modules and re.match("_[^_]", node.attr)
                assert not inside, f"{name}: line {node.lineno} uses {ast.unparse(node)}"


def docstring_lines(function):
    first = function.body[0]
    told = ast.get_docstring(function, clean=False) is not None
    return first.end_lineno - first.lineno + 1 if told else 0


def test_functions_fit_a_screen_and_files_a_few():
    lengths = []
    for name, path in FILES.items():
        text = path.read_text()
        assert text.count("\n") <= LONGEST_FILE, f"{name} is long: part it where two ideas meet"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lengths.append(node.end_lineno - node.lineno + 1 - docstring_lines(node))
                assert lengths[-1] <= LONGEST_FUNCTION, f"{name}.{node.name} is long"
    assert sorted(lengths)[int(0.9 * len(lengths))] <= NINE_OF_TEN


def test_import_is_light():
    code = "import sys, paredown; print(*(m for m in sys.argv[1:] if m in sys.modules))"
    command = [sys.executable, "-c", code, *OPTIONAL]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [], "import paredown imports what only some need"


def readme():
    path = ROOT / "README.md"
    assert path.exists(), "README.md is missing"
    return path.read_text()


def test_readme_shows_the_house_as_it_is():
    """One line a room, and the front door."""
    match = re.search(r"^#+ The house\n.*?^```\w*\n(.*?)^```", readme(), re.DOTALL | re.MULTILINE)
    assert match, "README.md has no fenced tree under a heading 'The house'"
    shown = [line.split()[0].rstrip("/") for line in match[1].splitlines() if line.strip()]
    assert sorted(shown[1:]) == sorted([*ROOMS, "cli"]), "the tree has one line a room"


def test_the_table_of_techniques_is_what_the_steps_say():
    from docs.make_techniques import renewed

    assert renewed(readme()) == readme(), "run python docs/make_techniques.py"


def test_the_page_of_the_house_names_what_is_there():
    """docs/house.md: every room, and no file or folder that is gone."""
    text = (ROOT / "docs" / "house.md").read_text()
    named = re.findall(r"`((?:paredown|tests|docs|examples)/[\w/.]*)`", text)
    gone = [name for name in named if not (ROOT / name).exists()]
    assert not gone, f"docs/house.md names {gone}"
    assert {f"paredown/{each}/" for each in ROOMS} <= set(named)


def commands(text):
    """The lines of fenced blocks that begin with ``paredown``, continued lines joined."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    stripped = [line.strip().removeprefix("$ ") for line in lines]
    return [line for line in stripped if line.startswith("paredown ")]


def complaint(app, line):
    """What is wrong with a command line: its verb, an option, or the count of arguments."""
    import typer

    words = shlex.split(line, comments=True)[1:]
    ends = [
        n for n, word in enumerate(words) if word in ("|", "&&", "||", ";", ">", ">>", "2>", "&")
    ]
    words = words[: ends[0]] if ends else words
    group = typer.main.get_command(app)
    if words in (["--help"], ["--version"]):
        return ""
    if not words or words[0] not in group.commands:
        return f"no verb {words[:1]}"
    verb = group.commands[words[0]]
    try:
        options, rest, _ = verb.make_parser(verb.context_class(verb)).parse_args(words[1:])
    except Exception as error:
        return str(error) or repr(error)
    missing = [
        param.name for param in verb.params if param.required and not options.get(param.name)
    ]
    return f"too many arguments: {rest}" if rest else f"missing: {missing}" if missing else ""


def test_commands_of_the_readme_parse():
    from paredown.cli import app

    lines = commands(readme())
    assert lines, "README.md shows no command"
    wrong = {line: complaint(app, line) for line in lines if complaint(app, line)}
    assert not wrong


def test_a_wrong_command_is_seen():
    import typer

    app = typer.Typer()
    app.command("run")(_example_verb)
    app.command("plan")(_example_verb)
    good = "$ paredown run a.py --size 0.3x \\\n  --out x  # say\nparedown plan a.py > log\nmore\n"
    bad = ["fly a.py", "run", "run a.py b.py", "run a.py --siez 0.3x", "run a.py --size"]
    assert [complaint(app, line) for line in commands(f"text\n```sh\n{good}```\n")] == ["", ""]
    assert all(complaint(app, f"paredown {line}") for line in bad)


def _example_verb(file: str, size: str = "", out: str = "") -> None:
    """A verb."""


def test_every_public_name_has_a_docstring():
    package = importlib.import_module("paredown")
    assert package.__all__, "paredown.__all__ is empty"
    for name in package.__all__:
        value = getattr(package, name)
        if inspect.isclass(value) or inspect.isroutine(value) or inspect.ismodule(value):
            text = value.__doc__ or ""
            # a dataclass without one is given its signature
            assert text and not text.startswith(f"{name}("), f"paredown.{name} has no docstring"
