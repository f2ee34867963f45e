"""Create what must exist on the server, idempotently, and recognise the store.

The store's incarnation is a random id in the metadata of the stream of jobs. A root keeps it in a marker file, with the
names of the streams that existed: another incarnation, or a stream that is gone, means that the store was wiped or
restored, and is refused until a person says so (`railbus up --new-store`, `railbus restore`).

While `railbus restore` puts a backup into a store, the stream of jobs is marked in its metadata, from the first message
of all streams to the last: until then the store is refused as one that is not whole, whoever asks.

In a cluster every stream has as many copies as `RAILBUS_REPLICAS` says. One that has fewer is given more, and never
fewer than it has: services that were told differently would else undo each other's work.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final

import nats.js.api as js
import nats.js.errors

from railbus_shared.bus.client import bus_errors
from railbus_shared.bus.connection import Bus
from railbus_shared.errors import BadSetting, IncarnationMismatch, StoreMissing
from railbus_shared.store_marker import StoreMarker, new_incarnation, read_marker, write_marker
from railbus_shared.topology import Consumer, Stream, Topology, topology

logger = logging.getLogger(__name__)

_INCARNATION: Final = "railbus-incarnation"
_RESTORING: Final = "railbus-restoring"
_NO_CLUSTER: Final = {10074}


async def ensure(bus: Bus, marker: Path) -> None:
    """Make sure that all streams, buckets and consumers exist; sets `bus.incarnation`.

    Raises StoreMissing, IncarnationMismatch, BusUnavailable.
    """
    wanted = topology(bus.subjects, replicas=bus.replicas)
    known = read_marker(marker)
    bus.incarnation = await _incarnation(bus, wanted, known)
    for stream in wanted.streams:
        await _ensure_stream(bus, stream, known)
    for consumer in wanted.consumers:
        await _ensure_consumer(bus, consumer)
    if known.streams and not known.incarnation:
        logger.warning("store accepted", extra={"incarnation": bus.incarnation, "renewed": bool(known.renewed)})
    write_marker(marker, StoreMarker(bus.incarnation, tuple(stream.name for stream in wanted.streams)))


async def check(bus: Bus, marker: Path) -> None:
    """See that the store is still the one that `ensure` found; makes nothing.

    Raises StoreMissing, IncarnationMismatch, BusUnavailable, RequestTimeout.
    """
    wanted, known = topology(bus.subjects), read_marker(marker)
    await _incarnation(bus, wanted, replace(known, incarnation=bus.incarnation, renewed=""))
    for stream in wanted.streams:
        if stream.name in known.streams and await _config_of(bus, stream.name) is None:
            raise _missing(stream.name)


async def incarnation_of_store(bus: Bus) -> str:
    """That of the store which the bus is connected to; empty if nothing was created there yet."""
    found = await _config_of(bus, bus.subjects.jobs_stream)
    return incarnation_in((found.metadata if found else None) or {})


def incarnation_in(metadata: Mapping[str, str]) -> str:
    """What `metadata_of` has put there; empty if nothing."""
    return metadata.get(_INCARNATION, "")


def metadata_of(incarnation: str) -> dict[str, str]:
    """What a stream says of the store that it belongs to."""
    return {_INCARNATION: incarnation}


def marked(metadata: Mapping[str, str]) -> dict[str, str]:
    """Those of the stream of jobs while a backup is put into its store."""
    return {**metadata, _RESTORING: "1"}


def is_marked(metadata: Mapping[str, str]) -> bool:
    """Whether a backup is put into the store of the stream that says so, or was until somebody was killed."""
    return _RESTORING in metadata


async def _incarnation(bus: Bus, wanted: Topology, known: StoreMarker) -> str:
    """The store's incarnation, made with the first stream if the store is new; compared with the marker's."""
    first, expected = wanted.streams[0], known.incarnation
    found = await _config_of(bus, first.name)
    if found is None:
        if expected or first.name in known.streams:
            raise _missing(first.name)
        await _create(bus, first, new_incarnation())
    elif is_marked(found.metadata or {}):
        raise StoreMissing(
            "this NATS store is not whole: a backup is being put into it, or was until the command was ended",
            hint="wait until `railbus restore FOLDER` is done, or run it again",
        )
    incarnation = known.renewed or await incarnation_of_store(bus)
    if expected and incarnation != expected:
        raise IncarnationMismatch(
            f"this NATS store is {incarnation!r}, but the root belongs to store {expected!r}",
            hint="connect to the right one; `railbus restore` after a restore, `railbus up --new-store` to begin anew",
        )
    return incarnation


async def _ensure_stream(bus: Bus, stream: Stream, known: StoreMarker) -> None:
    found = await _config_of(bus, stream.name)
    if found is None:
        if stream.name in known.streams:
            raise _missing(stream.name)
        await _create(bus, stream, bus.incarnation)
        return
    has = found.num_replicas or 1
    incarnation = known.renewed or (found.metadata or {}).get(_INCARNATION, bus.incarnation)
    config = _config(replace(stream, replicas=max(has, stream.replicas)), incarnation)
    with _replication_errors(bus, stream):
        await bus.client.jetstream().update_stream(config)
    if has < stream.replicas:
        logger.warning("stream replicated", extra={"stream": stream.name, "copies": stream.replicas, "before": has})


async def _create(bus: Bus, stream: Stream, incarnation: str) -> None:
    with _replication_errors(bus, stream):
        try:
            await bus.client.jetstream().add_stream(_config(stream, incarnation))
        except nats.js.errors.BadRequestError as exc:
            if exc.err_code != 10058:  # taken: another service was quicker, with an incarnation of its own
                raise
            return
        logger.info("stream created", extra={"stream": stream.name})


@contextmanager
def _replication_errors(bus: Bus, stream: Stream) -> Iterator[None]:
    """As `bus_errors`, but that a single server keeps no copies is a setting to change, and not to be tried again."""
    with bus_errors(stream.name):
        try:
            yield
        except nats.js.errors.APIError as exc:
            if bus.is_clustered or exc.err_code not in _NO_CLUSTER:
                raise
            raise BadSetting(
                f"setting RAILBUS_REPLICAS has value {stream.replicas}, but this NATS is no cluster",
                hint="1, or a cluster of at least so many nodes; see docs/operations.md",
            ) from exc


async def _config_of(bus: Bus, name: str) -> js.StreamConfig | None:
    async with bus.asking(f"$JS.API.STREAM.INFO.{name}", name=name):
        try:
            return (await bus.client.jetstream().stream_info(name)).config
        except nats.js.errors.NotFoundError:
            return None


async def _ensure_consumer(bus: Bus, consumer: Consumer) -> None:
    policy = js.AckPolicy.ALL if consumer.ack == "all" else js.AckPolicy.EXPLICIT
    config = js.ConsumerConfig(
        durable_name=consumer.name,
        ack_policy=policy,
        ack_wait=consumer.ack_wait_s,
        max_ack_pending=consumer.max_ack_pending,
        max_deliver=-1,
    )
    with bus_errors(consumer.name):
        await bus.client.jetstream().add_consumer(consumer.stream, config)


def _config(stream: Stream, incarnation: str) -> js.StreamConfig:
    return js.StreamConfig(
        name=stream.name,
        subjects=list(stream.subjects),
        description=stream.description,
        retention=js.RetentionPolicy.WORK_QUEUE if stream.retention == "workqueue" else js.RetentionPolicy.LIMITS,
        storage=js.StorageType.FILE,
        discard=js.DiscardPolicy.NEW if stream.discard == "new" else js.DiscardPolicy.OLD,
        max_msgs=stream.max_msgs,
        max_bytes=stream.max_bytes,
        max_age=stream.max_age_s,
        max_msgs_per_subject=stream.history,
        duplicate_window=stream.duplicate_window_s,
        num_replicas=stream.replicas,
        allow_direct=True,
        allow_rollup_hdrs=stream.is_bucket,
        deny_delete=stream.is_bucket,
        allow_msg_ttl=stream.allow_ttl or None,
        allow_atomic=stream.allow_atomic or None,
        metadata=metadata_of(incarnation),
    )


def _missing(name: str) -> StoreMissing:
    return StoreMissing(
        f"stream {name!r} existed and is gone from the NATS store",
        hint="restore the store, or start a new one with `railbus up --new-store`",
    )
