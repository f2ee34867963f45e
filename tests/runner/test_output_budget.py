"""What of a flood is told: at most so much at once and in time, the last lines always, and everything is counted."""

from __future__ import annotations

import random

import pytest

from railbus_runner.output_budget import TAIL_LINES, Dropped, OutputBudget, OutputStream


def stream() -> OutputStream:
    return OutputStream(OutputBudget(0.0))


def test_what_an_ordinary_trainer_prints_is_told_whole() -> None:
    out = stream()
    for second in range(100):
        lines = [f"step {second}.{n}" for n in range(500)]
        assert out.heed(lines, float(second)) == lines
        assert out.dropped(float(second)) is None
    assert out.finish() == (None, [])


def test_of_a_flood_the_beginning_and_the_end_are_told_and_the_rest_is_counted() -> None:
    out = stream()
    lines = [f"line {n}" for n in range(50_000)]
    told = out.heed(lines, 0.0)
    assert told == lines[:10_000]
    assert out.dropped(0.0) == Dropped(39_900, sum(map(len, lines[10_000:-TAIL_LINES])))
    more = [f"more {n}" for n in range(5000)]
    told = out.heed(more, 0.0)
    dropped, last = out.finish()
    assert told == []
    assert last == more[-TAIL_LINES:]
    assert dropped == Dropped(5000, sum(map(len, (lines + more)[-TAIL_LINES - 5000 : -TAIL_LINES])))
    assert list(out.tail) == more[-TAIL_LINES:]


def test_few_lines_that_are_huge_are_a_flood_too() -> None:
    out = stream()
    told = out.heed(["x" * 8192] * 1000, 0.0)
    assert len(told) == (4 << 20) // 8192
    assert out.finish()[0] == Dropped(1000 - len(told) - TAIL_LINES, 8192 * (1000 - len(told) - TAIL_LINES))


def test_a_flood_without_end_goes_on_being_told_at_the_sustained_rate() -> None:
    out = stream()
    told = sum(len(out.heed(["y" * 50] * 500, second / 10)) for second in range(600))
    assert 10_000 + 58_000 <= told <= 10_000 + 60_100


def test_drops_are_said_every_few_seconds_and_not_at_every_chunk() -> None:
    out = stream()
    said = [out.dropped(at / 10) for at in range(200) if out.heed(["z"] * 1000, at / 10) is not None]
    assert 3 <= sum(word is not None for word in said) <= 5


def test_both_streams_share_one_budget() -> None:
    budget = OutputBudget(0.0)
    first, second = OutputStream(budget), OutputStream(budget)
    assert len(first.heed(["a"] * 9_000, 0.0)) + len(second.heed(["b"] * 9_000, 0.0)) == 10_000


@pytest.mark.parametrize("seed", range(200))
def test_every_line_is_told_or_counted_once(seed: int) -> None:
    chance = random.Random(seed)
    out, now_s, given, told, counted = stream(), 0.0, [], 0, 0
    for _ in range(chance.randrange(1, 30)):
        lines = ["l" * chance.randrange(0, 3000)] * chance.choice([0, 1, 50, 3000])
        given += lines
        now_s += chance.choice([0.0, 0.1, 3.0, 100.0])
        told += len(out.heed(lines, now_s))
        dropped = out.dropped(now_s)
        counted += dropped.lines if dropped is not None else 0
    rest, last = out.finish()
    total = told + counted + len(last) + (rest.lines if rest is not None else 0)
    assert total == len(given)
    assert list(out.tail) == given[-TAIL_LINES:]
