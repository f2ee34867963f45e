"""The checker of histories: each promise, kept and broken."""

from __future__ import annotations

import pytest

from histories import unended, untold, violations

Event = dict[str, object]


def event(
    revision: int, what: str, *, job: str = "j-1", epoch: int = 1, step: int | None = None, **data: object
) -> Event:
    told: Event = {"type": f"job.{what}", "job": job, "lease_epoch": epoch, "data": {"revision": revision, **data}}
    return told if step is None else {**told, "step": step}


GOOD = [
    event(1, "queued", epoch=0),
    event(3, "placed", devices=["a"]),
    event(4, "started", devices=["a"]),
    event(5, "checkpointed", step=10),
    event(6, "requeued"),
    event(8, "placed", epoch=2, devices=["a"]),
    event(9, "started", epoch=2, devices=["a"]),
    event(10, "checkpointed", epoch=2, step=20),
    event(12, "succeeded", epoch=2),
    event(2, "queued", epoch=0, job="j-2"),
    event(7, "placed", job="j-2", devices=["b"]),
    event(13, "requeued", job="j-2"),
    event(14, "cancelled", job="j-2"),
]


def test_a_good_history_has_no_violations_in_any_order_and_with_doubles() -> None:
    assert violations(GOOD) == []
    assert violations([*reversed(GOOD), *GOOD]) == []


@pytest.mark.parametrize("lost", range(len(GOOD)))
def test_a_history_with_an_event_that_was_never_told_has_no_violations(lost: int) -> None:
    assert violations(GOOD[:lost] + GOOD[lost + 1 :]) == []


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (event(15, "failed", epoch=2), "j-1: job.failed at revision 15, after job.succeeded at 12"),
        (event(15, "placed", epoch=3, devices=["c"]), "after job.succeeded"),
        (event(11, "started", epoch=2), "job.started, job.started of lease epoch 2"),
        (event(11, "placed", epoch=2, devices=["c"]), "job.placed, job.placed of lease epoch 2"),
        (event(11, "started", epoch=1), "of lease epoch 1 after one of 2"),
        (event(11, "checkpointed", epoch=1, step=99), "after that attempt's end"),
        (event(11, "checkpointed", epoch=2, step=19), "step 19 after step 20"),
        (event(11, "placed", epoch=1, job="j-3", devices=["a"]), "a went to j-3 while j-1 had it"),
    ],
)
def test_a_broken_promise_is_named(more: Event, said: str) -> None:
    assert any(said in word for word in violations([*GOOD, more]))


def test_jobs_without_an_end_are_named() -> None:
    assert unended(GOOD) == set()
    assert unended([*GOOD, event(20, "queued", job="j-9", epoch=0)]) == {"j-9"}


def test_jobs_whose_end_is_not_told_exactly_once_are_named() -> None:
    assert untold(GOOD, ["j-1", "j-2"]) == {}
    assert untold([*GOOD, event(14, "cancelled", job="j-2")], ["j-1", "j-2", "j-3"]) == {"j-2": 2, "j-3": 0}
