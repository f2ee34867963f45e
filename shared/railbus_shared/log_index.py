"""What the closed log of a day holds: jobs, types and times of stretches of members, so that readers skip the rest.

A hint and never the truth: it says only what cannot be found in a stretch. It lies beside the closed file, says for
which size and last bytes of it it was made, and counts for no other; without it the file is read from end to end. It
is written whole, by telemetry, and can always be made anew.

The file: the CRC-32 of all that follows as eight hex digits, a space, one line of JSON, and the jobs of each stretch.
Those are sorted hashes of 32 bits, or a Bloom filter of 16 KiB where a stretch has more jobs than would fit there. With
at most 48 stretches a day an index has less than 2 MiB, however many jobs a day has.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import zlib
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, Final, Self

import orjson

from railbus_shared import files
from railbus_shared.layout import LOG_INDEX_NAME

logger = logging.getLogger(__name__)

MAX_STRETCHES: Final = 48
MAX_TYPES: Final = 256
"""Of one stretch; one with more says nothing about types."""
MAX_TYPE_LENGTH: Final = 64
"""What is longer, in some event's data, stands as its beginning."""
_JOBS_BYTES: Final = 16 * 1024
_MAX_HASHES: Final = _JOBS_BYTES // 4
_BLOOM_BITS: Final = _JOBS_BYTES * 8
_BLOOM_HASHES: Final = 4
_TAIL_BYTES: Final = 8
_CRC_BYTES: Final = 9


class Jobs:
    """A set of jobs that may hold one too many, and never one too few."""

    def __init__(self, hashes: Iterable[int] = (), *, bloom: bytearray | None = None) -> None:
        self._hashes = array("I", sorted(hashes))
        self._bloom = bloom
        if bloom is None and len(self._hashes) > _MAX_HASHES:
            self._bloom = _bloomed(self._hashes, bytearray(_JOBS_BYTES))

    def may_hold(self, job_hash: int) -> bool:
        if self._bloom is not None:
            return all(self._bloom[bit >> 3] >> (bit & 7) & 1 for bit in _bits(job_hash))
        at = bisect_left(self._hashes, job_hash)
        return at < len(self._hashes) and self._hashes[at] == job_hash

    def __or__(self, other: Jobs) -> Jobs:
        if self._bloom is None and other._bloom is None:
            return Jobs({*self._hashes, *other._hashes})
        bloom = bytearray(_JOBS_BYTES)
        for one in (self, other):
            if one._bloom is None:
                _bloomed(one._hashes, bloom)
            else:
                bloom[:] = (int.from_bytes(bloom) | int.from_bytes(one._bloom)).to_bytes(_JOBS_BYTES)
        return Jobs(bloom=bloom)

    @property
    def is_exact(self) -> bool:
        return self._bloom is None

    def to_bytes(self) -> bytes:
        return _little_endian(self._hashes).tobytes() if self._bloom is None else bytes(self._bloom)

    @classmethod
    def from_bytes(cls, data: bytes, *, is_exact: bool) -> Jobs:
        if not is_exact:
            return cls(bloom=bytearray(data))
        jobs = cls()
        jobs._hashes.frombytes(data)
        _little_endian(jobs._hashes)
        return jobs


def hash_of(job: bytes) -> int:
    """Of a job's id."""
    return int.from_bytes(hashlib.blake2b(job, digest_size=4).digest())


def _bits(job_hash: int) -> Iterable[int]:
    step = job_hash >> 15 | 1  # of other bits than those that give the first place
    return [(job_hash + turn * step) % _BLOOM_BITS for turn in range(_BLOOM_HASHES)]


def _bloomed(hashes: Iterable[int], bloom: bytearray) -> bytearray:
    for one in hashes:
        for bit in _bits(one):
            bloom[bit >> 3] |= 1 << (bit & 7)
    return bloom


def _little_endian(hashes: array[int]) -> array[int]:
    if sys.byteorder == "big":
        hashes = hashes[:]
        hashes.byteswap()
    return hashes


@dataclass(frozen=True)
class Stretch:
    """Some members that follow each other."""

    start: int
    """Where in the file its first member begins."""
    plain_bytes: int
    lines: int
    first_s: int | None
    """No event in it is older than this second since 1970; None if that is not known."""
    last_s: int | None
    """No event in it is of a later second."""
    types: frozenset[str] | None
    """None if there are too many."""
    jobs: Jobs = field(compare=False)

    def may_hold(self, *, job: int | None, types: Sequence[str], since_s: int | None, until_s: int | None) -> bool:
        """Whether an event of this hash of a job and of one of these beginnings of types may be in it.

        Times are the second of the oldest event that is wanted and that of the newest, both included.
        """
        if since_s is not None and self.last_s is not None and self.last_s < since_s:
            return False
        if until_s is not None and self.first_s is not None and self.first_s > until_s:
            return False
        if types and self.types is not None and not any(kind.startswith(tuple(types)) for kind in self.types):
            return False
        return job is None or self.jobs.may_hold(job)

    def joined(self, behind: Stretch) -> Stretch:
        """One stretch of this and the one behind it."""
        types = None if self.types is None or behind.types is None else self.types | behind.types
        return Stretch(
            start=self.start,
            plain_bytes=self.plain_bytes + behind.plain_bytes,
            lines=self.lines + behind.lines,
            first_s=_of_both(min, self.first_s, behind.first_s),
            last_s=_of_both(max, self.last_s, behind.last_s),
            types=types if types is None or len(types) <= MAX_TYPES else None,
            jobs=self.jobs | behind.jobs,
        )


def _of_both(choose: Callable[[int, int], int], one: int | None, other: int | None) -> int | None:
    return None if one is None or other is None else choose(one, other)


@dataclass(frozen=True)
class DayIndex:
    """All stretches of a closed file, from its beginning to its end."""

    closed_bytes: int
    tail: str
    """Its last bytes as hex: CRC-32 and length of the last member."""
    stretches: tuple[Stretch, ...]

    @classmethod
    def of(cls, closed: BinaryIO, stretches: Iterable[Stretch]) -> Self:
        """Of an open file; neighbours that are small together are joined until there are few enough."""
        size = os.fstat(closed.fileno()).st_size
        return cls(size, tail_of(closed, size), tuple(_joined(list(stretches))))

    def describes(self, closed: BinaryIO) -> bool:
        """Whether it was made for this file as it is."""
        return os.fstat(closed.fileno()).st_size == self.closed_bytes and self.begins(closed)

    def begins(self, closed: BinaryIO) -> bool:
        """Whether it was made for the file as it was when it had fewer members."""
        return tail_of(closed, self.closed_bytes) == self.tail

    def spans(self) -> list[tuple[Stretch, int]]:
        """Each stretch with where it ends."""
        ends = [*(stretch.start for stretch in self.stretches[1:]), self.closed_bytes]
        return list(zip(self.stretches, ends, strict=True))

    # --- as a file ---------------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Put it beside the closed file in one step; raises StorageFull, FileNotFoundError if the day is gone."""
        files.write_whole(folder / LOG_INDEX_NAME, self.to_bytes())

    @classmethod
    def load(cls, folder: Path) -> Self | None:
        """That of a day; None if there is none, or, with a word to the log, if it is damaged."""
        try:
            return cls.from_bytes((folder / LOG_INDEX_NAME).read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, LookupError, TypeError, OSError) as exc:
            logger.info("index of a log cannot be used", extra={"folder": str(folder), "problem": str(exc)})
            return None

    def to_bytes(self) -> bytes:
        names = sorted(set().union(*(stretch.types or () for stretch in self.stretches)))
        places = {name: at for at, name in enumerate(names)}
        jobs = [stretch.jobs.to_bytes() for stretch in self.stretches]
        content = {
            "v": 1,
            "closed_bytes": self.closed_bytes,
            "tail": self.tail,
            "types": names,
            "stretches": [
                {
                    "start": stretch.start,
                    "plain_bytes": stretch.plain_bytes,
                    "lines": stretch.lines,
                    "first_s": stretch.first_s,
                    "last_s": stretch.last_s,
                    "types": None if stretch.types is None else sorted(places[name] for name in stretch.types),
                    "jobs": {"bytes": len(data), "exact": stretch.jobs.is_exact},
                }
                for stretch, data in zip(self.stretches, jobs, strict=True)
            ],
        }
        body = b"".join([orjson.dumps(content), b"\n", *jobs])
        return b"%08x %b" % (zlib.crc32(body), body)

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Raises ValueError for anything that `to_bytes` did not make."""
        body = data[_CRC_BYTES:]
        if data[:_CRC_BYTES] != b"%08x " % zlib.crc32(body):
            raise ValueError("its checksum does not match")
        line, _, blob = body.partition(b"\n")
        content = orjson.loads(line)
        if content["v"] != 1:
            raise ValueError("it is of a newer version")
        index = cls(content["closed_bytes"], content["tail"], tuple(_parsed(content, blob)))
        starts = [*(stretch.start for stretch in index.stretches), index.closed_bytes]
        if starts[0] != 0 or any(behind <= before for before, behind in pairwise(starts)):
            raise ValueError("its stretches do not follow each other")
        return index


def _parsed(content: Any, blob: bytes) -> Iterator[Stretch]:
    names: list[str] = content["types"]
    at = 0
    for one in content["stretches"]:
        data = blob[at : at + one["jobs"]["bytes"]]
        at += len(data)
        yield Stretch(
            start=one["start"],
            plain_bytes=one["plain_bytes"],
            lines=one["lines"],
            first_s=one["first_s"],
            last_s=one["last_s"],
            types=None if one["types"] is None else frozenset(names[place] for place in one["types"]),
            jobs=Jobs.from_bytes(data, is_exact=one["jobs"]["exact"]),
        )


def tail_of(closed: BinaryIO, size: int) -> str:
    """The last bytes, as hex, of a file that is cut at `size`."""
    return os.pread(closed.fileno(), _TAIL_BYTES, max(size - _TAIL_BYTES, 0)).hex()


def _joined(stretches: list[Stretch]) -> list[Stretch]:
    while len(stretches) > MAX_STRETCHES:
        at = min(range(len(stretches) - 1), key=lambda at: stretches[at].plain_bytes + stretches[at + 1].plain_bytes)
        stretches[at : at + 2] = [stretches[at].joined(stretches[at + 1])]
    return stretches
