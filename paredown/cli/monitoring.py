"""The verb for those with a server of their own: monitor."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from paredown.cli.command import MISSED, app


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

    Exit code 3: it ended rolled back.
    """
    from paredown.ship.guard.bound import Bound
    from paredown.ship.guard.monitor import monitor
    from paredown.ship.guard.policy import Policy
    from paredown.ship.guard.profile import Profile
    from paredown.ship.guard.webhook import Webhook

    kept = None if profile is None else Profile.load(profile)
    rules = Policy() if policy is None else Policy.from_toml(policy)
    hook = None if webhook is None else Webhook(webhook)
    rolled_back = monitor(
        sys.stdin.buffer,
        sys.stdout,
        Bound(0.0, bound, kept),
        policy=rules,
        digest=digest,
        state=state,
        webhook=hook,
        replay=replay,
    )
    if rolled_back:
        raise typer.Exit(MISSED)
