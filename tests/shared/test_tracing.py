"""Trace contexts: read as W3C has them, made the same everywhere."""

from __future__ import annotations

import pytest

from railbus_shared import tracing
from railbus_shared.contracts.jobs import JobSpec
from railbus_shared.tracing import TraceContext, of_attempt, of_job, parsed

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (f"00-{TRACE}-{SPAN}-01", TraceContext(TRACE, SPAN, "01")),
        (f"00-{TRACE}-{SPAN}-00", TraceContext(TRACE, SPAN, "00")),
        (f"cc-{TRACE}-{SPAN}-01-what-the-future-will-be-like", TraceContext(TRACE, SPAN, "01")),
        (f"00-{TRACE}-{SPAN}-01-more", None),
        (f"ff-{TRACE}-{SPAN}-01", None),
        (f"00-{TRACE.upper()}-{SPAN}-01", None),
        (f"00-{'0' * 32}-{SPAN}-01", None),
        (f"00-{TRACE}-{'0' * 16}-01", None),
        (f"00-{TRACE}-{SPAN}-01\n", None),
        ("", None),
        (None, None),
    ],
)
def test_a_context_is_read_as_the_standard_has_it(text: str | None, found: TraceContext | None) -> None:
    assert parsed(text) == found


def test_a_job_has_a_trace_of_its_own_or_goes_on_with_that_of_its_submitter() -> None:
    alone = parsed(of_job("j-1", incarnation="abc"))
    assert alone is not None
    assert alone == parsed(of_job("j-1", incarnation="abc"))
    assert alone.trace_id != parsed(of_job("j-2", incarnation="abc")).trace_id  # type: ignore[union-attr]
    below = parsed(of_job("j-1", incarnation="abc", submitter=f"00-{TRACE}-{SPAN}-00"))
    assert below is not None
    assert (below.trace_id, below.flags) == (TRACE, "00")
    assert below.span_id != SPAN
    attempts = {of_attempt(str(below), epoch) for epoch in (1, 2, 3)}
    assert len(attempts) == 3
    assert all(parsed(one).trace_id == TRACE for one in attempts)  # type: ignore[union-attr]
    assert (of_attempt(str(below), 0), of_attempt(None, 1)) == (str(below), None)


def test_the_trace_of_a_submission_makes_no_other_job_of_it() -> None:
    spec = JobSpec(model="m", dataset="d", entrypoint="classifier")
    assert spec.changed(trace=f"00-{TRACE}-{SPAN}-01").digest == spec.digest
    assert tracing.VARIABLE.lower() == tracing.HEADER
