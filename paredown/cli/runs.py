"""Verbs that make a run, and look at one: run, report, explain, replay, validate."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from paredown.cli.command import (
    DIFFERS,
    FAILED,
    MISSED,
    NO_GOALS,
    NO_SAMPLES,
    UNPROVEN,
    File,
    Json,
    OtherFile,
    Quiet,
    RecipeFile,
    app,
    asks,
    brings,
)
from paredown.core.console import output, print_json, wide, working
from paredown.core.goals import Goals
from paredown.core.results import Run
from paredown.core.source import Samples, Source, source_of
from paredown.core.task import Target
from paredown.targets.options import DEFAULT, DEVICE_HELP, measures


@app.command()
@asks
@measures
@brings
def run(
    file: File,
    samples: Samples = NO_SAMPLES,
    goals: Goals = NO_GOALS,
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
    from paredown.data.load import load_told
    from paredown.run import arrival
    from paredown.run.compress import compress
    from paredown.run.departure import as_folder
    from paredown.run.words import print_run
    from paredown.steps import recipe

    goals = dataclasses.replace(goals, proof=proof)
    steps = recipe.load(recipe_file) if recipe_file else None
    with working(as_json, quiet):
        source = Source.of(file, samples, seed)
        module, task = load_told(source)
        arrival.told(file, module, task)
        command = shlex.join(["paredown", *sys.argv[1:]])
        finished = compress(module, task, goals, target, steps, out, seed, command, source)
        as_folder(finished, source)
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
@brings
def explain_verb(
    folder: Annotated[Path, typer.Argument(help="Run folder.")],
    file: OtherFile = None,
    samples: Samples = NO_SAMPLES,
    top: Annotated[int, typer.Option(min=1, help="Layers shown of each table.")] = 10,
    as_json: Json = False,
) -> None:
    """Say where the score went: the noise of each layer, what restoring it wins, and the causes.

    The report is written again with the explanation.
    """
    from paredown.data.load import task_of
    from paredown.explain.words import shown
    from paredown.report.page import report
    from paredown.run.explain import explain

    run = Run.load(folder)
    with working(as_json):
        found = explain(folder, task_of(source_of(run, "explain", file, samples)))
        report(Run.load(folder), folder / "report.html")
    if as_json:
        print_json(found.to_json())
        return
    console = wide()
    for part in shown(found, console.width, top, run.baseline.score_in_points):
        console.print(part, highlight=False)


@app.command("replay")
@brings
def replay_verb(
    folder: Annotated[Path, typer.Argument(help="Run folder.")],
    file: OtherFile = None,
    samples: Samples = NO_SAMPLES,
    as_json: Json = False,
) -> None:
    """Make a run's artifact again from its recipe, and compare the two files' SHA-256."""
    from paredown.data.load import load_source
    from paredown.graph import machine
    from paredown.run.replay import replay
    from paredown.run.words import print_replay

    run = Run.load(folder)
    with working(as_json):
        with machine.threads(run.details.get("threads")):  # as many add sums in the same order
            made = load_source(source_of(run, "replay", file, samples))
        artifact, digest = replay(folder, *made)
    same = digest == artifact.sha256
    if as_json:
        print_json({"kept": artifact.sha256, "replayed": digest, "same": same})
    else:
        print_replay(run, artifact.sha256, digest)
    if not same:
        raise typer.Exit(DIFFERS)


@app.command("validate")
@brings
def validate_verb(
    what: Annotated[Path, typer.Argument(help="Run folder, or a single artifact.")],
    file: Annotated[
        Path | None,
        typer.Option("--file", help="The file of the original, where the run names none."),
    ] = None,
    samples: Samples = NO_SAMPLES,
    devices: Annotated[
        list[str] | None, typer.Option("--device", help=f"{DEVICE_HELP} May be repeated.")
    ] = None,
    runtimes: Annotated[
        list[str] | None,
        typer.Option("--runtime", help="Runtime, by default the run's. May be repeated."),
    ] = None,
    isa: Annotated[
        list[str] | None,
        typer.Option(help="Instruction set to force here, by default all that can be; or none."),
    ] = None,
    power_csv: Annotated[
        Path | None, typer.Option(help="A power meter's CSV file with columns time and watts.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of the runtime.")] = None,
    rounds: Annotated[int, typer.Option(help="Times that each file is timed, at least 2.")] = 10,
    out: Annotated[Path | None, typer.Option(help="Folder of the pages, or its own.")] = None,
    as_json: Json = False,
) -> None:
    """Validate an artifact where it is to run: outputs, score, speed, memory, against its goals.

    Ends with 3 where a goal is missed or outputs are others, and with 1 where a device failed.
    """
    from paredown.data.load import task_of
    from paredown.run import validate_words as words
    from paredown.run.validate import FAILED as NOT_DONE
    from paredown.run.validate import PASSED, validate

    with working(as_json):
        words.check_out(out)
        targets = words.targets_of(what, devices, runtimes, threads, rounds)
        source = words.source_for(what, file, samples)
        loaded = task_of(source) if source and what.is_dir() else None
        subject, found = validate(what, loaded, targets, isa, power_csv, source)
        pages = words.write(subject, found, out or subject.folder)
    if as_json:
        print_json({"validations": [each.to_json() for each in found]})
    else:
        words.print_validations(found, pages)
    outcomes = {each.outcome for each in found}
    if outcomes != {PASSED}:
        raise typer.Exit(FAILED if NOT_DONE in outcomes else MISSED)
