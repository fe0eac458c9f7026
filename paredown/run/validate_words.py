"""What a validation leaves in a folder, and says in a terminal."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from paredown.core import progress, source
from paredown.core.console import output
from paredown.core.errors import UserError
from paredown.core.files import write_atomically
from paredown.core.results import Run
from paredown.core.source import Samples, Source
from paredown.core.task import Target
from paredown.core.units import human
from paredown.report import validation
from paredown.run.golden import Agreement
from paredown.run.validate import FAILED, MISSED, PASSED, Validation
from paredown.run.validate_subject import COMPRESSED, Subject, as_run, runtime_of
from paredown.targets.devices.address import parsed
from paredown.targets.devices.device import device

COLOURS = {PASSED: "green", MISSED: "red", FAILED: "red"}


def targets_of(
    what: Path,
    devices: Sequence[str] | None,
    runtimes: Sequence[str] | None,
    threads: int | None,
    rounds: int,
) -> list[Target]:
    """Every device with every runtime; by default those of the run, or of this machine.

    Raises:
        UserError: no such device.
    """
    for address in devices or ():
        device(address)
    given = Target(**Run.load(what).target) if what.is_dir() else Target(runtime_of(what))
    return [
        Target(name, address, given.threads if threads is None else threads, rounds)
        for address in dict.fromkeys(devices or [given.device])
        for name in dict.fromkeys(runtimes or [given.runtime])
    ]


def source_for(what: Path, file: Path | None, samples: Samples) -> Source | None:
    """What a run was started from, where it is the same still, or what is named in its place; of a
    single file what is named, the file being its own original where samples alone are.

    What is lacking is told.
    """
    named = file is not None or samples != Samples()
    if not what.is_dir():
        return Source.named(file or what, samples) if named else None
    if named:
        return source.source_of(Run.load(what), "validate", file, samples)
    found, lacking = source.found(what, "validate")
    if lacking:
        progress.say(f"  note: {lacking}")
    return found


def check_out(out: Path | None) -> None:
    """Refuse what is no folder before anything is measured.

    Raises:
        UserError: it is a file.
    """
    if out is not None and out.exists() and not out.is_dir():
        raise UserError(f"out: {out}: is a file; expected a folder.")


def write(subject: Subject, found: Sequence[Validation], folder: Path) -> list[Path]:
    """Write ``validation-DEVICE.json`` and its page for each device; the pages.

    Raises:
        UserError: a file cannot be written.
    """
    pages = []
    for each in found:
        stem = f"validation-{slug(each.device)}"
        if each.runtime != subject.runtime:
            stem = f"{stem}-{each.runtime}"
        told = {"name": subject.name, "created": _now(), **each.to_json()}
        text = json.dumps(told, indent=1, sort_keys=True, allow_nan=False)
        write_atomically(folder / f"{stem}.json", text.encode())
        if not each.problem:
            page = folder / f"{stem}.html"
            write_atomically(page, validation.render(_shown(subject, each), facts(each)).encode())
            pages.append(page)
    return pages


def slug(address: str) -> str:
    """The name of a device's files.

    Example:
        >>> slug("local"), slug("ssh://pi@berry.lan:2222/?python=/opt/venv/bin/python")
        ('local', 'ssh-pi-berry.lan-2222')
    """
    if not address.startswith("ssh:"):
        return re.sub(r"[^\w.-]+", "-", address)
    at = parsed(address)
    parts = "ssh", at.user, at.host, str(at.port or "")
    return re.sub(r"[^\w.-]+", "-", "-".join(part for part in parts if part))


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _shown(subject: Subject, each: Validation) -> Run:
    """The run as it is on the device, for the sections of its page."""
    measured = each.measured[COMPRESSED]
    target = {
        "runtime": each.runtime,
        "device": each.device,
        "threads": int(measured.where.get("threads", "1")),
    }
    run = as_run(subject, each.runtime, target, measured)
    return replace(
        run,
        name=f"{subject.name} on {slug(each.device)}",
        created=_now(),
        target=target,
        on_device=each.measured,
        comparison=each.comparison,
        checks=each.checks,
        met=each.outcome == PASSED,
        verdict=verdict(each),
        details={
            "latency_samples_ms": each.latency_samples_ms,
            "score": run.details.get("score"),
        },
    )


def verdict(each: Validation) -> str:
    """What came of it in a few sentences.

    Example:
        >>> verdict(Validation("local", "onnxruntime"))
        'No goal was set.'
    """
    if each.problem:
        return each.problem
    told = [check.sentence for check in each.checks if not check.met]
    if not told:
        told.append("Every goal is met" if each.checks else "No goal was set")
        open_yet = [check.title for check in each.checks if check.unproven]
        told[0] += f" as measured, not proven for {' and '.join(open_yet)}." if open_yet else "."
    if each.golden is not None:
        told.append(f"Golden outputs: {agreement(each.golden)}.")
    others = [way for way in each.instruction_sets if way.agreement and not way.agreement.agrees]
    if others:
        names = ", ".join(way.name for way in others)
        told.append(f"Under {names} the file gives other results than where it was made.")
    return " ".join(told)


def agreement(found: Agreement) -> str:
    """How outputs agree, in words.

    Example:
        >>> agreement(Agreement(32, 128, 0, 0.0, None, 0))
        'the same bits in all 128 values of 32 examples; no class flips'
        >>> agreement(Agreement(32, 128, 12, 0.25, 41.2, 1))
        '12 of 128 values differ, by at most 0.25 (41.2 dB); the class of 1 of 32 examples flips'
    """
    flips = ""
    if found.flips is not None:
        some = f"the class of {found.flips} of {found.examples} examples flips"
        flips = f"; {some if found.flips else 'no class flips'}"
    if not found.differing:
        values = f"all {found.values:,} values of {found.examples} examples"
        return f"the same bits in {values}{flips}"
    by = "in shape, or by NaN or infinity" if found.max_error is None else ""
    by = by or f"by at most {found.max_error:.3g}"
    decibels = "" if found.db is None else f" ({found.db:.1f} dB)"
    return f"{found.differing:,} of {found.values:,} values differ, {by}{decibels}{flips}"


def facts(each: Validation) -> dict[str, object]:
    """What the page of a device shows besides the sections of a run."""
    return {
        "outcome": each.outcome,
        "golden": each.golden and agreement(each.golden),
        "golden_agrees": each.golden is not None and each.golden.agrees,
        "sha256": each.sha256,
        "declared": each.declared,
        "notes": each.notes,
        "ways": [
            {
                "name": way.name,
                "how": way.how,
                "problem": way.problem,
                "agrees": way.agreement is not None and way.agreement.agrees,
                "differing": way.agreement and f"{way.agreement.differing:,}",
                "of": way.agreement and f"{way.agreement.values:,}",
                "max_error": way.agreement and _error(way.agreement.max_error),
                "flips": way.agreement and way.agreement.flips,
                "examples": way.agreement and way.agreement.examples,
            }
            for way in each.instruction_sets
        ],
    }


def _error(value: float | None) -> str:
    return "not comparable" if value is None else f"{value:.3g}"


def print_validations(found: Sequence[Validation], pages: Sequence[Path]) -> None:
    """One table a device."""
    console = output(False)
    for each in found:
        colour = COLOURS[each.outcome]
        title = f"{escape(each.device)}, {each.runtime}"
        console.print(f"[bold]{title}[/]: [{colour}]{each.outcome}[/]", highlight=False)
        if not each.problem:
            _print_figures(console, each)
            for way in each.instruction_sets:
                said = way.problem if way.agreement is None else agreement(way.agreement)
                console.print(f"under {way.name}: {escape(said)}", highlight=False)
            for note in [each.declared, *each.notes]:
                if note:
                    console.print(f"note: {escape(note)}", highlight=False)
        console.print(f"[{colour}]{escape(verdict(each))}[/]\n", highlight=False)
    for page in pages:
        console.print(f"Page: {escape(str(page))}", highlight=False, soft_wrap=True)


def _print_figures(console: Console, each: Validation) -> None:
    table = Table()
    for name in ("", *each.measured):
        table.add_column(name, justify="right" if name else "left")
    scores = [m.score for m in each.measured.values()]
    if any(score is not None for score in scores):
        table.add_row("score", *("" if s is None else f"{s:.4g}" for s in scores))
    for name in ("size", "latency", "throughput", "memory", "energy"):
        values = [m.quantity(name) for m in each.measured.values()]
        shown = ["unavailable" if v is None else human(name, v) for v in values]
        table.add_row(name, *shown)
    console.print(table)
    where = each.measured[COMPRESSED].where
    told = ", ".join(f"{name} {value}" for name, value in where.items())
    console.print(f"where: {escape(told)}", highlight=False)
