"""Telling the events that a decision about a job asks for."""

from __future__ import annotations

from collections.abc import Mapping

from railbus_shared.records import Applied
from railbus_shared.telemetry import About, LearningTelemetry


def tell(
    telemetry: LearningTelemetry,
    applied: Applied,
    more: Mapping[str, object] | None = None,
    *,
    step: int | None = None,
) -> None:
    """Record the events, with what else is known of them; once the record is written.

    Each carries the record's revision: the order in which all jobs changed, whatever clocks say.
    """
    before, after = applied.decision.before, applied.record
    attempt = max(before.attempt, after.attempt) or None  # one that did not count is named too
    about = About(after.id, attempt, after.lease_epoch or None, step)
    for told in applied.decision.told:
        data = {**told.data, **(more or {}), "revision": applied.revision}
        telemetry.record(told.what, data, about=about, severity=told.severity)
