"""Following a job to its end. Ctrl-C only leaves it: the job goes on, and that is said."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import click

from railbus.cli.render import to_console
from railbus.cli.tell import Teller, print_event

if TYPE_CHECKING:
    from railbus.client import Client
    from railbus_shared.contracts.jobs import JobRecord


def _any(_: Mapping[str, object]) -> bool:
    return True


async def follow_job(
    client: Client,
    job: str,
    *,
    as_json: bool,
) -> JobRecord:
    """Tell a job's events until its end, to stdout, as JSON lines if asked for; returns its last record."""
    return await follow_behind(client, job, 0, write=print_event if as_json else Teller(to_console()).tell)


async def follow_behind(
    client: Client,
    job: str,
    sequence: int,
    *,
    write: Callable[[Mapping[str, object]], None],
    is_wanted: Callable[[Mapping[str, object]], bool] = _any,
) -> JobRecord:
    """As `follow_job`, for what the stream has behind a sequence that lies before the job's end."""
    async with _leaving(f"left job {job}, which goes on; follow it again: railbus logs -f {job}"):
        async for event in client.follow(job, after=sequence):
            if is_wanted(event):
                write(event)
                sys.stdout.flush()
        (record,) = await client.wait([job])
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
