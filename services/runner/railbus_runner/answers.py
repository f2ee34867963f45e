"""What a trainer asks of its runner: to vouch for shards, to commit checkpoints, to pass events and its place on."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, Final

from railbus_runner.claim import OVER, Claim, through_outages
from railbus_runner.commits import Commits
from railbus_runner.frames import (
    Ahead,
    AwaitsWriter,
    Commit,
    Ended,
    Events,
    Frame,
    Moved,
    OpenWriter,
    Paused,
    Saving,
    Verified,
    Verify,
    WriterLost,
)
from railbus_runner.link import TrainerLink
from railbus_runner.saving import SaveRequests
from railbus_runner.telling import StreamTeller
from railbus_runner.writers import Writers
from railbus_shared import happenings
from railbus_shared.contracts.jobs import ErrorBody
from railbus_shared.contracts.requests import CloseStream, OpenedStream, OpenStream, StreamProgress, VerifyShards
from railbus_shared.errors import RailbusError
from railbus_shared.service import Context
from railbus_shared.waiting import end

logger = logging.getLogger(__name__)

_OPEN_S: Final = 10.0
_TELL_S: Final = 3.0
_VERIFY_S: Final = 60.0
"""Then it is asked again, as after an outage: a dataloader that was killed meanwhile answers never. What it had begun
goes on, whoever asks, so nothing is lost by it."""


class Answers:
    """Serves one trainer."""

    def __init__(
        self,
        link: TrainerLink,
        claim: Claim,
        context: Context,
        *,
        commits: Commits,
        saves: SaveRequests,
        writers: Writers,
        moved: Callable[[], None],
        forward: Callable[[Events], None],
    ) -> None:
        """`moved` is called where the trainer has made progress, `forward` with each batch of its events."""
        self._link = link
        self._claim = claim
        self._context = context
        self._commits = commits
        self._writers = writers
        self._moved = moved
        self._forward = forward
        self._num_owed = 0
        self._opened: OpenedStream | None = None
        self._saves = saves
        self.ended: Ended | None = None
        """The trainer's last frame, once it has come."""
        self.failure: RailbusError | None = None
        """Why shards could not be vouched for."""

    async def serve(self) -> None:
        """Answer frames of a trainer whose stream is open, until it closes its end."""
        teller = StreamTeller(self._stream, lambda word: self._ask("progress", word, timeout_s=_TELL_S))
        async with contextlib.aclosing(self._link.frames()) as frames, asyncio.TaskGroup() as tasks:
            helping = [tasks.create_task(teller.run()), tasks.create_task(self._saves.run())]
            async for frame in frames:
                match frame:
                    case Ahead():
                        teller.heed(frame)
                    case Verify():
                        tasks.create_task(self._verify(frame, teller))
                    case Saving():
                        self._saves.heed(frame)
                    case Paused():
                        tasks.create_task(self._pause(frame))
                    case Commit():
                        self._moved()
                        tasks.create_task(self._owed(self._commits.commit(frame, self._link)))
                    case WriterLost():
                        tasks.create_task(self._owed(self._writers.tell_recorded()))
                    case _:
                        self._hear(frame)
            await end(*helping)

    def _hear(self, frame: Frame) -> None:
        """What nobody waits for an answer to."""
        match frame:
            case Events():
                self._forward(frame)
            case Moved():
                self._moved()
            case OpenWriter():
                self._writers.open()
            case AwaitsWriter():
                self._writers.is_awaited = frame.is_waiting
                self._moved()
            case Ended():
                self.ended = frame
            case _:
                logger.warning("a trainer sent what it may not", extra={"frame": frame.f})

    async def open_stream(self) -> OpenedStream:
        """Where the shards of the job's dataset lie on this host; raises what the dataloader refuses it for."""
        spec, ref = self._claim.record.spec, self._claim.ref
        request = OpenStream(job=ref.job, lease_epoch=ref.lease_epoch, dataset=spec.dataset, seed=spec.seed)
        answer = await through_outages(lambda: self._ask("open", request, timeout_s=_OPEN_S))
        self._opened = OpenedStream.parse(answer)
        return self._opened

    async def close_stream(self) -> None:
        """Say that the trainer has ended; if nobody hears it, the stream's time runs out."""
        if self._opened is None:
            return
        try:
            await self._ask("close", CloseStream(stream=self._opened.stream), timeout_s=_TELL_S)
        except RailbusError as exc:
            logger.info("stream left to expire", extra={"stream": self._opened.stream, "problem": str(exc)})

    @property
    def is_owing(self) -> bool:
        """Whether the trainer waits for an answer, or for its writer."""
        return self._num_owed > 0 or self._writers.is_awaited

    @contextlib.contextmanager
    def _owing(self) -> Iterator[None]:
        self._num_owed += 1
        try:
            yield
        finally:
            self._num_owed -= 1

    async def _owed(self, answering: Coroutine[Any, Any, None]) -> None:
        with self._owing():
            await answering

    @property
    def _stream(self) -> OpenedStream:
        if self._opened is None:
            raise RuntimeError("a trainer is served once its stream is open")
        return self._opened

    async def _verify(self, asked: Verify, teller: StreamTeller) -> None:
        stream = self._stream
        request = VerifyShards(dataset=stream.dataset, shards=asked.shards, stream=stream.stream)
        try:
            with self._owing():
                await teller.releases_told()
                await through_outages(lambda: self._ask("verify", request, timeout_s=_VERIFY_S))
        except RailbusError as exc:
            self.failure = exc
            await self._link.send(Verified(shards=asked.shards, error=ErrorBody.parse(exc.to_wire())))
            return
        teller.holds(asked.shards)
        await self._link.send(Verified(shards=asked.shards))

    async def _pause(self, told: Paused) -> None:
        """Say so in the record, for people; nothing rests on it."""
        ref, host = self._claim.ref, str(self._claim.record.host)
        with contextlib.suppress(*OVER):
            await self._claim.apply(happenings.Paused(ref.lease_epoch, host, told.reason))

    async def _ask(
        self, verb: str, request: OpenStream | VerifyShards | StreamProgress | CloseStream, *, timeout_s: float
    ) -> dict[str, object]:
        """Ask the dataloader of this host, whose paths are the trainer's."""
        bus, host = self._context.bus, self._context.common.host
        return await bus.request(bus.subjects.request(f"data.{host}", verb), request.to_map(), timeout_s=timeout_s)
