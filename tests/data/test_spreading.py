"""Where shards end: even, within the promised bounds, and the same however samples come."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from railbus_shared.contracts.artifacts import Column, DatasetSchema, Split
from railbus_shared.data.spreading import Boundary, Cut, Spread, Weights
from railbus_shared.data.writer import SHARD_BYTES

MIB = 1 << 20
Sizes = npt.NDArray[np.int64]


class Samples:
    """Sizes of samples, as the rule sees those that are held."""

    def __init__(self, sizes: Sizes) -> None:
        self.ends = np.concatenate([[0], np.cumsum(sizes)])
        self.first = self.held = 0

    def find(self, goal: int) -> Boundary:
        ends = self.ends[self.first : self.held + 1] - self.ends[self.first]
        at = int(np.searchsorted(ends, goal, side="right")) - 1
        return Boundary(at, int(ends[at]), int(ends[min(at + 1, len(ends) - 1)]))

    @property
    def at(self) -> int:
        return int(self.ends[self.first])

    @property
    def weight(self) -> int:
        return int(self.ends[self.held]) - self.at


def shards(sizes: Sizes, *, target: int, chunk: int) -> list[Cut]:
    """All cuts, with samples that come in chunks."""
    samples, cuts = Samples(sizes), list[Cut]()
    spread = Spread(target)
    while samples.held < len(sizes):
        samples.held = min(len(sizes), samples.held + chunk)
        while spread.has_cut(samples.weight):
            cut = spread.cut(samples.find, at=samples.at)
            if not spread.is_settled(cut.weight, held=samples.weight):
                break
            cuts.append(cut)
            samples.first += cut.samples
    left = len(sizes) - samples.first
    return [*cuts, *spread.last_cuts(samples.find, held=samples.weight, samples=left)]


def sizes_of(kind: str, count: int, rng: np.random.Generator) -> Sizes:
    """Samples of a mean size of a hundred."""
    if kind == "alike":
        return np.full(count, 100)
    if kind == "uniform":
        return rng.integers(1, 200, count)
    return rng.permutation(np.where(np.arange(count) % 50 == 0, 2500, 50))


@pytest.mark.parametrize("kind", ["alike", "uniform", "now and then a large one"])
@pytest.mark.parametrize("target", [5000, 9_999, 51_200])
def test_every_shard_is_near_the_target_for_datasets_of_any_size(kind: str, target: int) -> None:
    rng = np.random.default_rng(3)
    for total in range(target // 10, 12 * target, target // 7):
        sizes = sizes_of(kind, max(1, total // 100), rng)
        cuts = shards(sizes, target=target, chunk=17)
        assert sum(cut.samples for cut in cuts) == len(sizes)
        assert sum(cut.weight for cut in cuts) == sizes.sum()
        assert max(cut.weight for cut in cuts) <= 1.5 * target + sizes.max()
        if len(cuts) > 1:
            assert min(cut.weight for cut in cuts) >= 0.75 * target - sizes.max()
            assert max(cut.weight for cut in cuts) <= 1.25 * target + sizes.max()
        if sizes.sum() >= target / 2:
            assert all(target / 2 <= cut.weight <= 4 * target for cut in cuts)


@pytest.mark.parametrize("target", [100, 1000, 3333])
def test_samples_as_large_as_shards_keep_within_half_and_four_times_the_target(target: int) -> None:
    rng = np.random.default_rng(4)
    for count in range(1, 120):
        sizes = rng.integers(target // 2, 3 * target, count)
        for cut in shards(sizes, target=target, chunk=1):
            assert target / 2 <= cut.weight <= 4 * target


@pytest.mark.parametrize("kind", ["alike", "uniform", "now and then a large one"])
def test_how_samples_come_in_chunks_does_not_decide_where_shards_end(kind: str) -> None:
    sizes = sizes_of(kind, 2000, np.random.default_rng(5))
    expected = shards(sizes, target=9_999, chunk=1)
    assert len(expected) > 10
    assert all(shards(sizes, target=9_999, chunk=chunk) == expected for chunk in (2, 7, 100, 333, 5000))


def test_a_large_sample_before_a_small_rest_does_not_leave_a_shard_that_is_too_small() -> None:
    assert [cut.weight for cut in shards(np.array([1000, 3000, 100]), target=1000, chunk=1)] == [1000, 3100]


def test_a_sample_larger_than_a_shard_gets_one_of_its_own() -> None:
    assert shards(np.array([100, 100, 100]), target=10, chunk=1) == [Cut(1, 100)] * 3


@pytest.mark.parametrize("total_mib", [1, 255, 256, 400, 767, 769, 1000, 1279, 1281, 5000, 50_001])
@pytest.mark.parametrize("sample_mib", [1, 7])
def test_shards_of_the_usual_size_have_256_mib_to_2_gib(total_mib: int, sample_mib: int) -> None:
    sizes = np.full(max(1, total_mib // sample_mib), sample_mib * MIB)
    cuts = shards(sizes, target=SHARD_BYTES, chunk=64)
    assert max(cut.weight for cut in cuts) <= 2048 * MIB
    if sizes.sum() >= 256 * MIB:
        assert min(cut.weight for cut in cuts) >= 256 * MIB


@pytest.mark.parametrize(
    ("payload", "columns", "expected"),
    [
        ("columns", {"a": Column(dtype="int32", shape=(3,)), "b": Column(dtype="bool", shape=())}, (13, {})),
        ("columns", {"a": Column(dtype="int16", shape=(), variable_length=True)}, (8, {"a": 2})),
        ("npy", {"a": Column(dtype="float64", shape=(2, 2))}, (32, {})),
        ("raw", {"a": Column(dtype="int16", shape=(4,), variable_length=True)}, (0, {"a": 8})),
        ("parquet", {"a": Column(dtype="uint8", shape=(5,)), "b": Column(dtype="bool", shape=(9,))}, (22, {})),
        ("parquet", {"a": Column(dtype="uint8", shape=(), variable_length=True)}, (4, {"a": 1})),
    ],
)
def test_samples_weigh_what_they_take_in_their_payload(
    payload: str, columns: dict[str, Column], expected: tuple[int, dict[str, int]]
) -> None:
    schema = DatasetSchema(name="d", columns=columns, splits={"all": Split(first=0, samples=1)})
    schema = DatasetSchema.parse(schema.to_map() | {"payload": payload})
    assert Weights.of(schema) == Weights(*expected)
