"""The checkpoints of one model on disk: written so that they are whole or do not exist.

A checkpoint is `checkpoint-000123.pt` and `checkpoint-000123.meta.json`, and the meta is its commit record:

    1. a number is claimed (`serials`)
    2. the `.pt` is written beside its final name, flushed, hashed, and takes its name without replacing
    3. the meta is written and flushed under its temporary name
    4. the runner names the checkpoint in the job record, with its lease epoch; a stale attempt ends here
    5. the meta takes its final name

Killed before 4, an attempt leaves litter that `sweep` of its successor removes; killed after it, a recorded checkpoint
that `complete` brings to its end. `loading` reads what is here.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, Final

import torch

from railbus_runner.checkpointing import serials
from railbus_runner.endings import CommitRefused
from railbus_shared import files, wire
from railbus_shared.contracts.artifacts import CheckpointFile, CheckpointMeta
from railbus_shared.contracts.jobs import CheckpointRef
from railbus_shared.errors import CheckpointCorrupt, CheckpointNotFound, RailbusError, WireError
from railbus_shared.layout import Layout, checkpoint_number, checkpoint_stem

State = dict[str, object]

MAX_META_BYTES: Final = 16 << 20


class CheckpointStore:
    """Writes checkpoints of one attempt, and lists those of its model."""

    def __init__(self, layout: Layout, model: str, *, job: str, lease_epoch: int) -> None:
        self.folder = layout.checkpoints(model)
        self._model = model
        self._job = job
        self._lease_epoch = lease_epoch
        self._known: dict[int, CheckpointMeta] = {}

    # --- writing -----------------------------------------------------------------------------------------------------

    def write(
        self,
        state: State,
        *,
        describe: Callable[[int, CheckpointFile], CheckpointMeta],
        commit: Callable[[CheckpointMeta], None],
    ) -> CheckpointMeta:
        """Write a checkpoint; it exists once this returns.

        `describe` makes the meta of a number and a file; `commit` asks the runner, and raises CommitRefused for a no,
        after which nothing of the checkpoint is left. Raises StorageFull; older checkpoints stay as they were.
        """
        with files.storage_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        number = serials.claim(self.folder, job=self._job, lease_epoch=self._lease_epoch)
        with self._removed_on(BaseException, number):
            meta = describe(number, self._write_data(number, state))
            self._write_draft(meta)
        with self._removed_on(CommitRefused, number):  # after any other end the record may name it: it is left
            commit(meta)
        self._publish(number)
        serials.release(self.folder, number)
        return meta

    def retain(self, keep_last: int) -> list[int]:
        """Remove the job's checkpoints but the newest `keep_last`, and give the numbers of those removed.

        To be called once the newest is durable. The meta goes first, so that none ever points to a missing file.
        """
        removed: list[int] = []
        for meta in list(self.metas(job=self._job))[max(1, keep_last) :]:
            self._meta_path(meta.number).unlink(missing_ok=True)
            files.fsync_dir(self.folder)
            for file in meta.files:
                (self.folder / file.file).unlink(missing_ok=True)
            removed.append(meta.number)
        return removed

    # --- at the start of an attempt ----------------------------------------------------------------------------------

    def complete(self, ref: CheckpointRef) -> bool:
        """Give a recorded checkpoint's meta its final name, if it still has the temporary one; True if it had."""
        draft = files.temporary_path(self._meta_path(ref.number))
        if not draft.exists():
            return False
        if self._meta_path(ref.number).exists():  # killed between the two halves of the rename
            draft.unlink()
            return False
        meta = self._read_meta(draft)
        if meta.files[0].sha256 != ref.sha256 or meta.job != self._job:
            raise CheckpointCorrupt(path=str(draft), expected=ref.sha256, actual=meta.files[0].sha256)
        self._publish(ref.number)
        return True

    def sweep(self) -> list[int]:
        """Remove what earlier attempts of the job left half done, and give the numbers; comes after `complete`."""
        if not self.folder.is_dir():
            return []
        litter: list[int] = []
        for number in serials.claims_of(self.folder, job=self._job, lease_epoch=self._lease_epoch):
            if not self._meta_path(number).exists() and self._remove(number):
                litter.append(number)
            serials.release(self.folder, number)
        return litter

    # --- reading -----------------------------------------------------------------------------------------------------

    def metas(
        self, *, job: str | None = None, rejected: Callable[[int, RailbusError], None] = lambda _number, _error: None
    ) -> Iterator[CheckpointMeta]:
        """Metas of the model's checkpoints, or of one job's alone, newest first.

        One that cannot be read may be anyone's, so `rejected` is told of it.
        """
        for number in self._numbers():
            try:
                if number not in self._known:  # a meta that has its final name never changes
                    self._known[number] = self._read_meta(self._meta_path(number))
            except CheckpointCorrupt as exc:
                rejected(number, exc)
                continue
            if job is None or self._known[number].job == job:
                yield self._known[number]

    def own_metas(self, *, rejected: Callable[[int, RailbusError], None]) -> Iterator[CheckpointMeta]:
        """Metas of this job's checkpoints, newest first."""
        return self.metas(job=self._job, rejected=rejected)

    def named(self, stem: str) -> CheckpointMeta:
        """The meta of the model's checkpoint of this name, of whatever job; no byte of its data is read.

        Raises CheckpointNotFound, CheckpointCorrupt.
        """
        number = checkpoint_number(f"{stem}.meta.json")
        if number is None or not self._meta_path(number).exists():
            raise CheckpointNotFound(
                f"field 'resume_from' has value {stem!r}: model {self._model!r} has no such checkpoint",
                hint=f"the newest is {self._newest_stem()}",
            )
        return self._read_meta(self._meta_path(number))

    def _newest_stem(self) -> str:
        return next((checkpoint_stem(number) for number in self._numbers()), "none: the model has no checkpoint")

    def _numbers(self) -> list[int]:
        """Of all checkpoints of the model, newest first."""
        if not self.folder.is_dir():
            return []
        found = (checkpoint_number(name) for name in os.listdir(self.folder))  # noqa: PTH208 - bare names
        return sorted((number for number in found if number is not None), reverse=True)

    def _read_meta(self, path: Path) -> CheckpointMeta:
        try:
            meta = CheckpointMeta.parse(wire.decode(path.read_bytes(), limit_bytes=MAX_META_BYTES))
        except (WireError, OSError) as exc:
            raise CheckpointCorrupt(path=str(path), expected="a valid meta", actual=str(exc)) from exc
        if (meta.model, self._meta_path(meta.number).name) != (self._model, _final_name(path)):
            said = f"{checkpoint_stem(meta.number)} of model {meta.model!r}"
            raise CheckpointCorrupt(path=str(path), expected=f"a checkpoint of {self._model!r}", actual=said)
        return meta

    # --- steps -------------------------------------------------------------------------------------------------------

    def _meta_path(self, number: int) -> Path:
        return self.folder / f"{checkpoint_stem(number)}.meta.json"

    def _data_path(self, number: int) -> Path:
        return self.folder / f"{checkpoint_stem(number)}.pt"

    def _write_data(self, number: int, state: State) -> CheckpointFile:
        final = self._data_path(number)
        draft = files.temporary_path(final)
        with files.temporary(final) as file:
            _save(state, file)
        described = CheckpointFile(file=final.name, bytes=draft.stat().st_size, sha256=files.sha256_file(draft))
        files.publish(draft, final)
        return described

    def _write_draft(self, meta: CheckpointMeta) -> None:
        with files.temporary(self._meta_path(meta.number)) as file:
            file.write(files.to_json(meta.to_map()))
        files.fsync_dir(self.folder)

    def _publish(self, number: int) -> None:
        final = self._meta_path(number)
        files.publish(files.temporary_path(final), final)

    @contextlib.contextmanager
    def _removed_on(self, error: type[BaseException], number: int) -> Iterator[None]:
        try:
            yield
        except error:
            self._remove(number)
            serials.release(self.folder, number)
            raise

    def _remove(self, number: int) -> bool:
        """Remove what is left of a checkpoint that does not exist; True if anything was."""
        data, meta = self._data_path(number), self._meta_path(number)
        there = [path for path in (files.temporary_path(meta), files.temporary_path(data), data) if path.exists()]
        for path in there:
            path.unlink(missing_ok=True)
        return bool(there)


def _final_name(path: Path) -> str:
    return path.name.removeprefix(".").removesuffix(".tmp")


def _save(state: Mapping[str, object], file: BinaryIO) -> None:
    try:
        torch.save(dict(state), file)
    except RuntimeError as exc:
        if isinstance(exc.__context__, OSError):  # a full disk, which torch hides behind its own complaint
            raise exc.__context__ from None
        raise
