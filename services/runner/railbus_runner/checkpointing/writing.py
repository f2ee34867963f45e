"""How a checkpoint comes to the disk and what is told of it, for a trainer that writes by itself and for a writer.

In: committed, refused. Out: commit; the events `checkpoint.written`, `.removed`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Literal

from railbus_runner.channel import TrainerChannel
from railbus_runner.checkpointing.events import CheckpointEvents
from railbus_runner.checkpointing.store import CheckpointStore
from railbus_runner.endings import CommitRefused
from railbus_runner.frames import Commit, Committed, Plan, Refused, Write
from railbus_runner.recorder import Recorder
from railbus_shared.contracts.artifacts import CheckpointFile, CheckpointMeta
from railbus_shared.contracts.model import JsonMap
from railbus_shared.errors import error_from_wire
from railbus_shared.retention import retention

Mode = Literal["async", "sync"]
Stall = Callable[[], float]


class Writing:
    """By one process of one attempt."""

    def __init__(
        self, plan: Plan, *, mode: Mode, store: CheckpointStore, channel: TrainerChannel, recorder: Recorder
    ) -> None:
        self._plan = plan
        self._mode = mode
        self._store = store
        self._channel = channel
        self._recorder = recorder
        self._events = CheckpointEvents(recorder, model=plan.spec.model)

    def write(
        self, source: memoryview | Iterable[memoryview], order: Write, *, why: str = "", stall: Stall | None = None
    ) -> CheckpointMeta:
        """Write a checkpoint, and then remove what the policy does not keep beside it.

        Args:
            source: the bytes of its file.
            order: what is written, and since when.
            why: why it is written in this mode, where the job wanted another.
            stall: gives how long the loop stood still, once all is written; if left out, it does so to the end.

        Raises CommitRefused, and whatever the disk refuses (StorageFull, OSError): then nothing of it is left.
        """
        meta = self._store.write(
            source,
            nbytes=order.nbytes,
            describe=lambda number, file: described(order.fields, number, (file,)),
            commit=self.commit,
        )
        self.finish(meta, order, why=why, stall=stall)
        return meta

    def finish(self, meta: CheckpointMeta, order: Write, *, why: str = "", stall: Stall | None = None) -> None:
        """It is durable: tell so, and let older ones go, if the lease has not lapsed.

        Else a successor may have found out meanwhile which ones are damaged, and rely on one of those older.
        """
        self._tell_written(meta, order, why=why, stall=stall)
        policy = self._plan.spec.checkpoint
        self._channel.poll()
        if self._channel.is_past_deadline:
            self._recorder.flush()
            return
        for number in self._store.retain(lambda metas: retention(metas, policy, damaged=order.damaged).gone):
            self._events.tell("removed", number, step=meta.step)
        self._recorder.flush()

    def commit(self, meta: CheckpointMeta) -> None:
        """Have the checkpoint named in the job record, within the lease; raises CommitRefused."""
        self._recorder.flush()
        self._channel.poll()
        self._channel.await_deadline(stop_suffices=False)
        answer = self._channel.ask(Commit(meta=meta.model_copy(update={"tensors": {}})), Committed, Refused)
        if isinstance(answer, Refused):
            raise CommitRefused(error_from_wire(answer.error.to_map()))

    def _tell_written(self, meta: CheckpointMeta, order: Write, *, why: str, stall: Stall | None) -> None:
        seconds = time.monotonic() - order.began_s
        self._events.tell(
            "written",
            meta.number,
            step=meta.step,
            bytes=sum(file.bytes for file in meta.files),
            reason=meta.reason,
            mode=self._mode,
            why=why,
            seconds=round(seconds, 3),
            stall_s=round(stall() if stall is not None else seconds, 3),
            waited_s=round(order.waited_s, 3),
        )


def described(fields: JsonMap, number: int, written: tuple[CheckpointFile, ...]) -> CheckpointMeta:
    """A meta of its fields, and of what is known only once it is written."""
    return CheckpointMeta.parse({**fields, "number": number, "files": [file.to_map() for file in written]})
