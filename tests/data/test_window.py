"""The window shuffle: a bijection with random access, few shards at a time, well shuffled within them."""

from __future__ import annotations

import random
from itertools import pairwise, product

import numpy as np
import pytest

from railbus_shared.data.bijection import Positions
from railbus_shared.data.order import Algorithm, Order, Window, epoch_order, shards_ahead
from railbus_shared.data.selection import Selection
from railbus_shared.data.shards import Shards

SIZES: dict[str, list[int]] = {
    "one": [1],
    "two": [1, 1],
    "small": [3, 1, 4, 1, 5, 9, 2, 6],
    "a prime number of primes": [7, 11, 13, 17, 19],
    "powers": [64] * 16,
    "uneven": [1000, 1, 1, 500, 250, 1, 2000],
    "many of one sample": [1] * 300,
}
WINDOWS = [Window(1), Window(2), Window(3), Window(8), Window(1000), Window(70, "samples"), Window(700, "bytes")]


def shards_of(sizes: list[int]) -> Shards:
    return Shards.of(sizes, sizes_bytes=[10 * size for size in sizes])


def made(
    sizes: list[int],
    *,
    algorithm: Algorithm = "window",
    window: Window = WINDOWS[1],
    seed: int = 3,
    epoch: int = 1,
    selection: Selection | None = None,
) -> Order:
    chosen = selection or Selection.of([(0, sum(sizes))])
    return epoch_order(algorithm, shards=shards_of(sizes), selection=chosen, seed=seed, epoch=epoch, window=window)


def whole(order: Order) -> Positions:
    return order.positions(0, order.num_samples)


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=list(SIZES))
def test_every_sample_comes_once_and_no_shard_is_needed_in_two_windows(sizes: list[int], window: Window) -> None:
    for seed, epoch in product([0, 7, 2**63], [0, 1, 50]):
        order = made(sizes, window=window, seed=seed, epoch=epoch)
        found = whole(order)
        assert np.array_equal(np.sort(found), np.arange(sum(sizes)))
        numbers = shards_of(sizes).numbers_of(found)
        first: dict[int, int] = {}
        last: dict[int, int] = {}
        for place, number in enumerate(numbers.tolist()):
            first.setdefault(number, place)
            last[number] = place
        for place in range(0, len(found), max(1, len(found) // 50)):
            open_now = [number for number in first if first[number] <= place <= last[number]]
            assert within(open_now, sizes, window)


def within(numbers: list[int], sizes: list[int], window: Window) -> bool:
    """Whether a window may hold these shards together."""
    weights = {"shards": [1] * len(sizes), "samples": sizes, "bytes": [10 * size for size in sizes]}[window.unit]
    return len(numbers) <= 1 or sum(weights[number] for number in numbers) <= window.limit


@pytest.mark.parametrize("algorithm", ["sequential", "global", "window"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=list(SIZES))
def test_any_part_is_what_the_whole_has_there(sizes: list[int], algorithm: Algorithm) -> None:
    selection = Selection.of([(0, max(1, sum(sizes) // 3)), (sum(sizes) // 2, sum(sizes))]).every(2)
    for window in WINDOWS:
        order = made(sizes, algorithm=algorithm, window=window, selection=selection)
        unbroken = whole(order)
        assert sorted(unbroken.tolist()) == selection.samples(np.arange(selection.num_samples)).tolist()
        dice = random.Random(len(sizes))
        for _ in range(20):
            start, stop = sorted(dice.choices(range(order.num_samples + 1), k=2))
            again = made(sizes, algorithm=algorithm, window=window, selection=selection)
            assert np.array_equal(again.positions(start, stop), unbroken[start:stop])


@pytest.mark.parametrize("algorithm", ["sequential", "global", "window"])
def test_ten_million_samples_resume_anywhere(algorithm: Algorithm) -> None:
    sizes = [10_000] * 1000 + [3]
    order = made(sizes, algorithm=algorithm, window=Window(7))
    unbroken = order.positions(4_999_000, 5_101_000)
    assert len(set(unbroken.tolist())) == len(unbroken)
    for start in range(4_999_000, 5_100_000, 12_345):
        resumed = made(sizes, algorithm=algorithm, window=Window(7)).positions(start, start + 1000)
        assert np.array_equal(resumed, unbroken[start - 4_999_000 :][:1000])
    assert len(order.positions(10**7, 10**7 + 3)) == 3


def test_by_count_the_windows_are_alike_to_within_a_shard() -> None:
    sizes, order = [10] * 23, made([10] * 23, window=Window(8))
    numbers = shards_of(sizes).numbers_of(whole(order))
    seen = [len(set(numbers[place : place + 70].tolist())) for place in (0, 70, 150)]
    assert seen == [7, 8, 8]


def test_a_window_over_all_shards_mixes_everything_with_everything() -> None:
    found = whole(made([1000] * 10, window=Window(10)))
    parts = np.bincount(np.arange(10_000) // 1000 * 10 + found // 1000, minlength=100)
    assert abs(chi_square(parts)) < 5


@pytest.mark.parametrize("num_shards", [8, 64])
def test_within_a_window_a_sample_is_as_likely_anywhere(num_shards: int) -> None:
    """Windows of 8 shards of 500 samples: of each window's tenths every shard has its share."""
    order = made([500] * num_shards, window=Window(8))
    found = whole(order).reshape(-1, 4000)
    for window in found:
        slots = np.searchsorted(np.sort(window), window)  # 0 to 3999, by the order of the files
        counts = np.bincount(np.arange(4000) * 10 // 4000 * 10 + slots * 10 // 4000, minlength=100)
        assert abs(chi_square(counts)) < 5
        assert abs(np.corrcoef(window[:-1], window[1:])[0, 1]) < 5 / np.sqrt(4000)


@pytest.mark.parametrize("window", [1, 2, 8])
def test_a_sample_is_never_further_from_its_shards_others_than_the_window_is_long(window: int) -> None:
    sizes = [50] * 24
    places = np.argsort(whole(made(sizes, window=Window(window)))).reshape(24, 50)
    assert (places.max(axis=1) - places.min(axis=1)).max() < window * 50


def test_over_many_epochs_every_shard_is_as_often_in_every_window_and_with_every_other() -> None:
    together, first = np.zeros((6, 6)), np.zeros(6)
    for epoch in range(2000):
        numbers = whole(made([2] * 6, window=Window(2), epoch=epoch)) // 2
        for window in numbers.reshape(3, 4):
            one, other = sorted(set(window.tolist()))
            together[one, other] += 1
        first[numbers[0]] += 1
    assert chi_square(first) < 5
    assert chi_square(together[np.triu_indices(6, 1)]) < 5


def test_two_epochs_share_no_more_places_than_chance() -> None:
    orders = [whole(made([100] * 100, window=Window(100), epoch=epoch)) for epoch in range(10)]
    assert max(int((one == other).sum()) for one, other in pairwise(orders)) < 12


def chi_square(counts: np.ndarray) -> float:
    """Pearson's statistic against equal counts, as a number of standard deviations from its mean."""
    expected = counts.sum() / counts.size
    freedom = counts.size - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom))


def test_the_order_is_the_one_that_checkpoints_were_made_with() -> None:
    assert whole(made([2, 3, 1, 4], seed=7, epoch=0)).tolist() == [1, 5, 0, 9, 4, 6, 2, 3, 7, 8]
    sizes = [10_000] * 1000
    assert made(sizes, seed=7, epoch=3, window=Window(8)).positions(79_998, 80_003).tolist() == [
        9669771,
        5759802,
        2645556,
        4593032,
        4177201,
    ]


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (3, 2), (0, 11), (11, 12)])
@pytest.mark.parametrize("algorithm", ["sequential", "global", "window"])
def test_places_that_the_epoch_does_not_have_are_refused(start: int, stop: int, algorithm: Algorithm) -> None:
    with pytest.raises(ValueError, match="of 10"):
        made([4, 6], algorithm=algorithm).positions(start, stop)


def test_a_window_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Window(0)
    order = epoch_order(
        "window",
        shards=Shards.of([4, 6]),
        selection=Selection.of([(0, 10)]),
        seed=0,
        epoch=0,
        window=Window(9, "bytes"),
    )
    with pytest.raises(ValueError, match="sizes of the shards"):
        order.positions(0, 1)


def test_a_selection_that_the_shards_do_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match="where the dataset ends"):
        made([4, 6], selection=Selection.of([(0, 11)])).positions(0, 1)


# --- what is needed next ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["sequential", "global", "window"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=list(SIZES))
def test_the_shards_ahead_are_those_that_are_needed_in_the_order_of_need(
    sizes: list[int], algorithm: Algorithm
) -> None:
    parts = [Selection.of([(0, sum(sizes))]), Selection.of([(sum(sizes) // 3, sum(sizes))]).every(3, offset=1)]
    for selection, window in product(parts, WINDOWS):
        order = made(sizes, algorithm=algorithm, window=window, selection=selection)
        numbers = shards_of(sizes).numbers_of(whole(order)).tolist()
        for place in range(0, order.num_samples + 1, max(1, order.num_samples // 15)):
            expected = list(dict.fromkeys(numbers[place:]))
            assert shards_ahead(order, place) == expected
            assert shards_ahead(order, place, limit=2) == expected[:2]


@pytest.mark.parametrize("algorithm", ["global", "window"])
def test_of_a_very_long_shuffle_the_shards_that_were_not_met_come_last(algorithm: Algorithm) -> None:
    order = made([1] * 10 + [10**7], algorithm=algorithm, window=Window(11))
    ahead = shards_ahead(order, 0)
    assert ahead[0] == 10
    assert sorted(ahead) == list(range(11))


@pytest.mark.parametrize("algorithm", ["sequential", "global", "window"])
def test_all_of_a_thousand_shards_are_told_once(algorithm: Algorithm) -> None:
    order = made([10_000] * 1000, algorithm=algorithm, window=Window(8))
    assert sorted(shards_ahead(order, 0)) == list(range(1000))
    assert len(shards_ahead(order, 4_000_000, limit=64)) == 64
