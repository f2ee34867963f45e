"""When a trainer writes a checkpoint, and what its meta says.

In: committed, refused. Out: commit; the events `checkpoint.written` and `.removed`.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from typing import Literal

from pydantic import JsonValue

from railbus_runner.channel import TrainerChannel
from railbus_runner.checkpointing.events import CheckpointEvents
from railbus_runner.checkpointing.image import Image
from railbus_runner.checkpointing.model_schema import libraries, precision, schema_of, write_or_check
from railbus_runner.checkpointing.resuming import Resuming
from railbus_runner.checkpointing.store import CheckpointStore
from railbus_runner.checkpointing.tracked import Tracked
from railbus_runner.endings import CommitRefused
from railbus_runner.frames import Commit, Committed, Plan, Refused
from railbus_runner.recorder import Recorder
from railbus_shared import clock, files
from railbus_shared.contracts.artifacts import CheckpointFile, CheckpointMeta
from railbus_shared.errors import error_from_wire
from railbus_shared.layout import Layout
from railbus_shared.retention import retention

Reason = Literal["policy", "end", "stop", "request"]


class Saver:
    """Checkpoints of one attempt."""

    def __init__(
        self, plan: Plan, *, layout: Layout, tracked: Tracked, channel: TrainerChannel, recorder: Recorder
    ) -> None:
        self.git_commit: str | None = None
        """Of the entrypoint's source, once it is known."""
        self._plan = plan
        self._layout = layout
        self._tracked = tracked
        self._channel = channel
        self._recorder = recorder
        self._events = CheckpointEvents(recorder, model=plan.spec.model)
        self._store = CheckpointStore(layout, plan.spec.model, job=plan.job, lease_epoch=plan.lease_epoch)
        self._parent: int | None = None
        self._is_schema_known = False
        self._resuming = Resuming(plan, store=self._store, tracked=tracked, channel=channel, events=self._events)
        self._schema_sha256: str | None = None

    # --- saving ------------------------------------------------------------------------------------------------------

    def metas(self) -> list[CheckpointMeta]:
        """Of the job's durable checkpoints, newest first."""
        return list(self._store.metas(job=self._plan.job))

    def save(self, reason: Reason, *, step: int, metrics: Mapping[str, JsonValue]) -> CheckpointMeta:
        """Write a checkpoint and remove the job's older ones; raises CommitRefused, StorageFull, Conflict."""
        began_s = time.monotonic()
        self._ensure_schema()
        image = Image.of(self._tracked.state(step=step))

        def describe(number: int, file: CheckpointFile) -> CheckpointMeta:
            meta = self._meta(number, (file,), reason=reason, step=step, metrics=metrics)
            return meta.model_copy(update={"tensors": image.tensors})

        meta = self._store.write(image.chunks(), nbytes=image.nbytes, describe=describe, commit=self._commit)
        self._written(meta, began_s=began_s)
        return meta

    def _written(self, meta: CheckpointMeta, *, began_s: float) -> None:
        """It is durable: tell so, and let older ones go."""
        step = meta.step
        self._parent = meta.number
        seconds = round(time.monotonic() - began_s, 3)
        size_bytes = sum(file.bytes for file in meta.files)
        self._events.tell("written", meta.number, step=step, bytes=size_bytes, reason=meta.reason, seconds=seconds)
        for number in self._store.retain(self._gone):
            self._events.tell("removed", number, step=step)

    def _gone(self, metas: Sequence[CheckpointMeta]) -> Collection[int]:
        return retention(metas, self._plan.spec.checkpoint, damaged=self._resuming.rejected).gone

    def _ensure_schema(self) -> None:
        if not self._is_schema_known and (model := self._tracked.model) is not None:
            path = self._layout.model_schema(self._plan.spec.model)
            write_or_check(path, schema_of(model, self._plan))
            self._schema_sha256 = files.sha256_if_any(path)
            self._is_schema_known = True

    def _commit(self, meta: CheckpointMeta) -> None:
        self._recorder.flush()
        self._channel.poll()
        self._channel.await_deadline(stop_suffices=False)
        answer = self._channel.ask(Commit(meta=meta.model_copy(update={"tensors": {}})), Committed, Refused)
        if isinstance(answer, Refused):
            raise CommitRefused(error_from_wire(answer.error.to_map()))

    def _meta(
        self,
        number: int,
        written: tuple[CheckpointFile, ...],
        *,
        reason: Reason,
        step: int,
        metrics: Mapping[str, JsonValue],
    ) -> CheckpointMeta:
        plan = self._plan
        return CheckpointMeta(
            number=number,
            model=plan.spec.model,
            job=plan.job,
            attempt=plan.attempt,
            lease_epoch=plan.lease_epoch,
            step=step,
            epoch=self._tracked.epoch,
            samples_seen=self._tracked.samples_seen,
            entrypoint=plan.spec.entrypoint,
            seed=plan.spec.seed,
            dataset=plan.spec.dataset,
            index_sha256=plan.stream.index_sha256,
            devices=tuple(device.id for device in plan.devices),
            precision=precision(self._tracked.model),
            libraries=libraries(),
            git_commit=self.git_commit,
            world_size=plan.world_size,
            metrics=dict(metrics),
            files=written,
            spec_sha256=plan.spec.digest,
            params=plan.spec.params,
            policy=plan.spec.checkpoint,
            model_schema_sha256=self._schema_sha256,
            parent=self._parent,
            parent_sha256=self._parent_sha256(),
            reason=reason,
            created_at=clock.now(),
        )

    def _parent_sha256(self) -> str | None:
        """Of the parent's meta as it lies on disk; None if there is none, or if somebody has removed it."""
        if self._parent is None:
            return None
        return files.sha256_if_any(self._layout.checkpoint_meta(self._plan.spec.model, self._parent))

    # --- resuming ----------------------------------------------------------------------------------------------------

    def tidy(self) -> None:
        """Bring a recorded checkpoint to its end and remove the litter of earlier attempts; before anything is read."""
        self._resuming.tidy()

    def resume(self) -> int | None:
        """Restore everything tracked from the newest valid checkpoint; gives its step, or None if there is none."""
        meta = self._resuming.resume()
        if meta is None:
            return None
        self._parent = meta.number
        return meta.step
