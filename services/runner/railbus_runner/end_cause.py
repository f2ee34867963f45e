"""Why an attempt ended: one word, and for people what happened and what to do about it. Pure.

The strongest evidence wins, in this order: a lost lease (nothing that the attempt says counts any more), the trainer's
own word that it succeeded, what railbus asked for (time limit, cancel, preemption, a broken GPU, a hang), what the
runner met, what the trainer says, what the kernel says, and last what lines of the output say (`log_rules`).
"""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from railbus_runner.clearing import broken_device
from railbus_runner.forked import EXIT_SETUP_FAILED
from railbus_runner.frames import Ended, Stop
from railbus_runner.log_rules import Match
from railbus_runner.stacks import cut_stacks
from railbus_shared.contracts.jobs import EndCause, ErrorBody
from railbus_shared.errors import (
    ConfigError,
    Detail,
    DeviceBroken,
    EntrypointFailed,
    LeaseLost,
    OutOfMemory,
    RailbusError,
    RejectedError,
    RunnerLost,
    TimeLimitExceeded,
    TrainerLost,
    TransientError,
    WireError,
    known_codes,
)

_OUTPUT: Final = "see the end of the attempt's output"
_LOG: Final = "see the runner's log; the job is placed again"

_MAX_LINE_CHARS: Final = 500
_MAX_STACKS_CHARS: Final = 8192

Verdict = tuple[EndCause, ErrorBody | None]


@dataclass(frozen=True)
class Limits:
    """What an attempt was held to."""

    time_s: float | None = None
    memory_bytes: int | None = None
    """Of all its processes together, where a control group holds them to it."""


NO_LIMITS: Final = Limits()


@dataclass(frozen=True)
class _MemoryKills:
    count: int
    limit_bytes: int | None


_BY_CODE: Final[Mapping[str, EndCause]] = {
    "STORAGE_FULL": "storage_full",
    "LEASE_LOST": "lease_lost",
    "STALE_LEASE_EPOCH": "lease_lost",
    "BAD_PARAMS": "bad_input",
    "BAD_SETTING": "setup_failed",
    "TRAINER_LOST": "setup_failed",
    "TIME_LIMIT_EXCEEDED": "hang",
}
_BY_CAUSE: Final[Mapping[EndCause, type[RailbusError]]] = {
    "device_oom": OutOfMemory,
    "host_oom": OutOfMemory,
    "device_fault": DeviceBroken,
    "setup_failed": TrainerLost,
    "hang": TimeLimitExceeded,
}
_BAD_INPUT: Final = (ConfigError, WireError, RejectedError)
"""What is wrong with the job or its data, not with the entrypoint's code."""
_LOST_HELPER: Final = re.compile(r"killed by signal|exited unexpectedly|SIGKILL")
"""How PyTorch says that a process of its own, such as a loader's worker, was taken from it."""
_SIGNALS: Final[Mapping[int, tuple[str, str]]] = {
    signal.SIGKILL: (
        "was killed from outside, and railbus did not do it",
        "look for the host's out-of-memory killer in its kernel log, or ask who may kill processes on it",
    ),
    signal.SIGTERM: (
        "was asked to end from outside",
        "see who stops processes on the host; railbus sends SIGTERM only to a trainer that it has asked to stop",
    ),
    signal.SIGSEGV: (
        "crashed in native code",
        "see the end of the attempt's output for a stack; suspect an extension or a build of PyTorch that does not fit",
    ),
    signal.SIGABRT: ("aborted by native code", "see the end of the attempt's output for the assertion that failed"),
    signal.SIGBUS: (
        "read memory that was no longer there: a mapped file was cut, or its disk failed",
        "see who changes shards in place (`railbus dataset verify` finds the one), or if /dev/shm is full",
    ),
    signal.SIGILL: ("met an instruction that this CPU does not have", "install a build of PyTorch for this CPU"),
    signal.SIGFPE: ("divided by zero in native code", _OUTPUT),
    signal.SIGXCPU: ("ran out of the CPU time that the host allows", "raise the host's limit on CPU time"),
}
"""What a signal means to a trainer, and what to do."""


def end_cause(
    exit_code: int | None,
    *,
    ended: Ended | None,
    stop: Stop | None,
    timed_out: bool,
    lost_lease: bool,
    oom_kills: int,
    failure: RailbusError | None = None,
    limits: Limits = NO_LIMITS,
) -> Verdict:
    """The cause, and an error unless the attempt ended as it should.

    Args:
        exit_code: as `os.waitstatus_to_exitcode` gives it; None if the trainer was never seen to end.
        ended: the trainer's last frame, if it came.
        stop: what it was asked to do, if anything.
        timed_out: whether it ran into the job's time limit.
        lost_lease: whether the attempt is no longer the job's.
        oom_kills: see `AttemptGroup.oom_kills`.
        failure: what the runner itself met while it started or served the trainer, `no_progress` among it.
        limits: what the attempt was held to, for the messages.
    """
    if lost_lease:
        return "lease_lost", _body(LeaseLost("the attempt lost its leases", hint="the job goes on elsewhere"))
    if ended is not None and ended.outcome == "succeeded":
        return "ok", None
    if timed_out:
        return "time_limit", _body(_time_limit(limits.time_s))
    if stop is not None and (asked := _as_asked(stop, ended)) is not None:
        return asked
    if failure is not None:
        return _refused(failure)
    return _unasked(exit_code, ended, memory=_MemoryKills(oom_kills, limits.memory_bytes))


def by_rule(verdict: Verdict, match: Match) -> Verdict:
    """The verdict as a line of the output corrects it; the error keeps its words, and says which line it was."""
    error, cause = verdict[1], match.rule.cause
    details: dict[str, Detail] = {**(error.details if error is not None else {}), "line": match.line[:_MAX_LINE_CHARS]}
    kind = _BY_CAUSE.get(cause)
    code = kind.code if kind is not None else error.code if error is not None else EntrypointFailed.code
    if kind is OutOfMemory:
        details["memory"] = "device" if cause == "device_oom" else "host"
    hint = match.rule.hint or (error.hint if error is not None else "")
    line, said = match.line.strip()[:_MAX_LINE_CHARS], error.message if error is not None else ""
    message = said if line in said else f"{line} ({said})" if said else line
    return cause, ErrorBody(code=code, message=message, hint=hint, details=details)


def _unasked(exit_code: int | None, ended: Ended | None, *, memory: _MemoryKills) -> Verdict:
    """The end of an attempt that railbus had no part in."""
    if ended is not None and ended.outcome == "stopped":  # nobody but a SIGTERM has asked
        return "signal", _body(_terminated())
    error = ended.error if ended is not None and ended.outcome == "failed" else None
    return _failed(error, memory=memory) if error is not None else _died(exit_code, memory=memory)


def _as_asked(stop: Stop, ended: Ended | None) -> Verdict | None:
    """The end that railbus asked for; None if the trainer failed instead of making room."""
    if stop.reason == "cancelled":
        return "cancelled", None
    if stop.reason == "device_fault":
        return "device_fault", _body(broken_device(stop.why))
    if ended is not None and ended.outcome == "failed":
        return None
    return "preempted", None  # by a job or by the runner's own end: neither is the job's fault, so neither counts


def _refused(failure: RailbusError) -> Verdict:
    """Of an attempt that the runner could not bring to training, or not go on serving."""
    body = _body(failure)
    if isinstance(failure, RunnerLost | TrainerLost):
        return "runner_lost", body
    if isinstance(failure, TransientError) and body.code not in _BY_CODE:
        return "start_refused", body
    return _cause_of(body), body


def _failed(error: ErrorBody, *, memory: _MemoryKills) -> Verdict:
    """What the trainer said of its failure; where the kernel killed a helper of it, that is the cause behind it."""
    if memory.count and _LOST_HELPER.search(error.message):
        return "host_oom", _body(_host_oom(memory, then=error.message))
    return _cause_of(error), error


def _cause_of(error: ErrorBody) -> EndCause:
    if error.code == OutOfMemory.code:
        return "host_oom" if error.details.get("memory") == "host" else "device_oom"
    if error.code in _BY_CODE:
        return _BY_CODE[error.code]
    kind = known_codes().get(error.code)
    return "bad_input" if kind is not None and issubclass(kind, _BAD_INPUT) else "user_error"


def _died(exit_code: int | None, *, memory: _MemoryKills) -> Verdict:
    """Of a trainer that ended without a word."""
    if exit_code is None:
        return "runner_lost", _body(TrainerLost("the trainer was lost with the process that forked it", hint=_LOG))
    if exit_code == EXIT_SETUP_FAILED:
        what = f"the trainer could not be set up (exit code {exit_code})"
        return "setup_failed", _body(
            TrainerLost(what, hint=f"{_OUTPUT}: a control group, a CPU or a working directory that it may not use")
        )
    number = _signal_number(exit_code)
    if memory.count and number == signal.SIGKILL:
        return "host_oom", _body(_host_oom(memory))
    if number is not None:
        return "signal", _body(_killed(number, exit_code))
    what = f"the trainer left with exit code {exit_code} without saying that it had finished"
    hint = f"{_OUTPUT}; user code must return from its entrypoint or raise, not call os._exit"
    return "user_error", _body(EntrypointFailed(what, hint=hint, details={"exit_code": exit_code}))


def _signal_number(exit_code: int) -> int | None:
    """Of the signal that an exit code tells of: negative by our own wait, over 128 by a shell's."""
    number = -exit_code if exit_code < 0 else exit_code - 128
    return number if 0 < number <= signal.SIGRTMAX else None


def _killed(number: int, exit_code: int) -> TrainerLost:
    name = signal_name(number)
    what, remedy = _SIGNALS.get(number, ("was ended by a signal", _OUTPUT))
    details: dict[str, Detail] = {"signal": name, "exit_code": exit_code}
    return TrainerLost(f"the trainer {what} ({name}, exit code {exit_code})", hint=remedy, details=details)


def _terminated() -> TrainerLost:
    what, remedy = _SIGNALS[signal.SIGTERM]
    details: dict[str, Detail] = {"signal": "SIGTERM"}
    return TrainerLost(f"the trainer {what} (SIGTERM), and ended after a checkpoint", hint=remedy, details=details)


def signal_name(number: int) -> str:
    """`SIGSEGV`; for a number without a name, such as a real-time signal, `signal 42`."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _host_oom(memory: _MemoryKills, *, then: str = "") -> OutOfMemory:
    processes = "a process" if memory.count == 1 else f"{memory.count} processes"
    who = "the host ran out of memory"
    if memory.limit_bytes is not None:
        who = f"the attempt needed more memory than the {memory.limit_bytes / (1 << 30):.3g} GiB of its devices"
    return OutOfMemory(
        f"{who} and the kernel killed {processes} of the attempt" + (f": {then}" if then else ""),
        hint="ask for a device with more memory (devices.min_memory_bytes), or use a smaller batch or fewer workers",
        details={"memory": "host", "oom_kills": memory.count, "limit_bytes": memory.limit_bytes},
    )


def no_progress(stall_s: float | None, stacks: str) -> TimeLimitExceeded:
    """What is met in a trainer that hangs; `stacks` are those of its threads."""
    limit = "its stall_s" if stall_s is None else f"its stall_s of {stall_s:g}"
    return TimeLimitExceeded(
        f"the attempt made no progress for {limit} seconds",
        hint="the stacks in the details say where its threads were; raise stall_s if that takes so long by right",
        details={"stacks": cut_stacks(stacks, limit=_MAX_STACKS_CHARS)},
    )


def _time_limit(limit_s: float | None) -> TimeLimitExceeded:
    limit = "its time limit" if limit_s is None else f"its time_limit_s of {limit_s:g}"
    return TimeLimitExceeded(
        f"the attempt ran longer than {limit}", hint="raise time_limit_s, or submit it again with resume_from"
    )


def _body(error: RailbusError) -> ErrorBody:
    return ErrorBody.parse(error.to_wire())
