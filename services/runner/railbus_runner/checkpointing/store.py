"""The checkpoints of one model on disk: written so that they are whole or do not exist.

A checkpoint is `checkpoint-000123.pt`, or a folder `checkpoint-000123.dcp`, and `checkpoint-000123.meta.json`, and the
meta is its commit record:

    1. a number is claimed (`serials`)
    2. the data are written beside their final name, flushed, hashed, and take their name without replacing
    3. the meta is written and flushed under its temporary name
    4. the runner names the checkpoint in the job record, with its lease epoch; a stale attempt ends here
    5. the meta takes its final name

Killed before 4, an attempt leaves litter that `sweep` of its successor removes; killed after it, a recorded checkpoint
that `complete` brings to its end, whether or not its writer lives on and does so too. One is removed the other way
round: its number is claimed again, the meta goes, and then the data. `loading` reads what is here.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path

from railbus_runner.checkpointing import serials
from railbus_runner.checkpointing.disk import setting_errors, write_draft
from railbus_runner.endings import CommitRefused
from railbus_shared import files
from railbus_shared.contracts.artifacts import CheckpointFile, CheckpointMeta
from railbus_shared.contracts.jobs import CheckpointRef
from railbus_shared.errors import (
    CheckpointCorrupt,
    CheckpointNotFound,
    RailbusError,
    StaleLeaseEpoch,
    StorageFull,
)
from railbus_shared.layout import Layout, checkpoint_number, checkpoint_stem
from railbus_shared.metas import read_meta


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
        source: memoryview | Iterable[memoryview],
        *,
        nbytes: int,
        describe: Callable[[int, CheckpointFile], CheckpointMeta],
        commit: Callable[[CheckpointMeta], None],
    ) -> CheckpointMeta:
        """Write a checkpoint whose data is one file, of these bytes, `nbytes` in all; else as `write_files`."""

        def produce(number: int) -> tuple[CheckpointFile]:
            final = self._data_path(number)
            sha256 = write_draft(final, source, nbytes=nbytes)
            try:
                files.publish(files.temporary_path(final), final)
            except FileNotFoundError as exc:
                raise _swept(final) from exc
            return (CheckpointFile(file=final.name, bytes=nbytes, sha256=sha256),)

        return self.write_files(produce, describe=lambda number, made: describe(number, *made), commit=commit)

    def write_files(
        self,
        produce: Callable[[int], tuple[CheckpointFile, ...]],
        *,
        describe: Callable[[int, tuple[CheckpointFile, ...]], CheckpointMeta],
        commit: Callable[[CheckpointMeta], None],
    ) -> CheckpointMeta:
        """Write a checkpoint; it exists once this returns.

        `produce` makes the data durable under the final names of a number, `describe` makes the meta of the number and
        what was produced, `commit` asks the runner, and raises CommitRefused for a no. After a no, and after any error
        before the question, nothing of the checkpoint is left, and older ones are as they were. Raises StorageFull,
        BadSetting for a folder that cannot be written to, CommitRefused also where a later attempt has swept the draft.
        """
        with setting_errors(self.folder):  # of each step, and of removing what is left after one
            with files.storage_errors(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                number = serials.claim(self.folder, job=self._job, lease_epoch=self._lease_epoch)
            with self._removed_on(BaseException, number):
                meta = describe(number, produce(number))
                self._write_draft(meta)
            with self._removed_on(CommitRefused, number):  # after any other end the record may name it: it is left
                commit(meta)
                self._publish(number)
            serials.release(self.folder, number)
        return meta

    def retain(self, choose: Callable[[Sequence[CheckpointMeta]], Collection[int]]) -> list[int]:
        """Remove checkpoints of the job, and give the numbers of those removed, oldest first.

        To be called once the newest is durable. `choose` gets the metas, newest first, and gives the numbers that are
        to go; the newest stays whatever it gives. Raises BadSetting for a folder that cannot be written to.
        """
        metas = list(self.metas(job=self._job))
        chosen = choose(metas)
        gone = [meta for meta in reversed(metas[1:]) if meta.number in chosen]
        with setting_errors(self.folder):
            for meta in gone:
                self._remove_whole(meta)
        return [meta.number for meta in gone]

    # --- at the start of an attempt ----------------------------------------------------------------------------------

    def complete(self, ref: CheckpointRef) -> bool:
        """Give a recorded checkpoint's meta its final name, if it still has the temporary one; True if it had."""
        draft = files.temporary_path(self._meta_path(ref.number))
        if not draft.exists():
            return False
        if self._meta_path(ref.number).exists():  # killed between the two halves of the rename
            draft.unlink(missing_ok=True)
            return False
        try:
            meta = self._read_meta(draft)
        except CheckpointCorrupt:
            if self._meta_path(ref.number).exists():  # its writer was quicker
                return False
            raise
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
            return read_meta(path, model=self._model)[0]
        except FileNotFoundError as exc:
            raise CheckpointCorrupt(path=str(path), expected="a valid meta", actual="no such file") from exc

    # --- steps -------------------------------------------------------------------------------------------------------

    def _meta_path(self, number: int) -> Path:
        return self.folder / f"{checkpoint_stem(number)}.meta.json"

    def _data_path(self, number: int) -> Path:
        return self.folder / f"{checkpoint_stem(number)}.pt"

    def _write_draft(self, meta: CheckpointMeta) -> None:
        with files.temporary(self._meta_path(meta.number)) as file:
            file.write(files.to_json(meta.to_map()))
        files.fsync_dir(self.folder)

    def _publish(self, number: int) -> None:
        """Give a meta its final name, if nobody else has; raises CommitRefused if its draft was swept."""
        final = self._meta_path(number)
        draft = files.temporary_path(final)
        try:
            files.publish(draft, final)
        except (FileExistsError, FileNotFoundError) as exc:  # one of two has done it, wholly or half
            if not final.exists():
                raise _swept(final) from exc
            draft.unlink(missing_ok=True)
            files.fsync_dir(self.folder)

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
        stem = checkpoint_stem(number)
        drafts = sorted(self.folder.glob(f".{stem}.*"))
        finals = (self._data_path(number), self.folder / f"{stem}.dcp")
        return sum(_remove(path) for path in (*drafts, *finals)) > 0

    def _remove_whole(self, meta: CheckpointMeta) -> None:
        """Remove a checkpoint; what a kill leaves of it is swept. The meta goes first, so none is without its data."""
        stem = checkpoint_stem(meta.number)
        with contextlib.suppress(StorageFull):  # then the more so
            serials.claim_again(self.folder, meta.number, job=self._job, lease_epoch=self._lease_epoch)
        self._meta_path(meta.number).unlink(missing_ok=True)
        files.fsync_dir(self.folder)
        for name in {file.file.partition("/")[0] for file in meta.files}:
            if name.startswith(f"{stem}."):  # and not what the data of another one are called
                _remove(self.folder / name)
        serials.release(self.folder, meta.number)


def _swept(final: Path) -> CommitRefused:
    return CommitRefused(StaleLeaseEpoch(f"the draft of {final.name!r} is gone: a later attempt has swept it"))


def _remove(path: Path) -> bool:
    """Remove a file or a folder; True if it was there."""
    try:
        path.unlink()
    except IsADirectoryError:
        shutil.rmtree(path)
    except FileNotFoundError:
        return False
    return True
