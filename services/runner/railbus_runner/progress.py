"""The progress of an attempt: counts steps, tells metrics, obeys the runner's orders, has checkpoints written.

Everything here happens between two steps of the user's loop, on its thread; a step costs a few microseconds when
nothing is due.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from pydantic import JsonValue

from railbus_runner.channel import TrainerChannel
from railbus_runner.checkpointing.keeping import Keeper
from railbus_runner.checkpointing.rng import Generators
from railbus_runner.checkpointing.saver import Reason, Saver
from railbus_runner.checkpointing.tracked import Tracked
from railbus_runner.curves import Curves, number
from railbus_runner.endings import Stopped
from railbus_runner.moving import Pulse
from railbus_runner.recorder import Recorder
from railbus_shared import clock


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
        keeper: Keeper,
        tracked: Tracked,
        pulse: Pulse,
        began_s: float,
        metric: str | None = None,
    ) -> None:
        self.global_step = 0
        self.is_resumed = False
        self.curves = Curves(recorder)
        self._channel = channel
        self._recorder = recorder
        self._saver = saver
        self._keeper = keeper
        self._tracked = tracked
        self._pulse = pulse
        self._began_s = began_s
        self._has_stepped = False
        self._stop_seen = False
        self._metric = metric
        self._seen_at_step = 0
        self._generators: Generators | None = None

    def step(self, metrics: Mapping[str, object]) -> None:
        """End an optimizer step; raises Stopped once a Stop was obeyed."""
        self.global_step += 1
        if not self._has_stepped:
            self._has_stepped = True
            self._tell_first_step()
        self._mark()
        self.curves.log(self.global_step, metrics)
        self._pulse.beat()
        self._obey()

    def log(self, metrics: Mapping[str, object]) -> None:
        """Metrics that belong to no single step."""
        self.curves.log(self.global_step, metrics)
        self._pulse.beat()
        self._evaluated(metrics)
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
        self._keeper.save(reason, step=self.global_step, metrics=self._metrics(), is_awaited=True)

    def resume(self) -> bool:
        """Go on from the newest valid checkpoint, if there is one; raises ValueError if nothing is tracked."""
        if not self._tracked.parts:
            raise ValueError("nothing is tracked, so nothing can be resumed: call ctx.track(model=model) before")
        self.is_resumed = True
        step = self._saver.resume()
        if step is None:
            return False
        self.global_step = step
        self._keeper.resumed(step)
        self._mark()
        return True

    def finish(self) -> bool:
        """The entrypoint has returned: tell and save what is left; False if it returned because of a Stop."""
        metrics, stop = self._metrics(), self._channel.stop
        if self._stop_seen and stop is not None:
            self._keeper.stop(stop, step=self.global_step, metrics=metrics)
        else:
            self._keeper.finish(step=self.global_step, metrics=metrics)
        return not self._stop_seen

    def _obey(self) -> None:
        self._channel.poll()
        self._keep_within_lease()
        self._keeper.heed(self.global_step, self._metrics)
        reason = self._keeper.wanted(self.global_step)
        if self._channel.stop is None and reason is not None:
            self._keeper.save(reason, step=self.global_step, metrics=self._metrics())
        if self._channel.stop is not None:  # it may have come while there was no room
            self._keeper.stop(self._channel.stop, step=self.global_step, metrics=self._metrics())
            raise Stopped
        self._keeper.refuse(self.global_step)
        self._recorder.flush_if_due()

    def _evaluated(self, metrics: Mapping[str, object]) -> None:
        """Keep the state that was evaluated, if it is among the best; one within a step is none that can be kept."""
        name = str(self._metric)
        if name not in metrics or self._generators is None or self._tracked.samples_seen != self._seen_at_step:
            return
        if self._keeper.is_worth_keeping(number(metrics[name], name=name), step=self.global_step):
            with self._tracked.with_generators(self._generators):
                self._keeper.save("policy", step=self.global_step, metrics=self._metrics())

    def _metrics(self) -> dict[str, JsonValue]:
        """What was told of the state as it is now."""
        self.curves.flush()
        return self.curves.of_step(self.global_step)

    def _mark(self) -> None:
        """A step has ended; what an evaluation changes that comes after it is no part of it."""
        if self._metric is not None:
            self._seen_at_step, self._generators = self._tracked.samples_seen, Generators.now()

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
        self._recorder.offer()
