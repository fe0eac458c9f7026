"""The options of the command line that say where and how to measure, for every verb that does."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
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
            help="Times that each file is opened and timed, at most, from 2 up; fewer are quicker. "
            "From 10 on there are up to twice as many where the machine is disturbed."
        ),
    ],
}


def measures(verb: Callable[..., None]) -> Callable[..., None]:
    """A verb of the command line, with the options of a Target in place of its ``target``."""
    return gathered("target", Target, MEASURING)(verb)


def gathered(
    argument: str, kind: type, options: Mapping[str, Any]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a verb of the command line options in place of an argument, which is made of them.

    Args:
        kind: of the argument, a dataclass.
        options: the fields of it that are asked for, each with its kind of option; their defaults
            are the fields' own.
    """

    def decorated(verb: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(verb)
        def made(**given: Any) -> None:
            verb(**{argument: kind(**{name: given.pop(name) for name in options})}, **given)

        hints = get_type_hints(verb, include_extras=True)
        listed = []
        for name, option in inspect.signature(verb).parameters.items():
            if name != argument:
                listed.append(option.replace(annotation=hints[name]))
                continue
            for each, told in options.items():
                default = getattr(kind, each)
                listed.append(
                    inspect.Parameter(each, option.kind, default=default, annotation=told)
                )
        made.__annotations__ = {each.name: each.annotation for each in listed}
        made.__dict__["__signature__"] = inspect.Signature(listed)
        return made

    return decorated
