"""Assembling: chunks go in, shards come out, in memory of a chunk and on disk of a few shards.

Shards are cut off while samples stream by (`spreading`); two threads write and hash them meanwhile, and each is noted
in the journal once its bytes are durable. What is left at the end is written last and stands in no journal, because
where it is cut depends on where the samples end. An import that was killed goes on behind the shards in its journal if
its source gives their samples again (`retracing`); if not, all that it gives is taken for new. So the result is always
that of an import which nothing has stopped.
"""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final

from railbus_shared.contracts.artifacts import DatasetSchema, Shard
from railbus_shared.data.chunks import Pieces, num_samples, part
from railbus_shared.data.journal import Finished, Journal
from railbus_shared.data.retracing import Retracing
from railbus_shared.data.shard_writers import WriteShard
from railbus_shared.data.slices import Slices
from railbus_shared.data.spool import Spool
from railbus_shared.data.spreading import Cut, Spread, Weights
from railbus_shared.layout import shard_name

logger = logging.getLogger(__name__)

_THREADS: Final = 2


@dataclass(frozen=True)
class Plan:
    """What decides which shards come of which samples."""

    schema: DatasetSchema
    write: WriteShard
    spread: Spread
    first_sample: int = 0
    first_number: int = 0


def assembled(plan: Plan, journal: Journal, pieces: Iterator[Pieces]) -> list[Shard]:
    """The shards of all samples that come, in the journal's folder; an import that was killed goes on."""
    if not journal.finished:
        return _from_start(plan, journal, pieces)
    logger.info("an import goes on", extra={"shards": len(journal.finished)})
    retracing = Retracing(journal.shards, plan.schema, [one.shard for one in journal.finished])
    is_same, rest = _retraced(retracing, pieces)
    if is_same:
        with _Assembly(plan, journal) as assembly:
            assembly.add_all(itertools.chain(rest, pieces))
            if assembly.is_settled:
                return assembly.finish()
            rest = assembly.taken_back()
    return _from_start(plan, journal, itertools.chain(retracing.again(journal.forget()), rest, pieces))


def _from_start(plan: Plan, journal: Journal, pieces: Iterator[Pieces]) -> list[Shard]:
    with _Assembly(plan, journal) as assembly:
        assembly.add_all(pieces)
        return assembly.finish()


def _retraced(retracing: Retracing, pieces: Iterator[Pieces]) -> tuple[bool, Iterable[Pieces]]:
    """Whether the source gives all samples of the finished shards, and what it has given beside those that agreed."""
    for one in pieces:
        count = min(num_samples(one), retracing.samples - retracing.agreed)
        if not retracing.agrees(part(one, 0, count)):
            return False, [one]
        if retracing.agreed == retracing.samples:
            return True, [part(one, count, num_samples(one))]
    return False, []


class _Assembly:
    """Samples on their way into shards."""

    def __init__(self, plan: Plan, journal: Journal) -> None:
        self._plan = plan
        self._journal = journal
        self._kept = tuple(journal.finished)
        self._shards = [one.shard for one in self._kept]
        self._number = plan.first_number + len(self._kept)
        self._sample = plan.first_sample + sum(one.shard.samples for one in self._kept)
        self._weight = sum(one.weight for one in self._kept)
        self._cut: Cut | None = None
        self._spool = Spool(journal.new_spool(), plan.schema, Weights.of(plan.schema))
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="shard")
        self._running: deque[tuple[Future[Shard], Slices]] = deque()

    def __enter__(self) -> _Assembly:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._threads.shutdown()  # which waits for what has begun: the next try goes on behind it
        self._spool.close()

    def add_all(self, pieces: Iterable[Pieces]) -> None:
        """Take samples in, and cut off each shard that they fill."""
        for one in pieces:
            self._spool.add(one)
            while cut := self._settled_cut():
                self._start(cut, is_last=False)

    @property
    def is_settled(self) -> bool:
        """Whether the shards that were finished before would be cut off again, by as many samples as there are."""
        end, start = self._weight + self._spool.weight, 0
        for one in self._kept:
            if not self._plan.spread.is_settled(one.weight, held=end - start):
                return False
            start += one.weight
        return True

    def taken_back(self) -> Iterator[Pieces]:
        """The samples that lie in no shard, which are then held no more."""
        return self._spool.pieces()

    def finish(self) -> list[Shard]:
        """Cut what is left, and wait for all shards."""
        for cut in self._plan.spread.last_cuts(self._spool.find, held=self._spool.weight, samples=self._spool.samples):
            self._start(cut, is_last=True)
        while self._running:
            self._collect()
        return self._shards

    def _settled_cut(self) -> Cut | None:
        """The next shard, if enough samples follow it; where it ends is looked up once only."""
        spread, held = self._plan.spread, self._spool.weight
        if self._cut is None and spread.has_cut(held):
            self._cut = spread.cut(self._spool.find, at=self._weight)
        return self._cut if self._cut is not None and spread.is_settled(self._cut.weight, held=held) else None

    def _start(self, cut: Cut, *, is_last: bool) -> None:
        """Have a shard written; where all threads are busy, wait for the one that began first."""
        if len(self._running) == _THREADS:
            self._collect()
        slices = self._spool.cut(cut.samples)
        path = self._journal.shards / shard_name(self._number)
        weight = None if is_last else cut.weight
        self._running.append((self._threads.submit(self._write, path, slices, self._sample, weight), slices))
        self._cut = None
        self._number += 1
        self._sample += cut.samples
        self._weight += cut.weight

    def _write(self, path: Path, slices: Slices, first: int, weight: int | None) -> Shard:
        shard = self._plan.write(path, self._plan.schema, slices, first=first)
        if weight is not None:
            self._journal.record(Finished(shard, weight))
        return shard

    def _collect(self) -> None:
        future, slices = self._running.popleft()
        self._shards.append(future.result())
        self._spool.drop(slices)
