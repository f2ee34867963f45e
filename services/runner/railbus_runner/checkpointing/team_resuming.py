"""From which checkpoint all ranks of a job go on: the newest that none of them finds fault with.

A spread checkpoint is hashed by all ranks together, each a share of it; any other is read and hashed by each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import cast

import torch

from railbus_runner.channel import TrainerChannel
from railbus_runner.checkpointing import loading, names, sharded
from railbus_runner.checkpointing.events import CheckpointEvents
from railbus_runner.checkpointing.loading import InMemory, Opened
from railbus_runner.checkpointing.resuming import Resuming
from railbus_runner.checkpointing.spread import Place, empty_like, is_spread, put_together, spread_like
from railbus_runner.checkpointing.store import CheckpointStore
from railbus_runner.checkpointing.team_tracked import TeamTracked
from railbus_runner.frames import Plan
from railbus_runner.team import Team
from railbus_shared.contracts.artifacts import CheckpointMeta
from railbus_shared.errors import CheckpointCorrupt


class TeamResuming(Resuming):
    """The begin of one rank of an attempt; all ranks make each call alike."""

    def __init__(
        self,
        plan: Plan,
        *,
        store: CheckpointStore,
        tracked: TeamTracked,
        channel: TrainerChannel,
        events: CheckpointEvents,
        team: Team,
    ) -> None:
        super().__init__(plan, store=store, tracked=tracked, channel=channel, events=events)
        self._own_tracked = tracked
        self._team = team

    def tidy(self) -> None:
        """As of one rank; rank 0 alone does it."""
        if self._team.is_leader:
            super().tidy()

    def resume(self) -> CheckpointMeta | None:
        opened = self._newest_for_all()
        self._miss_recorded(opened)
        if opened is None and (named := self._plan.spec.resume_from) is not None:
            opened = self._open(sharded.alike(self._team, lambda: self._store.named(named)))
        if opened is None:
            return None
        with opened:
            self._own_tracked.take_own_view(opened.state)
            return self._restore(opened)

    def _newest_for_all(self) -> Opened | None:
        metas: Iterator[CheckpointMeta] = iter(())
        if self._team.is_leader:
            metas = iter(self._store.own_metas(rejected=self._reject))
        while (said := self._team.told(_next(metas))) is not None:
            meta = CheckpointMeta.parse(said)
            try:
                return self._open(meta)
            except CheckpointCorrupt as exc:
                self._reject(meta.number, exc)
        return None

    def _open(self, meta: CheckpointMeta) -> Opened:
        """A checkpoint, its tensors spread as those in use are; raises on every rank what any finds wrong with it."""
        mine: list[Opened] = []
        live = LiveTensors(self._own_tracked.parts)

        def open_mine() -> Opened:
            mine.append(self._opened_here(meta, live))
            return mine[0]

        try:
            return sharded.alike(self._team, open_mine)
        except CheckpointCorrupt:
            for opened in mine:
                opened.file.close()
            raise

    def _opened_here(self, meta: CheckpointMeta, live: LiveTensors) -> Opened:
        folder = self._store.folder
        if meta.format == "torch":
            opened = loading.open_checkpoint(folder, meta, live=_none_live if live.is_spread else self._live)
            if not live.is_spread:
                return opened
            with opened:
                return Opened(meta, InMemory(spread_like(live, opened.read())))
        if (error := sharded.verify_files(folder, meta.files, team=self._team)) is not None:
            raise error
        parts = sharded.parts_path(folder, meta.number)
        common = sharded.alike(self._team, lambda: sharded.read_common(parts))
        state, tensors = put_together(common, target=empty_like(live))
        sharded.read_parts(parts, tensors, proven=meta.files, team=self._team)
        return loading.as_stated(Opened(meta, InMemory(state)), folder)


class LiveTensors:
    """Tells how the tensors in use lie: of a model those of its state, of an optimizer the parameters that it steps."""

    def __init__(self, parts: Mapping[str, object]) -> None:
        self._tensors: dict[Place, torch.Tensor] = {}
        self._params: dict[Place, torch.Tensor] = {}
        for name, part in parts.items():
            if isinstance(part, torch.nn.Module):
                state = cast("Mapping[str, object]", names.plain_state(part))
                self._tensors |= {
                    ("parts", name, key): value for key, value in state.items() if isinstance(value, torch.Tensor)
                }
            elif isinstance(part, torch.optim.Optimizer):
                groups = [cast("list[torch.Tensor]", group["params"]) for group in part.param_groups]
                params = (param for group in groups for param in group)
                self._params |= {("parts", name, "state", number): param for number, param in enumerate(params)}
        self.is_spread = is_spread([*self._tensors.values(), *self._params.values()])

    def __call__(self, place: Place) -> torch.Tensor | None:
        """The one at a place of a state, or that it belongs to."""
        return self._tensors.get(place, self._params.get(place[:-1]))


def _none_live(_meta: CheckpointMeta) -> tuple[str, ...]:
    return ()


def _next(metas: Iterator[CheckpointMeta]) -> dict[str, object] | None:
    meta = next(metas, None)
    return None if meta is None else meta.to_map()
