"""The progress of an attempt: counts steps, tells metrics, obeys the runner's orders, has checkpoints written.

Everything here happens between two steps of the user's loop, on its thread; a step costs a few microseconds when
nothing is due.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Final

from railbus_runner.channel import TrainerChannel
from railbus_runner.checkpointing.saver import Reason, Saver
from railbus_runner.checkpointing.tracked import Tracked
from railbus_runner.curves import Curves
from railbus_runner.endings import Stopped
from railbus_runner.failures import error_body
from railbus_runner.frames import Saving
from railbus_runner.moving import Pulse
from railbus_runner.recorder import Recorder
from railbus_shared import clock
from railbus_shared.errors import Conflict, RailbusError

_TRACK: Final = "call ctx.track(model=model) in the entrypoint"


class Progress:
    """What has been done and what is asked.

    Attributes:
        global_step: optimizer steps of the job, those of earlier attempts that count included.
        is_resumed: whether `resume` was called, with or without a checkpoint to go on from.
    """

    def __init__(
        self,
        *,
        channel: TrainerChannel,
        recorder: Recorder,
        saver: Saver,
        tracked: Tracked,
        pulse: Pulse,
        began_s: float,
    ) -> None:
        self.global_step = 0
        self.is_resumed = False
        self.curves = Curves(recorder)
        self._channel = channel
        self._recorder = recorder
        self._saver = saver
        self._tracked = tracked
        self._pulse = pulse
        self._began_s = began_s
        self._has_stepped = False
        self._stop_seen = False
        self._num_told = 0  # of the orders to save

    def step(self, metrics: Mapping[str, object]) -> None:
        """End an optimizer step; raises Stopped once a Stop was obeyed."""
        self.global_step += 1
        if not self._has_stepped:
            self._has_stepped = True
            self._tell_first_step()
        self.curves.log(self.global_step, metrics)
        self._pulse.beat()
        self._obey()

    def log(self, metrics: Mapping[str, object]) -> None:
        """Metrics that belong to no single step."""
        self.curves.log(self.global_step, metrics)
        self._pulse.beat()
        self._recorder.flush_if_due()

    def heed(self) -> None:
        """Between batches of any stream, also where no step is taken: notice orders and a dead runner."""
        self._pulse.beat()
        self._channel.poll()
        self._recorder.flush_if_due()

    def is_stopping(self) -> bool:
        """Whether the trainer is asked to end; who has seen it and returns has stopped, not succeeded."""
        self._channel.poll()
        self._stop_seen = self._stop_seen or self._channel.stop is not None
        return self._stop_seen

    def save(self, reason: Reason) -> None:
        """Write a checkpoint now; raises ValueError if nothing is tracked."""
        if not self._tracked.parts:
            raise ValueError("nothing is tracked, so there is nothing to save: call ctx.track(model=model) before")
        self.curves.flush()
        self._tell_saving()
        try:
            self._saver.save(reason, step=self.global_step, metrics=self.curves.latest)
        except RailbusError as exc:
            self._tell_saving(exc)
            raise

    def resume(self) -> bool:
        """Go on from the newest valid checkpoint, if there is one; raises ValueError if nothing is tracked."""
        if not self._tracked.parts:
            raise ValueError("nothing is tracked, so nothing can be resumed: call ctx.track(model=model) before")
        self.is_resumed = True
        step = self._saver.resume()
        self.global_step = step if step is not None else self.global_step
        return step is not None

    def finish(self) -> bool:
        """The entrypoint has returned: tell and save what is left; False if it returned because of a Stop."""
        self.curves.flush()
        if self._saver.has_news(self.global_step):
            self.save("stop" if self._stop_seen else "end")
        return not self._stop_seen

    def _obey(self) -> None:
        self._channel.poll()
        self._keep_within_lease()
        if self._channel.stop is not None:
            self._stop()
        if self._channel.save_requested:
            self._save_as_asked()
        elif self._saver.is_due(self.global_step):
            self.save("policy")
        self._recorder.flush_if_due()

    def _save_as_asked(self) -> None:
        if self._tracked.parts:
            self.save("request")
        else:
            self._tell_saving(Conflict("nothing is tracked, so there is nothing to save", hint=_TRACK))
        self._channel.save_requested = False

    def _tell_saving(self, error: RailbusError | None = None) -> None:
        """Answer whoever waits for a checkpoint: that of this step is theirs, or cannot be written."""
        number = self._channel.save_number
        if number > (self._num_told if error is None else 0):
            self._num_told = number
            body = error_body(error) if error is not None else None
            self._channel.send(Saving(number=number, step=self.global_step, error=body))

    def _stop(self) -> None:
        self.curves.flush()
        if self._saver.has_news(self.global_step):
            self.save("stop")
        raise Stopped

    def _keep_within_lease(self) -> None:
        if clock.boottime_s() < self._channel.deadline_boottime_s:
            return
        began_s = time.monotonic()
        self._recorder.flush()
        self._channel.await_deadline()
        waited_s = round(time.monotonic() - began_s, 3)
        self._recorder.record(
            "job.lease_awaited", step=self.global_step, severity="warning", data={"seconds": waited_s}
        )

    def _tell_first_step(self) -> None:
        seconds = round(time.monotonic() - self._began_s, 3)
        self._recorder.record("job.first_step", step=self.global_step, data={"seconds": seconds})
        self._recorder.flush()
