"""`railbus checkpoints consolidate`: one file of a checkpoint that several ranks have written."""

from __future__ import annotations

from pathlib import Path

import click

from railbus.cli.checkpoint_names import meant
from railbus.cli.render import print_json, say, size, to_console
from railbus.cli.session import json_option, root_option
from railbus_shared.errors import ConfigError


@click.command()
@click.argument("model")
@click.argument("number", required=False, type=int)
@click.option("--pt", "target", required=True, type=click.Path(path_type=Path), metavar="OUT",
              help="The file to write; it must not exist.")  # fmt: skip
@json_option
@root_option
def consolidate(*, model: str, number: int | None, target: Path, as_json: bool) -> None:
    """Write a checkpoint of several ranks (a .dcp folder) as one ordinary .pt file.

    The checkpoint is verified before, and the file written whole or not at all. It holds what the .pt of a job in one
    process holds; for that the whole state comes into memory once. Needs torch, as no other of these commands does.

    \b
      railbus checkpoints consolidate gpt 3 --pt gpt.pt
    """
    try:
        from railbus_runner.checkpointing.consolidating import consolidate as write
    except ModuleNotFoundError as exc:
        raise ConfigError(
            f"tensors of several ranks are put together by torch: {exc}", hint="pip install 'railbus[runner]'"
        ) from exc

    one = meant(model, number)
    done = write(one.path.parent, one.meta, target)
    if as_json:
        print_json({"checkpoint": one.title, "path": str(done.path), "bytes": done.num_bytes, "sha256": done.sha256})
        return
    say(
        f"consolidated {one.title} into {done.path}: {size(done.num_bytes)}, sha256 {done.sha256}", console=to_console()
    )
