"""Verbs for models in production: serve, rollout."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from paredown.cli.command import NO_SAMPLES, Json, app, brings
from paredown.core.console import output, print_json
from paredown.core.errors import UserError
from paredown.core.results import Run
from paredown.core.settings import require
from paredown.core.source import Samples, found, source_of

if TYPE_CHECKING:
    from http.client import HTTPResponse

ASKED_S = 30.0  # the longest that a server may take to answer

rollout = typer.Typer(no_args_is_help=True, help="Look at a server's rollout, or move it by hand.")
app.add_typer(rollout, name="rollout")

Url = Annotated[str, typer.Argument(help="Of the server: http://127.0.0.1:8080.")]
Reason = Annotated[str, typer.Option(help="Why; it is kept.")]
TokenFile = Annotated[
    Path, typer.Option("--token-file", help="The file with the server's token; RUN/serve/token.")
]


Host = Annotated[str, typer.Option(help="Address to listen at.")]
Port = Annotated[int, typer.Option(help="Port to listen at; 0 takes a free one.")]
MaxBatch = Annotated[int, typer.Option(help="Most examples that are run together.")]
MaxWait = Annotated[
    float, typer.Option(help="How long a request waits for others while a model is free.")
]
Threads = Annotated[int, typer.Option(help="Threads of one inference.")]
Deadline = Annotated[
    float, typer.Option(help="After so long the original answers in the candidate's place.")
]
PolicyFile = Annotated[Path | None, typer.Option(help="Numbers of the rollout, as TOML.")]
TaskFile = Annotated[
    Path | None,
    typer.Option("--file", help="File of the task, in the run's place; it scores late labels too."),
]
EvenSo = Annotated[bool, typer.Option("--even-so", help="Serve a run whose goals were missed.")]
EndToEnd = Annotated[
    bool,
    typer.Option("--end-to-end", help="Run the task's preprocess and postprocess in the server."),
]
OwnToken = Annotated[Path | None, typer.Option(help="A token of your own; by default one is made.")]
State = Annotated[Path | None, typer.Option(help="Folder of the state; RUN/serve.")]


@app.command("serve")
@brings
def serve_verb(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    host: Host = "127.0.0.1",
    port: Port = 8080,
    max_batch: MaxBatch = 32,
    max_wait_ms: MaxWait = 0.0,
    threads: Threads = 1,
    deadline_ms: Deadline = 1000.0,
    policy: PolicyFile = None,
    file: TaskFile = None,
    samples: Samples = NO_SAMPLES,
    even_so: EvenSo = False,
    end_to_end: EndToEnd = False,
    token_file: OwnToken = None,
    state: State = None,
) -> None:
    """Serve original and artifact behind one endpoint; the artifact takes over as it proves itself.

    Open Inference Protocol v2 over HTTP, a live page at /, metrics at /metrics.
    """
    from paredown.ship.guard.policy import Policy
    from paredown.ship.serve.extra import check_extra

    check_extra()
    from paredown.ship.serve.running import Serving, serve

    named = file is not None or samples != Samples()
    own = source_of(Run.load(run), "serve", file, samples) if named else None
    source, lacking = (own, "") if own else found(run, "serve")
    asked = Serving(
        run=run,
        host=host,
        port=port,
        max_batch=max_batch,
        max_wait_ms=max_wait_ms,
        threads=threads,
        deadline_ms=deadline_ms,
        policy=Policy.from_toml(policy) if policy else Policy(),
        source=source,
        lacking=lacking,
        scoring=own,
        even_so=even_so,
        end_to_end=end_to_end,
        token_file=token_file,
        state=state,
    )
    serve(asked, _say)


def _say(text: str) -> None:
    print(text, flush=True)


@rollout.command()
def status(url: Url, as_json: Json = False) -> None:
    """Say where the rollout stands, and what is missing to go on."""
    found = _asked(url)
    if as_json:
        print_json(found)
        return
    console = output(False)
    weight = f"{found['weight'] / 100:g} % of the requests"
    console.print(f"{escape(found['model'])}: {found['stage']}, {weight}", highlight=False)
    if found.get("events"):
        said = f"Last move: {found['events'][-1]['reason']}"
        console.print(escape(said), highlight=False)
    if found["stage"] == "rolled back":
        console.print("This artifact is not tried again; a new one starts anew.", highlight=False)
    _say_journal(found)
    if found.get("alone"):
        console.print(f"The original serves alone: {escape(found['alone'])}", highlight=False)
    for guard in found.get("guards", []):
        said = f"{guard['name']}: {guard['state']}: {guard['says']}"
        console.print(escape(said), highlight=False)


@rollout.command()
def promote(url: Url, reason: Reason, token_file: TokenFile) -> None:
    """Send all requests to the candidate now."""
    _move(url, "promote", reason, token_file)


@rollout.command()
def pause(url: Url, reason: Reason, token_file: TokenFile) -> None:
    """Keep the weight where it is."""
    _move(url, "pause", reason, token_file)


@rollout.command()
def resume(url: Url, reason: Reason, token_file: TokenFile) -> None:
    """Go on after a pause."""
    _move(url, "resume", reason, token_file)


@rollout.command()
def abort(url: Url, reason: Reason, token_file: TokenFile) -> None:
    """Send all requests to the original, at once and for good."""
    _move(url, "abort", reason, token_file)


def _move(url: str, action: str, reason: str, token_file: Path) -> None:
    from paredown.ship.serve.token import read

    found = _asked(url, action, {"reason": reason}, read(token_file))
    output(False).print(f"{found['stage']}, {found['weight'] / 100:g} % of the requests")
    _say_journal(found)


def _say_journal(found: dict[str, Any]) -> None:
    """What keeps the server from writing its state: a move may then not outlive it."""
    if found.get("journal"):
        said = f"Not on the disk yet: the state cannot be written: {found['journal']}"
        output(False).print(escape(said), highlight=False)


def _asked(
    url: str, action: str = "", said: dict[str, str] | None = None, token: str = ""
) -> dict[str, Any]:
    """The server's answer.

    Raises:
        UserError: the address is none, or the server refuses, or cannot be reached.
    """
    from paredown.ship.guard.webhook import is_address

    full = url if "://" in url else f"http://{url}"
    require("url", url, is_address(full), "a server's address, such as http://127.0.0.1:8080")
    address = f"{full.rstrip('/')}/v2/rollout" + (f"/{action}" if action else "")
    body = None if said is None else json.dumps(said).encode()
    request = urllib.request.Request(address, data=body)
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        response: HTTPResponse
        with urllib.request.urlopen(request, timeout=ASKED_S) as response:
            found: dict[str, Any] = json.load(response)
        if not isinstance(found, dict) or "stage" not in found:
            raise ValueError("it tells no stage")
        return found
    except urllib.error.HTTPError as error:
        raise UserError(f"{address}: {_refusal(error)}") from error
    except (OSError, ValueError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise UserError(f"{address}: no answer of a paredown server: {reason}.") from error


def _refusal(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.load(error)["error"])
    except (ValueError, KeyError, TypeError):
        return f"answered with status {error.code}."
