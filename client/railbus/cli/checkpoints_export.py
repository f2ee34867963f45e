"""`railbus checkpoints export`: weights for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from railbus.cli.checkpoint_names import meant
from railbus.cli.progress import progress
from railbus.cli.render import print_json, say, size, to_console
from railbus.cli.session import json_option, root_option

if TYPE_CHECKING:
    from railbus.checkpoints.catalogue import Checkpoint
    from railbus.checkpoints.weights import Exported


@click.command()
@click.argument("model")
@click.argument("number", required=False, type=int)
@click.option("--safetensors", "target", required=True, type=click.Path(path_type=Path), metavar="OUT",
              help="The file to write; it must not exist.")  # fmt: skip
@click.option("--part", default="model", show_default=True, metavar="NAME", help="What was tracked under this name.")
@click.option("--all", "everything", is_flag=True, help="Every tensor, with the optimizer's and the generators'.")
@click.option(
    "--only", "patterns", multiple=True, metavar="PATTERN", help="Names as in a shell: 'encoder.*'; repeat it."
)
@json_option
@root_option
def export(
    *,
    model: str,
    number: int | None,
    target: Path,
    part: str,
    everything: bool,
    patterns: tuple[str, ...],
    as_json: bool,
) -> None:
    """Write weights as a file of safetensors.

    The checkpoint is verified before, and the file written whole or not at all. Its metadata names the checkpoint, the
    job and the dataset, with their hashes. Of tied weights one name is kept; the metadata says what others stand for.

    \b
      railbus checkpoints export digits-cnn --safetensors out.safetensors
      railbus checkpoints export digits-cnn 3 --safetensors head --only 'head.*'
    """
    from railbus.checkpoints.weights import Wish, export_safetensors

    one = meant(model, number)
    wish = Wish(part=None if everything else part, patterns=patterns)
    with progress() as report:
        done = export_safetensors(one, target, wish, report=report)
    if as_json:
        print_json({
            "checkpoint": one.title, "path": str(done.path), "tensors": done.num_tensors, "bytes": done.num_bytes,
            "sha256": done.sha256, "tied": done.tied,
        })  # fmt: skip
        return
    say(_told(one, done), console=to_console())


def _told(one: Checkpoint, done: Exported) -> str:
    count = len(done.tied)
    tied = f", {count} more {'name is' if count == 1 else 'names are'} tied to them" if count else ""
    return (
        f"exported {done.num_tensors} tensors of {one.title} to {done.path}{tied}: "
        f"{size(done.num_bytes)}, sha256 {done.sha256}"
    )
