"""`railbus dataset import`, `append` and `repair`."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, ParamSpec, TypeVar

import click

from railbus.cli.dataset_files import counted, load, summary
from railbus.cli.progress import progress
from railbus.cli.render import humane, is_plain, print_json
from railbus.cli.session import json_option, root_option, session

if TYPE_CHECKING:
    from railbus.cli.progress import Report
    from railbus.importers.source import Options
    from railbus_shared.data.index import DatasetIndex
    from railbus_shared.layout import Layout

P = ParamSpec("P")
R = TypeVar("R")

_UNITS: Final = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def size_of(value: str) -> int:
    """A number of bytes out of `512MB`, `1GiB` or `1000`."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *([KMG]I?)?B?", str(value).upper())
    if match is None or (found := int(float(match[1]) * _UNITS[match[2] or ""])) < 1:
        raise click.BadParameter(f"{value!r} is no size; write 512MB or 1GiB")
    return found


def extent_of(value: str) -> tuple[int, int]:
    """Width and height out of `64x48`."""
    match = re.fullmatch(r"([1-9][0-9]{0,4})[x×]([1-9][0-9]{0,4})", value.lower())
    if match is None:
        raise click.BadParameter(f"{value!r} is no width and height; write 64x48")
    return int(match[1]), int(match[2])


def import_options(command: Callable[P, R]) -> Callable[P, R]:
    """Options that say how a source is to be read, passed on as `import_dataset` and `Options` take them."""
    options = (
        click.option("--held-out", "held_out_frac", type=click.FloatRange(0, 1, max_open=True), default=0.1,
                     metavar="SHARE", help="Share that is kept from training; 0.1 if not given."),
        click.option("--split", metavar="NAME", help="Put all samples into one split of this name."),
        click.option("--shuffle/--no-shuffle", default=True,
                     help="Whether rows are mixed first; not where they follow each other in time."),
        click.option("--tokenizer", type=click.Choice(["char", "byte", "bpe"]), default="char",
                     help="What a text is cut into; bpe is trained on it."),
        click.option("--block", type=int, default=128, metavar="N", help="Tokens of a sample of text; 128."),
        click.option("--vocab-size", type=int, default=8192, metavar="N", help="Tokens that bpe makes; 8192."),
        click.option("--text", "text_columns", multiple=True, metavar="COLUMN",
                     help="Take a column of a table as text; may be repeated."),
        click.option("--missing", type=click.Choice(["refuse", "fill"]), default="refuse",
                     help="Refuse gaps in a table, or fill them with NaN or nothing."),
        click.option("--decode", type=extent_of, metavar="WxH", help="Keep pixels of this size, not image files."),
        click.option("--max-bytes", type=size_of, metavar="SIZE",
                     help="What a packed source may unpack to; 1 GiB or 100 times its size."),
        click.option("--shard-bytes", type=size_of, default="512MiB", metavar="SIZE", help="Size of shards; 512MiB."),
    )  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def importing_options(report: Report, **given: Any) -> Options:
    """`Options` from what stands on the command line."""
    from railbus.importers.source import Options

    return Options(
        tokenizer=given["tokenizer"],
        vocab_size=given["vocab_size"],
        text_columns=frozenset(given["text_columns"]),
        missing=given["missing"],
        decode=given["decode"],
        max_bytes=given["max_bytes"],
        split=given["split"],
        block=given["block"],
        report=report,
        note=told,
    )


def told(note: str) -> None:
    """What the owner of a source should know."""
    click.echo(f"note: {note}", err=True)


def imported(source: str, *, name: str | None, **given: Any) -> DatasetIndex:
    """Import a source, with progress."""
    from railbus.importing import import_dataset

    with progress() as report:
        return import_dataset(
            session().layout,
            source,
            name=name,
            held_out_frac=given["held_out_frac"],
            shuffle=given["shuffle"],
            block=given["block"],
            shard_bytes=given["shard_bytes"],
            options=importing_options(report, **given),
        )


@click.command("import")
@click.argument("source")
@click.option("--name", metavar="NAME", help="Its name; from the source if not given.")
@import_options
@json_option
@root_option
def import_(*, source: str, name: str | None, as_json: bool, **given: Any) -> None:
    """Import a file, a folder, or a built-in dataset (digits, pydocs).

    \b
      .npy .npz              arrays; each is a column, its first axis the samples
      .csv .jsonl            numbers, texts and lists; what it is is found out
      .txt .md               text in blocks of tokens
      .parquet .tar          Parquet; WebDataset; or folders of them
      folders                images by class, Hugging Face datasets, MosaicML MDS

    What is there already with the same content is left as it is.
    """
    index = imported(source, name=name, **given)
    if as_json:
        print_json(summary(index))
        return
    shown = humane(index.sha256, "text" if is_plain(sys.stdout) else "hash", now_ns=0)
    click.echo(f"imported {index.file.dataset}: {counted(index)}, index sha256 {shown}")
    click.echo(f"look: railbus dataset show {index.file.dataset}", err=True)


@click.command()
@click.argument("name")
@click.argument("source")
@click.option("--shard-bytes", type=size_of, default="512MiB", metavar="SIZE", help="Size of shards; 512MiB.")
@click.option("--text", "text_columns", multiple=True, metavar="COLUMN", help="As for import.")
@click.option("--missing", type=click.Choice(["refuse", "fill"]), default="refuse", help="As for import.")
@click.option("--decode", type=extent_of, metavar="WxH", help="As for import.")
@click.option("--max-bytes", type=size_of, metavar="SIZE", help="As for import.")
@click.option("--split", default="train", metavar="NAME", help="Split that grows, or a new one; train if not given.")
@json_option
@root_option
def append(*, name: str, source: str, split: str, shard_bytes: int, as_json: bool, **given: Any) -> None:
    """Add the samples of a source to a dataset, as its next version.

    Older versions stay readable. Tokens and classes are those that the dataset has.

    \b
      railbus dataset append mine more.csv
    """
    from railbus.appending import append_source
    from railbus.importers.source import Options

    layout = session().layout
    before = load(layout, name)
    with progress() as report:
        options = Options(
            text_columns=frozenset(given["text_columns"]),
            missing=given["missing"],
            decode=given["decode"],
            max_bytes=given["max_bytes"],
            report=report,
            note=told,
        )
        index = append_source(layout, before, source, split=split, shard_bytes=shard_bytes, options=options)
    if as_json:
        print_json(summary(index))
        return
    new = index.file.samples - before.file.samples
    click.echo(f"appended {new} samples to {name}: version {index.file.version}, {counted(index)}")


@click.command()
@click.argument("name")
@click.option(
    "--from",
    "sources",
    required=True,
    multiple=True,
    metavar="SOURCE",
    help="What was imported, then what was appended, in order; or a copy of the dataset's folder.",
)
@import_options
@json_option
@root_option
def repair(*, name: str, sources: tuple[str, ...], as_json: bool, **given: Any) -> None:
    """Restore damaged or missing shards from their sources.

    Give the options that it was imported with: only the same samples give the same shards, and nothing else is put in
    their place.

    \b
      railbus dataset repair mine --from train.csv
      railbus dataset repair mine --from train.csv --from more.csv
      railbus dataset repair mine --from backup/datasets/mine
    """
    from railbus.verifying import damaged

    layout = session().layout
    index = load(layout, name)
    with progress() as report:
        broken = [error.details["path"] for error in damaged(layout, index, report=report)]
    if broken:
        _repaired(layout, index, sources, **given)
    if as_json:
        print_json({"dataset": name, "repaired": broken})
    elif broken:
        click.echo(f"repaired {name}: {len(broken)} of {len(index.file.shards)} shards")
    else:
        click.echo(f"{name} needs no repair: {counted(index)}")


def _repaired(layout: Layout, index: DatasetIndex, sources: tuple[str, ...], **given: Any) -> None:
    """Restore shards, with progress."""
    from railbus.repairing import AsBefore, repair_dataset

    with progress() as report:
        how = AsBefore(
            held_out_frac=given["held_out_frac"],
            shuffle=given["shuffle"],
            block=given["block"],
            shard_bytes=given["shard_bytes"],
            options=importing_options(report, **given),
        )
        repair_dataset(layout, index, sources, how=how)
