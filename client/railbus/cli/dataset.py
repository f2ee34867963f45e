"""`railbus dataset`: the group, its `list` and `show`. Straight on the files where they lie here; else by the bus."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import click

from railbus.cli.dataset_export import export
from railbus.cli.dataset_files import load, names, summary
from railbus.cli.dataset_import import append, import_, repair
from railbus.cli.dataset_look import sample, stats, verify
from railbus.cli.groups import DefaultGroup
from railbus.cli.render import Cell, Column, print_json, show, show_pairs, size, to_console
from railbus.cli.session import connected, json_option, root_option, run, session
from railbus_shared.errors import RailbusError

if TYPE_CHECKING:
    from railbus_shared.contracts.artifacts import Column as DataColumn
    from railbus_shared.data.index import DatasetIndex
    from railbus_shared.layout import Layout

_COLUMNS: Final = (
    Column("DATASET"),
    Column("SAMPLES", "number"),
    Column("SHARDS", "number"),
    Column("SIZE", "bytes"),
    Column("SPLITS"),
    Column("INDEX", "hash"),
)

_COLUMN_COLUMNS: Final = (
    Column("COLUMN"),
    Column("DTYPE"),
    Column("SHAPE"),
    Column("CLASSES", "number"),
    Column("WHAT"),
)
_SHARD_COLUMNS: Final = (
    Column("SHARD", "id"),
    Column("SAMPLES", "number"),
    Column("SIZE", "bytes"),
    Column("SHA256", "hash"),
)


@click.group(cls=DefaultGroup)
def dataset() -> None:
    """Import, look at, verify and export datasets.

    \b
      railbus dataset import digits                a built-in one
      railbus dataset import train.npz --name mnist
      railbus dataset sample mnist --png sheet.png
      railbus dataset export mnist out/ --to webdataset
    """


@dataset.command("list")
@click.option("--quiet", "-q", is_flag=True, help="Print names only.")
@json_option
@root_option
def list_datasets(*, quiet: bool, as_json: bool) -> None:
    """List datasets; one that is damaged is said, and does not hide the others."""
    layout = session().layout
    found = run(_asked()) if not layout.datasets.is_dir() else _here(layout)
    if as_json:
        print_json(found)
    elif quiet:
        for one in found:
            click.echo(one["dataset"])
    elif found:
        show(_COLUMNS, [_row(one) for one in found], console=to_console())
    else:
        click.echo("no datasets; `railbus dataset import digits` makes one", err=True)


@dataset.command("show")
@click.argument("name")
@json_option
@root_option
def show_dataset(*, name: str, as_json: bool) -> None:
    """Show a dataset's columns, splits and shards."""
    index = load(session().tree, name)
    if as_json:
        schema, file = index.schema.to_map(), index.file.to_map()
        print_json({"summary": summary(index), "schema": schema, "index": file})
        return
    console = to_console()
    show_pairs(_pairs(index), console=console)
    click.echo()
    show(_COLUMN_COLUMNS, [_column_row(*column) for column in index.schema.columns.items()], console=console)
    click.echo()
    show(_SHARD_COLUMNS, [[one.file, one.samples, one.bytes, one.sha256] for one in index.file.shards], console=console)


def _here(layout: Layout) -> list[dict[str, object]]:
    found = []
    for name in names(layout):
        try:
            found.append(summary(load(layout, name)))
        except RailbusError as exc:
            click.echo(f"warning: {name}: {exc.message}", err=True)
    return found


async def _asked() -> list[dict[str, object]]:
    async with connected() as client:
        return [one.to_map() for one in (await client.datasets()).datasets]


def _row(one: dict[str, object]) -> list[Cell]:
    splits = one["splits"]
    told = ", ".join(f"{name} {split['samples']}" for name, split in splits.items()) if isinstance(splits, dict) else ""
    numbers = [value if isinstance(value, int) else None for value in (one["samples"], one["num_shards"], one["bytes"])]
    return [str(one["dataset"]), *numbers, told, str(one["index_sha256"])]


def _column_row(name: str, column: DataColumn) -> list[Cell]:
    lengths = ["…"] if column.variable_length else []
    shape = "×".join([*lengths, *map(str, column.shape)]) or "scalar"
    return [name, column.dtype, shape, column.num_classes, column.description or column.encoding]


def _pairs(index: DatasetIndex) -> dict[str, Cell]:
    schema = index.schema
    pairs: dict[str, Cell] = {
        "dataset": schema.name,
        "description": schema.description or None,
        "licence": schema.licence or None,
        "source": schema.source or None,
        "payload": schema.payload,
        "samples": index.file.samples,
        "splits": ", ".join(f"{name} {split.samples}" for name, split in schema.splits.items()),
        "size": size(index.file.bytes),
        "index sha256": index.sha256,
    }
    return {name: value for name, value in pairs.items() if value is not None}


for _command in (import_, append, export, sample, stats, verify, repair):
    dataset.add_command(_command)
