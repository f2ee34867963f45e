"""A job of several ranks on one host: the trainer forks them, and stands between them and the runner.

The trainer itself runs no user code then. Every rank is a trainer of its own, with its own end of a socket pair, and
the ranks speak to each other by `torch.distributed` over the rendezvous that they inherit. To the runner all of them
are one trainer: orders go to rank 0, whose word is the job's; shards are asked for and released for all ranks together
(`rank_shards`); and when one rank ends badly, the others are ended too, and the trainer ends as that one did.
In: verified, and every other order, with its descriptors, for rank 0. Out: verify, ahead, ended, and every other frame
of rank 0; of the other ranks their events.
"""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import os
import re
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from railbus_runner import processes
from railbus_runner.channel import TrainerChannel
from railbus_runner.descriptors import receive
from railbus_runner.entrypoints import registry
from railbus_runner.forked import STACKS_SIGNAL
from railbus_runner.frames import Ahead, Ended, Events, Frame, FrameBuffer, Moved, Plan, Stop, Verified, Verify, pack
from railbus_runner.rank_shards import RankShards
from railbus_runner.team import Seat
from railbus_shared.contracts.jobs import ErrorBody
from railbus_shared.errors import InvalidField

EXIT_FAILED: Final = 1
EXIT_RUNNER_GONE: Final = 3
_OTHERS_S: Final = 1.0
"""From the first rank that ended badly to the end of all: time to clear away what they were writing, and for the one
that is to blame to say so."""
_READ_BYTES: Final = 1 << 18
_MAX_DESCRIPTORS: Final = 16
_ECHO: Final = re.compile(r"gloo|nccl|processgroup|connection (closed|reset) by peer|TCPStore|FileStore", re.IGNORECASE)
"""How an error reads that a rank has because another one is gone."""

RankMain = Callable[[Plan, TrainerChannel, Seat], int]
"""Lives one rank and gives its exit code."""


@dataclass
class Rank:
    """One rank, as the trainer above it sees it."""

    number: int
    pid: int
    pidfd: int
    sock: socket.socket
    buffer: FrameBuffer = field(default_factory=FrameBuffer)
    outgoing: bytearray = field(default_factory=bytearray)
    descriptors: list[int] = field(default_factory=list)
    """That go out with the next bytes."""
    ended: Ended | None = None
    status: int | None = None
    """As `os.waitstatus_to_exitcode` gives it, once it was reaped."""
    is_killed: bool = False
    """By us, so its status says nothing."""

    @property
    def has_failed(self) -> bool:
        said_so = self.ended is not None and self.ended.outcome == "failed"
        return said_so or (self.status is not None and self.status != 0)


def lead(plan: Plan, runner: socket.socket, *, rank_main: RankMain) -> int:
    """Fork the ranks and serve them to their end; gives the exit code. In a rank it gives that of the rank.

    Takes over the socket, from which nothing but the plan may have been read. To be called on the main thread, before
    there is another thread or CUDA is used.
    """
    rendezvous = os.memfd_create("railbus-rendezvous", os.MFD_CLOEXEC)
    pipes = [os.pipe() for _ in range(plan.spec.ranks)]  # from rank 0 to each, the one to itself unused
    parent = os.getpid()
    ranks: list[Rank] = []
    for number in range(plan.spec.ranks):
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            processes.die_with_parent(parent)
            for mine in (runner, ours, *(rank.sock for rank in ranks)):
                mine.close()
            for rank in ranks:
                os.close(rank.pidfd)
            return rank_main(plan_of(plan, number), _channel(plan, theirs), _seat(number, rendezvous, pipes))
        theirs.close()
        ours.setblocking(False)
        ranks.append(Rank(number, pid, os.pidfd_open(pid), ours))
    for descriptor in (rendezvous, *itertools.chain.from_iterable(pipes)):
        os.close(descriptor)
    _pass_on_stacks(ranks)
    return Lead(plan, runner, ranks).serve()


def refusal(plan: Plan) -> InvalidField | None:
    """Why a plan cannot be lived by several ranks."""
    num_gpus, count = sum(device.kind == "gpu" for device in plan.devices), plan.spec.ranks
    if num_gpus % count:
        return InvalidField(
            field="ranks",
            value=count,
            problem=f"{num_gpus} GPU(s) are leased, which so many ranks cannot share evenly",
            hint="let `ranks` be `devices.count`, or divide it",
        )
    if plan.spec.entrypoint in registry.BUILTIN:
        return InvalidField(
            field="ranks",
            value=count,
            problem=f"the built-in {plan.spec.entrypoint!r} trains in one process",
            hint="leave `ranks` out, or write an entrypoint that wraps its model in DistributedDataParallel",
        )
    return None


def plan_of(plan: Plan, rank: int) -> Plan:
    """What one rank is told. No shard counts as verified: each rank asks for those that it reads."""
    producer = plan.producer if rank == 0 else f"{plan.producer[:60]}-r{rank}"
    stream = plan.stream.model_copy(update={"verified": ()})
    update = {"rank": rank, "world_size": plan.spec.ranks, "producer": producer, "stream": stream}
    return plan.model_copy(update=update)


def _seat(rank: int, rendezvous: int, pipes: Sequence[tuple[int, int]]) -> Seat:
    """Of one rank, in its process; closes what is not its own."""
    own = tuple(end for _, end in pipes[1:]) if rank == 0 else (pipes[rank][0],)
    for descriptor in itertools.chain.from_iterable(pipes):
        if descriptor not in own:
            os.close(descriptor)
    return Seat(rendezvous, own)


def _channel(plan: Plan, sock: socket.socket) -> TrainerChannel:
    channel = TrainerChannel(sock)
    channel.deadline_boottime_s = plan.deadline_boottime_s
    return channel


def _pass_on_stacks(ranks: Iterable[Rank]) -> None:
    """The signal for stacks, which every rank has inherited the handler for, is theirs and not the trainer's."""
    pidfds = [rank.pidfd for rank in ranks]

    def pass_on(number: int, _frame: object) -> None:
        for pidfd in pidfds:
            with contextlib.suppress(ProcessLookupError):  # it has ended
                signal.pidfd_send_signal(pidfd, number)

    faulthandler.unregister(STACKS_SIGNAL)
    signal.signal(STACKS_SIGNAL, pass_on)


class Lead:
    """The trainer above its ranks: a loop without threads and without torch."""

    def __init__(self, plan: Plan, runner: socket.socket, ranks: list[Rank]) -> None:
        self._runner = runner
        self._ranks = ranks
        self._shards = RankShards(len(ranks), vouched=plan.stream.verified)
        self._from_runner = FrameBuffer()
        self._selector = selectors.DefaultSelector()
        self._is_runner_gone = False
        self._is_stopping = False
        self._kill_at_s: float | None = None
        self._failed: list[Rank] = []  # in the order in which it was noticed

    def serve(self) -> int:
        """Until every rank has been reaped; then say how that ended."""
        signal.signal(signal.SIGTERM, self._pass_on_termination)
        with self._selector:
            self._serve()
        for rank in self._ranks:
            rank.sock.close()
            os.close(rank.pidfd)
        code = EXIT_RUNNER_GONE if self._is_runner_gone else self._end()
        self._runner.close()
        return code

    def _serve(self) -> None:
        self._selector.register(self._runner, selectors.EVENT_READ)
        for rank in self._ranks:
            self._selector.register(rank.sock, selectors.EVENT_READ, rank)
            self._selector.register(rank.pidfd, selectors.EVENT_READ, rank)
        while any(rank.status is None for rank in self._ranks):
            self._turn()

    def _pass_on_termination(self, number: int, _frame: object) -> None:
        """Rank 0 decides what it means, if it has a handler; once the runner has ordered a stop it means nothing."""
        first = self._ranks[0]
        if first.status is None and processes.handles(first.pid, number):
            signal.pidfd_send_signal(first.pidfd, number)
        elif not self._is_stopping:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def _turn(self) -> None:
        wait_s = None if self._kill_at_s is None else max(0.0, self._kill_at_s - time.monotonic())
        for key, events in self._selector.select(wait_s):
            if key.fileobj not in self._selector.get_map():  # done with since
                continue
            if key.fileobj is self._runner:
                self._hear_runner()
            elif key.fileobj == key.data.pidfd:
                self._reap(key.data)
            elif events & selectors.EVENT_WRITE:
                self._flush(key.data)
            else:
                self._hear(key.data)
        if self._kill_at_s is not None and time.monotonic() >= self._kill_at_s:
            self._kill_rest()

    def _kill_rest(self) -> None:
        self._kill_at_s = None
        for rank in self._ranks:
            if rank.status is None:
                rank.is_killed = True
                signal.pidfd_send_signal(rank.pidfd, signal.SIGKILL)

    # --- the runner --------------------------------------------------------------------------------------------------

    def _hear_runner(self) -> None:
        try:
            data, descriptors = receive(self._runner, _READ_BYTES, max_descriptors=_MAX_DESCRIPTORS)
        except ConnectionResetError:
            data, descriptors = b"", []
        if not data:
            self._lose_runner()
            return
        self._ranks[0].descriptors += descriptors
        for frame in self._from_runner.feed(data):
            if isinstance(frame, Verified):
                for number, answer in self._shards.verified(frame):
                    self._send(self._ranks[number], answer)
            else:
                self._is_stopping |= isinstance(frame, Stop)
                self._send(self._ranks[0], frame)

    def _lose_runner(self) -> None:
        if not self._is_runner_gone:
            self._is_runner_gone = True
            self._selector.unregister(self._runner)
            self._kill_rest()

    def _tell(self, *frames: Frame) -> None:
        if self._is_runner_gone:
            return
        try:
            for frame in frames:
                self._runner.sendall(pack(frame))
        except (BrokenPipeError, ConnectionResetError):
            self._lose_runner()

    # --- the ranks ---------------------------------------------------------------------------------------------------

    def _hear(self, rank: Rank) -> None:
        try:
            data = rank.sock.recv(_READ_BYTES)
        except ConnectionResetError:
            data = b""
        if not data:
            self._selector.unregister(rank.sock)
            return
        for frame in rank.buffer.feed(data):
            self._take(rank, frame)

    def _take(self, rank: Rank, frame: Frame) -> None:
        match frame:
            case Ended():
                rank.ended = frame
                self._note(rank)
            case Verify():
                answer, question = self._shards.asked(rank.number, frame)
                if answer is not None:
                    self._send(rank, answer)
                if question is not None:
                    self._tell(question)
            case Ahead():
                if (ahead := self._shards.ahead(rank.number, frame)) is not None:
                    self._tell(ahead)
            case Events() | Moved():
                self._tell(frame)
            case _ if rank.number == 0:
                self._tell(frame)
            case _:
                sys.stderr.write(f"rank {rank.number} sent a {frame.f!r} frame, which only rank 0 may\n")

    def _send(self, rank: Rank, frame: Frame) -> None:
        """Without waiting: a rank reads when it comes to it."""
        rank.outgoing += pack(frame)
        self._flush(rank)

    def _flush(self, rank: Rank) -> None:
        try:
            del rank.outgoing[: _send(rank)]
        except BlockingIOError:
            pass
        except (BrokenPipeError, ConnectionResetError):
            rank.outgoing.clear()
        if rank.sock in self._selector.get_map():
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if rank.outgoing else 0)
            self._selector.modify(rank.sock, events, rank)

    def _reap(self, rank: Rank) -> None:
        self._selector.unregister(rank.pidfd)
        if rank.sock in self._selector.get_map():
            self._drain(rank)
        _, status = os.waitpid(rank.pid, 0)
        rank.status = os.waitstatus_to_exitcode(status)
        self._note(rank)

    def _drain(self, rank: Rank) -> None:
        """What it said last, before it ended."""
        while rank.sock in self._selector.get_map():
            try:
                self._hear(rank)
            except BlockingIOError:  # a process that the rank has left behind holds its socket
                self._selector.unregister(rank.sock)

    def _note(self, rank: Rank) -> None:
        if rank.has_failed and not rank.is_killed and rank not in self._failed:
            self._failed.append(rank)
            if self._kill_at_s is None:
                self._kill_at_s = time.monotonic() + _OTHERS_S

    # --- the end -----------------------------------------------------------------------------------------------------

    def _end(self) -> int:
        """Say and do what the rank did that is to blame, else what rank 0 did."""
        first = self._ranks[0]
        blamed = min(self._failed, key=_guilt) if self._failed else first
        if blamed.ended is not None:
            metrics = first.ended.metrics if first.ended is not None else {}
            error = _with_rank(blamed.ended.error, blamed.number)
            self._tell(Ended(outcome=blamed.ended.outcome, error=error, metrics=metrics))
            return blamed.status if blamed.status is not None and blamed.status > 0 else int(bool(self._failed))
        status = EXIT_FAILED if blamed.status is None else blamed.status
        if status >= 0:
            sys.stderr.write(f"rank {blamed.number} of {len(self._ranks)} exited with {status} and without a word\n")
            return status or EXIT_FAILED
        sys.stderr.write(f"rank {blamed.number} of {len(self._ranks)} was killed by {signal.Signals(-status).name}\n")
        sys.stderr.flush()
        if -status != signal.SIGKILL:  # which has no handler
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)  # so that the runner sees what the kernel shows of it
        return 128 - status


def _send(rank: Rank) -> int:
    """How many bytes went out, with all descriptors."""
    if not rank.descriptors:
        return rank.sock.send(rank.outgoing)
    sent = socket.send_fds(rank.sock, [rank.outgoing], rank.descriptors)
    while rank.descriptors:
        os.close(rank.descriptors.pop())
    return sent


def _guilt(rank: Rank) -> int:
    """The lower the likelier it is that the others failed because of this one."""
    if rank.ended is None:
        return 0
    return 2 if rank.ended.error is not None and _ECHO.search(rank.ended.error.message) else 1


def _with_rank(error: ErrorBody | None, rank: int) -> ErrorBody | None:
    return error and error.model_copy(update={"details": {**error.details, "rank": rank}})
