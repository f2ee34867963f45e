"""A trainer's way to have checkpoints written beside it: a writer and an arena, got when a save is coming.

Nothing here waits but `wait`. Where it cannot be had, `why_not` says why, and the trainer writes by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from railbus_runner.channel import TrainerChannel
from railbus_runner.checkpointing.arena import with_growth
from railbus_runner.checkpointing.headroom import spare_bytes
from railbus_runner.checkpointing.image import Image
from railbus_runner.checkpointing.writer_link import WriterGone, WriterLink
from railbus_runner.frames import AwaitsWriter, Durable, NotWritten, Write

_MAX_LOSSES: Final = 3


@dataclass(frozen=True)
class Lost:
    """The writer is gone, and with it what it was told to write, unless it had got that far."""

    order: Write | None


Outcome = Durable | NotWritten | Lost


class AsyncSaves:
    """Of one trainer; of its main thread alone.

    Attributes:
        why_not: why the last preparation came to nothing, or is not done; empty if all is well.
    """

    def __init__(self, channel: TrainerChannel) -> None:
        self.why_not = ""
        self._channel = channel
        self._link: WriterLink | None = None
        self._wanted = 0  # bytes of the arena that is there, or was asked for
        self._num_lost = 0

    @property
    def is_busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._link is not None and self._link.ordered is not None

    def fits(self, nbytes: int) -> bool:
        """Whether a state of so many bytes could be ordered now."""
        return self._link is not None and not self.is_busy and nbytes <= self._link.capacity

    def prepare(self, nbytes: int) -> None:
        """See to a writer, and to an arena for a state of so many bytes, if there is memory for it.

        Nothing is done while busy: the writer reads from the arena.
        """
        if self.is_busy or nbytes <= self._wanted or (self._wanted and not self._capacity):
            return  # it is there, or something is on its way
        if self._num_lost >= _MAX_LOSSES:
            self.why_not = f"the writer was lost {self._num_lost} times"
            return
        wanted = with_growth(nbytes)
        if (spare := spare_bytes() + self._capacity) < wanted:
            self.why_not = f"a copy needs {wanted} bytes of memory, and {spare} are to spare"
            return
        self._wanted = wanted
        if self._link is None:
            self._channel.open_writer()
            return
        try:
            self._link.make_arena(wanted)
        except WriterGone as exc:
            self.why_not = str(exc)  # `heed` finds it gone as well, and tells what is lost with it

    def order(self, order: Write, image: Image) -> Lost | None:
        """Copy an image into the arena and have it written meanwhile; Lost if there is nobody to do it."""
        link = self._of_writer()
        try:
            link.write(order)
            image.copy_to(link.memory(), on_copied=link.copied)
        except WriterGone:
            return self._lost()
        except BaseException:
            self._lost()  # or it would wait for the rest of the copy, and the trainer for it
            raise
        return None

    def heed(self) -> Outcome | None:
        """Take in what has come, and go on with what is being prepared; costs microseconds when nothing has."""
        try:
            self._greet()
            return self._link.poll() if self._link is not None else None
        except WriterGone:
            return self._lost()
        finally:
            self._note_refusal()

    def wait(self) -> Outcome | None:
        """What became of the order, once that is known; None if there was none. The runner is told of the waiting."""
        if not self.is_busy:
            return None
        self._channel.send(AwaitsWriter(is_waiting=True))
        try:
            return self._of_writer().wait(self._channel)
        except WriterGone:
            return self._lost()
        finally:
            self._channel.send(AwaitsWriter(is_waiting=False))

    def detach(self) -> None:
        """For a process that user code has forked: the writer is its parent's."""
        if self._link is not None:
            self._link.detach()

    @property
    def _capacity(self) -> int:
        return self._link.capacity if self._link is not None else 0

    def _of_writer(self) -> WriterLink:
        if self._link is None:
            raise RuntimeError("there is no writer")
        return self._link

    def _greet(self) -> None:
        """Take over a writer that has come."""
        if self._channel.writer is not None:
            self._link, self._channel.writer = WriterLink(self._channel.writer), None
            self._link.make_arena(self._wanted)

    def _note_refusal(self) -> None:
        """There is no writer or no arena to be had: the next time it is asked for anew."""
        channel, link = self._channel, self._link
        if channel.writer_refused is not None:
            self.why_not, channel.writer_refused, self._wanted = channel.writer_refused.message, None, 0
        elif link is not None and link.why_not:
            self.why_not, link.why_not, self._wanted = link.why_not, "", 0

    def _lost(self) -> Lost:
        link = self._of_writer()
        order, self._link, self._wanted = link.ordered, None, 0
        link.close()
        self._num_lost += 1
        return Lost(order)
