"""Keyed bijections: with tables and without, one by one and many at once, they are the same permutations."""

from __future__ import annotations

import numpy as np
import pytest

from railbus_shared.data import bijection
from railbus_shared.data.bijection import Bijection, Bijections


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 97, 1000, 4099, 65_536, 1_000_003])
def test_with_tables_and_without_it_is_the_same_permutation(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    places = np.arange(size)
    with_tables = Bijection(size, 3, 5, 7)(places)
    monkeypatch.setattr(bijection, "_LARGEST_TABLE", 0)
    assert np.array_equal(Bijection(size, 3, 5, 7)(places), with_tables)
    assert np.array_equal(np.sort(with_tables), places)


@pytest.mark.parametrize("size", [8192**2 - 1, 8192**2, 8192**2 + 1])
def test_where_the_tables_end_nothing_is_lost(size: int) -> None:
    places = np.concatenate([np.arange(20_000), np.arange(size - 20_000, size)])
    found = Bijection(size, 1, 0)(places)
    assert len(set(found.tolist())) == 40_000
    assert (found.min() >= 0, found.max() < size) == (True, True)


@pytest.mark.parametrize("sizes", [[1], [2, 1, 3], [1, 1, 1, 1], [1000, 1, 64, 4099, 2], list(range(1, 100))])
@pytest.mark.parametrize("step", [1, 50])
def test_many_at_once_are_what_each_is_by_itself(sizes: list[int], step: int) -> None:
    """With a step so few are asked for that tables are not worth their while."""
    which = np.repeat(np.arange(len(sizes)), sizes)[::step]
    places = np.concatenate([np.arange(size) for size in sizes])[::step]
    together = Bijections(np.array(sizes), 3, 1, 100)(places, which=which)
    alone = [Bijection(size, 3, 1, 100 + number)(np.arange(size)) for number, size in enumerate(sizes)]
    assert np.array_equal(together, np.concatenate(alone)[::step])


def test_every_salt_has_a_permutation_of_its_own_and_salt_0_is_that_of_the_epochs() -> None:
    found = {tuple(Bijection(64, 7, 0, salt)(np.arange(64)).tolist()) for salt in [*range(100), 1 << 62, (1 << 62) + 1]}
    assert len(found) == 102
    assert Bijection(10, 7, 0)(np.arange(10)).tolist() == [5, 0, 1, 4, 3, 6, 2, 9, 8, 7]


def test_places_that_were_asked_for_are_left_as_they_are() -> None:
    for size in (1, 100, 8192**2 * 2):
        places = np.arange(min(size, 50))
        Bijection(size, 0, 0)(places)
        assert places.tolist() == list(range(min(size, 50)))
