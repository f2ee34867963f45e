"""What a trainer does about checkpoints between its steps: writes those that are due, asked for, or last, and what it
does when there is no room, no time, or an evaluation that is worth keeping.

Out: saving; the events `checkpoint.failed`, `.paused` and `.skipped`. How one is written is the saver's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Final

from pydantic import JsonValue

from railbus_runner.channel import TrainerChannel
from railbus_runner.checkpointing.policy import Schedule
from railbus_runner.checkpointing.room import LOOK_S, Room
from railbus_runner.checkpointing.saver import NotSaved, Reason, Saved, Saver
from railbus_runner.checkpointing.tracked import Tracked
from railbus_runner.failures import error_body
from railbus_runner.frames import Paused, Saving, Stop
from railbus_runner.moving import Pulse
from railbus_runner.recorder import Recorder
from railbus_shared import clock
from railbus_shared.contracts.jobs import CheckpointPolicy, JobSpec
from railbus_shared.errors import Conflict, RailbusError, StorageFull
from railbus_shared.layout import checkpoint_stem
from railbus_shared.retention import metric_value, would_be_best

Metrics = Mapping[str, JsonValue]

_TRACK: Final = "call ctx.track(model=model) in the entrypoint"


class Keeper:
    """Of one attempt."""

    def __init__(
        self,
        spec: JobSpec,
        *,
        room: Room,
        saver: Saver,
        tracked: Tracked,
        channel: TrainerChannel,
        recorder: Recorder,
        pulse: Pulse,
    ) -> None:
        self._spec = spec
        self._room = room
        self._tracked = tracked
        self._saver = saver
        self._channel = channel
        self._recorder = recorder
        self._pulse = pulse
        self._schedule = Schedule(spec.checkpoint, now_s=time.monotonic())
        self._num_told = 0  # of the orders to save
        self._last: int | None = None
        self._is_ready = False  # for what will be due
        self._is_lost = False  # the last one, with its writer: the next step writes one again

    @property
    def _policy(self) -> CheckpointPolicy:
        return self._spec.checkpoint

    # --- between two steps -------------------------------------------------------------------------------------------

    def resumed(self, step: int) -> None:
        """The attempt goes on from a checkpoint of this step."""
        self._schedule.resumed(step, now_s=time.monotonic())

    def has_news(self, step: int) -> bool:
        """Whether a checkpoint of this step would hold something that the last one does not."""
        return bool(self._tracked.parts) and self._schedule.has_news(step)

    def heed(self, step: int, metrics: Callable[[], Metrics]) -> None:
        """After a step: what has become of one that is written beside the loop, and what the next one needs.

        Raises CommitRefused, and what the disk refused, as `save` does.
        """
        self._saver.heed()
        error = self._take_results()
        if error is not None:
            self._bear(error, "policy", step=step, metrics=metrics())
        if not self._is_ready and self._tracked.parts and self._schedule.is_near(now_s=time.monotonic()):
            self._is_ready = True
            self._saver.prepare(step=step)

    def wanted(self, step: int) -> Reason | None:
        """Why a checkpoint is to be written after this step, if one is."""
        if not self._tracked.parts:
            return None
        if self._channel.save_requested:
            return "request"
        if self._is_lost and self._schedule.has_news(step):
            return "policy"
        if not self._room.is_full:
            return "policy" if self._schedule.is_due(step, now_s=time.monotonic()) else None
        return "policy" if self._schedule.has_news(step) and self._room.has_room() else None

    def refuse(self, step: int) -> None:
        """Answer an order that cannot be obeyed, because nothing is tracked."""
        if self._channel.save_requested:
            self._channel.save_requested = False
            self._answer(step, Conflict("nothing is tracked, so there is nothing to save", hint=_TRACK))

    def save(self, reason: Reason, *, step: int, metrics: Metrics, is_awaited: bool = False) -> None:
        """Write a checkpoint, or do without as the policy says where there is no room: then a later one is tried.

        One that is awaited is durable when this returns, if there is room. Raises StorageFull with `on_full: fail`.
        """
        if reason == "policy" and self._saver.is_busy and self._policy.when_busy == "skip":
            self._schedule.skipped(now_s=time.monotonic())
            self._recorder.record("checkpoint.skipped", step=step, data={"why": "busy", "model": self._spec.model})
            return
        error = self._try(reason, step=step, metrics=metrics, is_awaited=is_awaited)
        if error is not None:
            self._bear(error, reason, step=step, metrics=metrics)

    def _bear(self, error: StorageFull, reason: Reason, *, step: int, metrics: Metrics) -> None:
        """There is no room: go on without, wait for it, or end, as the policy says."""
        if self._policy.on_full == "fail":
            raise error
        if self._policy.on_full == "pause":
            self._pause(error, reason, step=step, metrics=metrics)

    def is_worth_keeping(self, value: JsonValue, *, step: int) -> bool:
        """Whether a checkpoint of this very state would be among the best by the policy's metric.

        Not if one of this step has a value of it: an evaluation that is run again tells nothing new.
        """
        name = self._policy.metric
        if name is None or not self._tracked.parts or (number := metric_value({name: value}, name)) is None:
            return False
        metas = self._saver.metas()
        if any(meta.step == step and metric_value(meta.metrics, name) is not None for meta in metas):
            return False
        return would_be_best(number, metas, self._policy)

    # --- at the end --------------------------------------------------------------------------------------------------

    def finish(self, *, step: int, metrics: Metrics) -> None:
        """Write the last checkpoint, if there is news; raises StorageFull if there is no room for the job's grace."""
        self.settle()
        if not self.has_news(step):
            return
        until_s = clock.boottime_s() + self._spec.stop_grace_s
        if (error := self._try_until(until_s, "end", step=step, metrics=metrics)) is not None:
            raise error

    def stop(self, order: Stop, *, step: int, metrics: Metrics) -> None:
        """Write the last checkpoint before the attempt ends as it was told to, if it can be durable in time.

        Else the job relies on an older one, or on the one that is being written, which its writer finishes.
        """
        until_s = order.deadline_boottime_s or clock.boottime_s() + self._spec.stop_grace_s
        if self._is_too_late(until_s, step):
            self.settle()
            return
        self.settle()
        if not self.has_news(step) or self._is_too_late(until_s, step):
            return
        error = self._try_until(until_s - LOOK_S, "stop", step=step, metrics=metrics)  # with time left to say so
        if error is not None and self._policy.on_full == "fail":
            raise error

    def _try_until(self, until_s: float, reason: Reason, *, step: int, metrics: Metrics) -> StorageFull | None:
        """Try as long as there is no room and still time; gives the last error."""
        while (error := self._try(reason, step=step, metrics=metrics, is_awaited=True)) is not None:
            while not self._room.has_room():
                if clock.boottime_s() >= self._until(until_s):
                    return error
                self._wait()
        return None

    def _until(self, until_s: float) -> float:
        """Sooner, where the runner says so meanwhile."""
        stop = self._channel.stop
        if stop is None or stop.deadline_boottime_s is None:
            return until_s
        return min(until_s, stop.deadline_boottime_s - LOOK_S)

    # --- steps -------------------------------------------------------------------------------------------------------

    def settle(self) -> float:
        """Wait for one that is being written beside the loop; gives the seconds waited. Raises CommitRefused."""
        waited_s = self._saver.settle()
        self._take_results()
        return waited_s

    def _try(self, reason: Reason, *, step: int, metrics: Metrics, is_awaited: bool) -> StorageFull | None:
        """Begin one, after the one before; None if it is written, or being written."""
        waited_s = self.settle()
        self._channel.save_requested = self._is_lost = False
        self._answer(step)
        self._schedule.begun(step, now_s=time.monotonic())
        try:
            self._saver.save(reason, step=step, metrics=metrics, is_awaited=is_awaited, waited_s=waited_s)
        except StorageFull as exc:
            self._failed(exc, step=step)
            return exc
        except RailbusError as exc:
            self._answer(step, exc)
            raise
        return self._take_results()

    def _take_results(self) -> StorageFull | None:
        """Take to heart what has become of those that were begun; the error if one found no room.

        Raises what else one came to nothing for.
        """
        full: StorageFull | None = None
        for result in self._saver.take_results():
            match result:
                case Saved():
                    self._last = result.number
                    self._schedule.durable(result.step, seconds=result.seconds)
                    self._room.written(result.bytes)
                case NotSaved(is_lost=True):
                    self._schedule.failed()
                    self._is_lost = True
                case NotSaved(error=StorageFull() as full):
                    self._failed(full, step=result.step)
                case NotSaved():
                    self._schedule.failed()
                    self._answer(result.step, result.error)
                    raise result.error
        return full

    def _failed(self, error: StorageFull, *, step: int) -> None:
        """Told once for each stretch; whoever asked for this one is told in any case."""
        self._answer(step, error)
        self._schedule.failed()
        needed = error.details.get("needed_bytes")
        if self._room.failed(needed if isinstance(needed, int) else None):
            self._tell("failed", step, error=error.to_wire())

    def _pause(self, told: StorageFull, reason: Reason, *, step: int, metrics: Metrics) -> None:
        """Take no step until there is room and the checkpoint is written, or the attempt is to end."""
        self._tell("paused", step)
        self._channel.send(Paused(reason=f"paused for storage: {told.message}"))
        while self._channel.stop is None:
            if self._channel.save_requested:
                self._channel.save_requested = False
                self._answer(step, StorageFull("the job is paused: there is no room for a checkpoint"))
            if self._room.has_room() and self._try(reason, step=step, metrics=metrics, is_awaited=True) is None:
                return
            self._wait()

    def _wait(self) -> None:
        """For orders, or a second; a trainer that waits for room does not hang."""
        self._pulse.beat()
        self._recorder.flush()
        self._channel.wait(timeout_s=LOOK_S)

    def _is_too_late(self, until_s: float, step: int) -> bool:
        """Whether what is new cannot be durable in time; that is told."""
        left_s = until_s - clock.boottime_s()
        if not self.has_news(step) or self._schedule.fits(left_s):
            return False
        told: dict[str, object] = {
            "left_s": round(left_s, 3),
            "expected_s": self._schedule.expected_s,
            "relies_on": None if self._last is None else checkpoint_stem(self._last),
            "is_writing": self._saver.is_busy,
        }
        self._recorder.record("checkpoint.skipped", step=step, severity="warning", data={"why": "too_late", **told})
        self._recorder.flush()
        return True

    def _answer(self, step: int, error: RailbusError | None = None) -> None:
        """Tell whoever waits for a checkpoint: that of this step is theirs, or cannot be written."""
        number = self._channel.save_number
        if number > (self._num_told if error is None else 0):
            self._num_told = number
            body = error_body(error) if error is not None else None
            self._channel.send(Saving(number=number, step=step, error=body))

    def _tell(self, what: str, step: int, **data: object) -> None:
        room = {"needed_bytes": self._room.needed_bytes, "free_bytes": self._room.free_bytes}
        told = {"model": self._spec.model, "on_full": self._policy.on_full, **room, **data}
        self._recorder.record(f"checkpoint.{what}", step=step, severity="warning", data=told)
        self._recorder.flush()
