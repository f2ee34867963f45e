"""How a trainer writes a checkpoint, and what its meta says.

It is written beside the loop (`async`) where the job's policy and the memory allow it: the loop stands still for one
copy of the state, and the writer does the rest. Else the trainer writes it itself (`sync`), from the live tensors,
without a copy. One is written at a time.

In: recorded. Out: writer_lost; the events `checkpoint.failed` for a writer that was lost, `.completed`, `.swept`, and
those of `writing`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, cast

from pydantic import JsonValue

from railbus_runner.channel import TrainerChannel
from railbus_runner.checkpointing.async_saves import AsyncSaves, Lost, Outcome
from railbus_runner.checkpointing.events import CheckpointEvents
from railbus_runner.checkpointing.image import Image
from railbus_runner.checkpointing.model_schema import libraries, precision, schema_of, write_or_check
from railbus_runner.checkpointing.resuming import Resuming
from railbus_runner.checkpointing.store import CheckpointStore
from railbus_runner.checkpointing.tracked import Tracked
from railbus_runner.checkpointing.writing import Writing
from railbus_runner.endings import CommitRefused
from railbus_runner.frames import Durable, NotWritten, Plan, Recorded, Write, WriterLost
from railbus_runner.recorder import Recorder
from railbus_shared import clock, files
from railbus_shared.contracts.artifacts import CheckpointMeta
from railbus_shared.contracts.model import JsonMap
from railbus_shared.errors import RailbusError, TrainerLost, error_from_wire
from railbus_shared.layout import Layout

Reason = Literal["policy", "end", "stop", "request"]

ASYNC_BYTES: Final = 8 << 20
"""From which on a state is written beside the loop where the policy says `auto`."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint is durable."""

    number: int
    step: int
    bytes: int
    seconds: float
    """From the beginning of its save, after waiting for the one before."""


@dataclass(frozen=True)
class NotSaved:
    """A checkpoint that was begun came to nothing; nothing of it is left."""

    step: int
    error: RailbusError
    is_lost: bool = False
    """Whether only its writer is gone: to try again at once is worth while."""


Result = Saved | NotSaved


class Saver:
    """Checkpoints of one attempt."""

    def __init__(
        self, plan: Plan, *, layout: Layout, tracked: Tracked, channel: TrainerChannel, recorder: Recorder
    ) -> None:
        self.git_commit: str | None = None
        """Of the entrypoint's source, once it is known."""
        self._plan = plan
        self._policy = plan.spec.checkpoint
        self._layout = layout
        self._tracked = tracked
        self._channel = channel
        self._recorder = recorder
        self._events = CheckpointEvents(recorder, model=plan.spec.model)
        self._store = CheckpointStore(layout, plan.spec.model, job=plan.job, lease_epoch=plan.lease_epoch)
        self._beside = AsyncSaves(channel)
        self._writing = Writing(plan, mode="sync", store=self._store, channel=channel, recorder=recorder)
        self._parent: int | None = None
        self._results: list[Result] = []
        self._is_schema_known = False
        self._schema_sha256: str | None = None
        self._resuming = Resuming(plan, store=self._store, tracked=tracked, channel=channel, events=self._events)

    @property
    def is_busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._beside.is_busy

    def metas(self) -> list[CheckpointMeta]:
        """Of the job's durable checkpoints, newest first."""
        return list(self._store.metas(job=self._plan.job))

    # --- saving ------------------------------------------------------------------------------------------------------

    def prepare(self, *, step: int) -> None:
        """A save is coming: have a writer and an arena for a state of the present size, where that is wanted."""
        if self._policy.mode != "sync":
            nbytes = Image.of(self._tracked.state(step=step)).nbytes
            if self._is_for_writer(nbytes):
                self._beside.prepare(nbytes)

    def save(
        self, reason: Reason, *, step: int, metrics: Mapping[str, JsonValue], is_awaited: bool, waited_s: float = 0.0
    ) -> None:
        """Write a checkpoint, or have it written; one that is awaited is durable when this returns. Not while busy.

        `waited_s` were waited for the one before. Raises CommitRefused, Conflict, and, where the trainer writes by
        itself or waits, what the disk refuses (StorageFull): then nothing of it is left. Else `take_results` tells.
        """
        began_s = time.monotonic()
        self._ensure_schema()
        image = Image.of(self._tracked.state(step=step))
        fields = self._fields(reason, step=step, metrics=metrics)
        fields["tensors"] = {name: cast("JsonMap", place.to_map()) for name, place in image.tensors.items()}
        order = self._order(fields, step=step, nbytes=image.nbytes, began_s=began_s, waited_s=waited_s)
        if not self._is_for_writer(image.nbytes):
            self._write(image, order)
        elif self._beside.fits(image.nbytes):
            self._have_written(image, order, is_awaited=is_awaited)
        else:
            self._beside.prepare(image.nbytes)  # for the next one
            self._write(image, order, why=self._beside.why_not or "the writer is not ready yet")

    def heed(self) -> None:
        """Take in what has come from the writer; costs microseconds. Raises CommitRefused, RunnerGone."""
        self._take(self._beside.heed())

    def settle(self) -> float:
        """Wait until nothing is being written any more; gives the seconds waited. Raises CommitRefused, RunnerGone."""
        began_s = time.monotonic()
        self.heed()
        if self._beside.is_busy:
            self._recorder.flush()
            self._take(self._beside.wait())
        return time.monotonic() - began_s

    def take_results(self) -> list[Result]:
        """What has become of saves since this was last asked, but for what was raised."""
        results, self._results = self._results, []
        return results

    def detach(self) -> None:
        """For a process that user code has forked: the writer is its parent's."""
        self._beside.detach()

    def _order(self, fields: JsonMap, *, step: int, nbytes: int, began_s: float, waited_s: float) -> Write:
        damaged = tuple(self._resuming.rejected)
        return Write.model_construct(
            nbytes=nbytes,
            step=step,
            fields=fields,
            damaged=damaged,
            began_s=began_s,
            waited_s=waited_s,
        )

    def _is_for_writer(self, nbytes: int) -> bool:
        """Whether the policy wants a state of this size written beside the loop."""
        return self._policy.mode == "async" or (self._policy.mode == "auto" and nbytes >= ASYNC_BYTES)

    def _have_written(self, image: Image, order: Write, *, is_awaited: bool) -> None:
        """By the writer, from a copy; by the trainer itself if the writer is lost over one that is awaited."""
        lost = self._beside.order(order, image)
        if lost is None and not is_awaited:
            return
        self._take(lost or self._beside.wait())
        failed = self._results[-1] if self._results else None
        if is_awaited and isinstance(failed, NotSaved):
            self._results.pop()
            if not failed.is_lost:
                raise failed.error
            self._write(image, order, why="the writer was lost")

    def _write(self, image: Image, order: Write, *, why: str = "") -> None:
        """By the trainer itself, from the live tensors."""
        meta = self._writing.write(image.chunks(), order, why=why)
        self._saved(Saved(meta.number, order.step, order.nbytes, _seconds(order)))

    def _take(self, outcome: Outcome | None) -> None:
        """What became of the checkpoint that the writer was told to write."""
        match outcome:
            case None:
                return
            case Durable():
                self._saved(Saved(outcome.number, outcome.step, outcome.nbytes, outcome.seconds))
            case NotWritten():
                error = error_from_wire(outcome.error.to_map())
                if outcome.is_refused:
                    raise CommitRefused(error)
                self._results.append(NotSaved(outcome.step, error))
            case Lost():
                self._recover(outcome.order)

    def _saved(self, saved: Saved) -> None:
        self._parent = saved.number
        self._results.append(saved)

    def _recover(self, order: Write | None) -> None:
        """The writer is gone: bring to its end what it has committed, remove its litter, and have another writer."""
        recorded = self._channel.ask(WriterLost(), Recorded).checkpoint
        if order is not None and recorded is not None and recorded.number > self._newest_before():
            if self._store.complete(recorded):
                self._events.tell("completed", recorded.number)
            self._saved(Saved(recorded.number, recorded.step, order.nbytes, _seconds(order)))
        elif order is not None:
            self._tell_lost(order)
        for number in self._store.sweep():
            self._events.tell("swept", number)
        if order is not None:
            self._beside.prepare(order.nbytes)

    def _newest_before(self) -> int:
        """Of the checkpoints that the job record has named so far: one that is not read any more is named still."""
        recorded = self._plan.checkpoint
        return max(self._parent or 0, recorded.number if recorded is not None else 0)

    def _tell_lost(self, order: Write) -> None:
        error = TrainerLost("the writer of the checkpoint is gone", hint="another one is started, and saves again")
        told = {"model": self._plan.spec.model, "mode": "async", "error": error.to_wire()}
        self._recorder.record("checkpoint.failed", step=order.step, severity="warning", data=told)
        self._results.append(NotSaved(order.step, error, is_lost=True))

    def _ensure_schema(self) -> None:
        if not self._is_schema_known and (model := self._tracked.model) is not None:
            path = self._layout.model_schema(self._plan.spec.model)
            write_or_check(path, schema_of(model, self._plan))
            self._schema_sha256 = files.sha256_if_any(path)
            self._is_schema_known = True

    def _fields(self, reason: Reason, *, step: int, metrics: Mapping[str, JsonValue]) -> JsonMap:
        """Of a meta, all but its number, files and tensors, as plain values."""
        plan = self._plan
        return {
            "model": plan.spec.model,
            "job": plan.job,
            "attempt": plan.attempt,
            "lease_epoch": plan.lease_epoch,
            "step": step,
            "epoch": self._tracked.epoch,
            "samples_seen": self._tracked.samples_seen,
            "entrypoint": plan.spec.entrypoint,
            "seed": plan.spec.seed,
            "dataset": plan.spec.dataset,
            "index_sha256": plan.stream.index_sha256,
            "devices": [device.id for device in plan.devices],
            "precision": precision(self._tracked.model),
            "libraries": dict(libraries()),
            "git_commit": self.git_commit,
            "world_size": plan.world_size,
            "metrics": dict(metrics),
            "spec_sha256": plan.spec.digest,
            "params": dict(plan.spec.params),
            "policy": cast("JsonMap", self._policy.to_map()),
            "model_schema_sha256": self._schema_sha256,
            "parent": self._parent,
            "parent_sha256": self._parent_sha256(),
            "reason": reason,
            "created_at": clock.now(),
        }

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


def _seconds(order: Write) -> float:
    return time.monotonic() - order.began_s
