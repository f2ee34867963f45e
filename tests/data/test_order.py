"""The order of an epoch: a bijection, random access, the same for every number of ranks, and well shuffled."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from itertools import pairwise, product

import numpy as np
import pytest

from railbus_shared.data.order import (
    Algorithm,
    EpochOrder,
    Order,
    epoch_order,
    num_batches,
    rank_range,
    worker_batches,
)
from railbus_shared.data.selection import Selection
from railbus_shared.data.shards import Shards


def whole(num_samples: int, *, seed: int = 0, epoch: int = 0, shuffle: bool = True) -> list[int]:
    order = EpochOrder(num_samples, seed, epoch, shuffle)
    return [int(sample) for sample in order.positions(0, num_samples)]


@pytest.mark.parametrize("first", range(1, 2001, 100))
def test_every_sample_comes_once_in_every_size_up_to_two_thousand(first: int) -> None:
    for num_samples in range(first, first + 100):
        assert sorted(whole(num_samples, seed=num_samples, epoch=first)) == list(range(num_samples))


@pytest.mark.parametrize("num_samples", [4095, 4096, 4097, 65_535, 65_536, 65_537, 99_991, 262_145, 1_000_003])
def test_every_sample_comes_once_in_large_and_odd_sizes(num_samples: int) -> None:
    found = EpochOrder(num_samples, 3, 1).positions(0, num_samples)
    assert found.dtype == np.int64
    assert np.array_equal(np.sort(found), np.arange(num_samples))


@pytest.mark.parametrize("num_samples", [2**31 + 11, 2**48 + 1, 2**62, 2**63 - 1])
def test_the_largest_sizes_stay_in_range_and_do_not_repeat(num_samples: int) -> None:
    order = EpochOrder(num_samples, 5, 0)
    found = np.concatenate([order.positions(0, 5000), order.positions(num_samples - 5000, num_samples)])
    assert found.min() >= 0
    assert found.max() < num_samples
    assert len(np.unique(found)) == 10_000


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("num_samples", [1, 2, 7, 64, 1000, 1797])
def test_any_part_is_what_the_whole_has_there(num_samples: int, shuffle: bool) -> None:
    order = EpochOrder(num_samples, 9, 4, shuffle)
    sequential = whole(num_samples, seed=9, epoch=4, shuffle=shuffle)
    for start in range(0, num_samples, max(1, num_samples // 13)):
        for stop in {start, start + 1, (start + num_samples) // 2, num_samples}:
            assert order.positions(start, stop).tolist() == sequential[start:stop]


def test_without_shuffling_the_order_is_that_of_the_files() -> None:
    assert whole(1000, seed=5, epoch=3, shuffle=False) == list(range(1000))


def test_every_seed_and_epoch_has_an_order_of_its_own() -> None:
    keys = list(product([0, 1, 2, -1, 2**31, 2**63], range(6)))
    orders = {tuple(whole(100, seed=seed, epoch=epoch)) for seed, epoch in keys}
    assert len(orders) == len(keys)


def test_another_process_has_the_same_order() -> None:
    code = "from railbus_shared.data.order import EpochOrder; print(EpochOrder(1797, 7, 2).positions(0, 1797).tolist())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(whole(1797, seed=7, epoch=2))


def test_the_order_is_the_one_that_checkpoints_were_made_with() -> None:
    assert whole(10, seed=7) == [5, 0, 1, 4, 3, 6, 2, 9, 8, 7]
    assert EpochOrder(10**12, 7, 3).positions(999_999, 1_000_002).tolist() == [436357346638, 291942796059, 731527320091]


@pytest.mark.parametrize(
    ("num_samples", "digest"),
    [(4097, "c95d8880764888cb"), (1_000_003, "ecdc35411c9fd805"), (67_108_865, "768417ae9fdd1408")],
)
def test_large_orders_are_the_ones_that_checkpoints_were_made_with(num_samples: int, digest: str) -> None:
    """With tables up to 67,108,864 samples and without beyond; as the first release had them, bit by bit."""
    order = EpochOrder(num_samples, 7, 3)
    parts = [order.positions(start, start + 1000) for start in (0, num_samples // 2, num_samples - 1000)]
    assert hashlib.sha256(np.concatenate(parts).astype("<i8").tobytes()).hexdigest()[:16] == digest


@pytest.mark.parametrize("seed", [0, 3])
def test_ten_million_and_three_samples_come_once_each(seed: int) -> None:
    num_samples = 10**7 + 3
    seen = np.zeros(num_samples, dtype=np.bool_)
    order = EpochOrder(num_samples, seed, 0)
    for start in range(0, num_samples, 1 << 16):
        seen[order.positions(start, min(start + (1 << 16), num_samples))] = True
    assert seen.all()


@pytest.mark.parametrize("first", [0, 700])
def test_a_split_in_one_run_is_shuffled_as_by_itself(first: int) -> None:
    shards = Shards.of([500] * 4)
    selection = Selection.of([(first, first + 1000)])
    for epoch in range(3):
        order = epoch_order("global", shards=shards, selection=selection, seed=7, epoch=epoch)
        assert order.positions(0, 1000).tolist() == [first + one for one in whole(1000, seed=7, epoch=epoch)]


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (3, 2), (0, 11), (11, 12)])
def test_places_that_the_epoch_does_not_have_are_refused(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match="of 10"):
        EpochOrder(10, 0, 0).positions(start, stop)


# --- how well it shuffles --------------------------------------------------------------------------------------------


def chi_square(counts: np.ndarray) -> float:
    """Pearson's statistic against equal counts, as a number of standard deviations from its mean."""
    expected = counts.sum() / counts.size
    freedom = counts.size - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom))


@pytest.mark.parametrize("num_samples", [2, 3, 4, 5, 7, 10, 50])
def test_over_many_epochs_every_sample_is_as_often_at_every_place(num_samples: int) -> None:
    epochs = 3000
    orders = np.array([EpochOrder(num_samples, 11, epoch).positions(0, num_samples) for epoch in range(epochs)])
    for place in range(num_samples):
        assert chi_square(np.bincount(orders[:, place], minlength=num_samples)) < 5


@pytest.mark.parametrize("num_samples", [1000, 65_537, 300_000])
def test_every_part_of_an_epoch_holds_samples_from_all_over(num_samples: int) -> None:
    found = EpochOrder(num_samples, 13, 0).positions(0, num_samples)
    places, parts = np.arange(num_samples) * 10 // num_samples, found * 10 // num_samples
    assert abs(chi_square(np.bincount(places * 10 + parts, minlength=100))) < 5


@pytest.mark.parametrize("num_samples", [1000, 65_537, 300_000])
def test_neighbours_in_the_files_are_no_neighbours_in_the_order(num_samples: int) -> None:
    found = EpochOrder(num_samples, 17, 0).positions(0, num_samples)
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 5 / np.sqrt(num_samples)
    assert (np.abs(np.diff(found)) == 1).sum() < 20
    lags = (found[1:] - found[:-1]) % num_samples
    assert chi_square(np.bincount(lags * 50 // num_samples, minlength=50)) < 5


def test_two_epochs_share_no_more_places_than_chance() -> None:
    orders = [np.array(whole(10_000, seed=1, epoch=epoch)) for epoch in range(20)]
    assert max(int((one == other).sum()) for one, other in pairwise(orders)) < 12


# --- batches and ranks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_samples", "batch_size", "drop_last", "expected"),
    [(10, 5, False, 2), (10, 5, True, 2), (11, 5, False, 3), (11, 5, True, 2), (4, 5, False, 1), (4, 5, True, 0)],
)
def test_batches_of_an_epoch_are_counted(num_samples: int, batch_size: int, drop_last: bool, expected: int) -> None:
    assert num_batches(num_samples, batch_size=batch_size, drop_last=drop_last) == expected


@pytest.mark.parametrize("num_samples", [1, 23, 24, 25, 100, 241])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 8, 12, 24])
def test_the_ranks_together_read_the_same_global_batches_for_every_world_size(
    num_samples: int, world_size: int
) -> None:
    order = EpochOrder(num_samples, 2, 1)
    for batch in range(num_batches(num_samples, batch_size=24, drop_last=False)):
        parts = [
            rank_range(batch, num_samples=num_samples, batch_size=24, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        together = [int(sample) for part in parts for sample in order.positions(*part)]
        assert together == whole(num_samples, seed=2, epoch=1)[batch * 24 : batch * 24 + 24]
        sizes = [stop - start for start, stop in parts]
        assert max(sizes) - min(sizes) <= 1


ALGORITHMS: list[Algorithm] = ["sequential", "global", "window"]


def order_of(algorithm: Algorithm, *, epoch: int = 1) -> Order:
    """Of 1,499 samples in three runs that cut through 13 shards."""
    selection = Selection.of([(3, 600), (650, 1300), (1301, 1500), (1507, 1560)])
    shards = Shards.of([97, 211, 5, 300, 1, 64, 128, 256, 33, 200, 100, 100, 65])
    return epoch_order(algorithm, shards=shards, selection=selection, seed=3, epoch=epoch)


def digests(order: Order, *, world_size: int, num_workers: int, from_batch: int = 0) -> list[str]:
    """A hash of every global batch, put together from what the workers of all ranks make, each in its turn."""
    total = num_batches(order.num_samples, batch_size=24, drop_last=False)
    made: dict[int, list[bytes]] = {}
    for rank, worker in product(range(world_size), range(num_workers)):
        for batch in worker_batches(from_batch, total, worker=worker, num_workers=num_workers):
            part = rank_range(batch, num_samples=order.num_samples, batch_size=24, rank=rank, world_size=world_size)
            made.setdefault(batch, []).append(order.positions(*part).tobytes())
    return [hashlib.sha256(b"".join(made[batch])).hexdigest() for batch in range(from_batch, total)]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("world_size", [2, 3, 4, 8, 24])
@pytest.mark.parametrize("num_workers", [1, 2, 5])
def test_every_algorithm_has_the_same_global_batches_for_every_world_size_and_number_of_workers(
    algorithm: Algorithm, world_size: int, num_workers: int
) -> None:
    order = order_of(algorithm)
    expected = digests(order, world_size=1, num_workers=1)
    assert digests(order, world_size=world_size, num_workers=num_workers) == expected
    assert digests(order, world_size=world_size, num_workers=num_workers, from_batch=17) == expected[17:]


@pytest.mark.parametrize("num_workers", [1, 2, 3, 7])
@pytest.mark.parametrize(("start", "stop"), [(0, 0), (0, 1), (0, 20), (5, 6), (5, 23)])
def test_one_batch_from_each_worker_in_turn_is_the_sequence(start: int, stop: int, num_workers: int) -> None:
    lines = [list(worker_batches(start, stop, worker=one, num_workers=num_workers)) for one in range(num_workers)]
    taken = []
    while any(lines):
        taken += [line.pop(0) for line in lines if line]
    assert taken == list(range(start, stop))


@pytest.mark.parametrize(("worker", "num_workers"), [(-1, 2), (2, 2), (0, 0)])
def test_a_worker_that_is_not_there_is_refused(worker: int, num_workers: int) -> None:
    with pytest.raises(ValueError, match="no worker"):
        worker_batches(0, 10, worker=worker, num_workers=num_workers)


@pytest.mark.parametrize(("batch", "rank", "world_size"), [(0, 0, 5), (0, 2, 2), (0, -1, 2), (-1, 0, 1), (3, 0, 1)])
def test_parts_that_nobody_reads_are_refused(batch: int, rank: int, world_size: int) -> None:
    with pytest.raises(ValueError, match=r"divide|no part"):
        rank_range(batch, num_samples=24, batch_size=8, rank=rank, world_size=world_size)
