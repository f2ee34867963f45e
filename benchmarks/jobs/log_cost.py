"""A job that logs without pause, and tells what each call cost it."""

from __future__ import annotations

import time

from railbus import TrainContext

_CALLS = 50_000
_FIRST = 1_000
"""Left out: the first calls import and fill caches."""


def measure(ctx: TrainContext) -> None:
    """Microseconds of `ctx.log` with two numbers: those that are told, and those that wait for the next."""
    spent: list[int] = []
    for number in range(_FIRST + _CALLS):
        began = time.perf_counter_ns()
        ctx.log(loss=1 / (number + 1), lr=0.001)
        spent.append(time.perf_counter_ns() - began)
    told = sorted(ns / 1000 for ns in spent[_FIRST:])
    ctx.event(
        "log_cost_measured",
        mean=sum(told) / len(told),
        p50=told[len(told) // 2],
        p99=told[len(told) * 99 // 100],
        max=told[-1],
    )
