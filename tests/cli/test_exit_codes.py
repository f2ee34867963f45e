"""What a script that waits for a job can tell from the exit status."""

from __future__ import annotations

import pytest

from cluster_for_tests import job
from railbus.cli import exit_codes
from railbus_shared.contracts.jobs import EndCause, JobState


@pytest.mark.parametrize(
    ("state", "cause", "code", "status"),
    [
        ("succeeded", "ok", 0, 0),
        ("succeeded", "ok", None, 0),
        ("failed", "user_error", 1, 1),
        ("failed", "user_error", 42, 42),
        ("failed", "user_error", None, 1),
        ("failed", "bad_input", 1, 1),
        ("failed", "user_error", 0, 1),
        ("failed", "signal", -11, 139),
        ("failed", "host_oom", -9, 137),
        ("failed", "hang", -9, 137),
        ("failed", "device_oom", 1, 1),
        ("failed", "time_limit", -15, 124),
        ("failed", "time_limit", 0, 124),
        ("cancelled", "cancelled", -15, 123),
        ("cancelled", "cancelled", None, 123),
        ("failed", "host_lost", None, 125),
        ("failed", "runner_lost", -9, 125),
        ("failed", "lease_lost", None, 125),
        ("failed", "start_refused", None, 125),
        ("failed", "setup_failed", 1, 125),
        ("failed", "storage_full", 1, 125),
        ("failed", "device_fault", -6, 125),
    ],
)
def test_a_job_that_was_waited_for_gives_its_own_code_and_other_trouble_another(
    state: JobState, cause: EndCause, code: int | None, status: int
) -> None:
    record = job("j-1").changed(state=state, end_cause=cause, exit_code=code)
    assert exit_codes.of_record(record) == status
