"""`railbus checkpoints diff`: what changed between two checkpoints."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

import click

from railbus.cli.checkpoint_names import two_meant
from railbus.cli.progress import progress
from railbus.cli.render import Cell, Column, print_json, say, show, to_console
from railbus.cli.session import json_option, root_option

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from railbus.checkpoints.catalogue import Checkpoint
    from railbus.checkpoints.comparing import Change, Comparison

_SHOWN: Final = 20
_SHA256: Final = re.compile(r"[0-9a-f]{64}\Z")
_META: Final = (Column("META"), Column("A"), Column("B"))
_PLACES: Final = (Column("TENSOR"), Column("A"), Column("B"))
_CHANGES: Final = (
    Column("CHANGED TENSOR"),
    Column("FORM"),
    Column("RELATIVE", "number"),
    Column("MAX ABS", "number"),
    Column("DIFFERENT", "number"),
)


@click.command()
@click.argument("checkpoints", nargs=-1, required=True, metavar="A [B]")
@click.option("--part", metavar="NAME", help="Only tensors of what was tracked under this name.")
@click.option("--limit", type=click.IntRange(0), default=_SHOWN, help=f"Lines of each table; {_SHOWN}, 0 for all.")
@json_option
@root_option
def diff(*, checkpoints: tuple[str, ...], part: str | None, limit: int, as_json: bool) -> None:
    """Say what changed between two checkpoints.

    In the metas, which tensors there are, and by how much they changed: `relative` is the norm of the difference over
    that of the tensor in A. Both are verified before.

    A and B are each a MODEL with a NUMBER, or its newest without one, or a path; a number alone is of the same model.
    A alone is compared with its parent.

    \b
      railbus checkpoints diff digits-cnn 3 5
      railbus checkpoints diff digits-cnn 5 other 2
      railbus checkpoints diff old/checkpoint-000003.pt digits-cnn
    """
    from railbus.checkpoints.comparing import compare

    first, second = two_meant(checkpoints)
    with progress() as report:
        found = compare(first, second, part=part, report=report)
    if as_json:
        print_json({"a": _named(first), "b": _named(second), **found.to_map()})
        return
    console = to_console()
    say(f"A is {first.title}, B is {second.title}.", console=console)
    _show_meta(found, console)
    _show_tensors(found, limit or None, console)


def _named(one: Checkpoint) -> dict[str, object]:
    return {"model": one.meta.model, "number": one.meta.number, "path": str(one.path)}


def _show_meta(found: Comparison, console: Console) -> None:
    if found.meta:
        click.echo()
        rows: list[list[Cell]] = [
            [name, *(_value(value, is_brief=console.is_terminal) for value in both)]
            for name, both in found.meta.items()
        ]
        show(_META, rows, console=console)


def _show_tensors(found: Comparison, limit: int | None, console: Console) -> None:
    places = [_place(one.name, one.form, None) for one in found.removed]
    places += [_place(one.name, None, one.form) for one in found.added]
    places += [_place(old.name, old.form, new.form) for old, new in found.reshaped]
    _show_some(_PLACES, places, limit, console)
    _show_some(_CHANGES, [_row(change) for change in found.changed], limit, console)
    click.echo()
    say(_summary(found), console=console)


def _show_some(columns: Sequence[Column], rows: Sequence[Sequence[Cell]], limit: int | None, console: Console) -> None:
    if not rows:
        return
    click.echo()
    show(columns, rows[:limit], console=console)
    if limit is not None and len(rows) > limit:
        click.echo(f"… and {len(rows) - limit} more; --limit 0 shows all")


def _place(name: str, in_a: str | None, in_b: str | None) -> list[Cell]:
    return [_name(name), in_a, in_b]


def _row(change: Change) -> list[Cell]:
    different = f"{change.num_different / max(change.num_elements, 1):.1%}"
    if change.num_not_finite:
        different += f", {change.num_not_finite:,} not finite"
    relative = "from zero" if change.relative is None else f"{change.relative:.3g}"
    return [_name(change.name), change.form, relative, f"{change.max_abs:.3g}", different]


def _summary(found: Comparison) -> str:
    counts = {
        "changed": len(found.changed),
        "added": len(found.added),
        "removed": len(found.removed),
        "of another shape": len(found.reshaped),
        "not compared": len(found.others),
    }
    told = [f"{count:,} {what}" for what, count in counts.items() if count]
    return f"Tensors: {', '.join([*told, f'{found.num_same:,} the same bit by bit'])}."


def _name(name: str) -> str:
    """Without what all names of tracked parts begin with."""
    return name.removeprefix("parts.")


def _value(value: object, *, is_brief: bool) -> Cell:
    if isinstance(value, bool):
        return str(value).lower()
    if is_brief and isinstance(value, str) and _SHA256.match(value):
        return f"{value[:12]}…"
    if isinstance(value, int | str) or value is None:
        return value
    return f"{value:.6g}" if isinstance(value, float) else str(value)
