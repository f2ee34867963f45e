"""The progress of a job of several ranks: rank 0 decides as a job of one does, and the others obey (`team`)."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

from railbus_runner.channel import TrainerChannel
from railbus_runner.checkpointing.saver import Reason
from railbus_runner.checkpointing.team_saver import TeamSaver
from railbus_runner.checkpointing.team_tracked import TeamTracked
from railbus_runner.endings import Stopped
from railbus_runner.frames import Plan
from railbus_runner.progress import Progress
from railbus_runner.recorder import Recorder
from railbus_runner.team import Call, Team
from railbus_shared.layout import Layout


def parts(
    plan: Plan, *, layout: Layout, channel: TrainerChannel, recorder: Recorder, team: Team
) -> tuple[TeamTracked, TeamSaver, type[Progress]]:
    """What one rank is made of; the progress takes the saver."""
    tracked = TeamTracked(team)
    saver = TeamSaver(plan, layout=layout, tracked=tracked, channel=channel, recorder=recorder, team=team)
    return tracked, saver, LeadingProgress if team.is_leader else FollowingProgress


class _TeamProgress(Progress):
    @property
    def _team_saver(self) -> TeamSaver:
        assert isinstance(self._saver, TeamSaver)  # noqa: S101 - `parts` gives them together
        return self._saver

    @property
    def team(self) -> Team:
        return self._team_saver.team


class LeadingProgress(_TeamProgress):
    """Of rank 0."""

    def step(self, metrics: Mapping[str, object]) -> None:
        with self.team.leading("step", step=self.global_step + 1):
            super().step(metrics)

    def log(self, metrics: Mapping[str, object]) -> None:
        if self._team_saver.metric not in metrics:
            super().log(metrics)
            return
        with self.team.leading("log", step=self.global_step):
            super().log(metrics)

    def is_stopping(self) -> bool:
        with self.team.leading("stopping", step=self.global_step):
            is_stopping = super().is_stopping()
            if is_stopping:
                self.team.order("stop")
        return is_stopping

    def save(self, reason: Reason) -> None:
        with self.team.leading("save", step=self.global_step):
            super().save(reason)

    def resume(self) -> bool:
        with self.team.leading("resume", step=self.global_step):
            pass  # all are here
        return super().resume()

    def finish(self) -> bool:
        with self.team.leading("return", step=self.global_step):
            return super().finish()


class FollowingProgress(_TeamProgress):
    """Of any other rank."""

    def step(self, metrics: Mapping[str, object]) -> None:
        self.global_step += 1
        self._mark()
        self.curves.log(self.global_step, metrics)
        self.heed()
        if self._follow("step"):
            raise Stopped

    def log(self, metrics: Mapping[str, object]) -> None:
        self.curves.log(self.global_step, metrics)
        self.heed()
        if self._team_saver.metric not in metrics:
            return
        generators = self._generators
        with contextlib.nullcontext() if generators is None else self._tracked.with_generators(generators):
            self._follow("log")

    def is_stopping(self) -> bool:
        self._stop_seen = self._follow("stopping") or self._stop_seen
        return self._stop_seen

    def save(self, reason: Reason) -> None:
        del reason  # rank 0 has it
        self._follow("save")

    def resume(self) -> bool:
        self._follow("resume")
        return super().resume()

    def finish(self) -> bool:
        self.curves.flush()
        self._follow("return")
        return not self._stop_seen

    def _follow(self, call: Call) -> bool:
        """Do what rank 0 orders until it orders to go on; whether it has ordered to stop."""
        is_stopping = False
        while (order := self.team.follow(call, step=self.global_step)) != "go on":
            if order == "state":
                self._team_saver.show(step=self.global_step)
            elif order == "write":
                self._team_saver.follow()
            elif call == "stopping":
                is_stopping = True
            else:
                return True
        return is_stopping
