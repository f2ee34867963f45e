"""`railbus checkpoints show`: what exactly a checkpoint was trained on."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Final

import click

from railbus.cli.checkpoint_names import meant
from railbus.cli.progress import progress
from railbus.cli.render import Cell, Column, print_json, say, show, show_pairs, size, to_console
from railbus.cli.session import connected, json_option, root_option, run, session
from railbus_shared.errors import JobNotFound

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from rich.console import Console

    from railbus.checkpoints.catalogue import Checkpoint
    from railbus.checkpoints.lineage import Lineage, Link
    from railbus_shared.contracts.jobs import JobRecord

_PARENTS: Final = 5
_LINKS: Final = (Column("MADE FROM"), Column("NAME", "id"), Column("STATE", "state"), Column("WHY"))


@click.command("show")
@click.argument("model")
@click.argument("number", required=False, type=int)
@click.option("--ask", is_flag=True, help="Ask NATS for the records of the jobs, and compare.")
@click.option("--quick", is_flag=True, help="Do not hash the tensors.")
@json_option
@root_option
def show_checkpoint(*, model: str, number: int | None, ask: bool, quick: bool, as_json: bool) -> None:
    """Show what a checkpoint was trained on.

    The one of this NUMBER, or the newest; MODEL may also be the path of one. From the indexes of the datasets through
    the jobs and the parents to its own bytes, each link is proven by a hash, unknown because what it names is not here,
    or broken.

    \b
      railbus checkpoints show digits-cnn
      railbus checkpoints show digits-cnn 3 --ask
    """
    from railbus.checkpoints.lineage import jobs_of, lineage

    one = meant(model, number)
    records = run(_records(jobs_of(one))) if ask else {}
    with progress() as report:
        found = lineage(session().layout, one, records=records, hashes=not quick, report=report)
    if as_json:
        print_json(
            {
                "path": str(one.path),
                "meta": one.meta.to_map(),
                "meta_sha256": one.meta_sha256,
                "lineage": found.to_map(),
            }
        )
        return
    console = to_console()
    show_pairs({name: value for name, value in _pairs(one).items() if value not in {None, ""}}, console=console)
    click.echo()
    show(_LINKS, list(_rows(found.links)), console=console)
    click.echo()
    _conclude(found, console, asked=ask)


async def _records(jobs: Sequence[str]) -> dict[str, JobRecord]:
    """Of the jobs that NATS still knows."""
    found: dict[str, JobRecord] = {}
    async with connected() as client:
        for job in jobs:
            with contextlib.suppress(JobNotFound):
                found[job] = await client.job(job)
    return found


def _rows(links: Sequence[Link]) -> Iterator[list[Cell]]:
    """A row for each link; of many parents that are proven the first and the last ones."""
    proven = [link for link in links if link.what == "parent" and link.verdict == "proven"]
    hidden = proven[1:-_PARENTS] if len(proven) > _PARENTS + 2 else []
    for link in links:
        if link not in hidden:
            yield [link.what, link.name, link.verdict, link.said]
        elif link is hidden[0]:
            yield [link.what, f"… {len(hidden)} more", link.verdict, f"from {link.name} to {hidden[-1].name}"]


def _conclude(found: Lineage, console: Console, *, asked: bool) -> None:
    """In one sentence, what all of it comes to."""
    by_verdict = {
        verdict: [f"{link.what} {link.name}" for link in found.links if link.verdict == verdict]
        for verdict in ("broken", "unknown")
    }
    if by_verdict["broken"]:
        say(f"Broken: {', '.join(by_verdict['broken'])}.", console=console)
    elif by_verdict["unknown"]:
        asking = "" if asked else " --ask compares jobs with their records."
        say(f"Nothing is broken. Not proven here: {', '.join(by_verdict['unknown'])}.{asking}", console=console)
    else:
        say("Proven from the dataset to the last byte.", console=console)


def _pairs(one: Checkpoint) -> dict[str, Cell]:
    meta = one.meta
    count = len(meta.files)
    tensors = f", {count} files" if count > 1 else f", {len(meta.tensors)} tensors" if meta.tensors else ""
    return {
        "checkpoint": str(one.path.with_name(meta.files[0].file.partition("/")[0])),
        "size": f"{size(one.num_bytes)} in the format {meta.format}{tensors}",
        "sha256": meta.files[0].sha256 if count == 1 else None,
        "model": meta.model,
        "trained": f"{meta.step:,} steps, {meta.samples_seen:,} samples, now in epoch {meta.epoch}",
        "metrics": _listed(meta.metrics),
        "dataset": meta.dataset,
        "index sha256": meta.index_sha256,
        "job": f"{meta.job}, attempt {meta.attempt}, lease epoch {meta.lease_epoch}",
        "spec sha256": meta.spec_sha256,
        "entrypoint": f"{meta.entrypoint}, seed {meta.seed}",
        "git commit": meta.git_commit,
        "params": _listed(meta.params),
        "devices": f"{', '.join(meta.devices)}; {meta.precision}, {_processes(meta.world_size)}",
        "libraries": _listed(meta.libraries),
        "parent": meta.parent,
        "written": f"{meta.created_at}, because of {meta.reason}",
        "meta sha256": one.meta_sha256,
    }


def _listed(values: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {_short(value)}" for name, value in values.items())


def _short(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _processes(count: int) -> str:
    return "one process" if count == 1 else f"{count} processes"
