"""Naming checkpoints in the job record, for the trainer or the writer that has written them."""

from __future__ import annotations

from collections.abc import Callable

from railbus_runner.claim import OVER, Claim
from railbus_runner.frames import Commit, Committed, Refused
from railbus_runner.link import TrainerLink
from railbus_runner.saving import SaveRequests
from railbus_shared.contracts.jobs import CheckpointRef, ErrorBody
from railbus_shared.happenings import Saved


class Commits:
    """Of one attempt.

    Attributes:
        recorded: what the job record names, as far as this attempt has seen to it.
    """

    def __init__(self, claim: Claim, saves: SaveRequests, *, refused: Callable[[], None]) -> None:
        """`refused` is called where a commit was refused: the attempt is over, and whoever asked has been told.

        `saves` are those who wait for a checkpoint to be committed.
        """
        self.recorded = claim.record.checkpoint
        self._claim = claim
        self._saves = saves
        self._refused = refused

    async def commit(self, asked: Commit, link: TrainerLink) -> None:
        """Name the checkpoint in the job record, unless the attempt is no longer the job's; answers on the link."""
        meta, host = asked.meta, str(self._claim.record.host)
        ref = CheckpointRef(number=meta.number, step=meta.step, sha256=meta.files[0].sha256)
        try:
            applied = await self._claim.apply(Saved(self._claim.ref.lease_epoch, host, ref))
        except OVER as exc:
            await link.send(Refused(number=meta.number, error=ErrorBody.parse(exc.to_wire())))
            self._refused()
            return
        self.recorded = ref
        self._saves.committed(meta)
        await link.send(Committed(number=meta.number))
        size_bytes = sum(file.bytes for file in meta.files)
        more = {"model": meta.model, "bytes": size_bytes, "reason": meta.reason}
        self._claim.tell(applied, more, step=meta.step)
