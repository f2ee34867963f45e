"""`railbus dataset verify`, `sample` and `stats`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from railbus.cli.dataset_files import counted, load
from railbus.cli.progress import progress
from railbus.cli.render import Cell, Column, print_json, show, to_console
from railbus.cli.session import json_option, root_option, session

if TYPE_CHECKING:
    from railbus.reading_rows import Rows
    from railbus.statistics import ColumnStatistics
    from railbus_shared.data.order import Positions

_ROWS: Final = 5
_PICTURES: Final = 40
_MAX_ROWS: Final = 10_000
_STAT_COLUMNS: Final = (
    Column("COLUMN"),
    Column("MIN", "number"),
    Column("MAX", "number"),
    Column("MEAN", "number"),
    Column("STD", "number"),
    Column("NAN", "number"),
    Column("LENGTHS"),
)
_CLASS_COLUMNS: Final = (Column("CLASS"), Column("NUMBER", "number"), Column("SHARE"), Column(""))
_MAX_CLASSES_SHOWN: Final = 30
_BAR: Final = 24


@click.command()
@click.argument("name")
@json_option
@root_option
def verify(*, name: str, as_json: bool) -> None:
    """Check the schema and the index, and hash every shard."""
    from railbus.verifying import damaged

    layout = session().tree
    index = load(layout, name)
    with progress() as report:
        found = list(damaged(layout, index, report=report))
    if found:
        for error in found[1:]:
            click.echo(f"also damaged: {error.details['path']}", err=True)
        raise found[0]
    if as_json:
        print_json({"dataset": name, "shards": len(index.file.shards), "bytes": index.file.bytes, "valid": True})
    else:
        click.echo(f"{name} is valid: {counted(index)}")


@click.command()
@click.argument("name")
@click.option("-n", "count", type=click.IntRange(1, _MAX_ROWS), help=f"How many; {_ROWS}, or {_PICTURES} pictures.")
@click.option("--split", metavar="NAME", help="Of one split only.")
@click.option("--from", "first", type=click.IntRange(0), metavar="N", help="From this one on, not at random.")
@click.option("--seed", type=int, default=0, help="Another seed, other samples.")
@click.option("--png", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Draw images into a file.")
@json_option
@root_option
def sample(
    *, name: str, count: int | None, split: str | None, first: int | None, seed: int, png: Path | None, as_json: bool
) -> None:
    """Show some samples of a dataset; with --png as pictures.

    \b
      railbus dataset sample digits
      railbus dataset sample digits --split test --png sheet.png
    """
    from railbus.reading_rows import Rows

    layout = session().tree
    rows = Rows(layout, load(layout, name), split=split)
    wanted = count or (_ROWS if png is None else _PICTURES)
    numbers = _numbers(rows, wanted, first=first, seed=seed)
    if png is not None:
        _draw(rows, numbers, png)
    if as_json:
        from railbus.cli.cells import as_json as json_of

        chunk = rows.take(_positions(numbers))
        print_json([{"sample": number, **json_of(rows.columns, chunk, at)} for at, number in enumerate(numbers)])
    elif png is None:
        _show_rows(rows, numbers)


def _numbers(rows: Rows, count: int, *, first: int | None, seed: int) -> list[int]:
    import numpy as np

    from railbus_shared.data.order import EpochOrder

    if first is None:
        places = EpochOrder(rows.samples, seed, epoch=0).positions(0, min(count, rows.samples))
        places.sort()
    else:
        places = np.arange(min(first, rows.samples), min(first + count, rows.samples), dtype=np.int64)
    found: list[int] = rows.places(places).tolist()
    return found


def _positions(numbers: list[int]) -> Positions:
    import numpy as np

    return np.array(numbers, np.int64)


def _show_rows(rows: Rows, numbers: list[int]) -> None:
    from railbus.cli.cells import cell

    chunk = rows.take(_positions(numbers))
    columns = (Column("SAMPLE", "number"), *(Column(name) for name in rows.columns))
    table: list[list[Cell]] = [
        [number, *(cell(rows.columns[name], values[at]) for name, values in chunk.items())]
        for at, number in enumerate(numbers)
    ]
    show(columns, table, console=to_console())


def _draw(rows: Rows, numbers: list[int], target: Path) -> None:
    from railbus.exporters.pictures import contact_sheet, is_picture, picture, png
    from railbus_shared.errors import InvalidField

    image = next((name for name, column in rows.columns.items() if is_picture(column)), None)
    if image is None:
        raise InvalidField(field="columns", value=sorted(rows.columns), problem="none of them holds pictures")
    found = [
        picture(rows.take(_positions([number]), [image])[image][0], rows.columns[image], name=f"sample {number}")
        for number in numbers
    ]
    target.write_bytes(png(contact_sheet(found)))
    click.echo(f"drew {len(found)} samples of {image!r} into {target}, from left to right: {_shown(numbers)}", err=True)


def _shown(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (", …" if len(numbers) > 8 else "")


@click.command()
@click.argument("name")
@click.option("--split", metavar="NAME", help="Of one split only.")
@json_option
@root_option
def stats(*, name: str, split: str | None, as_json: bool) -> None:
    """Range, mean and spread of every column; lengths; how many of each class.

    Reads everything, and verifies it on the way.
    """
    from railbus.reading_rows import Rows
    from railbus.statistics import statistics

    layout = session().tree
    rows = Rows(layout, load(layout, name), split=split, verifies=True)
    with progress() as report:
        found = statistics(rows, report=report)
    if as_json:
        print_json({"dataset": name, "split": split, "columns": {key: one.to_map() for key, one in found.items()}})
        return
    console = to_console()
    show(_STAT_COLUMNS, [_stat_row(key, one) for key, one in found.items()], console=console)
    for key, one in found.items():
        if one.classes.size and not one.column.shape and not one.column.variable_length:
            click.echo()
            _show_classes(key, one)


def _stat_row(name: str, found: ColumnStatistics) -> list[Cell]:
    has_numbers = found.items > 0
    numbers: list[Cell] = [found.least, found.most, found.mean, found.std] if has_numbers else [None] * 4
    mean = found.mean_length
    lengths = f"{found.shortest} to {found.longest}, mean {mean:.6g}" if mean is not None else None
    return [name, *numbers, found.nans if has_numbers or found.nans else None, lengths]


def _show_classes(name: str, found: ColumnStatistics) -> None:
    labels = found.column.labels or tuple(str(number) for number in range(len(found.classes)))
    counts = found.classes.tolist()
    total, most = sum(counts), max(counts)
    rows: list[list[Cell]] = [
        [label, count, f"{count / max(total, 1):.1%}", "█" * round(_BAR * count / max(most, 1))]
        for label, count in zip(labels, counts, strict=True)
    ]
    title = (Column(name.upper()), *_CLASS_COLUMNS[1:])
    show(title, rows[:_MAX_CLASSES_SHOWN], console=to_console())
    if len(rows) > _MAX_CLASSES_SHOWN:
        click.echo(f"… and {len(rows) - _MAX_CLASSES_SHOWN} more; --json has them all")
