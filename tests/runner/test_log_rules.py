"""What lines of output tell about a failure: the rules as a table, and patterns that take for ever."""

from __future__ import annotations

import time

import pytest

from railbus_runner import log_rules
from railbus_runner.end_cause import by_rule
from railbus_runner.log_rules import DEFAULT_RULES, Match, judge, search
from railbus_runner.settings import Settings
from railbus_shared.contracts.jobs import EndCause, ErrorBody, LogRule
from railbus_shared.errors import BadSetting, InvalidField
from railbus_shared.settings import load
from until import PATIENCE_S


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.", "device_oom"),
        ("terminate called after throwing 'thrust::system_error': CUDA error: out of memory", "device_oom"),
        ("RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", "device_oom"),
        ("torch.AcceleratorError: CUDA error: uncorrectable ECC error encountered", "device_fault"),
        ("CUDA error: uncorrectable NVLink error detected during the execution", "device_fault"),
        ("RuntimeError: CUDA error: hardware stack error", "device_fault"),
        ("NVRM: Xid (PCI:0000:65:00): 79, pid=1234, GPU has fallen off the bus.", "device_fault"),
        ("Unable to determine the device handle for GPU0000:65:00.0: GPU is lost.", "device_fault"),
        (
            "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7) ran for 600001 ms",
            "hang",
        ),
        ("torch.distributed.DistBackendError: NCCL error: ncclRemoteError: A call failed possibly", "signal"),
        ("ncclRemoteError: remote process exited or there was a network error", "signal"),
        ("RuntimeError: CUDA error: device-side assert triggered", None),
        ("RuntimeError: CUDA error: an illegal memory access was encountered", None),
        ("ValueError: expected 3 channels, got 4", None),
        ("NCCL version 2.27.3+cuda12.9", None),
        ("step 48 of 79: Xid is a column of ours", None),
        ("", None),
    ],
)
def test_the_default_rules_know_what_breaks_on_gpus(line: str, cause: EndCause | None) -> None:
    match = judge(["before", line, "after"], error=None, own=())
    assert (match.rule.cause if match is not None else None) == cause


def test_ones_own_rules_come_first_and_the_last_line_that_matches_is_shown() -> None:
    own = (LogRule(pattern="out of memory", cause="bad_input", hint="ours"), LogRule(pattern="2", cause="signal"))
    match = judge(["CUDA out of memory 1", "CUDA out of memory 2"], error=None, own=own)
    assert match == Match(own[0], "CUDA out of memory 2")


def test_what_was_printed_and_did_not_end_the_trainer_is_no_evidence() -> None:
    """An error that the trainer told is judged by its own words, unless another process failed below it."""
    output = ["CUDA out of memory, trying again with half the batch"]
    own_error = ErrorBody(code="X", message="KeyError: 'x'", details={"traceback": "Traceback\nKeyError: 'x'"})
    assert judge(output, error=own_error, own=()) is None
    of_below = ErrorBody(
        code="X", message="m", details={"traceback": "CalledProcessError: returned non-zero exit status 1"}
    )
    found = judge(output, error=of_below, own=())
    assert found is not None
    assert found.rule.cause == "device_oom"


def test_an_error_that_the_runner_made_of_an_exit_code_leaves_the_output_as_evidence() -> None:
    error = ErrorBody(code="TRAINER_LOST", message="the trainer aborted by native code (SIGABRT, exit code -6)")
    found = judge(["CUDA error: uncorrectable ECC error encountered"], error=error, own=())
    assert found is not None
    assert found.rule.cause == "device_fault"


def test_a_pattern_that_takes_for_ever_is_given_up_and_the_defaults_still_judge() -> None:
    evil = LogRule(pattern="(a+)+$", cause="user_error")
    began_s = time.monotonic()
    assert search(["a" * 60 + "!"], rules=[evil], timeout_s=0.5) is None
    assert time.monotonic() - began_s < PATIENCE_S


def test_only_the_end_of_the_output_is_looked_at_and_lines_are_cut() -> None:
    rule = LogRule(pattern="needle", cause="signal")
    early = ["needle", *["hay"] * log_rules.MAX_LINES]
    assert judge(early, error=None, own=(rule,)) is None
    assert judge(["h" * log_rules.MAX_LINE_CHARS + "needle"], error=None, own=(rule,)) is None
    assert judge(["hay", "a needle"], error=None, own=(rule,)) == Match(rule, "a needle")
    assert judge([], error=None, own=(rule,)) is None


@pytest.mark.parametrize("cause", ["ok", "cancelled", "preempted", "lease_lost", "host_lost", "time_limit"])
def test_a_rule_cannot_claim_what_railbus_alone_can_know(cause: str) -> None:
    with pytest.raises(InvalidField, match="cause"):
        LogRule.parse({"pattern": "x", "cause": cause})


def test_every_default_rule_says_what_to_do() -> None:
    assert [rule.pattern for rule in DEFAULT_RULES if not rule.hint] == []
    assert {"user_error", "signal"} == log_rules.JUDGED


def test_the_verdict_keeps_the_error_and_shows_the_line() -> None:
    error = ErrorBody(code="TRAINER_LOST", message="the trainer aborted", hint="h", details={"exit_code": -6})
    cause, told = by_rule(
        ("signal", error), Match(LogRule(pattern="x", cause="device_oom", hint="ask for more"), " x1 ")
    )
    assert (cause, told) == (
        "device_oom",
        ErrorBody(
            code="OUT_OF_MEMORY",
            message="x1 (the trainer aborted)",
            hint="ask for more",
            details={"exit_code": -6, "line": " x1 ", "memory": "device"},
        ),
    )
    plain = by_rule(("user_error", error), Match(LogRule(pattern="x", cause="bad_input"), "the trainer aborted"))[1]
    assert plain is not None
    assert (plain.code, plain.message, plain.hint) == ("TRAINER_LOST", "the trainer aborted", "h")


def test_rules_of_an_operator_come_as_json_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAILBUS_RUNNER_LOG_RULES", '[{"pattern": "boom", "cause": "signal", "hint": "wait"}]')
    assert load(Settings).log_rules == (LogRule(pattern="boom", cause="signal", hint="wait"),)
    monkeypatch.setenv("RAILBUS_RUNNER_LOG_RULES", '[{"pattern": "bo(om", "cause": "signal"}]')
    with pytest.raises(BadSetting, match="regular expression"):
        load(Settings)
