"""`railbus checkpoints prune`: remove what is not needed, and say why the rest stays."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Final

import click

from railbus.cli.checkpoint_names import warn
from railbus.cli.progress import progress
from railbus.cli.render import Cell, Column, print_json, say, show, size, to_console
from railbus.cli.session import connected, json_option, root_option, run, session
from railbus_shared.errors import BusUnavailable, TransientError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from railbus.checkpoints.catalogue import Checkpoint
    from railbus.checkpoints.in_use import InUse
    from railbus.checkpoints.leftovers import Leftover
    from railbus.checkpoints.proof import Report
    from railbus.checkpoints.pruning import Fate, Rules
    from railbus_shared.retention import Why

_COLUMNS: Final = (
    Column("MODEL"),
    Column("NUMBER", "number"),
    Column("STEP", "number"),
    Column("SIZE", "bytes"),
    Column("WRITTEN", "time"),
    Column("JOB", "id"),
    Column("STAYS BECAUSE"),
)
WORDS: Final[Mapping[Why, str]] = {
    "newest": "newest",
    "best": "best",
    "every": "every n steps",
    "recorded": "the job goes on from it",
    "resumed_from": "the job came from it",
    "named": "a job begins from it",
    "evidence": "damaged, and too few others",
}
"""Why a checkpoint stays, for people."""


@click.command()
@click.argument("model", required=False)
@click.option("--job", metavar="ID", help="Checkpoints of one job only.")
@click.option("--keep-last", type=click.IntRange(1), metavar="N", help="Keep the newest N of each job.")
@click.option("--keep-best", type=click.IntRange(0), metavar="N", help="Keep N more that are the best.")
@click.option("--metric", metavar="NAME", help="The metric that tells which are the best.")
@click.option("--best", type=click.Choice(["min", "max"]), help="Whether a low or a high metric is good.")
@click.option("--keep-every-steps", type=click.IntRange(1), metavar="N", help="Keep steps that are multiples of N.")
@click.option("--litter", "with_litter", is_flag=True, help="Also what dead attempts have left half done.")
@click.option("--offline", is_flag=True, help="Do not ask NATS; for when you know that no job needs them.")
@click.option("--dry-run", "-n", is_flag=True, help="Only say what would go.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@json_option
@root_option
def prune(
    *, model: str | None, job: str | None, with_litter: bool, offline: bool, dry_run: bool, yes: bool, as_json: bool,
    keep_last: int | None, keep_best: int | None, metric: str | None, best: str | None, keep_every_steps: int | None,
) -> None:  # fmt: skip
    """Remove checkpoints that are not needed any more.

    Of each job stays what its own policy keeps, or what the options say instead. What is kept as the newest or the best
    is hashed before, and one that is damaged counts for nothing, so the only valid one never goes. Nor does one that a
    job which has not ended names, which is why NATS is asked.

    \b
      railbus checkpoints prune --dry-run
      railbus checkpoints prune digits-cnn --keep-last 1 --litter
    """
    from railbus.checkpoints.catalogue import known_model, model_names, read_all
    from railbus.checkpoints.leftovers import leftovers
    from railbus.checkpoints.pruning import Rules

    if not (dry_run or yes) and not sys.stdin.isatty():
        raise click.UsageError("nobody is there to be asked: say --yes or --dry-run")
    layout = session().tree
    models = [known_model(layout, model)] if model else model_names(layout)
    found = {
        name: [one for one in read_all(layout, name, damaged=warn) if job in {None, one.meta.job}] for name in models
    }
    beside = {
        name: [one for one in leftovers(layout, name) if job in {None, one.job}] if with_litter else []
        for name in models
    }
    claimed = {one.job for ones in beside.values() for one in ones if one.job is not None}
    asked = None if offline else run(_ask(claimed))
    rules = Rules(keep_last, keep_best, metric, best, keep_every_steps)
    with progress() as report:
        decided = [fate for name in models for fate in _fates(found[name], rules, asked, name, report)]
    done = _Pruning(decided, _litter(beside, asked), as_json=as_json)
    done.tell(dry_run=dry_run)
    if not dry_run and done.is_wanted(yes=yes):
        done.carry_out(None if offline else run(_ask(())))
    done.conclude()


def _fates(found: Sequence[Checkpoint], rules: Rules, asked: InUse | None, model: str, report: Report) -> list[Fate]:
    from railbus.checkpoints.pruning import fates

    return fates(found, rules, pinned=asked.pinned.get(model) if asked else None, report=report)


def _litter(beside: Mapping[str, list[Leftover]], asked: InUse | None) -> list[Leftover]:
    from railbus.checkpoints.pruning import litter

    records, now_s = asked.records if asked else None, time.time()
    layout = session().layout
    return [one for name, ones in beside.items() for one in litter(layout, name, ones, records, now_s=now_s)]


async def _ask(claimed: Collection[str]) -> InUse:
    """Raises BusUnavailable, which says what to do about it."""
    from railbus.checkpoints.in_use import in_use

    try:
        async with connected() as client:
            return await in_use(client, jobs=claimed)
    except TransientError as exc:
        raise BusUnavailable(
            f"which checkpoints are needed by jobs that have not ended cannot be known: {exc.message}",
            hint="start what runs them, or say --offline if nothing does",
        ) from exc


class _Pruning:
    """What is to be removed, told and done."""

    def __init__(self, decided: list[Fate], beside: list[Leftover], *, as_json: bool) -> None:
        self._decided = decided
        self._going = [fate.one for fate in decided if not fate.stays]
        self._beside = beside
        self._as_json = as_json
        self._removed: list[Checkpoint] | None = None

    def tell(self, *, dry_run: bool) -> None:
        if self._as_json:
            return
        console = to_console()
        if self._decided:
            show(_COLUMNS, [_row(fate) for fate in self._decided], console=console)
        for one in self._beside:
            click.echo(f"{one.path.name}: {one.kind}, {size(one.num_bytes)}, of {one.job or 'nobody knows which job'}")
        if self._decided or self._beside:
            click.echo()
        total = sum(one.num_bytes for one in self._going) + sum(one.num_bytes for one in self._beside)
        litter = f" and {len(self._beside)} leftovers" if self._beside else ""
        will = "Would remove" if dry_run else "To remove"
        say(f"{will}: {len(self._going)} of {len(self._decided)} checkpoints{litter}, {size(total)}.", console=console)

    def is_wanted(self, *, yes: bool) -> bool:
        """Whether there is something to do, and whoever is there wants it."""
        return bool(self._going or self._beside) and (yes or click.confirm("Remove them?", err=True))

    def carry_out(self, asked: InUse | None) -> None:
        """Remove them, the oldest first; but for what a job has come to need since it was asked for."""
        from railbus.checkpoints.pruning import remove, remove_leftovers

        needed = asked.pinned if asked is not None else {}
        kept = [one for one in self._going if one.meta.number in needed.get(one.meta.model, {})]
        for one in kept:
            click.echo(f"{one.title} stays: a job has come to need it just now", err=True)
        self._removed = remove(session().layout, [one for one in self._going if one not in kept])
        remove_leftovers(self._beside)

    def conclude(self) -> None:
        if self._as_json:
            print_json({
                "removed": [one.title for one in self._removed or ()],
                "going": [fate.to_map() for fate in self._decided if not fate.stays],
                "kept": [fate.to_map() for fate in self._decided if fate.stays],
                "litter": [one.to_map() for one in self._beside],
                "done": self._removed is not None,
            })  # fmt: skip
        elif self._removed is not None:
            click.echo(f"removed {len(self._removed)} checkpoints")


def _row(fate: Fate) -> list[Cell]:
    meta = fate.one.meta
    told = ", ".join(WORDS[why] for why in fate.whys) if fate.stays else "goes, damaged" if fate.is_damaged else "goes"
    return [meta.model, meta.number, meta.step, fate.one.num_bytes, meta.created_at, meta.job, told]
