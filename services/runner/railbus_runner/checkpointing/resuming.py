"""From which checkpoint an attempt goes on, and what it puts in order before.

Out: the events `checkpoint.completed`, `.swept`, `.resumed`, `.rejected`.
"""

from __future__ import annotations

from railbus_runner.channel import TrainerChannel
from railbus_runner.checkpointing import loading
from railbus_runner.checkpointing.events import CheckpointEvents
from railbus_runner.checkpointing.loading import Opened
from railbus_runner.checkpointing.store import CheckpointStore
from railbus_runner.checkpointing.tracked import Tracked
from railbus_runner.frames import Plan
from railbus_shared.contracts.artifacts import CheckpointMeta
from railbus_shared.errors import CheckpointCorrupt, CheckpointNotFound, InvalidField, RailbusError
from railbus_shared.layout import checkpoint_stem


class Resuming:
    """The begin of one attempt.

    Attributes:
        rejected: numbers of checkpoints that are not what they should be.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        store: CheckpointStore,
        tracked: Tracked,
        channel: TrainerChannel,
        events: CheckpointEvents,
    ) -> None:
        self._plan = plan
        self._store = store
        self._tracked = tracked
        self._channel = channel
        self._events = events
        self.rejected: set[int] = set()

    def tidy(self) -> None:
        """Bring a recorded checkpoint to its end and remove the litter of earlier attempts; before anything is read."""
        self._channel.await_deadline()  # an attempt whose lease has lapsed must not sweep beside its successor
        recorded = self._plan.checkpoint
        if recorded is not None:
            try:
                if self._store.complete(recorded):
                    self._events.tell("completed", recorded.number)
            except CheckpointCorrupt as exc:
                self._reject(recorded.number, exc)
        for number in self._store.sweep():
            self._events.tell("swept", number)

    def resume(self) -> CheckpointMeta | None:
        """Restore everything tracked from the newest valid checkpoint; gives its meta, or None if there is none.

        Raises Conflict, CheckpointNotFound, CheckpointCorrupt.
        """
        opened = loading.newest(self._store, rejected=self._reject, live=self._live)
        self._miss_recorded(opened)
        if opened is None and (named := self._plan.spec.resume_from) is not None:
            opened = loading.named(self._store, named, live=self._live)
        if opened is None:
            return None
        with opened:
            return self._restore(opened)

    def _live(self, meta: CheckpointMeta) -> set[str]:
        return self._tracked.live(meta.tensors)

    def _restore(self, opened: Opened) -> CheckpointMeta:
        meta = opened.meta
        self._tracked.restore(opened.state, values=opened.file)
        positions = self._restore_streams(opened)
        generators = self._tracked.restore_generators(opened.state)
        self._events.tell(
            "resumed",
            meta.number,
            step=meta.step,
            from_job=meta.job,
            epoch=meta.epoch,
            samples_seen=meta.samples_seen,
            positions=positions,
            generators=generators or "restored",
        )
        return meta

    def _restore_streams(self, opened: Opened) -> str:
        """What became of the positions; those of another job may mean nothing here, and then the data begin anew."""
        try:
            self._tracked.restore_streams(opened.state)
        except InvalidField as exc:
            if opened.meta.job == self._plan.job:
                raise
            return f"not restored: {exc.message}"
        return "restored"

    def _miss_recorded(self, opened: Opened | None) -> None:
        """Tell if the checkpoint that the job record names is not there at all."""
        recorded = self._plan.checkpoint
        if recorded is None or recorded.number in self.rejected:
            return
        if opened is None or opened.meta.number < recorded.number:
            stem = checkpoint_stem(recorded.number)
            self._reject(recorded.number, CheckpointNotFound(f"the job record names {stem}, which is not there"))

    def _reject(self, number: int, error: RailbusError) -> None:
        self.rejected.add(number)
        self._events.tell("rejected", number, is_bad=True, error=error.to_wire())
