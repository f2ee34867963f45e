"""`railbus dataset export`."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import click

from railbus.cli.dataset_files import load
from railbus.cli.dataset_import import size_of
from railbus.cli.progress import progress
from railbus.cli.render import print_json
from railbus.cli.session import json_option, root_option, session

FORMATS: Final = ("npz", "npy", "csv", "jsonl", "parquet", "webdataset", "mds", "images")


@click.command()
@click.argument("name")
@click.argument("dest", type=click.Path(path_type=Path))
@click.option("--to", required=True, type=click.Choice(FORMATS), help="The format.")
@click.option("--split", metavar="NAME", help="One split only.")
@click.option("--shard-bytes", type=size_of, default="64MiB", metavar="SIZE",
              help="Size of the files of webdataset and mds; 64MiB.")  # fmt: skip
@json_option
@root_option
def export(*, name: str, dest: Path, to: str, split: str | None, shard_bytes: int, as_json: bool) -> None:
    """Write a dataset for other programs.

    Every shard is verified while it is read. Folders (parquet, webdataset, mds, images) keep the splits apart; the
    other formats are one file, or a folder of arrays, of one split.

    \b
      railbus dataset export digits out.npz --to npz --split train
      railbus dataset export digits out/ --to webdataset
    """
    from railbus.exporters.exporter import ExportOptions
    from railbus.exporting import export_dataset

    layout = session().tree
    index = load(layout, name)
    with progress() as report:
        options = ExportOptions(shard_bytes=shard_bytes, report=report)
        samples = export_dataset(layout, index, to=to, target=dest, split=split, options=options)
    if as_json:
        print_json({"dataset": name, "format": to, "path": str(dest), "samples": samples})
    else:
        click.echo(f"exported {samples} samples of {name} to {dest}")
