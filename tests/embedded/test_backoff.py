"""When what has ended is started again."""

from __future__ import annotations

import pytest

from railbus.embedded.backoff import HEALTHY_S, LONGEST_S, Backoff, delay_s


@pytest.mark.parametrize(
    ("failures", "expected_s"), [(1, 0.25), (2, 0.5), (3, 1.0), (4, 2.0), (5, 4.0), (6, 8.0), (7, 10.0), (10**6, 10.0)]
)
def test_the_wait_doubles_up_to_ten_seconds(failures: int, expected_s: float) -> None:
    assert delay_s(failures) == expected_s


@pytest.mark.parametrize(
    ("lived_s", "expected_s"), [(0.0, 0.5), (HEALTHY_S - 0.1, 0.5), (HEALTHY_S, 0.25), (1e6, 0.25)]
)
def test_a_spell_of_health_is_forgiven(lived_s: float, expected_s: float) -> None:
    backoff = Backoff()
    backoff.started(100.0)
    assert backoff.ended(100.0) == 0.25
    backoff.started(200.0)
    assert backoff.ended(200.0 + lived_s) == expected_s


def test_it_is_due_after_the_wait_and_never_while_it_runs() -> None:
    backoff = Backoff()
    backoff.started(0.0)
    assert not backoff.is_due(1e9)
    backoff.ended(10.0)
    assert not backoff.is_due(10.2)
    assert backoff.is_due(10.25)
    backoff.started(10.25)
    assert not backoff.is_due(1e9)


def test_what_needs_another_setting_is_tried_rarely() -> None:
    backoff = Backoff()
    backoff.started(0.0)
    assert backoff.ended(0.1, hopeless=True) == LONGEST_S
