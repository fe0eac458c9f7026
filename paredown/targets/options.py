"""The options of the command line that say where and how to measure, for every verb that does."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

import typer

from paredown.core.task import Target
from paredown.targets.devices.device import DEVICES
from paredown.targets.runtimes import RUNTIMES

Runtime = Annotated[str, typer.Option(help=f"Runtime of the artifact: {', '.join(RUNTIMES)}.")]
DEFAULT = Target()
DEVICE_HELP = f"Where to measure: {', '.join(DEVICES)}; as in ssh://user@host."
MEASURING = {  # the fields of a Target, as every verb that measures has them
    "runtime": Runtime,
    "device": Annotated[str, typer.Option(help=DEVICE_HELP)],
    "threads": Annotated[int, typer.Option(help="Threads of the runtime.")],
    "rounds": Annotated[
        int,
        typer.Option(
            help="Times that each file is opened and timed, at most; fewer are quicker. From 10 on "
            "there are up to twice as many where the machine is disturbed."
        ),
    ],
}


def measures(verb: Callable[..., None]) -> Callable[..., None]:
    """A verb of the command line, with the options of a Target in place of its ``target``."""

    @functools.wraps(verb)
    def made(**given: Any) -> None:
        verb(target=Target(**{name: given.pop(name) for name in MEASURING}), **given)

    hints, kept = get_type_hints(verb, include_extras=True), inspect.signature(verb).parameters
    listed = []
    for name, option in kept.items():
        if name != "target":
            listed.append(option.replace(annotation=hints[name]))
            continue
        for each, kind in MEASURING.items():
            default = getattr(Target, each)
            listed.append(inspect.Parameter(each, option.kind, default=default, annotation=kind))
    made.__annotations__ = {each.name: each.annotation for each in listed}
    made.__dict__["__signature__"] = inspect.Signature(listed)
    return made
