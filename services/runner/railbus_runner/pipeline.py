"""From numbers of batches to batches: located, verified, gathered, transformed, and on their device.

Without workers everything happens in the consumer's thread when a batch is asked for; with a CUDA device one batch
earlier. With workers, what is decided (order, verification, look-ahead) stays here, and the bytes are moved there.
A copy for another process is without workers and device: it is one of those processes itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from railbus_runner.gathering import Batch, Gatherer
from railbus_runner.lookahead import LookAhead, OnAhead, unheard
from railbus_runner.places import Part, Places
from railbus_runner.reading import Reading
from railbus_runner.shards import EnsureVerified, HeldShards, OpenShards, VouchedShards
from railbus_runner.staging import Here, Staging, ToCuda
from railbus_runner.transforming import AHEAD, GathersOne, Wanted, Workers
from railbus_runner.vouching import HashedHere, NotFetched, user_memory

Transform = Callable[[Batch], Any]


@dataclass(frozen=True)
class Route:
    """How the batches of a reading reach their consumer; nothing of it changes what is in them."""

    shard_paths: Mapping[int, Path]
    rank: int
    world_size: int
    device: torch.device
    transform: Transform | None
    workers: int
    is_fetched: bool
    ensure_verified: EnsureVerified
    on_ahead: OnAhead


class Pipeline:
    """Makes the batches of one rank."""

    def __init__(self, reading: Reading, route: Route) -> None:
        """Raises InvalidField for a transform that worker processes cannot import."""
        self._reading, self._route = reading, route
        self._places = Places(reading, rank=route.rank, world_size=route.world_size)
        is_cuda = route.device.type == "cuda"
        self._staging: Staging = ToCuda(route.device) if is_cuda else Here()
        self._workers: Workers | None = None
        self._shards: HeldShards
        if route.workers:
            self._shards = VouchedShards(ensure_verified=route.ensure_verified)
            gathers = GathersOne(reading.index, route.shard_paths)
            self._workers = Workers(gathers, transform=route.transform, count=route.workers)
        else:
            self._shards = shards = OpenShards(reading.index, route.shard_paths, ensure_verified=route.ensure_verified)
            columns = reading.index.about.columns
            self._gatherer = Gatherer(columns, shards, is_pinned=is_cuda and route.transform is None)
        self._ahead = LookAhead(reading, self._shards, route.on_ahead)

    def batches(self, epoch: int, numbers: range, *, epochs: int) -> Iterator[Any]:
        """Batches of an epoch by their numbers; `epochs` is how many are known to be wanted."""
        parts = self._parts(epoch, numbers, epochs)
        if self._workers is not None:
            return self._staging.staged(self._workers.batches(self._wanted(parts)))
        return self._staging.staged(map(self._made, parts))

    def copied(self) -> Pipeline:
        """For another process, which can ask nobody: it verifies by itself what is not verified yet.

        Where shards are fetched it reads none: what lies here now may be gone when it looks.
        """
        verify: EnsureVerified = NotFetched(self._reading.index)
        if not self._route.is_fetched:
            verify = HashedHere(
                self._reading.index, self._route.shard_paths, memory=user_memory(), verified=self._shards.numbers
            )
        route = replace(self._route, device=torch.device("cpu"), workers=0, ensure_verified=verify, on_ahead=unheard)
        return Pipeline(self._reading, route)

    def _parts(self, epoch: int, numbers: range, epochs: int) -> Iterator[Part]:
        in_making = self._route.workers * AHEAD  # workers may not even have opened the shards of these
        for number in numbers:
            part = self._places.part(epoch, number)
            self._ahead.look(part, epoch=epoch, oldest=max(number - in_making, numbers.start), epochs=epochs)
            yield part

    def _made(self, part: Part) -> Any:
        batch = self._gatherer.gather(part)
        return batch if self._route.transform is None else self._route.transform(batch)

    def _wanted(self, parts: Iterator[Part]) -> Iterator[Wanted]:
        for part in parts:
            self._shards.hold(shard for shard, _, _ in part.segments)
            yield Wanted(part, self._ahead.keep)
