"""A thousand histories of a cluster on which everything goes wrong; and proof that the checks would see it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import pytest

from railbus_device_manager.manager import DeviceManager
from railbus_device_manager.reports import Reports
from railbus_device_manager.untold import UntoldEnds
from railbus_shared import conclusion, lifecycle
from railbus_shared.bus.bucket import Write
from simulated_bus import Simulation
from simulated_cluster import Clock, run_seed, simulated

SEEDS, CHUNK = 1000, 40
LEAST_MESSAGES = 50
MUTANTS = 400
"""Seeds in which a broken rule must show; most show within ten."""


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    with simulated(monkeypatch) as clock:
        yield clock


@contextmanager
def _untraced() -> Iterator[None]:
    """Without coverage's tracer, under which a history takes more than twice as long; the tests below are traced."""
    tracer = sys.gettrace()
    sys.settrace(None)
    try:
        yield
    finally:
        sys.settrace(tracer)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_no_promise_is_broken_whatever_goes_wrong(told: Clock, first: int) -> None:
    with _untraced():
        for seed in range(first, first + CHUNK):
            cluster = run_seed(told, seed)
            assert cluster.recorder.broken == [], f"seed {seed}"
            assert cluster.sim.messages >= LEAST_MESSAGES, f"seed {seed}"


def test_a_seed_is_a_history(told: Clock) -> None:
    first, again = run_seed(told, 7), run_seed(told, 7)
    assert first.sim.messages == again.sim.messages > LEAST_MESSAGES
    assert first.recorder.events == again.recorder.events
    assert first.recorder.events != run_seed(told, 8).recorder.events


def test_everything_that_can_go_wrong_does(told: Clock) -> None:
    """The histories are of use only if they hold ends of all kinds."""
    events = [event for seed in range(60) for event in run_seed(told, seed).recorder.events]
    causes = {event["data"]["cause"] for event in events if event["type"] == "job.requeued"}  # type: ignore[index]
    assert {"signal", "runner_lost", "start_refused", "preempted", "device_fault"} <= causes
    assert {"job.succeeded", "job.failed", "job.cancelled", "job.held"} <= {event["type"] for event in events}


# --- broken on purpose -----------------------------------------------------------------------------------------------

Break = Callable[[pytest.MonkeyPatch], None]


def _accept_any_epoch(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(lifecycle, "check_names", lambda _record, **_names: None)


def _believe_processes_gone(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(DeviceManager, "_are_gone", lambda *_: True)


def _forget_reclaim_marks(patch: pytest.MonkeyPatch) -> None:
    async def forget(*_: object) -> None:
        return

    patch.setattr(Reports, "mark", forget)


def _forget_cancellations(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(conclusion, "said", lambda _record, cause: cause)


def _never_look_for_lost_attempts(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(DeviceManager, "lost", lambda *_, **__: [])


def _never_look_for_untold_ends(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(UntoldEnds, "take_due", lambda *_: {})


def _write_without_comparing(patch: pytest.MonkeyPatch) -> None:
    write = Simulation.write

    def overwrite(sim: Simulation, bucket: str, changes: Sequence[Write]) -> int:
        return write(sim, bucket, [replace(change, revision=-1) for change in changes])

    patch.setattr(Simulation, "write", overwrite)


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("breaks", "said"),
    [
        (_accept_any_epoch, ("of another attempt", "is no step", "after that attempt's end", "of lease epoch")),
        (_believe_processes_gone, ("has processes of",)),
        (_forget_reclaim_marks, ("has processes of",)),
        (_write_without_comparing, ("has processes of", "is no step", "goes back", "after", "of lease epoch")),
        (_forget_cancellations, ("was promised to be cancelled",)),
        (_never_look_for_lost_attempts, ("for ever",)),
        (_never_look_for_untold_ends, ("is told to nobody",)),
    ],
)
def test_a_broken_rule_is_seen(
    told: Clock, monkeypatch: pytest.MonkeyPatch, breaks: Break, said: tuple[str, ...]
) -> None:
    breaks(monkeypatch)
    for seed in range(MUTANTS):
        broken = run_seed(told, seed).recorder.broken
        if broken:
            assert any(word in line for word in said for line in broken), broken
            return
    pytest.fail(f"{breaks.__name__} was not seen in {MUTANTS} histories")
