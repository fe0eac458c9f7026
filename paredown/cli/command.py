"""The command itself: its exit codes, and the options that verbs share."""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

from paredown.core.goals import Goals
from paredown.core.source import Samples
from paredown.core.task import KINDS
from paredown.targets.options import gathered

FAILED, MISSED, DIFFERS, UNPROVEN, INTERRUPTED = 1, 3, 4, 5, 130

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Pare a trained model down to a budget, and prove it.

A model comes in a Python file that defines [bold]model()[/] (an nn.Module) and [bold]task()[/]
(a paredown.Task: example inputs, splits, score, loss), or without its source (.onnx, a Hugging Face
folder, Keras, .pt2, .safetensors) and with samples, [bold]--data[/]; a run is kept in a folder.
Start with [bold]check[/], then [bold]run[/].

Exit codes: 0 done and every goal met; 1 a problem, told in plain words; 2 wrong usage;
3 finished, but a goal was missed (the best file is kept); 4 a replay that gave another file;
5 with [bold]--proof[/], every goal met as measured, and not proven by the data;
130 interrupted (start the same command again to go on).
""",
)

File = Annotated[
    Path, typer.Argument(help="Python file with model() and task(), or a model without source.")
]
BESIDE = {  # the fields of Samples, as every verb that takes a model has them
    "data": Annotated[
        Path | None,
        typer.Option(
            help="Samples of a model without source: .npz, .npy, .jsonl, a folder of arrays or "
            "pictures, a saved Hugging Face dataset."
        ),
    ],
    "task": Annotated[
        str | None,
        typer.Option(help=f"Kind of task: {', '.join(KINDS)}; by default it is found out."),
    ],
}
OtherFile = Annotated[
    Path | None, typer.Option("--file", help="The file, where it is not where the run found it.")
]
NO_SAMPLES = Samples()
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, for machines.")]
ASKING = {  # the fields of Goals, as every verb that asks for some has them
    "max_drop": Annotated[
        str | None, typer.Option(help='Allowed drop of the score: "1%", "0.01".')
    ],
    "size": Annotated[str | None, typer.Option(help='File size: "500KB", "0.3x" of the original.')],
    "latency": Annotated[str | None, typer.Option(help='Median latency: "2ms", "0.7x".')],
    "memory": Annotated[str | None, typer.Option(help='Peak memory: "64MiB", "0.5x".')],
    "throughput": Annotated[str | None, typer.Option(help='At least: "500/s", "2x".')],
    "energy": Annotated[str | None, typer.Option(help='Energy per inference: "5mJ", "0.5x".')],
}
NO_GOALS = Goals()
RecipeFile = Annotated[
    Path | None, typer.Option("--recipe", help="A recipe of your own, instead of the plan's.")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print the result only.")]


def asks(verb: Callable[..., None]) -> Callable[..., None]:
    """A verb with the options of Goals in place of its ``goals``."""
    return gathered("goals", Goals, ASKING)(verb)


def brings(verb: Callable[..., None]) -> Callable[..., None]:
    """A verb with the options of Samples in place of its ``samples``."""
    return gathered("samples", Samples, BESIDE)(verb)


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
