"""Telling the events that a decision about a job asks for."""

from __future__ import annotations

from collections.abc import Mapping

from railbus_shared.lifecycle import Decision
from railbus_shared.telemetry import About, LearningTelemetry


def tell(telemetry: LearningTelemetry, decision: Decision, more: Mapping[str, object] | None = None) -> None:
    """Record the events, with what else is known of them; once the record is written."""
    before, after = decision.before, decision.record
    attempt = max(before.attempt, after.attempt) or None  # one that did not count is named too
    about = About(after.id, attempt, after.lease_epoch or None)
    for told in decision.told:
        telemetry.record(told.what, {**told.data, **(more or {})}, about=about, severity=told.severity)
