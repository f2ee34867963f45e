"""The ranks of one job, as each of them sees the others: what they agree on, and that they are at the same step.

They share no clock and hear no runner but through rank 0. So what depends on either is decided by rank 0, the leader,
in the calls that all ranks make alike: `ctx.step`, `ctx.save`, `ctx.stopping`, `ctx.resume`, an evaluation that decides
what is kept, and the return from the entrypoint. In each of them the leader gives the others an order for whatever they
have to do with it, and at last the one to go on. Orders go through pipes, and the leader waits for nobody; what ranks
tell each other goes through a process group of their own, beside the one that user code has.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, Literal, TypeVar, cast, get_args

import torch
import torch.distributed as dist

from railbus_runner.endings import Stopped
from railbus_shared.errors import Conflict

T = TypeVar("T")
Call = Literal["step", "save", "stopping", "resume", "log", "return"]
Order = Literal["go on", "state", "write", "stop"]
"""`state`: say what you have for yourself; `write`: your part of the state that was just shown."""

_CALLS: Final[tuple[Call, ...]] = get_args(Call)
_ORDERS: Final[tuple[Order, ...]] = get_args(Order)
_ORDER: Final = struct.Struct("<BqB")
_FOREVER: Final = timedelta(days=365)
"""Rank 0 may wait for its lease, and the others for rank 0; who is gone is noticed by the trainer above."""


@dataclass(frozen=True)
class Seat:
    """What a rank inherits to meet the others."""

    rendezvous: int
    """Descriptor of a file, empty at first."""
    orders: tuple[int, ...]
    """Of rank 0 the ends of the pipes to all others, of any other rank the end of its own."""


class Team:
    """One rank among those of a job, by default the only one.

    Attributes:
        rank: its number.
        world_size: how many there are.
        group: for what is not the user's own; None for the only one, and before `join`.
    """

    def __init__(self, rank: int = 0, world_size: int = 1) -> None:
        self.rank = rank
        self.world_size = world_size
        self.group: dist.ProcessGroup | None = None
        self._orders: tuple[int, ...] = ()
        self._leading: tuple[Call, int] | None = None

    def join(self, seat: Seat, *, device: torch.device) -> None:
        """Meet the other ranks at the file that all have inherited, and make the process group of user code.

        That is `gloo` on the CPU, and `nccl` too for CUDA, on the loopback interface unless the job's environment says
        otherwise. Sets the variables by which torchrun tells a process its rank.
        """
        os.environ.update({name: str(self.rank) for name in ("RANK", "LOCAL_RANK")})
        os.environ.update({name: str(self.world_size) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")})
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
        self._orders = seat.orders
        is_cuda = device.type == "cuda"
        if is_cuda:
            torch.cuda.set_device(device)
        store = dist.FileStore(f"/proc/self/fd/{seat.rendezvous}", self.world_size)  # type: ignore[attr-defined]
        backend = "cpu:gloo,cuda:nccl" if is_cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.world_size)
        self.group = cast("dist.ProcessGroup", dist.new_group(backend="gloo", timeout=_FOREVER))

    @property
    def is_leader(self) -> bool:
        return self.rank == 0

    # --- orders ------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def leading(self, call: Call, *, step: int) -> Iterator[None]:
        """What the leader does in a call; after it the others go on, or stop where it raises Stopped."""
        if self._leading is not None:  # a call within a call
            yield
            return
        self._leading = call, step
        try:
            yield
        except Stopped:
            self.order("stop")
            raise
        else:
            self.order("go on")
        finally:
            self._leading = None

    def order(self, order: Order) -> None:
        """Have the others, who make the same call, do something; nobody but the leader, within `leading`."""
        assert self._leading is not None  # noqa: S101 - whoever orders something is in a call
        call, step = self._leading
        packed = _ORDER.pack(_CALLS.index(call), step, _ORDERS.index(order))
        for pipe in self._orders:
            try:
                os.write(pipe, packed)
            except BrokenPipeError as exc:
                raise ConnectionError("connection closed by peer: another rank has ended") from exc

    def follow(self, call: Call, *, step: int) -> Order:
        """Wait for the leader's next order; raises Conflict if it makes another call, or is at another step."""
        packed = os.read(self._orders[0], _ORDER.size)  # written at once, so it is there as a whole
        if not packed:
            raise ConnectionError("connection closed by peer: rank 0 has ended")
        its_call, its_step, order = cast("tuple[int, int, int]", _ORDER.unpack(packed))
        if (_CALLS[its_call], its_step) != (call, step):
            raise Conflict(
                f"rank {self.rank} {_named(call)} at step {step}, but rank 0 {_named(_CALLS[its_call])} at {its_step}",
                hint="all ranks must make the same calls of ctx: give each as many batches, and let none return early",
            )
        return _ORDERS[order]

    # --- values ------------------------------------------------------------------------------------------------------

    def told(self, value: T) -> T:
        """The leader's value, on every rank; plain values only."""
        if self.group is None:
            return value
        box: list[Any] = [value]
        dist.broadcast_object_list(box, 0, group=self.group)
        return cast("T", box[0])

    def gathered(self, value: T) -> list[T]:
        """Every rank's value, on every rank, by rank; plain values and tensors only."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return cast("list[T]", values)


def _named(call: Call) -> str:
    return "returns" if call == "return" else f"calls ctx.{call}"
