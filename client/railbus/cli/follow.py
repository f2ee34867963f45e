"""Following a job to its end. Ctrl-C only leaves it: the job goes on, and that is said."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

import click

from railbus.cli.render import to_console
from railbus.cli.tell import Teller, print_event

if TYPE_CHECKING:
    from railbus.client import Client
    from railbus_shared.contracts.jobs import JobRecord

_LAST_EVENTS_S: Final = 5.0
"""How long a job's last events may be on their way when its record says already that it has ended."""


def _any(_: Mapping[str, object]) -> bool:
    return True


async def follow_job(
    client: Client,
    job: str,
    *,
    as_json: bool,
    is_wanted: Callable[[Mapping[str, object]], bool] = _any,
) -> JobRecord:
    """Tell a job's events until its end, to stdout, as JSON lines if asked for; returns its last record."""
    from railbus_shared.waiting import beside, is_set_within

    write = print_event if as_json else Teller(to_console()).tell
    is_told = asyncio.Event()

    async def tell() -> None:
        async for event in client.follow(job):
            if is_wanted(event):
                write(event)
        is_told.set()

    async with _leaving(f"left job {job}, which goes on; follow it again: railbus logs -f {job}"), beside(tell()):
        (record,) = await client.wait([job])
        await is_set_within(is_told, _LAST_EVENTS_S)  # of a job of long ago they are no longer in the stream
    return record


async def wait_for_jobs(client: Client, jobs: Sequence[str]) -> list[JobRecord]:
    """Wait for the end of all jobs in silence; returns their records in the same order."""
    several = jobs[0] if len(jobs) == 1 else f"{len(jobs)} jobs"
    async with _leaving(f"left {several}; what was submitted goes on"):
        return await client.wait(jobs)


@contextlib.asynccontextmanager
async def _leaving(words: str) -> AsyncIterator[None]:
    """Say these words where Ctrl-C ends the wait."""
    try:
        yield
    except asyncio.CancelledError:
        click.echo(f"\n{words}", err=True)
        raise
