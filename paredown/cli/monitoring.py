"""The verb for those with a server of their own: monitor."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from paredown.cli.command import MISSED, app
from paredown.core.errors import UserError
from paredown.core.settings import require

if TYPE_CHECKING:
    from paredown.ship.guard.bound import Bound
    from paredown.ship.guard.policy import Policy
    from paredown.ship.guard.webhook import Webhook


@app.command("monitor")
def monitor_verb(
    bound: Annotated[
        float, typer.Option(help="Upper bound of the disagreement rate, as validation measured it.")
    ],
    profile: Annotated[
        Path | None, typer.Option(help="Histograms of inputs and outputs, for drift.")
    ] = None,
    policy: Annotated[
        Path | None, typer.Option(help="Numbers of your own to go by, in TOML.")
    ] = None,
    state: Annotated[
        Path | None, typer.Option(help="File that keeps the state over restarts.")
    ] = None,
    webhook: Annotated[
        str | None, typer.Option(help="URL that each decision is posted to, as JSON.")
    ] = None,
    digest: Annotated[
        str, typer.Option(help="Which candidate this is; one rolled back is not tried again.")
    ] = "candidate",
    replay: Annotated[
        bool, typer.Option("--replay", help="Take the time from each line's time_s.")
    ] = False,
) -> None:
    """Guard a candidate that your own server runs: answers in as lines of JSON, decisions out.

    Exit code 3: it ended rolled back; 130 and 143: SIGINT or SIGTERM ended it.
    """
    from paredown.ship.guard.bound import Bound
    from paredown.ship.guard.policy import Policy
    from paredown.ship.guard.profile import Profile
    from paredown.ship.guard.webhook import Webhook

    require("--bound", bound, 0 < bound < 1, "a share above 0 and below 1, such as 0.02")
    if sys.stdin is None or sys.stdout is None:
        raise UserError("monitor: expected lines of JSON at an open standard input, and an output.")
    kept = None if profile is None else Profile.load(profile)
    rules = Policy() if policy is None else Policy.from_toml(policy)
    hook = None if webhook is None else Webhook(webhook)
    if _guarded(Bound(0.0, bound, kept), rules, digest, state, hook, replay):
        raise typer.Exit(MISSED)


def _guarded(
    bound: Bound,
    policy: Policy,
    digest: str,
    state: Path | None,
    hook: Webhook | None,
    replay: bool,
) -> bool:
    """Until the lines end, or a signal comes; whether it was rolled back."""
    from paredown.ship.guard.monitor import monitor
    from paredown.ship.guard.until import UntilSignal

    lines = UntilSignal(sys.stdin.buffer)
    with lines.listening():
        rolled_back = monitor(
            lines,
            sys.stdout,
            bound,
            policy=policy,
            digest=digest,
            state=state,
            webhook=hook,
            replay=replay,
        )
    if lines.signal:
        _leave(lines.signal, state)
    return rolled_back


def _leave(number: int, state: Path | None) -> NoReturn:
    """End as a signal asks. Everything is told and closed by now; leaving at once spares the words
    that other verbs have for an interruption, as these lines do not come again."""
    kept = "nothing is kept without --state" if state is None else f"the state is kept in {state}"
    print(f"ended by {signal.Signals(number).name}: {kept}.", file=sys.stderr, flush=True)
    os._exit(128 + number)
