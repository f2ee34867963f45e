"""Why attempts end: a table."""

from __future__ import annotations

import signal
from typing import Any

import pytest

from railbus_runner.end_cause import Limits, end_cause, no_progress, signal_name
from railbus_runner.forked import EXIT_SETUP_FAILED
from railbus_runner.frames import Ended, Stop
from railbus_shared.contracts.jobs import EndCause, ErrorBody
from railbus_shared.errors import (
    BusUnavailable,
    DatasetNotFound,
    RailbusError,
    RunnerLost,
    ShardCorrupt,
    StorageFull,
    TrainerLost,
)

SUCCEEDED = Ended(outcome="succeeded")
STOPPED = Ended(outcome="stopped")


def failed(code: str, message: str = "it broke", **details: str) -> Ended:
    return Ended(outcome="failed", error=ErrorBody(code=code, message=message, details=dict(details)))


@pytest.mark.parametrize(
    ("exit_code", "ended", "stop", "cause", "code"),
    [
        (0, SUCCEEDED, None, "ok", None),
        (-11, SUCCEEDED, None, "ok", None),  # it crashed while it shut down, after the last checkpoint
        (0, SUCCEEDED, "cancelled", "ok", None),  # it finished before it read the order
        (0, STOPPED, "cancelled", "cancelled", None),
        (-9, None, "cancelled", "cancelled", None),  # killed after the grace
        (1, failed("ENTRYPOINT_FAILED"), "cancelled", "cancelled", None),
        (0, STOPPED, "preempted", "preempted", None),
        (-9, None, "preempted", "preempted", None),
        (None, None, "preempted", "preempted", None),
        (1, failed("ENTRYPOINT_FAILED"), "preempted", "user_error", "ENTRYPOINT_FAILED"),
        (0, STOPPED, "shutdown", "preempted", None),
        (0, SUCCEEDED, "device_fault", "ok", None),
        (0, STOPPED, "device_fault", "device_fault", "DEVICE_BROKEN"),
        (-9, None, "device_fault", "device_fault", "DEVICE_BROKEN"),
        (1, failed("ENTRYPOINT_FAILED"), "device_fault", "device_fault", "DEVICE_BROKEN"),
        (1, failed("ENTRYPOINT_FAILED"), None, "user_error", "ENTRYPOINT_FAILED"),
        (1, failed("SOMETHING_NEWER"), None, "user_error", "SOMETHING_NEWER"),
        (1, failed("BAD_PARAMS"), None, "bad_input", "BAD_PARAMS"),
        (1, failed("SHARD_CORRUPT"), None, "bad_input", "SHARD_CORRUPT"),
        (1, failed("UNKNOWN_ENTRYPOINT"), None, "bad_input", "UNKNOWN_ENTRYPOINT"),
        (1, failed("INVALID_FIELD"), None, "bad_input", "INVALID_FIELD"),
        (1, failed("STORAGE_FULL"), None, "storage_full", "STORAGE_FULL"),
        (1, failed("BAD_SETTING"), None, "setup_failed", "BAD_SETTING"),
        (1, failed("TRAINER_LOST"), None, "setup_failed", "TRAINER_LOST"),
        (1, failed("STALE_LEASE_EPOCH"), None, "lease_lost", "STALE_LEASE_EPOCH"),
        (1, failed("OUT_OF_MEMORY", memory="device"), None, "device_oom", "OUT_OF_MEMORY"),
        (1, failed("OUT_OF_MEMORY", memory="host"), None, "host_oom", "OUT_OF_MEMORY"),
        (EXIT_SETUP_FAILED, None, None, "setup_failed", "TRAINER_LOST"),
        (None, None, None, "runner_lost", "TRAINER_LOST"),
        (0, None, None, "user_error", "ENTRYPOINT_FAILED"),
        (0, STOPPED, None, "signal", "TRAINER_LOST"),  # nobody but a SIGTERM asked it to stop
        (3, None, None, "user_error", "ENTRYPOINT_FAILED"),
        (-11, None, None, "signal", "TRAINER_LOST"),
        (139, None, None, "signal", "TRAINER_LOST"),
        (-9, None, None, "signal", "TRAINER_LOST"),
        (255, None, None, "user_error", "ENTRYPOINT_FAILED"),
    ],
)
def test_the_word_follows_from_what_is_known(
    exit_code: int | None, ended: Ended | None, stop: str | None, cause: EndCause, code: str | None
) -> None:
    order = Stop.model_validate({"reason": stop}) if stop else None
    word, error = end_cause(exit_code, ended=ended, stop=order, timed_out=False, lost_lease=False, oom_kills=0)
    assert (word, error.code if error else None) == (cause, code)


@pytest.mark.parametrize("ended", [None, STOPPED, failed("ENTRYPOINT_FAILED")])
@pytest.mark.parametrize("stop", [None, Stop(reason="cancelled"), Stop(reason="shutdown")])
def test_a_time_limit_is_the_cause_however_the_trainer_ends(ended: Ended | None, stop: Stop | None) -> None:
    cause, error = end_cause(
        -9, ended=ended, stop=stop, timed_out=True, lost_lease=False, oom_kills=0, limits=Limits(time_s=90.0)
    )
    assert cause == "time_limit"
    assert error is not None
    assert (error.code, "90" in error.message) == ("TIME_LIMIT_EXCEEDED", True)


def test_a_trainer_that_succeeded_within_its_limit_is_not_called_late() -> None:
    verdict = end_cause(0, ended=SUCCEEDED, stop=None, timed_out=True, lost_lease=False, oom_kills=0)
    assert verdict == ("ok", None)


@pytest.mark.parametrize("ended", [None, SUCCEEDED, STOPPED, failed("ENTRYPOINT_FAILED")])
@pytest.mark.parametrize("timed_out", [True, False])
def test_nothing_counts_once_the_lease_is_lost(ended: Ended | None, timed_out: bool) -> None:
    cause, error = end_cause(
        0, ended=ended, stop=Stop(reason="cancelled"), timed_out=timed_out, lost_lease=True, oom_kills=1
    )
    assert cause == "lease_lost"
    assert error is not None
    assert error.code == "LEASE_LOST"


@pytest.mark.parametrize(
    ("exit_code", "ended", "cause"),
    [
        (-9, None, "host_oom"),
        (137, None, "host_oom"),
        (1, failed("ENTRYPOINT_FAILED", "DataLoader worker (pid 7) is killed by signal: Killed."), "host_oom"),
        (1, failed("ENTRYPOINT_FAILED", "division by zero"), "user_error"),  # somebody else's kill, perhaps
        (-11, None, "signal"),
        (1, None, "user_error"),
    ],
)
def test_a_kill_for_memory_explains_only_what_looks_like_one(
    exit_code: int, ended: Ended | None, cause: EndCause
) -> None:
    word, error = end_cause(exit_code, ended=ended, stop=None, timed_out=False, lost_lease=False, oom_kills=2)
    assert word == cause
    assert error is not None
    assert (error.code == "OUT_OF_MEMORY") == (cause == "host_oom")
    if cause == "host_oom":
        assert "2 processes" in error.message
        assert error.details["oom_kills"] == 2
        assert "min_memory_bytes" in error.hint


@pytest.mark.parametrize(
    ("failure", "cause"),
    [
        (BusUnavailable("no answer"), "start_refused"),
        (TrainerLost("died"), "runner_lost"),
        (RunnerLost("stops"), "runner_lost"),
        (StorageFull("full"), "storage_full"),
        (DatasetNotFound("no such dataset"), "bad_input"),
        (ShardCorrupt(path="a", expected="b", actual="c"), "bad_input"),
    ],
)
def test_what_the_runner_met_is_the_cause_and_is_told_as_it_was(failure: RailbusError, cause: EndCause) -> None:
    word, error = end_cause(
        None, ended=None, stop=None, timed_out=False, lost_lease=False, oom_kills=0, failure=failure
    )
    assert word == cause
    assert error == ErrorBody.parse(failure.to_wire())


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (signal.SIGKILL, "out-of-memory"),
        (signal.SIGSEGV, "PyTorch"),
        (signal.SIGBUS, "/dev/shm"),
        (signal.SIGILL, "CPU"),
        (signal.SIGTERM, "who stops"),
        (signal.SIGUSR1, "output"),
        (42, "output"),
    ],
)
@pytest.mark.parametrize("by_shell", [False, True])
def test_a_signal_is_named_and_has_a_remedy(number: int, says: str, by_shell: bool) -> None:
    exit_code = 128 + number if by_shell else -number
    cause, error = end_cause(exit_code, ended=None, stop=None, timed_out=False, lost_lease=False, oom_kills=0)
    assert cause == "signal"
    assert error is not None
    assert signal_name(number) in error.message
    assert error.details == {"signal": signal_name(number), "exit_code": exit_code}
    assert says in error.hint


def test_an_attempt_that_was_held_to_the_memory_of_its_devices_is_told_how_much_that_was() -> None:
    _, error = end_cause(
        -9,
        ended=None,
        stop=None,
        timed_out=False,
        lost_lease=False,
        oom_kills=1,
        limits=Limits(memory_bytes=3 << 30),
    )
    assert error is not None
    assert "3 GiB of its devices" in error.message
    assert error.details["limit_bytes"] == 3 << 30


def test_a_hang_has_the_stacks_in_its_details_and_a_cancel_comes_before_it() -> None:
    failure = no_progress(5.0, "x" * 10_000 + " in train")
    known: dict[str, Any] = {"timed_out": False, "lost_lease": False, "oom_kills": 0, "failure": failure}
    cause, error = end_cause(-9, ended=None, stop=None, **known)
    assert cause == "hang"
    assert error is not None
    assert str(error.details["stacks"]).endswith(" in train")
    assert "5" in error.message
    assert end_cause(-9, ended=None, stop=Stop(reason="cancelled"), **known)[0] == "cancelled"
    assert end_cause(0, ended=SUCCEEDED, stop=None, **known)[0] == "ok"


def test_a_signal_without_a_name_is_called_by_its_number() -> None:
    assert (signal_name(9), signal_name(42)) == ("SIGKILL", "signal 42")
