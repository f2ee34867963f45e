"""What lines of a failed attempt's output tell about why it failed; the rules are data, the judging is pure.

Rules are looked at in this order: the job's own (`retry.log_rules`), those of the runner's settings, those below. The
first rule that matches any line decides; of several lines, the last one that it matches is shown. Only an attempt whose
cause would be `user_error` or `signal` is judged by them: all other causes rest on better evidence.

A pattern that somebody wrote may take for ever on some line, so those of jobs and settings are searched for by a
process of its own, with a limit on its time (`search`).
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from railbus_shared.contracts.jobs import EndCause, ErrorBody, LogRule

JUDGED: Final = frozenset[EndCause]({"user_error", "signal"})
MAX_LINES: Final = 400
MAX_LINE_CHARS: Final = 2000
_SEARCH_S: Final = 5.0
_OF_A_PROCESS: Final = re.compile(
    r"CalledProcessError|ChildFailedError|ProcessExitedException|ProcessRaisedException|"
    r"exit (status|code)|exitcode|died with|killed by signal|exited unexpectedly"
)
"""How an error says that another process failed, whose own words stand in the output."""
_SEARCHER: Final = Path(__file__).with_name("rule_search.py")

_ASK_FOR_MORE: Final = "use a smaller batch or model, or ask for a device with more memory (devices.min_memory_bytes)"
_BROKEN: Final = "the GPU is at fault, not the job; look for XID lines in the host's kernel log"

DEFAULT_RULES: Final = (
    LogRule(
        pattern=r"(?i)CUDA out of memory|CUDA error: out of memory|cudaErrorMemoryAllocation|"
        r"CUBLAS_STATUS_ALLOC_FAILED|HIP out of memory|hipErrorOutOfMemory",
        cause="device_oom",
        hint=_ASK_FOR_MORE,
    ),
    LogRule(
        pattern=r"(?i)uncorrectable (NVLink|ECC)|CUDA error: uncorrectable|cudaErrorECCUncorrectable|"
        r"double.bit ECC error",
        cause="device_fault",
        hint=_BROKEN,
    ),
    LogRule(
        pattern=r"\bXid\b.{0,40}\b(48|63|64|74|79|92|94|95|119|120)\b|(?i:GPU has fallen off the bus|GPU is lost|"
        r"CUDA error: hardware stack error|NVLink (fatal )?error|unable to determine the device handle)|"
        r"cudaErrorHardwareStackError|cudaErrorNvlinkUncorrectable|cudaErrorContained",
        cause="device_fault",
        hint=_BROKEN,
    ),
    LogRule(
        pattern=r"Watchdog caught collective operation timeout|NCCL.{0,200}(?i:timed? ?out)|"
        r"DistBackendError.{0,200}(?i:timed? ?out)",
        cause="hang",
        hint="a rank did not take part in a collective: look for one that failed or is slow, and at its own output",
    ),
    LogRule(
        pattern=r"ncclRemoteError|ncclSystemError|remote process exited or there was a network error|"
        r"NCCL WARN.{0,200}(?i:connection (refused|closed|reset)|broken pipe)",
        cause="signal",
        hint="another rank was lost, or the network between ranks: see which one ended first",
    ),
)
"""Of the runner; a GPU that is out of memory, broken, or waits for a rank that is gone."""


@dataclass(frozen=True)
class Match:
    """A rule and the last line that it matches."""

    rule: LogRule
    line: str


def judge(output: Sequence[str], *, error: ErrorBody | None, own: Sequence[LogRule]) -> Match | None:
    """What the end of the output, and the error that the trainer told, say: by one's own rules, then by the defaults.

    The defaults look at the output only where the error is none or that of a process below: what was printed and did
    not end the trainer is no evidence. Blocks for up to 5 s where there are rules of one's own: call it in a thread.
    """
    told = _lines_of(error) if error is not None else []
    recent = [line[:MAX_LINE_CHARS] for line in [*output[-MAX_LINES:], *told]]
    if own and recent and (found := search(recent, rules=own)) is not None:
        return found
    is_enough = bool(told) and not any(_OF_A_PROCESS.search(line) for line in told)
    return search_here([line[:MAX_LINE_CHARS] for line in told] if is_enough else recent, rules=DEFAULT_RULES)


def _lines_of(error: ErrorBody) -> list[str]:
    """Of what the trainer said; an error that the runner made of an exit code is no line of the trainer's."""
    traceback = str(error.details.get("traceback", ""))
    return [*traceback.splitlines(), *error.message.splitlines()][-MAX_LINES:] if traceback else []


def search(lines: Sequence[str], *, rules: Sequence[LogRule], timeout_s: float = _SEARCH_S) -> Match | None:
    """The first rule that matches, looked for by another process; a rule that takes too long matches nothing.

    So do those after it.
    """
    asked = json.dumps({"patterns": [rule.pattern for rule in rules], "lines": list(lines)})
    command = [sys.executable, "-I", "-S", str(_SEARCHER)]
    try:
        done = subprocess.run(command, input=asked, capture_output=True, text=True, timeout=timeout_s, check=False)
        found = json.loads(done.stdout)
    except (subprocess.TimeoutExpired, ValueError, OSError):
        return None
    if not found:
        return None
    rule, place = map(int, found)
    return Match(rules[rule], lines[place])


def search_here(lines: Sequence[str], *, rules: Sequence[LogRule]) -> Match | None:
    """The first of some harmless rules that matches."""
    for rule in rules:
        pattern = re.compile(rule.pattern)
        for line in reversed(lines):
            if pattern.search(line):
                return Match(rule, line)
    return None
