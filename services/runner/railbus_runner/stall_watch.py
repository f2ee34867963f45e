"""Tells of a trainer that makes no progress, with the stacks of its threads."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from railbus_runner import stalling
from railbus_runner.claim import Claim
from railbus_runner.processes import ProcessId
from railbus_runner.stacks import StacksFile, take_stacks


class StallWatch:
    """Over one trainer, where its job has a `stall_s`."""

    def __init__(self, claim: Claim, *, is_waiting: Callable[[], bool], ended: Callable[[str], None]) -> None:
        """Two callbacks.

        Args:
            is_waiting: whether the trainer waits for railbus.
            ended: given the stacks of a trainer that is to end because it has stalled.
        """
        self._claim = claim
        self._spec = claim.record.spec
        self._is_waiting = is_waiting
        self._ended = ended
        self._clock = stalling.StallClock(self._spec.stall_s or 0.0, time.monotonic())
        self.file = StacksFile()

    def moved(self) -> None:
        """The trainer has made progress."""
        self._clock.moved(time.monotonic())

    async def run(self, trainer: ProcessId) -> None:
        """Watch until cancelled."""
        if self._spec.stall_s is None:
            return
        self.moved()
        await stalling.watch(
            self._clock, now_s=time.monotonic, is_waiting=self._is_waiting, stalled=lambda: self._stalled(trainer)
        )

    def close(self) -> None:
        self.file.close()

    async def _stalled(self, trainer: ProcessId) -> None:
        stacks = await asyncio.to_thread(take_stacks, trainer, self.file)
        is_over = not self._clock.is_told  # it has moved while its stacks were taken
        on_stall = "report" if is_over else self._spec.on_stall
        told = {"stall_s": self._spec.stall_s, "pid": trainer.pid, "stacks": stacks, "on_stall": on_stall}
        self._claim.event("job.stalled", told, severity="warning")
        if on_stall == "end":
            self._ended(stacks)
