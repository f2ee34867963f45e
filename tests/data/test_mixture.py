"""Mixtures: exact proportions, every sample of every source once an epoch, random access, the same for every rank."""

from __future__ import annotations

import random

import numpy as np
import pytest

from railbus_shared.data.bijection import Positions
from railbus_shared.data.mixture import ENDLESS, Mixture, Stop
from railbus_shared.data.order import EpochOrder, num_batches, rank_range

WEIGHTS: list[list[float]] = [[1], [1, 1], [7, 2, 1], [0.5, 0.3, 0.2], [1, 1, 1], [0.97, 0.01, 0.01, 0.01], [3.3, 1e-1]]
STOPS: list[Stop] = ["first", "longest"]


def mixed(
    weights: list[float], *, seed: int = 5, size: int = 10_007, stop: Stop = "never", block: int = 1000
) -> Mixture:
    return Mixture.of(
        weights, sizes=[size + 13 * one for one in range(len(weights))], seed=seed, stop=stop, block=block
    )


def rows(mixture: Mixture, start: int, stop: int) -> Positions:
    """Source, epoch of the source and place in it, of each place of the mixture (N, 3)."""
    found = np.full((stop - start, 3), -1, dtype=np.int64)
    for span in mixture.spans(start, stop):
        found[span.at, 0], found[span.at, 1] = span.source, span.epoch
        found[span.at, 2] = np.arange(span.start, span.stop)
    assert found.min(initial=0) >= 0
    return found


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("block", [100, 1000, 1024])
def test_over_every_prefix_the_proportions_are_those_promised(weights: list[float], block: int) -> None:
    mixture = mixed(weights, block=block)
    found = mixture.sources(0, 20 * block + 77)
    prefixes = np.arange(1, len(found) + 1)
    for source, (weight, count) in enumerate(zip(weights, mixture.counts.tolist(), strict=True)):
        assert abs(count / block - weight / sum(weights)) < 1 / block
        ahead = np.cumsum(found == source) - prefixes * count / block
        assert np.abs(ahead).max() <= count * (block - count) / block + 1e-9
        assert np.abs(ahead[block - 1 :: block]).max() < 1e-9
    assert mixture.counts.sum() == mixture.block == block


@pytest.mark.parametrize(
    ("weights", "block", "counts"),
    [
        ([1, 1, 1], 1000, [334, 333, 333]),
        ([0.7, 0.2, 0.1], 10, [7, 2, 1]),
        ([5, 3, 1], 10, [6, 3, 1]),
        ([1e-300, 1e-300], 10, [5, 5]),
        ([1e300, 1e300, 1e300, 1e300], 1000, [250] * 4),
    ],
)
def test_the_places_of_a_block_are_shared_by_largest_remainder(
    weights: list[float], block: int, counts: list[int]
) -> None:
    assert mixed(weights, block=block).counts.tolist() == counts


@pytest.mark.parametrize("seed", [0, 1, 2**63])
@pytest.mark.parametrize("weights", [[7, 2, 1], [1, 1]])
def test_a_source_gives_its_samples_in_order_and_begins_again_when_it_runs_out(seed: int, weights: list[float]) -> None:
    found = rows(mixed(weights, seed=seed, size=90), 0, 5000)
    for source in range(len(weights)):
        given = found[found[:, 0] == source]
        size = 90 + 13 * source
        assert np.array_equal(given[:, 1] * size + given[:, 2], np.arange(len(given)))


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_any_part_is_what_the_whole_has_there(weights: list[float]) -> None:
    unbroken, dice = rows(mixed(weights, size=333), 0, 12_000), random.Random(1)
    for _ in range(40):
        start, stop = sorted(dice.choices(range(12_001), k=2))
        stop = min(stop, start + dice.choice([0, 1, 32, 4096]))
        mixture = mixed(weights, size=333)
        assert np.array_equal(rows(mixture, start, stop), unbroken[start:stop])
        assert mixture.drawn(start).tolist() == np.bincount(unbroken[:start, 0], minlength=len(weights)).tolist()


def test_far_away_places_cost_the_same_and_hold_together() -> None:
    mixture = mixed([7, 2, 1])
    far = ENDLESS - 10_000
    found = rows(mixture, far, far + 5000)
    assert np.array_equal(found[100:], rows(mixture, far + 100, far + 5000))
    assert mixture.drawn(far).sum() == far


def test_every_seed_and_block_is_mixed_in_its_own_way() -> None:
    blocks = {
        mixed([1, 1], seed=seed).sources(at, at + 1000).tobytes() for seed in range(9) for at in range(0, 9000, 1000)
    }
    assert len(blocks) == 81


def test_the_sources_of_neighbouring_places_do_not_depend_on_each_other() -> None:
    found = mixed([1, 1]).sources(0, 200_000)
    pairs = np.bincount(found[:-1] * 2 + found[1:], minlength=4) / (len(found) - 1)
    assert np.abs(pairs - 0.25).max() < 0.005
    places = np.bincount(np.arange(200_000)[found == 0] % 1000, minlength=1000)
    expected = np.full(1000, 100.0)
    assert abs((((places - expected) ** 2 / 50).sum() - 1000) / np.sqrt(2000)) < 5


# --- where it stops ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_it_stops_when_the_first_source_or_every_source_has_been_read_once(weights: list[float], seed: int) -> None:
    first, longest = (mixed(weights, seed=seed, size=500, stop=stop) for stop in STOPS)
    sizes = first.sizes
    assert (first.drawn(first.num_samples) <= sizes).all()
    assert (first.drawn(first.num_samples) == sizes).any()
    assert (first.drawn(first.num_samples - 1) < sizes).all()
    assert (longest.drawn(longest.num_samples) >= sizes).all()
    assert (longest.drawn(longest.num_samples - 1) < sizes).any()
    assert mixed(weights).num_samples == ENDLESS


# --- ranks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 3, 6, 12])
def test_the_ranks_together_read_the_same_global_batches_of_a_mixture(world_size: int) -> None:
    mixture = mixed([7, 2, 1], size=200, stop="first")
    unbroken = rows(mixture, 0, mixture.num_samples)
    for batch in range(num_batches(mixture.num_samples, batch_size=12, drop_last=False)):
        parts = [
            rank_range(batch, num_samples=mixture.num_samples, batch_size=12, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        together = np.concatenate([rows(mixture, *part) for part in parts])
        assert np.array_equal(together, unbroken[12 * batch : 12 * batch + 12])


def test_with_an_order_for_each_epoch_of_a_source_every_sample_comes_once_an_epoch() -> None:
    mixture = mixed([3, 1], size=100)
    seen: list[list[int]] = [[], []]
    for span in mixture.spans(0, 4000):
        size = int(mixture.sizes[span.source])
        seen[span.source] += EpochOrder(size, 5, span.epoch).positions(span.start, span.stop).tolist()
    for size, samples in zip(mixture.sizes.tolist(), seen, strict=True):
        for start in range(0, len(samples) - size, size):
            assert sorted(samples[start : start + size]) == list(range(size))


def test_the_mixture_is_the_one_that_checkpoints_were_made_with() -> None:
    assert mixed([7, 2, 1], block=10).sources(10, 30).tolist() == [
        0,
        0,
        1,
        0,
        1,
        2,
        0,
        0,
        0,
        0,
        1,
        0,
        0,
        0,
        0,
        0,
        1,
        0,
        2,
        0,
    ]
    assert mixed([7, 2, 1]).sources(10**12 - 5, 10**12 + 5).tolist() == [2, 0, 0, 0, 1, 2, 1, 2, 0, 0]


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [[], [1, 0], [1, -1], [float("nan")], [float("inf"), 1]])
def test_weights_that_are_none_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match=r"weights \["):
        mixed(weights)


def test_sizes_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="no mixture"):
        Mixture.of([1, 1], sizes=[5], seed=0)
    with pytest.raises(ValueError, match="no mixture"):
        Mixture.of([1, 1], sizes=[5, 0], seed=0)


def test_a_weight_that_is_too_small_for_the_block_is_refused_and_named() -> None:
    with pytest.raises(ValueError, match=r"weight 0\.0001 is less than one in 1000"):
        mixed([1, 0.0001])
    assert mixed([1, 0.0001], block=20_000).counts.tolist() == [19_998, 2]


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (3, 2)])
def test_places_that_are_none_are_refused(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match="asked for"):
        mixed([1, 1]).sources(start, stop)
