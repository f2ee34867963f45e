"""How full a stream is and how much of it waits for its consumer, from two answers of the server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from railbus_shared.bus.connection import Bus
from railbus_shared.errors import BusUnavailable
from railbus_shared.topology import Consumer


@dataclass(frozen=True)
class Fill:
    """Of one stream and one consumer of it."""

    stream: str
    consumer: str
    messages: int
    bytes: int
    limit_bytes: int
    """0 where there is none."""
    pending: int
    """Messages that the consumer has not been given yet."""
    unacknowledged: int
    """Messages that it was given and has not acknowledged."""


async def fill(bus: Bus, consumer: Consumer) -> Fill:
    """Raises TransientError if it cannot be known now."""
    stream = await _asked(bus, f"STREAM.INFO.{consumer.stream}")
    waiting = await _asked(bus, f"CONSUMER.INFO.{consumer.stream}.{consumer.name}")
    state, config = _part(stream, "state"), _part(stream, "config")
    return Fill(
        stream=consumer.stream,
        consumer=consumer.name,
        messages=_count(state, "messages"),
        bytes=_count(state, "bytes"),
        limit_bytes=_count(config, "max_bytes"),
        pending=_count(waiting, "num_pending"),
        unacknowledged=_count(waiting, "num_ack_pending"),
    )


async def _asked(bus: Bus, verb: str) -> dict[str, object]:
    answer = await bus.api(verb)
    if "error" in answer:
        raise BusUnavailable(f"$JS.API.{verb}: {answer['error']}")
    return answer


def _part(answer: Mapping[str, object], name: str) -> Mapping[str, object]:
    found = answer.get(name)
    return cast("Mapping[str, object]", found) if isinstance(found, dict) else {}


def _count(answer: Mapping[str, object], name: str) -> int:
    found = answer.get(name)
    return max(0, found) if isinstance(found, int) else 0
