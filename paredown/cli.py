"""The command line: one function per verb; each parses, calls and prints."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from paredown.core import threads
from paredown.core.console import output, print_json, wide, working
from paredown.core.errors import UserError
from paredown.core.goals import Goals
from paredown.core.results import Run
from paredown.core.task import Target, Task
from paredown.targets.options import DEFAULT, Runtime, measures

if TYPE_CHECKING:
    from paredown.graph.model import Model

# What a verb needs is imported within it: `paredown --help` waits for no PyTorch.
FAILED, MISSED, DIFFERS, UNPROVEN, INTERRUPTED = 1, 3, 4, 5, 130

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Pare a trained model down to a budget, and prove it.

A model comes in a Python file that defines [bold]model()[/] (an nn.Module) and [bold]task()[/]
(a paredown.Task: example inputs, splits, score, loss); a run is kept in a folder.
Start with [bold]check[/], then [bold]run[/].

Exit codes: 0 done and every goal met; 1 a problem, told in plain words; 2 wrong usage;
3 finished, but a goal was missed (the best file is kept); 4 a replay that gave another file;
5 with [bold]--proof[/], every goal met as measured, and not proven by the data;
130 interrupted (start the same command again to go on).
""",
)

File = Annotated[Path, typer.Argument(help="Python file with model() and task().")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, for machines.")]
Drop = Annotated[str | None, typer.Option(help='Allowed drop of the score: "1%", "0.01".')]
Size = Annotated[str | None, typer.Option(help='File size: "500KB", "0.3x" of the original.')]
Latency = Annotated[str | None, typer.Option(help='Median latency: "2ms", "0.7x".')]
Memory = Annotated[str | None, typer.Option(help='Peak memory: "64MiB", "0.5x".')]
Throughput = Annotated[str | None, typer.Option(help='At least: "500/s", "2x".')]
Energy = Annotated[str | None, typer.Option(help='Energy per inference: "5mJ", "0.5x".')]
RecipeFile = Annotated[
    Path | None, typer.Option("--recipe", help="A recipe of your own, instead of the plan's.")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print the result only.")]


def _say_version(asked: bool) -> None:
    if asked:
        print(f"paredown {metadata.version('paredown')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_say_version, is_eager=True, help="Say the version."),
    ] = False,
) -> None:
    """Options of the command itself."""


def main() -> None:
    """Run the command line; a user's mistake ends in a sentence, never in a traceback."""
    threads.sleep_at_barriers()
    try:
        app()
    except UserError as error:
        _fail(str(error), FAILED)
    except SystemExit as end:  # typer's own answer to Ctrl-C is this code, without a word
        if end.code != INTERRUPTED:
            raise
        _fail(
            "interrupted. What was finished is kept; the same command goes on from there.",
            INTERRUPTED,
        )
    except MemoryError:
        _fail("out of memory. Use a smaller batch_size in task(), or a machine with more.", FAILED)
    except OSError as error:
        _fail(f"{error.filename or 'the system'}: {error.strerror or error}.", FAILED)


def _fail(text: str, code: int) -> NoReturn:
    Console(stderr=True, soft_wrap=True).print(f"[red]error:[/] {escape(text)}", highlight=False)
    sys.exit(code)


def _captured(file: Path) -> tuple[Model, Task]:
    from paredown.graph.capture import capture
    from paredown.graph.doors import python_file

    module, task = python_file.load(file)
    return capture(module, task.example, task.dynamic), task


@app.command()
def check(
    file: File,
    size: Size = None,
    memory: Memory = None,
    energy: Energy = None,
    runtime: Runtime = "onnxruntime",
    recipe_file: Annotated[
        Path | None, typer.Option("--recipe", help="Also check that this recipe can run.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Capture, export and dry-run one batch; name every problem at once, change nothing.

    Of goals it says which nothing can meet here.
    """
    from paredown.run import preflight, words

    goals = Goals(size=size, memory=memory, energy=energy)
    with working(as_json):
        found = preflight.check_file(file, Target(runtime=runtime), recipe_file, goals)
    if as_json:
        print_json(dataclasses.asdict(found))
    else:
        words.print_found(found.problems, found.notes, found.facts)
    if found.problems:
        raise typer.Exit(FAILED)


@app.command()
@measures
def baseline(
    file: File,
    target: Target = DEFAULT,
    as_json: Json = False,
) -> None:
    """Measure the model as it is: the exported file, in a process of its own."""
    from paredown.run import preflight, words

    with working(as_json):
        model, task = _captured(file)
        measurement, _ = preflight.baseline(model, task, target)
    if as_json:
        print_json(dataclasses.asdict(measurement))
    else:
        words.print_measurement(file.name, measurement)


@app.command("inspect")
def inspect_verb(
    file: Annotated[
        Path, typer.Argument(help="Python file, exported .pt2 or saved .safetensors model.")
    ],
    attention: Annotated[
        str, typer.Option(help='Units in attention: "heads", or "head_dim", those of every head.')
    ] = "heads",
    group_norm: Annotated[
        str, typer.Option(help='Units of a group norm: "groups", or "within", channels of each.')
    ] = "groups",
    parameter: Annotated[
        str | None, typer.Option(help="Say of this parameter alone which groups cut it.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what structured pruning can cut, what goes with it, and what stays whole; run no data."""
    from paredown.explain.inspect import inspect_model, shown
    from paredown.graph.coupling.coupling import analyze

    with working(as_json):
        model = _captured(file)[0] if file.suffix == ".py" else _opened(file)
        coupling = analyze(model, attention, group_norm)
    if parameter is not None:
        dims = coupling.explain(parameter)
        if as_json:
            print_json({"parameter": parameter, "dimensions": dims})
        else:
            print("\n".join(dims))
        return
    found = inspect_model(model, coupling)
    if as_json:
        print_json(found.to_json())
    else:
        console = wide()
        for part in shown(found, console.width):
            console.print(part, highlight=False)


def _opened(file: Path) -> Model:
    from paredown.graph.capture import capture
    from paredown.graph.doors.other_files import told

    if file.suffix not in (".pt2", ".safetensors"):
        raise UserError(told(file))
    return capture(file)


@app.command("plan")
@measures
def plan_verb(
    file: File,
    max_drop: Drop = None,
    size: Size = None,
    latency: Latency = None,
    memory: Memory = None,
    throughput: Throughput = None,
    energy: Energy = None,
    target: Target = DEFAULT,
    recipe_file: RecipeFile = None,
    as_json: Json = False,
) -> None:
    """Say which recipes would be tried for these goals, in which order and why."""
    from paredown.run import preflight
    from paredown.run.reach import steering
    from paredown.search.plan import as_asked, plan
    from paredown.search.words import plan_rows, print_plan
    from paredown.steps import recipe

    goals = Goals(max_drop, size, latency, memory, throughput, energy)
    steps = recipe.load(recipe_file) if recipe_file else None
    with working(as_json):
        model, task = _captured(file)
        asked = steps or []
        lacking = recipe.problems(asked, task, target) or recipe.unfit(asked, model, task)
        if lacking:
            raise UserError("\n".join(lacking))
        measurement, beyond = preflight.baseline(model, task, target, goals, asked)
    given = [as_asked(steps)] if steps else None
    goals, told = steering(goals, beyond), list(beyond.values())
    proposals = given or plan(model, task, goals, measurement, target=target)
    if as_json:
        print_json(plan_rows(proposals, measurement, told))
    else:
        print_plan(proposals, told)


@app.command()
@measures
def run(
    file: File,
    max_drop: Drop = None,
    size: Size = None,
    latency: Latency = None,
    memory: Memory = None,
    throughput: Throughput = None,
    energy: Energy = None,
    target: Target = DEFAULT,
    recipe_file: RecipeFile = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Run folder, by default a new one under runs/ for each other input."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of every random choice.")] = 0,
    proof: Annotated[
        bool, typer.Option("--proof", help="Count a goal as missed that the data cannot prove.")
    ] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Compress to the goals, measure the exported file, and write artifact and report.

    The same command goes on where it was interrupted.
    """
    from paredown.graph.doors import python_file
    from paredown.run.compress import compress
    from paredown.run.words import print_run
    from paredown.steps import recipe

    goals = Goals(max_drop, size, latency, memory, throughput, energy, proof)
    steps = recipe.load(recipe_file) if recipe_file else None
    with working(as_json, quiet):
        module, task = python_file.load(file)
        command = shlex.join(["paredown", *sys.argv[1:]])
        finished = compress(module, task, goals, target, steps, out, seed, command)
    if as_json:
        print(finished.to_json())
    else:
        print_run(finished)
    if not finished.met:
        raise typer.Exit(UNPROVEN if finished.outcome == "not proven" else MISSED)


@app.command("report")
def report_verb(
    folder: Annotated[Path, typer.Argument(help="Run folder.")], as_json: Json = False
) -> None:
    """Write the report page of a run again."""
    from paredown.report.page import report

    path = report(Run.load(folder), folder / "report.html")
    if as_json:
        print_json({"report": str(path)})
    else:
        output(False).print(f"Report: {escape(str(path))}", highlight=False)


@app.command("explain")
def explain_verb(
    folder: Annotated[Path, typer.Argument(help="Run folder.")],
    file: Annotated[
        Path | None, typer.Option(help="The Python file, where it is not where the run found it.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Layers shown of each table.")] = 10,
    as_json: Json = False,
) -> None:
    """Say where the score went: the noise of each layer, what restoring it wins, and the causes.

    The report is written again with the explanation.
    """
    from paredown.explain.words import shown
    from paredown.graph.doors import python_file
    from paredown.report.page import report
    from paredown.run.explain import explain
    from paredown.run.words import file_of

    run = Run.load(folder)
    with working(as_json):
        found = explain(folder, python_file.load_task(file or file_of(run, "explain")))
        report(Run.load(folder), folder / "report.html")
    if as_json:
        print_json(found.to_json())
        return
    console = wide()
    for part in shown(found, console.width, top, run.baseline.score_in_points):
        console.print(part, highlight=False)


@app.command("replay")
def replay_verb(
    folder: Annotated[Path, typer.Argument(help="Run folder.")],
    file: Annotated[
        Path | None, typer.Option(help="The Python file, where it is not where the run found it.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a run's artifact again from its recipe, and compare the two files' SHA-256."""
    from paredown.graph.doors import python_file
    from paredown.run.replay import replay
    from paredown.run.words import file_of, print_replay

    run = Run.load(folder)
    with working(as_json):
        artifact, digest = replay(folder, *python_file.load(file or file_of(run, "replay")))
    same = digest == artifact.sha256
    if as_json:
        print_json({"kept": artifact.sha256, "replayed": digest, "same": same})
    else:
        print_replay(run, artifact.sha256, digest)
    if not same:
        raise typer.Exit(DIFFERS)


@app.command("pack")
def pack_verb(
    file: Annotated[Path, typer.Argument(help="The artifact of any runtime.")],
    out: Annotated[Path | None, typer.Option(help="The container; default: FILE.pare.")] = None,
    as_json: Json = False,
) -> None:
    """Pack an artifact for delivery: lossless, each tensor by what compression left in it."""
    from paredown.ship.pack.container import pack
    from paredown.ship.pack.words import print_contents

    with working(as_json):
        path = pack(file, out)
    print_contents(path, as_json)


@app.command("unpack")
def unpack_verb(
    file: Annotated[Path, typer.Argument(help="A .pare container.")],
    out: Annotated[Path | None, typer.Option(help="Folder; default: the container's.")] = None,
    only_list: Annotated[
        bool, typer.Option("--list", help="Say what it holds; unpack nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Unpack a container, bit for bit, checked by SHA-256."""
    from paredown.ship.pack.container import unpack
    from paredown.ship.pack.words import print_contents

    if only_list:
        print_contents(file, as_json)
        return
    with working(as_json):
        path = unpack(file, out)
    if as_json:
        print_json({"file": str(path)})
    else:
        output(False).print(f"Unpacked: {escape(str(path))}", highlight=False, soft_wrap=True)
