"""Runs the telemetry service, to die at a chosen instant: `python dying_telemetry.py`.

The instants are those at which it does something to the world, named for what the system or the server sees:
`DIES_AT=<call>.<before|half|after>:<n>` is the n-th call of a kind. Calls on files count below the logs only; `ack` is
a message that acknowledges another. Without DIES_AT it is the service itself. ACK_WAIT_S shortens the time after which
what is not acknowledged comes again.
"""

from __future__ import annotations

import faulthandler
import os
import random
import runpy
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

DIES_AT = "DIES_AT"
ACK_WAIT_S = "ACK_WAIT_S"
APPENDING = ("writev.before", "writev.half", "writev.after", "fdatasync.before", "fdatasync.after")
ACKNOWLEDGING = ("ack.before", "ack.after")
CLOSING = ("fsync.before", "fsync.after", "replace.before", "replace.after", "unlink.before", "unlink.after")


def some_instant(chance: random.Random, points: Sequence[str] = APPENDING + ACKNOWLEDGING + CLOSING) -> str:
    """One that is come to within a second or two under load, if periods are closed as well."""
    point = chance.choice(points)
    most = 20 if point in ACKNOWLEDGING else 3
    return f"{point}:{chance.randint(1, most)}"


class _Instant:
    """The one that was chosen."""

    def __init__(self, text: str) -> None:
        self._point, _, count = text.partition(":")
        self._left = int(count)

    def come(self, call: str, when: str) -> None:
        """Die if this is it."""
        if self.is_now(call, when):
            os.kill(os.getpid(), signal.SIGKILL)

    def is_now(self, call: str, when: str) -> bool:
        if f"{call}.{when}" != self._point:
            return False
        self._left -= 1
        return self._left == 0


def _is_log(target: Any) -> bool:
    path = Path(f"/proc/self/fd/{target}").readlink() if isinstance(target, int) else Path(target)
    return "logs" in path.parts


def _watch_file_call(name: str, instant: _Instant) -> None:
    call: Callable[..., Any] = getattr(os, name)

    def watched(target: Any, *rest: Any, **named: Any) -> Any:
        if not _is_log(target):
            return call(target, *rest, **named)
        instant.come(name, "before")
        if name == "writev" and instant.is_now(name, "half"):
            data = b"".join(rest[0])
            os.write(target, data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        result = call(target, *rest, **named)
        instant.come(name, "after")
        return result

    setattr(os, name, watched)


def _watch_acks(instant: _Instant) -> None:
    from nats.aio.client import Client

    publish = Client.publish

    async def watched(self: Client, subject: str, *rest: Any, **named: Any) -> None:
        is_ack = subject.startswith("$JS.ACK.")
        if is_ack:
            instant.come("ack", "before")
        await publish(self, subject, *rest, **named)
        if is_ack:
            await self.flush()
            instant.come("ack", "after")

    setattr(Client, "publish", watched)  # noqa: B010 - to a type checker a method is not to be assigned


def _wait_shorter(seconds: float) -> None:
    from railbus_shared import topology

    consumer = topology.event_consumer
    topology.event_consumer = lambda subjects: replace(consumer(subjects), ack_wait_s=seconds)


if __name__ == "__main__":
    sys.path.pop(0)  # the folder of the tests is no part of what runs
    faulthandler.register(signal.SIGUSR1)
    if ACK_WAIT_S in os.environ:
        _wait_shorter(float(os.environ[ACK_WAIT_S]))
    if DIES_AT in os.environ:
        chosen = _Instant(os.environ[DIES_AT])
        _watch_acks(chosen)
        for kind in ("writev", "fdatasync", "fsync", "replace", "unlink"):
            _watch_file_call(kind, chosen)
    runpy.run_module("railbus_telemetry", run_name="__main__", alter_sys=True)
