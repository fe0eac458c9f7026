"""The command line: one function per verb; each parses, calls and prints."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shlex
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from paredown import check as checks
from paredown import progress, recipe
from paredown.compress import compress, replay, versions
from paredown.details import load_run
from paredown.devices.local import DEVICES
from paredown.explain.run import explain
from paredown.explain.words import shown as shown_explanation
from paredown.graph.capture import capture
from paredown.graph.coupling import analyze
from paredown.graph.model import Model
from paredown.inspect import inspect_model, shown
from paredown.offers import Recipe
from paredown.pack import Contents, contents, pack, unpack
from paredown.plan import plan
from paredown.report import comparison, report
from paredown.runtimes import RUNTIMES, parts
from paredown.terminal import WIDEST
from paredown.types import Goals, Measurement, Run, Target, Task, UserError, human

FAILED, MISSED, DIFFERS, INTERRUPTED = 1, 3, 4, 130

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
Runtime = Annotated[str, typer.Option(help=f"Runtime of the artifact: {', '.join(RUNTIMES)}.")]
Device = Annotated[str, typer.Option(help=f"Where to measure: {', '.join(DEVICES)}.")]
Threads = Annotated[int, typer.Option(help="Threads of the runtime.")]
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


def _console(as_json: bool, quiet: bool = False) -> Console:
    return Console(stderr=as_json, quiet=quiet, soft_wrap=not sys.stdout.isatty())


@contextlib.contextmanager
def _working(as_json: bool, quiet: bool = False) -> Iterator[None]:
    """Show progress; what the user's own code prints stays out of the JSON."""
    aside = contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()
    with aside, progress.shown(_console(as_json, quiet)):
        yield


def _captured(file: Path) -> tuple[Model, Task]:
    module, task = checks.load(file)
    return capture(module, task.example, task.dynamic), task


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1, allow_nan=False))


@app.command()
def check(
    file: File,
    runtime: Runtime = "onnxruntime",
    recipe_file: Annotated[
        Path | None, typer.Option("--recipe", help="Also check that this recipe can run.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Capture, export and dry-run one batch; name every problem at once, change nothing."""
    with _working(as_json):
        found = checks.check_file(file, Target(runtime=runtime), recipe_file)
    if as_json:
        _print_json(dataclasses.asdict(found))
    else:
        console = _console(False)
        for note in found.notes:
            console.print(f"note: {escape(note)}", highlight=False)
        for problem in found.problems:
            console.print(f"[red]problem:[/] {escape(problem)}", highlight=False)
        for fact in found.facts:
            console.print(f"[green]ok[/] {escape(fact)}", highlight=False)
    if found.problems:
        raise typer.Exit(FAILED)


@app.command()
def baseline(
    file: File,
    runtime: Runtime = "onnxruntime",
    device: Device = "local",
    threads: Threads = 1,
    as_json: Json = False,
) -> None:
    """Measure the model as it is: the exported file, in a fresh process."""
    with _working(as_json):
        model, task = _captured(file)
        measurement = checks.baseline(model, task, Target(runtime, device, threads))
    if as_json:
        _print_json(dataclasses.asdict(measurement))
        return
    table = Table(title=f"{file.name} as it is", title_justify="left")
    table.add_column("quantity")
    table.add_column("value", justify="right")
    for row in _measurement_rows(measurement):
        table.add_row(*row)
    _console(False).print(table)


def _measurement_rows(m: Measurement) -> list[tuple[str, str]]:
    score = f"{m.score:.2%}" if m.score_in_points else f"{m.score:.5g}"
    rows = [
        ("size on disk", human("size", m.size_bytes)),
        (f"score on {m.split} ({m.examples})", score),
    ]
    for name, value in (("latency p50", m.latency_ms_p50), ("latency p90", m.latency_ms_p90)):
        if value is not None:
            rows.append((name, human("latency", value)))
    for name in ("throughput", "memory"):
        value = m.quantity(name)
        if value is not None:
            rows.append(("peak memory" if name == "memory" else name, human(name, value)))
    rows.append(("where", ", ".join(f"{k} {v}" for k, v in m.where.items())))
    return rows


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
    with _working(as_json):
        model = _captured(file)[0] if file.suffix == ".py" else _opened(file)
        coupling = analyze(model, attention, group_norm)
    if parameter is not None:
        dims = coupling.explain(parameter)
        if as_json:
            _print_json({"parameter": parameter, "dimensions": dims})
        else:
            print("\n".join(dims))
        return
    found = inspect_model(model, coupling)
    if as_json:
        _print_json(found.to_json())
    else:
        console = Console(width=None if sys.stdout.isatty() else WIDEST)
        for part in shown(found, console.width):
            console.print(part, highlight=False)


def _opened(file: Path) -> Model:
    if file.suffix not in (".pt2", ".safetensors"):
        raise UserError(
            f"{file}: expected a Python file with model() and task(), a .pt2 program or a saved "
            ".safetensors model."
        )
    return capture(file)


@app.command("plan")
def plan_verb(
    file: File,
    max_drop: Drop = None,
    size: Size = None,
    latency: Latency = None,
    memory: Memory = None,
    throughput: Throughput = None,
    energy: Energy = None,
    runtime: Runtime = "onnxruntime",
    device: Device = "local",
    threads: Threads = 1,
    as_json: Json = False,
) -> None:
    """Say which recipes would be tried for these goals, in which order and why."""
    goals = Goals(max_drop, size, latency, memory, throughput, energy)
    target = Target(runtime, device, threads)
    with _working(as_json):
        model, task = _captured(file)
        measurement = checks.baseline(model, task, target)
    recipes = plan(model, task, goals, measurement, target=target)
    if as_json:
        rows = [
            {"title": r.title, "reason": r.reason, "recipe": recipe.to_toml(r.steps)}
            for r in recipes
        ]
        _print_json({"baseline": dataclasses.asdict(measurement), "recipes": rows})
    else:
        _print_plan(recipes)


def _print_plan(recipes: list[Recipe]) -> None:
    console = _console(False)
    for number, item in enumerate(recipes, 1):
        console.print(f"[bold]{number}. {item.title}[/]: {item.reason}", highlight=False)
        for attempt in item.attempts:
            steps = ", ".join(recipe.line(step) for step in attempt.steps)
            console.print(f"   - {attempt.title}: {escape(steps)}", highlight=False)
            console.print(f"     why: {attempt.reason}", highlight=False)
            console.print(f"     expected: {attempt.expected}", highlight=False)


@app.command()
def run(
    file: File,
    max_drop: Drop = None,
    size: Size = None,
    latency: Latency = None,
    memory: Memory = None,
    throughput: Throughput = None,
    energy: Energy = None,
    runtime: Runtime = "onnxruntime",
    device: Device = "local",
    threads: Threads = 1,
    recipe_file: Annotated[
        Path | None, typer.Option("--recipe", help="A recipe of your own, instead of the plan's.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Run folder, by default a new one under runs/ for each other input."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of every random choice.")] = 0,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Compress to the goals, measure the exported file, and write artifact and report.

    The same command goes on where it was interrupted.
    """
    goals = Goals(max_drop, size, latency, memory, throughput, energy)
    steps = recipe.load(recipe_file) if recipe_file else None
    target = Target(runtime, device, threads)
    with _working(as_json, quiet):
        module, task = checks.load(file)
        finished = compress(module, task, goals, target, steps, out, seed, _command())
        report(finished, Path(finished.details["folder"]) / "report.html")
    if as_json:
        print(finished.to_json())
    else:
        _print_run(finished)
    if not finished.met:
        raise typer.Exit(MISSED)


def _command() -> str:
    return shlex.join(["paredown", *sys.argv[1:]])


def _print_run(finished: Run) -> None:
    console = _console(False)
    table = Table(
        title="The exported file beside the original, on the test split", title_justify="left"
    )
    for name in ("", "original", "compressed", "ratio", "goal", "met?"):
        table.add_column(name, justify="left" if not name else "right")
    for row in comparison(finished):
        met = {True: "[green]yes[/]", False: "[red]no[/]", None: ""}[row["met"]]
        table.add_row(row["name"], *row["figures"], row["change"], row["goal"], met)
    console.print(table)
    if finished.comparison is not None:
        console.print(f"Score: {finished.comparison.verdict}", highlight=False)
        console.print(f"Speed: {finished.comparison.speed}", highlight=False)
    colour = "green" if finished.met else "red"
    console.print(f"[bold {colour}]{escape(finished.verdict)}[/]", highlight=False)
    if finished.artifact is not None:
        folder = Path(finished.details["folder"])
        shipped = [str(path) for path in parts(folder / finished.artifact.path)]
        for name, paths in (("Artifact", shipped), ("Report", [str(folder / "report.html")])):
            line = f"{name + ':':9} {escape(' and '.join(paths))}"
            console.print(line, highlight=False, soft_wrap=True)


@app.command("report")
def report_verb(
    folder: Annotated[Path, typer.Argument(help="Run folder.")], as_json: Json = False
) -> None:
    """Write the report page of a run again."""
    path = report(load_run(folder), folder / "report.html")
    if as_json:
        _print_json({"report": str(path)})
    else:
        _console(False).print(f"Report: {escape(str(path))}", highlight=False)


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
    run = load_run(folder)
    with _working(as_json):
        found = explain(folder, checks.load_task(file or _file_of(run, "explain")))
        report(load_run(folder), folder / "report.html")
    if as_json:
        _print_json(found.to_json())
        return
    console = Console(width=None if sys.stdout.isatty() else WIDEST)
    for part in shown_explanation(found, console.width, top, run.baseline.score_in_points):
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
    run = load_run(folder)
    with _working(as_json):
        artifact, digest = replay(folder, *checks.load(file or _file_of(run, "replay")))
    same = digest == artifact.sha256
    if as_json:
        _print_json({"kept": artifact.sha256, "replayed": digest, "same": same})
    else:
        console = _console(False)
        console.print(f"kept      {artifact.sha256}\nreplayed  {digest}", highlight=False)
        console.print("[green]the same file[/]" if same else f"[red]another file[/]: {_why(run)}")
    if not same:
        raise typer.Exit(DIFFERS)


@app.command("pack")
def pack_verb(
    file: Annotated[Path, typer.Argument(help="The artifact of any runtime.")],
    out: Annotated[Path | None, typer.Option(help="The container; default: FILE.pare.")] = None,
    as_json: Json = False,
) -> None:
    """Pack an artifact for delivery: lossless, each tensor by what compression left in it."""
    with _working(as_json):
        path = pack(file, out)
    _print_contents(path, as_json)


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
    if only_list:
        _print_contents(file, as_json)
        return
    with _working(as_json):
        path = unpack(file, out)
    if as_json:
        _print_json({"file": str(path)})
    else:
        _console(False).print(f"Unpacked: {escape(str(path))}", highlight=False, soft_wrap=True)


def _print_contents(path: Path, as_json: bool) -> None:
    found = contents(path)
    if as_json:
        files = [{"name": f.name, "bytes": f.size, "sha256": f.sha256.hex()} for f in found.files]
        parts = [dataclasses.asdict(part) for part in found.parts]
        _print_json({"packed_bytes": found.packed_bytes, "files": files, "parts": parts})
        return
    table = Table(title=f"{escape(str(path))}", title_justify="left")
    for name in ("coding", "elements", "before", "packed", "ratio"):
        table.add_column(name, justify="left" if name in ("coding", "elements") else "right")
    for (coding, element), (before, after) in _summed(found).items():
        ratio = f"{before / max(1, after):.2f}x"
        table.add_row(coding, element, human("size", before), human("size", after), ratio)
    console = _console(False)
    console.print(table)
    names = ", ".join(file.name for file in found.files)
    console.print(
        f"{escape(names)}: {human('size', found.size_bytes)} packed into "
        f"{human('size', found.packed_bytes)}, "
        f"{found.size_bytes / found.packed_bytes:.2f}x smaller",
        highlight=False,
        soft_wrap=True,
    )


def _summed(found: Contents) -> dict[tuple[str, str], tuple[int, int]]:
    """Bytes before and after by coding and element, the largest first."""
    sums: dict[tuple[str, str], tuple[int, int]] = {}
    for part in found.parts:
        key = (part.coding, part.element)
        before, after = sums.get(key, (0, 0))
        sums[key] = (before + part.size_bytes, after + part.packed_bytes)
    return dict(sorted(sums.items(), key=lambda item: -item[1][0]))


def _file_of(run: Run, verb: str) -> Path:
    """The Python file that the run's command named."""
    found = next((word for word in shlex.split(run.command) if word.endswith(".py")), None)
    if found is None:
        raise UserError(f"{verb}: the run was not started from a file; name it with --file.")
    if not Path(found).is_file():
        raise UserError(f"{verb}: {found}: no such file here; name it with --file.")
    return Path(found)


def _why(run: Run) -> str:
    """What differs between the run and this replay."""
    now = versions(run.target["runtime"])
    changed = [f"{n} was {v}, is {now.get(n)}" for n, v in run.versions.items() if now.get(n) != v]
    return "; ".join(changed) or (
        "made with the same versions, so on another kind of processor, or with another number of "
        "threads (OMP_NUM_THREADS), which changes how sums are rounded"
    )
