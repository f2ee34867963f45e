"""When a checkpoint is due, and whether one can still be durable in time. Pure: whoever asks brings the time.

A checkpoint is due after every `every_steps` steps, and once `every_s` seconds have passed since the last one was begun
(or since the attempt began, or was resumed). One that holds nothing new is never due. A checkpoint that was begun and
failed holds nothing: its steps are news again, and the clock goes on from its beginning, so that the next try is the
next one that is due.

Which metrics a checkpoint's meta has: those that were told for the very state that it holds, by `ctx.step` of its step
or by `ctx.log` after it. So one that is written before the evaluation of its step lacks that evaluation; it never gets
an older one. Where the job keeps the best by a metric, `ctx.log` of that metric therefore writes a checkpoint of its
own if it would be among the best, with the generators as the step left them: a resume runs the evaluation again.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from railbus_shared.contracts.jobs import CheckpointPolicy

_REMEMBERED: Final = 3
_SLOWER: Final = 1.25
"""How much longer than the longest of the last few a write may take before a stop relies on an older one wrongly."""


class Schedule:
    """Of one attempt; seconds are those of one monotonic clock."""

    def __init__(self, policy: CheckpointPolicy, *, now_s: float) -> None:
        self._policy = policy
        self._begun_step = 0
        self._durable_step = 0
        self._begun_s = now_s
        self._seconds: deque[float] = deque(maxlen=_REMEMBERED)

    def resumed(self, step: int, *, now_s: float) -> None:
        """The attempt goes on from a checkpoint of this step."""
        self._begun_step = self._durable_step = step
        self._begun_s = now_s

    def begun(self, step: int, *, now_s: float) -> None:
        """The state of this step has been taken; it is being written."""
        self._begun_step, self._begun_s = step, now_s

    def durable(self, step: int, *, seconds: float) -> None:
        """A checkpoint of this step counts, so many seconds after it was begun."""
        self._durable_step = max(self._durable_step, step)
        self._seconds.append(seconds)

    def failed(self) -> None:
        """What was begun came to nothing."""
        self._begun_step = self._durable_step

    def skipped(self, *, now_s: float) -> None:
        """One that was due was not begun; the clock goes on from here."""
        self._begun_s = now_s

    def has_news(self, step: int) -> bool:
        """Whether a checkpoint of this step would hold something that the last one does not."""
        return step > self._begun_step

    def is_due(self, step: int, *, now_s: float) -> bool:
        """Whether the policy wants a checkpoint after this step."""
        policy = self._policy
        if not self.has_news(step):
            return False
        if policy.every_steps is not None and step % policy.every_steps == 0:
            return True
        return policy.every_s is not None and now_s - self._begun_s >= policy.every_s

    def is_near(self, *, now_s: float) -> bool:
        """Whether one will be due soon enough to make ready for it: at once by steps, after half the time by time."""
        policy = self._policy
        if policy.every_steps is not None:
            return True
        return policy.every_s is not None and now_s - self._begun_s >= policy.every_s / 2

    @property
    def expected_s(self) -> float | None:
        """How long the next one may take from its beginning until it is durable; None if nothing is known."""
        return max(self._seconds) * _SLOWER if self._seconds else None

    def fits(self, left_s: float) -> bool:
        """Whether one that is begun now can be durable in so many seconds; where nothing is known it is tried."""
        expected_s = self.expected_s
        return left_s > 0 if expected_s is None else expected_s <= left_s
