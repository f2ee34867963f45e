"""What the checkpoint commands share: which checkpoint is meant, and what to say of those that cannot be read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from railbus.cli.session import session
from railbus_shared.errors import CheckpointCorrupt, InvalidField

if TYPE_CHECKING:
    from collections.abc import Sequence

    from railbus.checkpoints.catalogue import Checkpoint


def warn(_path: Path, error: CheckpointCorrupt) -> None:
    """Say on stderr what is wrong with a meta."""
    click.echo(f"warning: {error.message}", err=True)


def meant(model: str, number: int | None) -> Checkpoint:
    """A model's checkpoint of this number, or its newest; or that of the path of one of its files.

    Raises ModelNotFound, CheckpointNotFound, CheckpointCorrupt, InvalidName.
    """
    from railbus.checkpoints.catalogue import at, find

    if number is None and is_path(model):
        return at(Path(model))
    return find(session().tree, model, number, damaged=warn)


def two_meant(words: Sequence[str]) -> tuple[Checkpoint, Checkpoint]:
    """The two checkpoints that words name: `MODEL [NUMBER]` or a path each; a number alone is one of the same model.

    Of one checkpoint alone, it and its parent. Raises InvalidField, and what `meant` raises.
    """
    named: list[tuple[str, int | None]] = []
    is_open = False
    """Whether the last word was a model, whose number may follow."""
    for word in words:
        is_number = word.isdecimal() and bool(named) and not is_path(named[-1][0])
        if is_number and is_open:
            named[-1] = (named[-1][0], int(word))
        elif is_number:
            named.append((named[-1][0], int(word)))
        else:
            named.append((word, None))
        is_open = not is_number and not is_path(word)
    if not 1 <= len(named) <= 2:
        raise InvalidField(
            field="checkpoints",
            value=" ".join(words),
            problem=f"these are {len(named)}, not two",
            hint="MODEL NUMBER NUMBER",
        )
    found = [meant(model, number) for model, number in named]
    return (found[0], found[1]) if len(found) == 2 else (_parent(found[0]), found[0])


def _parent(one: Checkpoint) -> Checkpoint:
    from railbus.checkpoints.catalogue import at
    from railbus_shared.layout import checkpoint_stem

    if one.meta.parent is None:
        raise InvalidField(
            field="checkpoints", value=one.title, problem="it has no parent to be compared with", hint="name two"
        )
    return at(one.path.with_name(f"{checkpoint_stem(one.meta.parent)}.meta.json"))


def is_path(word: str) -> bool:
    """Whether a word names a file rather than a model: no model's name has a slash or ends so."""
    return "/" in word or word.endswith((".pt", ".dcp", ".meta.json"))
