"""Which checkpoints of a job are kept, which go, and why each one stays. Pure.

Asked once a newer checkpoint is durable, and by whoever wants to know beforehand. The rules add up: a checkpoint stays
if any of them keeps it.

    newest        among the `keep_last` newest states of the job
    best          among the `keep_best` best by the policy's metric
    every         its step is a multiple of `keep_every_steps`
    recorded      the job record names it
    resumed_from  the present attempt goes on from it
    named         a later job names it in `resume_from`
    evidence      it is damaged, and there are not yet `keep_last` newer ones that are not

`keep_last` is at least one, so the newest whole one always stays, and with it the only one.

An older checkpoint of a step that the same attempt has saved once more holds nothing of the state that the newer one
lacks: it is neither among the newest nor kept for its step. A metric counts that is a finite number in the meta of the
very checkpoint; one that is missing, NaN or infinite is never best. Of equals the newer is the better.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from railbus_shared.contracts.artifacts import CheckpointMeta
from railbus_shared.contracts.jobs import CheckpointPolicy

Why = Literal["newest", "best", "every", "recorded", "resumed_from", "named", "evidence"]
Pins = Mapping[int, Why]
"""Numbers that stay whatever the policy says, each with its reason."""


@dataclass(frozen=True)
class Retention:
    """What becomes of each checkpoint."""

    kept: Mapping[int, tuple[Why, ...]]
    """Newest first, with every reason for which it stays."""
    gone: tuple[int, ...]
    """Oldest first, which is the order in which they may go."""


def retention(
    metas: Iterable[CheckpointMeta],
    policy: CheckpointPolicy,
    *,
    pinned: Pins | None = None,
    damaged: Collection[int] = (),
) -> Retention:
    """Decide on the durable checkpoints of one job.

    Args:
        metas: of all that exist, in any order; the newest has the highest number.
        policy: the job's.
        pinned: what must stay whatever the policy says.
        damaged: numbers of those that are known not to be what their metas say. They count for no rule, so that
            `keep_last` whole ones are left.
    """
    newest_first = sorted(metas, key=lambda meta: meta.number, reverse=True)
    reasons: dict[int, list[Why]] = {meta.number: [] for meta in newest_first}
    counting = _counting(newest_first, damaged)
    last = counting[: policy.keep_last]
    rules: tuple[tuple[Why, list[CheckpointMeta]], ...] = (
        ("newest", last),
        ("best", best((meta for meta in newest_first if meta.number not in damaged), policy)),
        ("every", _every(counting, policy)),
    )
    for why, chosen in rules:
        for meta in chosen:
            reasons[meta.number].append(why)
    for number, why in (pinned or {}).items():
        if number in reasons:
            reasons[number].append(why)
    for number in damaged:
        if number in reasons and (len(last) < policy.keep_last or number > last[-1].number):
            reasons[number].append("evidence")
    return Retention(
        kept={number: tuple(whys) for number, whys in reasons.items() if whys},
        gone=tuple(number for number, whys in reversed(reasons.items()) if not whys),
    )


def best(metas: Iterable[CheckpointMeta], policy: CheckpointPolicy) -> list[CheckpointMeta]:
    """The `keep_best` best, best first; fewer where fewer have the metric."""
    if policy.metric is None:
        return []
    rated = [(value, meta) for meta in metas if (value := metric_value(meta.metrics, policy.metric)) is not None]
    sign = 1 if policy.best == "min" else -1
    return [meta for _, meta in sorted(rated, key=lambda one: (sign * one[0], -one[1].number))][: policy.keep_best]


def would_be_best(value: float, metas: Iterable[CheckpointMeta], policy: CheckpointPolicy) -> bool:
    """Whether a new checkpoint with this value of the policy's metric would be among the best."""
    if policy.metric is None or not math.isfinite(value):
        return False
    there = best(metas, policy)
    if len(there) < policy.keep_best:
        return True
    worst = metric_value(there[-1].metrics, policy.metric)
    assert worst is not None  # noqa: S101 - it was rated
    return value <= worst if policy.best == "min" else value >= worst


def metric_value(metrics: Mapping[str, object], name: str) -> float | None:
    """A metric as a number that can be compared; None for one that is missing, NaN or infinite."""
    value = metrics.get(name)
    if not isinstance(value, int | float) or not math.isfinite(value):  # NaN and the infinities are words in JSON
        return None
    return float(value)


def _counting(newest_first: Sequence[CheckpointMeta], damaged: Collection[int]) -> list[CheckpointMeta]:
    """Those that are whole, and not saved once more by the same attempt at the same step."""
    seen: set[tuple[int, int]] = set()
    counting: list[CheckpointMeta] = []
    for meta in newest_first:
        state = (meta.lease_epoch, meta.step)
        if meta.number not in damaged and state not in seen:
            seen.add(state)
            counting.append(meta)
    return counting


def _every(metas: Iterable[CheckpointMeta], policy: CheckpointPolicy) -> list[CheckpointMeta]:
    steps = policy.keep_every_steps
    return [] if steps is None else [meta for meta in metas if meta.step % steps == 0]
