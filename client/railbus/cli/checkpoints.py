"""`railbus checkpoints`: the group, and its `list`. Pure files: no torch, no bus."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import click

from railbus.cli.checkpoint_names import warn
from railbus.cli.checkpoint_now import now
from railbus.cli.checkpoints_consolidate import consolidate
from railbus.cli.checkpoints_diff import diff
from railbus.cli.checkpoints_export import export
from railbus.cli.checkpoints_prune import WORDS, prune
from railbus.cli.checkpoints_show import show_checkpoint
from railbus.cli.checkpoints_verify import verify
from railbus.cli.groups import DefaultGroup
from railbus.cli.render import Cell, Column, print_json, show, to_console
from railbus.cli.session import json_option, root_option, session

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from railbus.checkpoints.catalogue import Checkpoint


@click.group(cls=DefaultGroup)
def checkpoints() -> None:
    """List, prove, compare and export checkpoints, from their files; ask for one.

    \b
      railbus checkpoints                          all, newest last
      railbus checkpoints show digits-cnn          what the newest was trained on
      railbus checkpoints verify digits-cnn        hash all files, check all links
      railbus checkpoints diff digits-cnn 3 5      what changed between two
      railbus checkpoints export digits-cnn --safetensors out.safetensors
      railbus checkpoints prune --dry-run          what is not needed any more
      railbus checkpoints consolidate gpt --pt gpt.pt
      railbus checkpoint now JOB                   have a running job write one
    """


@checkpoints.command("list")
@click.argument("model", required=False)
@click.option("--job", metavar="ID", help="Those of one job only.")
@click.option("--metric", metavar="NAME", help="Show this metric, not the one that the best are kept by.")
@click.option("--quiet", "-q", is_flag=True, help="Print the paths of the metas only.")
@json_option
@root_option
def list_checkpoints(*, model: str | None, job: str | None, metric: str | None, quiet: bool, as_json: bool) -> None:
    """List checkpoints, of one model or of all; `ls` for short."""
    from railbus.checkpoints.catalogue import known_model, model_names, read_all

    layout = session().tree
    models = [known_model(layout, model)] if model else model_names(layout)
    found = [one for name in models for one in read_all(layout, name, damaged=warn)]
    listed = [one for one in found if job is None or one.meta.job == job]
    if as_json:
        print_json([{"path": str(one.path), "meta": one.meta.to_map()} for one in listed])
    elif quiet:
        for one in listed:
            click.echo(one.path)
    elif listed:
        _show(listed, metric=metric)
    else:
        of_the_job = f" of job {job}" if job is not None else ""
        click.echo(f"no checkpoints{of_the_job} under {layout.models}", err=True)


def _show(listed: Sequence[Checkpoint], *, metric: str | None) -> None:
    names = {metric} if metric is not None else {one.meta.policy.metric for one in listed if one.meta.policy} - {None}
    title = (names.pop() or "").upper() if len(names) == 1 else "METRIC" if names else None
    has_formats = any(one.meta.format != "torch" for one in listed)
    columns = [
        Column("MODEL"),
        Column("NUMBER", "number"),
        Column("STEP", "number"),
        *([Column(title)] if title is not None else []),
        Column("SIZE", "bytes"),
        Column("WRITTEN", "time"),
        *([Column("FORMAT")] if has_formats else []),
        Column("JOB", "id"),
        Column("KEPT AS", "brief"),
    ]
    kept = _kept(listed)
    rows: list[list[Cell]] = []
    for one in listed:
        meta = one.meta
        value = [_metric(one, metric, names_it=title == "METRIC")] if title is not None else []
        form = [meta.format] if has_formats else []
        rows.append(
            [
                meta.model,
                meta.number,
                meta.step,
                *value,
                one.num_bytes,
                meta.created_at,
                *form,
                meta.job,
                kept.get(one.path),
            ]
        )
    show(columns, rows, console=to_console())


def _kept(listed: Sequence[Checkpoint]) -> dict[Path, str]:
    """Why each stays by what its job asked for, as far as files can tell; nothing of jobs that do not say."""
    from railbus.checkpoints.pruning import by_job, own_policy
    from railbus_shared.retention import retention

    told: dict[Path, str] = {}
    for model in {one.meta.model for one in listed}:
        for own in by_job(one for one in listed if one.meta.model == model).values():
            if (policy := own_policy(own)) is not None:
                kept = retention([one.meta for one in own], policy).kept
                told |= {one.path: ", ".join(WORDS[why] for why in kept.get(one.meta.number, ())) for one in own}
    return told


def _metric(one: Checkpoint, metric: str | None, *, names_it: bool) -> Cell:
    name = metric or (one.meta.policy.metric if one.meta.policy is not None else None)
    value = one.meta.metrics.get(name) if name is not None else None
    if value is None:
        return None
    return f"{name} {shown_value(value)}" if names_it else shown_value(value)


def shown_value(value: object) -> str:
    """A metric, with four digits where it is a fraction."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


for _command in (show_checkpoint, verify, diff, export, consolidate, prune, now):
    checkpoints.add_command(_command)
_ls = copy.copy(list_checkpoints)
_ls.hidden = True
checkpoints.add_command(_ls, "ls")
