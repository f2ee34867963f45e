"""`Mixture`: several datasets read as one, by weights.

A mixture is one endless row of places. Which source stands at a place, and which of that source's samples, follows
from the seed and the place alone, so any place can be asked for by itself, and every world size reads the same global
batches.

The row is made of blocks. In every block a source has the same number of places, its share by largest remainder, and
a keyed bijection of the block says which. What is guaranteed, for a block of B places and a source with C of them:

- C / B differs from the source's weight by less than 1 / B, and C is at least 1;
- at the end of every block the proportions are exactly C / B; within one, a source is ahead or behind by at most
  C * (B - C) / B places, which is never more than B / 4, wherever a prefix ends;
- a source's samples come in the order of the source, and where it runs out its next epoch begins.

Source: Hamilton's method of largest remainders. Letters: S sources, N places, K blocks, B places of a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Final, Literal, Self, assert_never

import numpy as np

from railbus_shared.data.bijection import Bijections, Positions

Stop = Literal["first", "longest", "never"]

BLOCK: Final = 1000
"""Weights in tenths of a percent are met exactly."""
ENDLESS: Final = 1 << 62
"""Places of a mixture that never stops; nobody comes so far."""
_SALT: Final = 1 << 62


@dataclass(frozen=True)
class Span:
    """Places of one epoch of one source, one after the other, and where they stand in the mixture."""

    source: int
    epoch: int
    """Of the source."""
    start: int
    stop: int
    at: Positions
    """For each of the source's places start..stop-1, where it stands, counted from the first place asked for."""


@dataclass(frozen=True, eq=False)
class Mixture:
    """Which source, and which of its samples, stands at a place."""

    counts: Positions
    """Places that each source has in a block (S,)."""
    sizes: Positions
    """Samples of each source's epoch (S,)."""
    seed: int
    stop: Stop

    @classmethod
    def of(
        cls,
        weights: Sequence[float],
        *,
        sizes: Sequence[int],
        seed: int,
        stop: Stop = "never",
        block: int = BLOCK,
    ) -> Self:
        """A mixture of sources of these weights and sizes; only the weights' proportions count.

        Raises ValueError for weights or sizes that are none, and for a weight too small for a place in each block.
        """
        if not weights or len(weights) != len(sizes) or min(sizes) < 1:
            raise ValueError(f"weights {list(weights)} and sizes {list(sizes)} are no mixture: one of each a source")
        return cls(np.array(_shares(weights, block)), np.array(sizes, dtype=np.int64), seed, stop)

    @property
    def block(self) -> int:
        """Places of a block."""
        return int(self.counts.sum())

    @cached_property
    def num_samples(self) -> int:
        """Places until the mixture stops, which is what an epoch of it is; the next one goes on where it ends.

        `first`: until the source that runs out first has been read once. `longest`: until every source has been.
        `never`: more than anybody reads.
        """
        match self.stop:
            case "first":
                return min(self._exhausted)
            case "longest":
                return max(self._exhausted)
            case "never":
                return ENDLESS
            case _:
                assert_never(self.stop)

    def sources(self, start: int, stop: int) -> Positions:
        """The source at each of the places start..stop-1, int64 (stop - start,). Raises ValueError for places < 0."""
        if not 0 <= start <= stop:
            raise ValueError(f"places {start} to {stop} asked for: expected 0 <= start <= stop")
        first = start // self.block
        found = self._of_blocks(first, max(-(-stop // self.block), first + 1))
        return found.reshape(-1)[start - first * self.block : stop - first * self.block]

    def drawn(self, place: int) -> Positions:
        """Samples that each source has given before a place, over all its epochs, int64 (S,)."""
        whole = place // self.block
        part = self.sources(whole * self.block, place)
        return whole * self.counts + np.bincount(part, minlength=len(self.counts))

    def spans(self, start: int, stop: int) -> Iterator[Span]:
        """What stands at the places start..stop-1, source by source; a source that runs out within gives several."""
        found = self.sources(start, stop)
        for source, drawn in enumerate(self.drawn(start).tolist()):
            at = np.flatnonzero(found == source)
            yield from self._epochs(source, drawn, at)

    def _epochs(self, source: int, drawn: int, at: Positions) -> Iterator[Span]:
        """Cuts a source's places where its epochs end."""
        size, taken = int(self.sizes[source]), 0
        while taken < len(at):
            epoch, begin = divmod(drawn + taken, size)
            count = min(size - begin, len(at) - taken)
            yield Span(source, epoch, begin, begin + count, at[taken : taken + count])
            taken += count

    def _of_blocks(self, first: int, stop: int) -> Positions:
        """The source at every place of blocks first..stop-1 (K, B)."""
        num_blocks = stop - first
        permuted = Bijections(np.full(num_blocks, self.block), self.seed, epoch=0, first_salt=_SALT + first)
        places = np.tile(np.arange(self.block), num_blocks)
        mixed = permuted(places, which=np.repeat(np.arange(num_blocks), self.block))
        return np.repeat(np.arange(len(self.counts)), self.counts)[mixed].reshape(num_blocks, self.block)

    @cached_property
    def _exhausted(self) -> list[int]:
        """For each source, the places until all its samples have come once (S,)."""
        return [self._exhausted_at(source) for source in range(len(self.counts))]

    def _exhausted_at(self, source: int) -> int:
        whole, rest = divmod(int(self.sizes[source]) - 1, int(self.counts[source]))
        (block,) = self._of_blocks(whole, whole + 1)
        return whole * self.block + int(np.flatnonzero(block == source)[rest]) + 1


def _shares(weights: Sequence[float], block: int) -> list[int]:
    """How many of the places of a block each source has; in exact arithmetic, so every machine gives the same."""
    if not all(0 < weight < float("inf") for weight in weights):
        raise ValueError(f"weights {list(weights)} are none: expected numbers above 0")
    exact = [Fraction(weight) for weight in weights]
    shares = [block * weight / sum(exact) for weight in exact]
    counts = [int(share) for share in shares]
    by_rest = sorted(range(len(shares)), key=lambda source: (counts[source] - shares[source], source))
    for source in by_rest[: block - sum(counts)]:
        counts[source] += 1
    if 0 in counts:
        raise ValueError(
            f"weight {weights[counts.index(0)]} is less than one in {block}: take a larger block, or leave it out"
        )
    return counts
