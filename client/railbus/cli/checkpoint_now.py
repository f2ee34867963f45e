"""`railbus checkpoint now`: have a running job write a checkpoint, and wait until it is durable."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import click

from railbus.cli.job_names import find_job
from railbus.cli.render import print_json, size
from railbus.cli.session import connected, json_option, root_option, run
from railbus_shared.layout import checkpoint_stem

if TYPE_CHECKING:
    from railbus_shared.contracts.saving import SavedCheckpoint

_TIMEOUT_S: Final = 60.0
_MAX_TIMEOUT_S: Final = 3600.0


@click.command("now")
@click.argument("job")
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(0, _MAX_TIMEOUT_S, min_open=True),
    default=_TIMEOUT_S,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait for it; it is written all the same.",
)
@click.option("--quiet", "-q", is_flag=True, help="Print the checkpoint's name only.")
@json_option
@root_option
def now(*, job: str, timeout_s: float, quiet: bool, as_json: bool) -> None:
    """Have a running JOB write a checkpoint at its next step, and wait until it is durable.

    JOB is an id, the beginning of one, or `@last`.
    """
    saved = run(_save(job, timeout_s))
    name = checkpoint_stem(saved.checkpoint.number)
    if as_json:
        print_json(saved.to_map())
    elif quiet:
        click.echo(name)
    else:
        told = f"{name} of {saved.model}: step {saved.checkpoint.step}, {size(saved.bytes)}, {saved.seconds:.2f} s"
        click.echo(f"{told}, sha256 {saved.checkpoint.sha256}")


async def _save(job: str, timeout_s: float) -> SavedCheckpoint:
    async with connected() as client:
        return await client.checkpoint((await find_job(client, job)).id, timeout_s=timeout_s)
