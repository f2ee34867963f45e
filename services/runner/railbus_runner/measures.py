"""What the runner counts and shows, for Prometheus.

Most of it is heard: whatever an attempt comes through is a fact that its runner tells or passes on. Of the metrics of
steps, which come in batches, only the last of each batch is looked at.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, get_args

from prometheus_client import Counter, Histogram

from railbus_runner.leasing import Outcome
from railbus_shared import clock
from railbus_shared.contracts.devices import AttemptRef
from railbus_shared.contracts.jobs import EndCause
from railbus_shared.contracts.model import JsonMap
from railbus_shared.metrics import WAITS, Metrics, Readings

_ENDS: Final = frozenset({"job.succeeded", "job.failed", "job.cancelled", "job.requeued"})
_SAVE_S: Final = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


@dataclass
class _Watched:
    """One attempt that has processes here."""

    began_s: float
    deadline_s: Callable[[], float]
    step: int | None = None


@dataclass(frozen=True)
class Measures:
    """All metrics that only the runner has."""

    ended: Counter
    first_step_seconds: Histogram
    steps: Counter
    lease_renewals: Counter
    save_seconds: Histogram
    saved_bytes: Counter
    save_stall_seconds: Counter
    saves_failed: Counter
    saves_skipped: Counter
    stalls: Counter
    _attempts: dict[AttemptRef, _Watched] = field(default_factory=dict)

    @classmethod
    def of(cls, metrics: Metrics) -> Measures:
        made = cls(
            ended=metrics.counter("attempts_ended", "Attempts of this host that have ended, by end cause.", "cause"),
            first_step_seconds=metrics.histogram(
                "attempt_first_step_seconds", "From the order to start an attempt to its first step.", buckets=WAITS
            ),
            steps=metrics.counter("train_steps", "Steps of attempts of this host, as far as metrics tell them."),
            lease_renewals=metrics.counter("lease_renewals", "Times leases were to be renewed.", "outcome"),
            save_seconds=metrics.histogram(
                "checkpoint_save_seconds", "From the order until a checkpoint is durable.", "mode", buckets=_SAVE_S
            ),
            saved_bytes=metrics.counter("checkpoint_saved_bytes", "Bytes of checkpoints that were written."),
            save_stall_seconds=metrics.counter("checkpoint_stall_seconds", "Time that loops stood still for saves."),
            saves_failed=metrics.counter("checkpoint_failures", "Checkpoints that could not be written."),
            saves_skipped=metrics.counter(
                "checkpoint_skips", "Checkpoints that were due and not written, by why.", "why"
            ),
            stalls=metrics.counter("attempt_stalls", "Times a trainer took no step for its job's `stall_s`."),
        )
        metrics.reading("attempts_running", "Attempts that have processes on this host.", read=made._running)
        metrics.reading("job_step", "Last step that a running job of this host told.", "job", read=made._steps)
        metrics.reading(
            "lease_expiry_seconds",
            "Until the first lease of a job that runs here would expire, if none is renewed; negative once it has.",
            read=made._expiry,
        )
        for cause in get_args(EndCause):
            made.ended.labels(cause)
        for outcome in get_args(Outcome):
            made.lease_renewals.labels(outcome)
        return made

    # --- told --------------------------------------------------------------------------------------------------------

    def began(self, ref: AttemptRef, *, deadline_s: Callable[[], float]) -> None:
        """An attempt begins; `deadline_s` gives when its leases expire, on CLOCK_BOOTTIME, or 0 before it is known."""
        self._attempts[ref] = _Watched(time.monotonic(), deadline_s)

    def is_over(self, ref: AttemptRef) -> None:
        self._attempts.pop(ref, None)

    def renewed(self, outcome: Outcome) -> None:
        self.lease_renewals.labels(outcome).inc()

    def stepped(self, ref: AttemptRef, events: Sequence[JsonMap]) -> None:
        """A batch of its events has come; the steps before the first that is known are not counted.

        A writer tells of a step that the trainer may have left behind.
        """
        watched, step = self._attempts.get(ref), events[-1].get("step") if events else None
        if watched is None or not isinstance(step, int) or step <= (watched.step or 0):
            return
        if watched.step is not None:
            self.steps.inc(step - watched.step)
        watched.step = step

    def heard(self, event: JsonMap) -> None:
        """A fact that was recorded here or passed on for a trainer."""
        kind, data = event["type"], event.get("data")
        told: Mapping[str, object] = data if isinstance(data, dict) else {}
        match kind:
            case "job.first_step":
                self._first_step(event)
            case "checkpoint.written":
                self.save_seconds.labels(_word(told, "mode")).observe(_number(told, "seconds"))
                self.saved_bytes.inc(_number(told, "bytes"))
                self.save_stall_seconds.inc(_number(told, "stall_s"))
            case "checkpoint.failed":
                self.saves_failed.inc()
            case "checkpoint.skipped":
                self.saves_skipped.labels(_word(told, "why")).inc()
            case "job.stalled":
                self.stalls.inc()
            case _ if kind in _ENDS and event["source"] != "trainer":
                self.ended.labels(_word(told, "cause")).inc()
            case _:
                pass

    def _first_step(self, event: JsonMap) -> None:
        for ref, watched in self._attempts.items():
            if (ref.job, ref.lease_epoch) == (event.get("job"), event.get("lease_epoch")):
                self.first_step_seconds.observe(time.monotonic() - watched.began_s)

    # --- read --------------------------------------------------------------------------------------------------------

    def _running(self) -> Readings:
        yield (), len(self._attempts)

    def _steps(self) -> Iterator[tuple[tuple[str, ...], float]]:
        for ref, watched in self._attempts.items():
            if watched.step is not None:
                yield (ref.job,), watched.step

    def _expiry(self) -> Readings:
        deadlines = [deadline for one in self._attempts.values() if (deadline := one.deadline_s())]
        if deadlines:
            yield (), min(deadlines) - clock.boottime_s()


def _number(told: Mapping[str, object], name: str) -> float:
    value = told.get(name)
    return max(0.0, float(value)) if isinstance(value, int | float) else 0.0


def _word(told: Mapping[str, object], name: str) -> str:
    """A word of a closed list of ours; what a trainer made up is no label."""
    value = told.get(name)
    return value if isinstance(value, str) and value in _WORDS else "other"


_WORDS: Final = frozenset({*get_args(EndCause), "async", "sync", "busy", "too_late"})
