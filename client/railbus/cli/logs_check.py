"""`railbus logs --check`: whether the log has every event of every producer, each once, in files that can be read."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple

import click

from railbus.cli import exit_codes
from railbus.cli.render import Cell, Column, print_json, say, show, to_console
from railbus.cli.session import connected, knows_bus, run, session
from railbus_shared.errors import NotFound, RailbusError, TransientError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from railbus.cli.history import Wanted
    from railbus.log_check import Check, Finding, Range

_COLUMNS: Final = (Column("WHAT"), Column("PRODUCER", "id"), Column("COUNT", "number"), Column("NUMBERS"))
_FILES: Final = (Column("FILE", "id"), Column("AT BYTE", "number"), Column("PROBLEM"))
_MOST_SHOWN: Final = 12
"""Ranges of one producer that people are told; --json has all."""
_MOST_LOOKED_AT: Final = 100_000
"""Messages of the stream behind what is on disk."""


class _Stream(NamedTuple):
    """What the stream holds behind what was on disk before the files were read."""

    events: int = 0
    problem: str = ""
    """Why nobody knows."""


def check_logs(wanted: Wanted, *, as_json: bool) -> int:
    """Ends with 6 if anything is missing, doubled or broken."""
    from railbus.log_check import check
    from railbus_shared.log_filter import Filter

    layout = session().tree
    if not layout.logs.is_dir():
        raise NotFound(f"there is no log at {str(layout.logs)!r}", hint="ask on the host where telemetry writes it")
    asked = Filter(wanted.job, (), wanted.since_ns, wanted.until_ns)
    on_disk, problem = _asked_of_bus(_on_disk) if knows_bus() else (None, "no bus runs on this root")
    found = check(layout, asked)
    waiting, problem = (0, problem) if on_disk is None else _asked_of_bus(partial(_look_behind, on_disk, found))
    stream = _Stream(waiting or 0, problem)
    if as_json:
        print_json(_to_map(found, stream))
    else:
        _show(found, stream)
    is_fault = found.num_broken or any(finding.is_fault for finding in found.findings())
    return exit_codes.INVALID_INPUT if is_fault else exit_codes.OK


def _asked_of_bus(work: Callable[[], Coroutine[None, None, int]]) -> tuple[int | None, str]:
    """What it gives, or why it cannot be had; the files say what they say without a bus, too."""
    try:
        return run(work()), ""
    except RailbusError as exc:
        return None, exc.message


async def _on_disk() -> int:
    """Up to where the files hold everything."""
    async with connected() as client:
        return (await client.seam()).sequence


async def _look_behind(sequence: int, found: Check) -> int:
    """Take what is stored behind that; returns how many events are not on disk yet."""
    from railbus_shared.bus.follow import events_in
    from railbus_shared.bus.reading import stored_after

    async with connected() as client:
        bus, subjects = client.bus, client.bus.subjects
        on_disk = (await client.seam()).sequence
        last, waiting = await bus.last_sequence(subjects.events_stream), 0
        if last - sequence > _MOST_LOOKED_AT:
            raise TransientError(f"{last - sequence:,} messages are too many to be looked at")
        while sequence < last:
            messages = await stored_after(bus, subjects.events_stream, subjects.all_events, sequence)
            if not messages:
                break
            for message in messages:
                events = events_in(message.data, subject=message.subject)
                waiting += found.add_stored(events, is_on_disk=message.sequence <= on_disk)
            sequence = messages[-1].sequence
    return waiting


# --- what was found --------------------------------------------------------------------------------------------------


def _to_map(found: Check, stream: _Stream) -> dict[str, object]:
    findings = list(found.findings())
    return {
        "days": found.days,
        "events": found.events,
        "producers": found.num_producers,
        "missing": sum(one.num_missing for one in findings),
        "doubled": sum(one.num_doubled for one in findings),
        "out_of_line": sum(one.num_late for one in findings),
        "broken": found.num_broken,
        "given_up": found.dropped,
        "not_on_disk_yet": None if stream.problem else stream.events,
        "found": [_finding_map(one) for one in findings],
        "files": [{"file": str(file), "at_byte": at, "problem": problem} for file, at, problem in found.broken],
    }


def _finding_map(one: Finding) -> dict[str, object]:
    return {
        "producer": one.producer,
        "events": one.events,
        "missing": one.missing,
        "num_missing": one.num_missing,
        "doubled": one.doubled,
        "num_doubled": one.num_doubled,
        "out_of_line": one.num_late,
        "not_on_disk_yet": one.waiting,
    }


def _show(found: Check, stream: _Stream) -> None:
    console = to_console()
    rows = [row for finding in found.findings() for row in _rows(finding)]
    if rows:
        show(_COLUMNS, rows, console=console)
        click.echo()
    if found.broken:
        show(_FILES, [[str(one.file), one.at_byte, one.problem] for one in found.broken], console=console)
        click.echo()
    for said in _in_words(found, stream):
        say(said, console=console)


def _rows(one: Finding) -> Iterator[list[Cell]]:
    told = (
        ("missing", one.num_missing, one.missing),
        ("doubled", one.num_doubled, one.doubled),
        ("not on disk yet", sum(last - first + 1 for first, last in one.waiting), one.waiting),
    )
    for what, count, numbers in told:
        if count:
            yield [what, one.producer, count, _said(numbers)]


def _said(ranges: Sequence[Range]) -> str:
    told = [f"{first}" if first == last else f"{first}-{last}" for first, last in ranges[:_MOST_SHOWN]]
    return ", ".join([*told, "…"] if len(ranges) > _MOST_SHOWN else told)


def _in_words(found: Check, stream: _Stream) -> Iterator[str]:
    findings = list(found.findings())
    missing, doubled = sum(one.num_missing for one in findings), sum(one.num_doubled for one in findings)
    counts = ((found.events, "event"), (found.num_producers, "producer"), (found.days, "day"))
    events, producers, days = (f"{count:,} {what}{'' if count == 1 else 's'}" for count, what in counts)
    read = f"{events} of {producers} on {days}"
    yield f"{read}: {missing or 'none'} missing, {doubled or 'none'} doubled, {found.num_broken or 'none'} broken"
    if late := sum(one.num_late for one in findings):
        yield f"{late:,} stand behind a later one of their producer, which is no loss"
    if found.dropped:
        yield f"{found.dropped:,} were given up under pressure before they had a number, as events.dropped tells"
    if stream.events and not stream.problem:
        yield f"{stream.events:,} are in the stream and not on disk yet"
    if stream.problem:
        yield f"what is in the stream and not on disk yet is not known: {stream.problem}"
