"""`railbus checkpoints`: what the metas say, and whether the bytes agree. Pure files: no torch, no bus."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from railbus.cli import exit_codes
from railbus.cli.checkpoint_now import now
from railbus.cli.groups import DefaultGroup
from railbus.cli.render import Cell, Column, print_json, show, show_pairs, size, to_console
from railbus.cli.session import json_option, root_option, session
from railbus_shared.errors import CheckpointCorrupt, CheckpointNotFound, ModelNotFound, WireError

if TYPE_CHECKING:
    from railbus_shared.contracts.artifacts import CheckpointMeta
    from railbus_shared.layout import Layout

_META: Final = "checkpoint-*.meta.json"
_COLUMNS: Final = (
    Column("MODEL"),
    Column("NUMBER", "number"),
    Column("STEP", "number"),
    Column("SIZE", "bytes"),
    Column("WRITTEN", "time"),
    Column("JOB", "id"),
    Column("SHA256", "hash"),
)


@dataclass(frozen=True)
class Checkpoint:
    """A meta and where it lies."""

    path: Path
    meta: CheckpointMeta

    @property
    def num_bytes(self) -> int:
        return sum(file.bytes for file in self.meta.files)

    @property
    def name(self) -> str:
        return self.path.name.removesuffix(".meta.json")


@click.group(cls=DefaultGroup)
def checkpoints() -> None:
    """List, show and verify checkpoints, from their files; ask for one.

    \b
      railbus checkpoints                          all, newest last
      railbus checkpoints digits-cnn               those of a model
      railbus checkpoints verify digits-cnn        hash every file
      railbus checkpoint now JOB                   have a running job write one
    """


checkpoints.add_command(now)


@checkpoints.command("list")
@click.argument("model", required=False)
@click.option("--quiet", "-q", is_flag=True, help="Print the paths of the metas only.")
@json_option
@root_option
def list_checkpoints(*, model: str | None, quiet: bool, as_json: bool) -> None:
    """List checkpoints, of one model or of all."""
    layout = session().layout
    models = [known_model(layout, model)] if model else model_names(layout)
    found = [checkpoint for name in models for checkpoint in read_all(layout, name)]
    if as_json:
        print_json([{"path": str(one.path), "meta": one.meta.to_map()} for one in found])
    elif quiet:
        for one in found:
            click.echo(one.path)
    elif found:
        show(_COLUMNS, [_row(one) for one in found], console=to_console())
    else:
        click.echo(f"no checkpoints under {layout.models}", err=True)


@checkpoints.command("show")
@click.argument("model")
@click.argument("number", required=False, type=int)
@json_option
@root_option
def show_checkpoint(*, model: str, number: int | None, as_json: bool) -> None:
    """Show one checkpoint of a model: by its NUMBER, or the newest."""
    layout = session().layout
    one = pick(read_all(layout, known_model(layout, model)), model=model, number=number)
    if as_json:
        print_json({"path": str(one.path), "meta": one.meta.to_map()})
        return
    show_pairs(_pairs(one), console=to_console())


@checkpoints.command("verify")
@click.argument("model")
@click.argument("number", required=False, type=int)
@json_option
@root_option
def verify(*, model: str, number: int | None, as_json: bool) -> int:
    """Hash every file of a model's checkpoints, and compare with what the metas say."""
    layout = session().layout
    found = list(read_all(layout, known_model(layout, model)))
    chosen = [pick(found, model=model, number=number)] if number is not None else found
    results = [(one, fault(one)) for one in chosen]
    if as_json:
        print_json([{"checkpoint": one.name, "error": bad.to_wire() if bad else None} for one, bad in results])
    else:
        rows = [
            [one.name, "damaged" if bad else "valid", bad.message if bad else one.meta.files[0].sha256]
            for one, bad in results
        ]
        columns = (Column("CHECKPOINT", "id"), Column("STATE", "state"), Column("SHA256 OR FAULT"))
        show(columns, rows, console=to_console())
    return exit_codes.INVALID_INPUT if any(bad for _, bad in results) else exit_codes.OK


def model_names(layout: Layout) -> list[str]:
    """Models that have a folder of checkpoints."""
    return sorted(
        path.parent.name for path in layout.models.glob("*/checkpoints") if not path.parent.name.startswith(".")
    )


def known_model(layout: Layout, name: str) -> str:
    """The name itself; raises ModelNotFound with the nearest one, InvalidName."""
    if layout.checkpoints(name).is_dir():
        return name
    known = model_names(layout)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(known) or 'none'}"
    raise ModelNotFound(f"model has value {name!r}: it has no checkpoints under {str(layout.models)!r}", hint=hint)


def read_all(layout: Layout, model: str) -> Iterator[Checkpoint]:
    """A model's checkpoints, oldest first; one whose meta is no meta is said and left out."""
    from railbus_shared.layout import checkpoint_number

    numbered = [(checkpoint_number(path.name), path) for path in layout.checkpoints(model).glob(_META)]
    for _, path in sorted((number, path) for number, path in numbered if number is not None):
        try:
            yield Checkpoint(path, read_meta(path))
        except CheckpointCorrupt as exc:
            click.echo(f"warning: {exc.message}", err=True)
        except FileNotFoundError:
            continue  # a newer one has replaced it just now


def read_meta(path: Path) -> CheckpointMeta:
    """Raises CheckpointCorrupt if it is no meta."""
    from railbus_shared.contracts.artifacts import CheckpointMeta

    try:
        return CheckpointMeta.parse(json.loads(path.read_bytes()))
    except (ValueError, WireError) as exc:
        raise CheckpointCorrupt(path=str(path), expected="a valid meta", actual=str(exc)) from exc


def pick(found: Iterator[Checkpoint] | list[Checkpoint], *, model: str, number: int | None) -> Checkpoint:
    """The one of this number, or the newest; raises CheckpointNotFound."""
    listed = list(found)
    chosen = [one for one in listed if number is None or one.meta.number == number]
    if chosen:
        return chosen[-1]
    known = ", ".join(str(one.meta.number) for one in listed[-10:])
    what = f"has no checkpoint {number}" if number is not None else "has no checkpoint"
    raise CheckpointNotFound(f"model {model!r} {what}", hint=f"there are: {known}" if known else "train it first")


def fault(one: Checkpoint) -> CheckpointCorrupt | None:
    """What is wrong with a checkpoint's files; None if every size and hash is as the meta says."""
    from railbus_shared.files import sha256_file

    for file in one.meta.files:
        path = one.path.parent / file.file
        try:
            actual_bytes = path.stat().st_size
            if actual_bytes != file.bytes:
                return CheckpointCorrupt(path=str(path), expected=f"{file.bytes} bytes", actual=f"{actual_bytes} bytes")
            actual = sha256_file(path)
        except FileNotFoundError:
            return CheckpointCorrupt(path=str(path), expected=file.sha256, actual="no such file")
        if actual != file.sha256:
            return CheckpointCorrupt(path=str(path), expected=file.sha256, actual=actual)
    return None


def _row(one: Checkpoint) -> list[Cell]:
    meta = one.meta
    return [
        meta.model,
        meta.number,
        meta.step,
        one.num_bytes,
        meta.created_at,
        meta.job,
        meta.files[0].sha256,
    ]


def _pairs(one: Checkpoint) -> dict[str, Cell]:
    meta = one.meta
    return {
        "checkpoint": str(one.path.with_name(meta.files[0].file)),
        "sha256": meta.files[0].sha256,
        "size": size(one.num_bytes),
        "model": meta.model,
        "step": meta.step,
        "epoch": meta.epoch,
        "samples seen": meta.samples_seen,
        "job": f"{meta.job}, attempt {meta.attempt}, lease epoch {meta.lease_epoch}",
        "dataset": f"{meta.dataset}, index {meta.index_sha256}",
        "devices": ", ".join(meta.devices),
        "metrics": ", ".join(f"{name} {value}" for name, value in meta.metrics.items()),
        "libraries": ", ".join(f"{name} {version}" for name, version in meta.libraries.items()),
        "git commit": meta.git_commit,
        "parent": meta.parent,
        "written": meta.created_at,
        "because of": meta.reason,
    }
