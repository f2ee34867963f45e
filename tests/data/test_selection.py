"""Selections: sets of samples by ranges and steps, against sets of Python."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from railbus_shared.contracts.artifacts import SampleRange, Split
from railbus_shared.data.selection import Selection

Runs = list[tuple[int, int]]
Model = set[int]


def held(selection: Selection) -> list[int]:
    return [int(sample) for sample in selection.samples(np.arange(selection.num_samples))]


def agrees(selection: Selection, model: Model) -> None:
    """The selection has the samples of a set, in order, and knows the place of each."""
    assert held(selection) == sorted(model)
    numbers = np.arange(130)
    assert selection.places(numbers).tolist() == [sum(one < number for one in model) for number in range(130)]


runs_of = st.lists(
    st.tuples(st.integers(0, 60), st.integers(0, 60)).map(lambda pair: (min(pair), max(pair))), max_size=6
)


@settings(max_examples=60, deadline=None)
@given(runs=runs_of)
def test_ranges_are_a_set_however_they_overlap_and_in_whatever_order(runs: Runs) -> None:
    model = {sample for first, stop in runs for sample in range(first, stop)}
    selection = Selection.of(runs)
    agrees(selection, model)
    assert len(selection.firsts) <= len(runs)
    assert selection.key == Selection.of(reversed(runs)).key == Selection.of((one, one + 1) for one in model).key


step = st.tuples(st.just("every"), st.integers(1, 7), st.integers(0, 6))
cut = st.tuples(st.just("slice"), st.integers(0, 30), st.integers(0, 30))
joined = st.tuples(st.sampled_from(["intersection", "exclude"]), runs_of, st.integers(1, 4))


@settings(max_examples=150, deadline=None)
@given(runs=runs_of, steps=st.lists(step | cut | joined, max_size=5))
def test_sets_made_from_each_other_are_what_sets_of_python_would_be(
    runs: Runs, steps: list[tuple[str, Runs, int]]
) -> None:
    selection, model = Selection.of(runs), {sample for first, stop in runs for sample in range(first, stop)}
    for name, first, second in steps:
        match name, first, second:
            case "every", int(every), int(offset):
                selection = selection.every(every, offset=offset % every)
                model = {sample for sample in model if sample % every == offset % every}
            case "slice", int(start), int(length):
                selection = selection.slice(start, start + length)
                model = set(sorted(model)[start : start + length])
            case _, list(other_runs), int(every):
                other = Selection.of(other_runs).every(every)
                samples = {one for begin, stop in other_runs for one in range(begin, stop) if one % every == 0}
                selection = getattr(selection, name)(other)
                model = {"intersection": model & samples, "exclude": model - samples}[name]
        agrees(selection, model)


def test_every_tenth_for_validation_and_the_rest_for_training_cost_what_ranges_cost() -> None:
    whole = Selection.of([(0, 10**9), (2 * 10**9, 3 * 10**9)])
    valid = whole.every(10, offset=3)
    train = whole.exclude(valid)
    assert (valid.num_samples, train.num_samples) == (2 * 10**8, 18 * 10**8)
    assert valid.marks.size + train.marks.size <= 100
    assert valid.samples(np.array([0, 10**8])).tolist() == [3, 2_000_000_003]
    assert train.samples(np.array([2, 3, 9 * 10**8])).tolist() == [2, 4, 2_000_000_000]
    assert whole.exclude(train).key == valid.key


def test_what_every_step_chose_stays_chosen_when_samples_are_added() -> None:
    before, after = Selection.of([(5, 103)]).every(10), Selection.of([(0, 205)]).every(10)
    assert held(before) == [one for one in held(after) if 5 <= one < 103]


def test_a_split_in_several_runs_is_one_selection() -> None:
    ranges = (SampleRange(first=10, samples=2), SampleRange(first=50, samples=3))
    assert held(Selection.of_split(Split(first=10, samples=5, ranges=ranges))) == [10, 11, 50, 51, 52]
    assert held(Selection.of_split(Split(first=7, samples=3))) == [7, 8, 9]


def test_ranges_of_places_are_those_samples_and_cost_no_more_than_they_are() -> None:
    split = Selection.of([(100, 200), (500, 600)]).every(2)
    assert held(split.at([(48, 52), (0, 2), (1, 3)])) == [100, 102, 104, 196, 198, 500, 502]
    many = Selection.of([(0, 10**6)]).at((start, start + 5) for start in range(0, 10**6, 10))
    assert (many.num_samples, many.marks.size) == (500_000, 100_000)
    with pytest.raises(ValueError, match="of 100"):
        split.at([(0, 101)])


def test_many_ranges_find_the_sample_of_every_place() -> None:
    firsts = np.arange(100_000) * 10
    selection = Selection.of((int(first), int(first) + 3) for first in firsts)
    places = np.random.default_rng(1).integers(0, 300_000, 5000)
    assert np.array_equal(selection.samples(places), places // 3 * 10 + places % 3)


@pytest.mark.parametrize("runs", [[(-1, 3)], [(5, 4)], [(0, 2), (9, 8)]])
def test_runs_that_are_none_are_refused(runs: Runs) -> None:
    with pytest.raises(ValueError, match="is none"):
        Selection.of(runs)


@pytest.mark.parametrize("place", [-1, 5, 10**9])
def test_places_that_the_selection_does_not_have_are_refused(place: int) -> None:
    with pytest.raises(ValueError, match="of 5"):
        Selection.of([(3, 6), (9, 11)]).samples(np.array([0, place]))


@pytest.mark.parametrize(("step", "offset"), [(0, 0), (3, 3), (3, -1), (1 << 17, 0)])
def test_steps_that_are_none_are_refused(step: int, offset: int) -> None:
    with pytest.raises(ValueError, match="is none"):
        Selection.of([(0, 9)]).every(step, offset=offset)


def test_steps_whose_patterns_are_too_long_together_are_refused() -> None:
    whole = Selection.of([(0, 10**7)])
    with pytest.raises(ValueError, match="repeat every 257 and 263 samples"):
        whole.every(257).intersection(whole.every(263))


def test_an_empty_selection_is_one() -> None:
    for selection in (Selection.of([]), Selection.of([(4, 4)]), Selection.of([(0, 9)]).slice(20, 30)):
        agrees(selection, set())
        agrees(Selection.of([(1, 3)]).exclude(selection.every(3)), {1, 2})
