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
LAYERS = (  # from the top; each may import its own layer and those below
    "paredown",
    "cli __main__",
    "report serve",
    "check compress inspect",
    "explain",
    "plan details",
    "offers",
    "measure ledger recipe verify",
    "steps runtimes devices pack timing",
    "lessons teacher targets",
    "matching",
    "train checkpoint qat lasso ties calibrate reconstruct lockstep layer_inputs parity zoo stages",
    "batches examples machine taps distill_losses",
    "data scores",
    "graph stats",
    "files findings progress terminal",
    "types",
)
FAMILIES = ("steps", "runtimes")  # their members never import each other
OPTIONAL = ["onnxruntime", "openvino", "transformers", "sklearn", "onnx", "scipy.stats"]


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def layer(module):
    """How deep the module lies; its part of the house must have a layer."""
    part = module.split(".")[1] if "." in module else "paredown"
    depths = [depth for depth, names in enumerate(LAYERS) if part in names.split()]
    assert depths, f"{module}: give {part!r} a layer in {Path(__file__).name}"
    return depths[0]


def imports(source, name, top_level_only=False):
    """The modules of the package that ``source`` imports, those for type checking aside."""
    nodes, found = [ast.parse(source)], set()
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            nodes += node.orelse
            continue
        if top_level_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: line {node.lineno} imports relatively"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in FILES or is_folder(full) else node.module)
        nodes += ast.iter_child_nodes(node)
    return {module for module in found if module.split(".")[0] == "paredown"} - {name}


def is_folder(module):
    return ROOT.joinpath(*module.split(".")).is_dir()


def members(family):
    """The modules that the family's dict names, or all of them where it has none yet."""
    inside = {module for module in FILES if module.startswith(f"paredown.{family}.")}
    path = PACKAGE / family / "__init__.py"
    text = path.read_text() if path.exists() else ""
    named = {module for module in inside if re.search(rf"{re.escape(module)}[\"':]", text)}
    return named or inside


@pytest.mark.parametrize("module", FILES)
def test_imports_go_one_way(module):
    for imported in imports(FILES[module].read_text(), module):
        assert imported in FILES or is_folder(imported), (
            f"{module} imports {imported}: no such file"
        )
        assert layer(imported) >= layer(module), f"{module} must not import {imported}"


@pytest.mark.parametrize("family", FAMILIES)
def test_members_of_a_family_never_import_each_other(family):
    inside = members(family)
    for module in (name for name in FILES if name.startswith(f"paredown.{family}.")):
        found = imports(FILES[module].read_text(), module) & inside
        assert not found, f"{module} must not import {', '.join(sorted(found))}"


def test_no_module_is_in_a_cycle():
    graph = {name: imports(path.read_text(), name, True) for name, path in FILES.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_the_import_rule_sees_what_it_should():
    source = """
if TYPE_CHECKING:
    from paredown.report import charts
else:
    import paredown.stats
import paredown.data as d, numpy
def f():
    from paredown import files, nothing
    from paredown.graph import mode
class C:
    from paredown.types import Task
"""
    outer = {"paredown.stats", "paredown.data", "paredown.types"}
    inner = {"paredown", "paredown.graph.mode", "paredown.files"}
    assert imports(source, "paredown.x") == outer | inner
    assert imports(source, "paredown.x", True) == outer


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
    match = re.search(r"^#+ The house\n.*?^```\w*\n(.*?)^```", readme(), re.DOTALL | re.MULTILINE)
    assert match, "README.md has no fenced tree under a heading 'The house'"
    shown = {line.split()[0].removeprefix("paredown/") for line in match[1].splitlines() if line}
    shown -= {""}  # the line of paredown/ itself
    gone = {name for name in shown if not (PACKAGE / name).exists() and not (ROOT / name).exists()}
    assert not gone, f"README.md shows what is not there: {sorted(gone)}"
    there = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*")
        if path.is_file() and path.suffix != ".pyc" and path.name != "__init__.py"
    }
    assert there <= shown, f"README.md does not show {sorted(there - shown)}"


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
