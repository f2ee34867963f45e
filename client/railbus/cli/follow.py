"""Following a job to its end. Ctrl-C only leaves it: the job goes on, and that is said."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import click

from railbus.cli.render import to_console
from railbus.cli.tell import Teller, print_event

if TYPE_CHECKING:
    from railbus.client import Client


def _any(_: Mapping[str, object]) -> bool:
    return True


async def follow_job(
    client: Client,
    job: str,
    *,
    as_json: bool,
    is_silent: bool,
    is_wanted: Callable[[Mapping[str, object]], bool] = _any,
) -> str:
    """Tell a job's events until its end; returns its final state.

    The story goes to stdout, as JSON lines if asked for.
    """
    write = print_event if as_json else Teller(to_console()).tell
    try:
        async for event in client.follow(job):
            if not is_silent and is_wanted(event):
                write(event)
    except asyncio.CancelledError:
        click.echo(f"\nleft job {job}, which goes on; follow it again: railbus logs -f {job}", err=True)
        raise
    return (await client.job(job)).state
