"""`railbus checkpoints verify`: every size, hash and link of a model's checkpoints, and what lies beside them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from railbus.cli import exit_codes
from railbus.cli.progress import progress
from railbus.cli.render import Cell, Column, print_json, say, show, to_console
from railbus.cli.session import json_option, root_option, session
from railbus_shared import clock
from railbus_shared.errors import CheckpointCorrupt, CheckpointNotFound

if TYPE_CHECKING:
    from railbus.checkpoints.leftovers import Leftover
    from railbus.checkpoints.lineage import Link
    from railbus.checkpoints.proof import Report
    from railbus_shared.layout import Layout

_COLUMNS: Final = (
    Column("MODEL"),
    Column("CHECKPOINT", "id"),
    Column("STATE", "state"),
    Column("PARENT", "state"),
    Column("SHA256", "hash"),
)
_LEFTOVERS: Final = (
    Column("ALSO THERE"),
    Column("WHAT"),
    Column("SIZE", "bytes"),
    Column("CHANGED", "time"),
    Column("JOB", "id"),
)


@dataclass(frozen=True)
class _Result:
    """What was found out about one checkpoint."""

    model: str
    name: str
    sha256: str
    error: CheckpointCorrupt | None
    parent: Link | None

    @property
    def is_good(self) -> bool:
        return self.error is None and (self.parent is None or self.parent.verdict != "broken")

    @property
    def row(self) -> list[Cell]:
        parent = self.parent.verdict if self.parent else None
        return [self.model, self.name, "damaged" if self.error else "valid", parent, self.sha256]

    @property
    def faults(self) -> list[str]:
        """What is wrong with it, in words."""
        told = [self.error.message] if self.error else []
        if self.parent is not None and self.parent.verdict == "broken":
            told.append(f"{self.name}: its parent {self.parent.name} is broken: {self.parent.said}")
        return told

    def to_map(self) -> dict[str, object]:
        return {
            "model": self.model,
            "checkpoint": self.name,
            "error": self.error.to_wire() if self.error else None,
            "parent": self.parent.to_map() if self.parent else None,
        }


@click.command()
@click.argument("model", required=False)
@click.argument("number", required=False, type=int)
@json_option
@root_option
def verify(*, model: str | None, number: int | None, as_json: bool) -> int:
    """Hash every file, and check every link.

    Of one checkpoint, of a model's, or of all. Ends with 6 if anything is damaged or broken. What lies beside the
    checkpoints (drafts, tensors without a meta, claims on numbers) is told, and may be in use at this moment.
    """
    from railbus.checkpoints.catalogue import known_model, model_names
    from railbus.checkpoints.leftovers import leftovers

    layout = session().tree
    models = [known_model(layout, model)] if model else model_names(layout)
    with progress() as report:
        results = [result for name in models for result in _results(layout, name, number, report)]
    beside = [one for name in models for one in leftovers(layout, name)] if number is None else []
    if as_json:
        maps = [result.to_map() for result in results]
        print_json({"checkpoints": maps, "leftovers": [one.to_map() for one in beside]})
    else:
        _show(results, beside)
    return exit_codes.OK if all(result.is_good for result in results) else exit_codes.INVALID_INPUT


def _results(layout: Layout, model: str, number: int | None, report: Report) -> list[_Result]:
    from railbus.checkpoints.catalogue import numbered

    paths = numbered(layout, model)
    chosen = [path for serial, path in paths.items() if number in {None, serial}]
    if not chosen and number is not None:
        known = ", ".join(map(str, list(paths)[-10:]))
        raise CheckpointNotFound(f"model {model!r} has no checkpoint {number}", hint=f"there are: {known or 'none'}")
    return [result for path in chosen if (result := _result(path, model, report)) is not None]


def _result(path: Path, model: str, report: Report) -> _Result | None:
    """None if it has been removed meanwhile."""
    from railbus.checkpoints.catalogue import read
    from railbus.checkpoints.lineage import parent_link
    from railbus.checkpoints.proof import fault

    name = path.name.removesuffix(".meta.json")
    try:
        one = read(path, model=model)
    except FileNotFoundError:
        return None
    except CheckpointCorrupt as exc:
        return _Result(model, name, "", exc, None)
    bad = fault(one, report=lambda _stage, done, total: report(name, done, total))
    if bad is not None and not path.exists():
        return None
    link, _ = parent_link(one)
    return _Result(model, name, one.meta.files[0].sha256, bad, link)


def _show(results: list[_Result], beside: list[Leftover]) -> None:
    console = to_console()
    if results:
        show(_COLUMNS, [result.row for result in results], console=console)
    else:
        click.echo("no checkpoints", err=True)
    for fault in (fault for result in results for fault in result.faults):
        click.echo()
        say(fault, console=console)
    if beside:
        click.echo()
        show(_LEFTOVERS, [_leftover(one) for one in beside], console=console)


def _leftover(one: Leftover) -> list[Cell]:
    changed = clock.rfc3339(int(one.changed_s * clock.NS_PER_S))
    return [one.path.name, one.kind, one.num_bytes, changed, one.job]
