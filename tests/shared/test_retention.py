"""Which checkpoints a policy keeps, as tables and for any history."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from railbus_shared.contracts.artifacts import CheckpointFile, CheckpointMeta
from railbus_shared.contracts.jobs import CheckpointPolicy
from railbus_shared.retention import Why, best, metric_value, retention, would_be_best

SHA = "0" * 64
TIME = "2026-01-01T00:00:00.000000000Z"


def meta(number: int, *, step: int | None = None, epoch: int = 1, **metrics: float | str) -> CheckpointMeta:
    """Of step `10 * number` unless said."""
    return CheckpointMeta(
        number=number, model="m", job="j-1", attempt=1, lease_epoch=epoch, step=10 * number if step is None else step,
        epoch=0, samples_seen=0, entrypoint="classifier", seed=0, dataset="d", index_sha256=SHA, devices=(),
        precision="float32", libraries={}, metrics=dict(metrics), created_at=TIME,
        files=(CheckpointFile(file=f"checkpoint-{number:06d}.pt", bytes=1, sha256=SHA),),
    )  # fmt: skip


LOSSES = [meta(n, loss=loss) for n, loss in enumerate([5.0, 1.0, 3.0, 2.0, 4.0], start=1)]
ODD = [meta(1, loss="NaN"), meta(2, loss="-Infinity"), meta(3), meta(4, loss=9.0), meta(5, loss="text"), meta(6)]
TWICE = [meta(1, step=10), meta(2, step=20), meta(3, step=20, loss=1.0), meta(4, step=30)]
BEST: dict[str, object] = {"keep_last": 1, "keep_best": 2, "metric": "loss"}


@pytest.mark.parametrize(
    ("metas", "policy", "kept"),
    [
        (LOSSES, {"keep_last": 2}, {5: ("newest",), 4: ("newest",)}),
        (LOSSES, {"keep_last": 9}, dict.fromkeys((5, 4, 3, 2, 1), ("newest",))),
        (LOSSES, BEST, {5: ("newest",), 4: ("best",), 2: ("best",)}),
        (LOSSES, {**BEST, "best": "max"}, {5: ("newest", "best"), 1: ("best",)}),
        (LOSSES, {"keep_last": 1, "keep_every_steps": 20}, {5: ("newest",), 4: ("every",), 2: ("every",)}),
        ([meta(1, loss=1.0), meta(2, loss=1.0), meta(3)], {**BEST, "keep_best": 1}, {3: ("newest",), 2: ("best",)}),
        (ODD, BEST, {6: ("newest",), 4: ("best",)}),
        (TWICE, {"keep_last": 3}, {4: ("newest",), 3: ("newest",), 1: ("newest",)}),
        ([meta(1, step=20), meta(2, step=20, epoch=2)], {"keep_last": 2}, {2: ("newest",), 1: ("newest",)}),
        ([], {}, {}),
    ],
)
def test_what_stays_and_why(
    metas: list[CheckpointMeta], policy: dict[str, object], kept: dict[int, tuple[Why, ...]]
) -> None:
    decided = retention(metas, CheckpointPolicy.parse(policy))
    assert dict(decided.kept) == kept
    assert list(decided.gone) == [one.number for one in metas if one.number not in kept]


def test_what_is_pinned_stays_with_its_reason_beside_the_others() -> None:
    decided = retention(LOSSES, CheckpointPolicy(keep_last=1), pinned={5: "recorded", 2: "named", 99: "resumed_from"})
    assert dict(decided.kept) == {5: ("newest", "recorded"), 2: ("named",)}
    assert decided.gone == (1, 3, 4)


@pytest.mark.parametrize(
    ("damaged", "kept"),
    [
        ({5}, {5: ("evidence",), 4: ("newest",), 3: ("newest",)}),
        ({4, 5}, {5: ("evidence",), 4: ("evidence",), 3: ("newest",), 2: ("newest",)}),
        ({1}, {5: ("newest",), 4: ("newest",)}),
        ({2, 3, 4, 5}, {5: ("evidence",), 4: ("evidence",), 3: ("evidence",), 2: ("evidence",), 1: ("newest",)}),
    ],
)
def test_damaged_ones_count_for_nothing_and_go_once_enough_whole_ones_are_newer(
    damaged: set[int], kept: dict[int, tuple[Why, ...]]
) -> None:
    assert dict(retention(LOSSES, CheckpointPolicy(keep_last=2), damaged=damaged).kept) == kept


@pytest.mark.parametrize(
    ("value", "direction", "expected"),
    [(0.5, "min", True), (2.0, "min", True), (2.1, "min", False), (float("nan"), "min", False), (4.5, "max", True)],
)
def test_a_value_is_known_to_be_among_the_best_before_it_is_saved(value: float, direction: str, expected: bool) -> None:
    policy = CheckpointPolicy.parse({**BEST, "best": direction})
    assert would_be_best(value, LOSSES, policy) is expected
    assert would_be_best(value, LOSSES[:1], policy) is not math.isnan(value), "there is room still"
    assert not would_be_best(value, LOSSES, CheckpointPolicy())


_METAS = st.lists(st.tuples(st.integers(0, 6), st.integers(1, 3), st.sampled_from([None, "NaN", 1.0, 2.0])), max_size=8)
_POLICY = st.builds(
    lambda last, k, every, way: CheckpointPolicy.parse(
        {"keep_last": last, "keep_every_steps": every, "best": way} | ({"keep_best": k, "metric": "m"} if k else {})
    ),
    st.integers(1, 4), st.integers(0, 3), st.none() | st.integers(1, 3), st.sampled_from(["min", "max"]),
)  # fmt: skip


@given(_METAS, _POLICY, st.sets(st.integers(1, 8)), st.sets(st.integers(1, 8), max_size=2))
def test_whatever_the_history_the_newest_whole_one_the_best_and_the_pinned_stay(
    told: list[tuple[int, int, float | str | None]], policy: CheckpointPolicy, damaged: set[int], pins: set[int]
) -> None:
    metas = [
        meta(number, step=step, epoch=epoch, **({} if value is None else {"m": value}))
        for number, (step, epoch, value) in enumerate(told, start=1)
    ]
    decided = retention(metas, policy, pinned=dict.fromkeys(pins, "named"), damaged=damaged)
    whole = [one for one in metas if one.number not in damaged]
    assert {*decided.kept, *decided.gone} == {one.number for one in metas}
    assert not decided.kept.keys() & set(decided.gone)
    assert not whole or whole[-1].number in decided.kept
    assert {one.number for one in metas} & pins <= decided.kept.keys()
    if policy.metric is not None and (top := best(whole, policy)):
        value = metric_value(top[0].metrics, "m")
        assert value in [metric_value(one.metrics, "m") for one in whole if one.number in decided.kept]
    later = retention([one for one in metas if one.number in decided.kept], policy, damaged=damaged)
    assert not later.gone or pins, "what was kept is kept again"
