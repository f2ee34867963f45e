"""Checkpoints of a job of several ranks: one for all of them, of one step, that every rank goes on from.

Where no tensor is spread, rank 0 writes an ordinary `.pt` as if it were alone, and the others go on at once. Where
tensors are (FSDP2), each rank writes its part (`sharded`), and all wait until the checkpoint is durable. Rank 0 alone
has a number, speaks to the runner, tells events and lets older checkpoints go.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, cast

from pydantic import JsonValue

from railbus_runner.channel import TrainerChannel
from railbus_runner.checkpointing import sharded
from railbus_runner.checkpointing.saver import Reason, Saved, Saver
from railbus_runner.checkpointing.spread import is_spread
from railbus_runner.checkpointing.team_resuming import TeamResuming
from railbus_runner.checkpointing.team_tracked import TeamTracked
from railbus_runner.checkpointing.writing import described
from railbus_runner.endings import CommitRefused
from railbus_runner.frames import Plan
from railbus_runner.recorder import Recorder
from railbus_runner.team import Team
from railbus_shared import files
from railbus_shared.contracts.artifacts import CheckpointFile, CheckpointMeta
from railbus_shared.errors import RailbusError, error_from_wire
from railbus_shared.layout import Layout

Describe = Callable[[int, tuple[CheckpointFile, ...]], CheckpointMeta]


class TeamSaver(Saver):
    """Checkpoints of one rank of an attempt: rank 0 calls `save`, and by its orders the others do theirs."""

    def __init__(
        self,
        plan: Plan,
        *,
        layout: Layout,
        tracked: TeamTracked,
        channel: TrainerChannel,
        recorder: Recorder,
        team: Team,
    ) -> None:
        super().__init__(plan, layout=layout, tracked=tracked, channel=channel, recorder=recorder)
        self._shown: dict[str, object] = {}
        self._resuming = TeamResuming(
            plan, store=self._store, tracked=tracked, channel=channel, events=self._events, team=team
        )
        self.team = team
        self.metric = plan.spec.checkpoint.metric
        """By which checkpoints are kept; what is told of it is told by all ranks alike."""

    def prepare(self, *, step: int) -> None:
        """A spread state is written by all ranks, and by no writer."""
        if not self._is_spread():
            super().prepare(step=step)

    def save(
        self, reason: Reason, *, step: int, metrics: Mapping[str, JsonValue], is_awaited: bool, waited_s: float = 0.0
    ) -> None:
        """As of one rank; what goes wrong with a spread state on any rank is raised here."""
        if not self._is_spread():
            super().save(reason, step=step, metrics=metrics, is_awaited=is_awaited, waited_s=waited_s)
            return
        began_s = time.monotonic()
        self._ensure_schema()
        fields = {**self._fields(reason, step=step, metrics=metrics), "format": "dcp"}
        meta = self._lead_writing(
            self._tracked.state(step=step), lambda number, written: described(fields, number, written)
        )
        nbytes = sum(file.bytes for file in meta.files)
        order = self._order(fields, step=step, nbytes=nbytes, began_s=began_s, waited_s=waited_s)
        self._writing.finish(meta, order)
        self._saved(Saved(meta.number, step, nbytes, time.monotonic() - began_s))

    def _is_spread(self) -> bool:
        return any(is_spread(part.state_dict()) for part in self._tracked.parts.values())

    def show(self, *, step: int) -> None:
        """Let rank 0 have what this one has for itself."""
        self._shown = self._tracked.state(step=step)

    def follow(self) -> None:
        """Write this rank's part of what was shown; what goes wrong with it, rank 0 knows and decides about."""
        state, self._shown = self._shown, {}
        try:
            number = _checked(self.team.told(None))["number"]
            final = sharded.parts_path(self._store.folder, cast("int", number))
            sharded.write_parts(files.temporary_path(final), state, final=final.name, team=self.team)
            _checked(self.team.told(None))
        except RailbusError:
            return

    def _lead_writing(self, state: dict[str, object], describe: Describe) -> CheckpointMeta:
        """Two words to the others: the number, and whether the checkpoint came to be; or why not, instead of either."""
        self.team.order("write")
        is_awaited = True  # the others wait for a word, and not for what all of them do

        def produce(number: int) -> tuple[CheckpointFile, ...]:
            nonlocal is_awaited
            final = sharded.parts_path(self._store.folder, number)
            draft = files.temporary_path(final)
            with files.storage_errors(draft):
                draft.mkdir()
            self.team.told({"number": number})
            is_awaited = False
            written = sharded.write_parts(draft, state, final=final.name, team=self.team)
            is_awaited = True
            sharded.publish_folder(draft, final)
            return written

        try:
            meta = self._store.write_files(produce, describe=describe, commit=self._writing.commit)
        except (RailbusError, CommitRefused) as exc:
            if is_awaited:
                self.team.told({"error": (exc.error if isinstance(exc, CommitRefused) else exc).to_wire()})
            raise
        self.team.told({})
        return meta


def _checked(word: dict[str, Any] | None) -> dict[str, object]:
    """Of rank 0; raises what kept it from writing."""
    assert word is not None  # noqa: S101 - it never says nothing
    if "error" in word:
        raise error_from_wire(word["error"])
    return word
