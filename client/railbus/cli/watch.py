"""`railbus watch`: jobs, devices, throughput, losses and the last events, drawn again as they change."""

from __future__ import annotations

import asyncio
import os
import sys
from typing import TYPE_CHECKING, Final

import click

from railbus.cli.render import to_console
from railbus.cli.session import connected, root_option, run
from railbus.cli.watch_state import Watched

if TYPE_CHECKING:
    from rich.console import Console

    from railbus.client import Client
    from railbus_shared.contracts.jobs import JobState

_ASK_S: Final = 2.0
_DRAW_S: Final = 0.5
_DRAW_AWAY_S: Final = 2.0
"""While NATS is away, when nothing changes but the clock."""
_LISTED: Final = 50
_ENDED: Final = 8
_HISTORY: Final = 500
_TIME_OF_DAY: Final = slice(11, 19)
_GROUPS: Final[dict[str, tuple[JobState, ...]]] = {
    "active": ("running", "checkpointing", "placed"),
    "queued": ("queued",),
    "ended": ("succeeded", "failed", "cancelled"),
}


@click.command()
@click.option("--once", is_flag=True, help="Draw one picture and end; also where there is no terminal.")
@root_option
def watch(*, once: bool) -> None:
    """Watch jobs and devices as they change; Ctrl-C ends it, and nothing else.

    VALUE and CURVE are a job's loss, or the first metric that it tells: what
    is heard while it is watched, and up to 500 values of before.
    """
    if once:
        run(_once(to_console()))
        return
    if not sys.stdout.isatty() or os.environ.get("TERM") == "dumb":
        raise click.UsageError("there is no terminal to draw on; `railbus watch --once`, or `railbus logs -f`")
    from rich.console import Console

    run(_watch(Console(highlight=False)))  # colours or not as NO_COLOR says


async def _once(console: Console) -> None:
    from railbus.cli.watch_screen import screen
    from railbus_shared import clock

    state = Watched()
    async with connected() as client:
        await _ask(client, state)
        await _recall(client, state)
    lines = len(state.lines) + len(state.active) + len(state.queued) + len(state.ended) + 24
    console.print(screen(state, width=console.width, height=lines, now_ns=clock.now_ns()), soft_wrap=False)


async def _watch(console: Console) -> None:
    from rich.live import Live

    from railbus.cli.watch_screen import screen
    from railbus_shared import clock
    from railbus_shared.waiting import beside

    state = Watched()
    async with connected() as client:
        await _ask(client, state)
        await _recall(client, state)
        with Live(console=console, screen=True, auto_refresh=False) as live:
            async with beside(_listen(client, state)), beside(_keep_asking(client, state)):
                while True:
                    width, height = console.size
                    live.update(screen(state, width=width, height=height, now_ns=clock.now_ns()), refresh=True)
                    await asyncio.sleep(_DRAW_AWAY_S if state.trouble else _DRAW_S)


async def _listen(client: Client, state: Watched) -> None:
    async for event in client.follow_all():
        state.hear(event)


async def _keep_asking(client: Client, state: Watched) -> None:
    """What is shown stays while nobody answers, and that is said."""
    from railbus_shared import clock
    from railbus_shared.errors import TransientError

    asked_at = clock.now()
    while True:
        await asyncio.sleep(_ASK_S)
        try:
            await _ask(client, state)
            state.trouble, asked_at = "", clock.now()
        except TransientError as exc:
            state.trouble = f"as of {asked_at[_TIME_OF_DAY]}: {exc.message.partition(', so ')[0]}"


async def _ask(client: Client, state: Watched) -> None:
    limits = {"active": _LISTED, "queued": _LISTED, "ended": _ENDED}
    found = {name: await client.jobs(states=states, limit=limits[name]) for name, states in _GROUPS.items()}
    state.active, state.queued, state.ended = (found[name].jobs for name in _GROUPS)
    state.totals = {name: one.total for name, one in found.items()}
    state.devices = await client.devices()


async def _recall(client: Client, state: Watched) -> None:
    """The last events and the curves of what runs, as far as telemetry has them; without it they begin now."""
    from railbus.cli.story import Line
    from railbus_shared import clock
    from railbus_shared.contracts.logs import QueryEvents
    from railbus_shared.errors import TransientError

    try:
        for event in (await client.events(QueryEvents(types=("job.", "device.", "host."), limit=50))).events:
            state.hear(event)
        for record in [*state.active, *state.ended][:_ENDED]:
            query = QueryEvents(job=record.id, types=("train.metrics",), limit=_HISTORY)
            for event in (await client.events(query)).events:
                state.learn(event)
    except TransientError as exc:
        state.lines.append((clock.now(), Line(f"nothing is shown of what was before: {exc.message}", "bad")))
