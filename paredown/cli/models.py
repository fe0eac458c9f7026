"""Verbs that look at a model: check, baseline, inspect, plan."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from paredown.cli.command import (
    FAILED,
    NO_GOALS,
    NO_SAMPLES,
    File,
    Json,
    RecipeFile,
    app,
    asks,
    brings,
)
from paredown.core.console import print_json, wide, working
from paredown.core.errors import UserError
from paredown.core.goals import Goals
from paredown.core.source import Samples, Source
from paredown.core.task import Target, Task
from paredown.targets.options import DEFAULT, Runtime, measures

if TYPE_CHECKING:
    from paredown.graph.model import Model


def _captured(file: Path, samples: Samples) -> tuple[Model, Task]:
    from paredown.data.load import load_told
    from paredown.graph.capture import capture

    module, task = load_told(Source.named(file, samples))
    return capture(module, task.example, task.dynamic), task


@app.command()
@asks
@brings
def check(
    file: File,
    samples: Samples = NO_SAMPLES,
    goals: Goals = NO_GOALS,
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

    with working(as_json):
        found = preflight.check_file(file, Target(runtime=runtime), recipe_file, goals, samples)
    if as_json:
        print_json(dataclasses.asdict(found))
    else:
        words.print_found(found.problems, found.notes, found.facts)
    if found.problems:
        raise typer.Exit(FAILED)


@app.command()
@measures
@brings
def baseline(
    file: File,
    samples: Samples = NO_SAMPLES,
    target: Target = DEFAULT,
    as_json: Json = False,
) -> None:
    """Measure the model as it is: the exported file, in a process of its own."""
    from paredown.run import preflight, words

    with working(as_json):
        model, task = _captured(file, samples)
        measurement, _ = preflight.baseline(model, task, target)
    if as_json:
        print_json(dataclasses.asdict(measurement))
    else:
        words.print_measurement(file.name, measurement)


@app.command("inspect")
@brings
def inspect_verb(
    file: File,
    samples: Samples = NO_SAMPLES,
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
        model = _opened(file, samples)
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


def _opened(file: Path, samples: Samples) -> Model:
    from paredown.data.brought import model_of

    if file.suffix == ".py" or samples.data is not None:
        return _captured(file, samples)[0]
    return model_of(file)


@app.command("plan")
@asks
@measures
@brings
def plan_verb(
    file: File,
    samples: Samples = NO_SAMPLES,
    goals: Goals = NO_GOALS,
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

    steps = recipe.load(recipe_file) if recipe_file else None
    with working(as_json):
        model, task = _captured(file, samples)
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
