"""What is known of how an attempt ended, apart from what its trainer said, and the verdict on it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from railbus_runner import log_rules
from railbus_runner.end_cause import Limits, Verdict, by_rule, end_cause
from railbus_runner.frames import Ended, Stop
from railbus_shared.contracts.jobs import JobSpec, LogRule
from railbus_shared.errors import RailbusError


@dataclass
class Evidence:
    """Of one attempt, gathered while it lives.

    Attributes:
        exit_code: as `os.waitstatus_to_exitcode` gives it; None if the trainer was never seen to end.
        stop: what the trainer was asked to do, if anything.
        memory_bytes: what its control group held it to, if it did.
        failure: what the runner itself met.
    """

    spec: JobSpec
    exit_code: int | None = None
    stop: Stop | None = None
    is_timed_out: bool = False
    is_fenced: bool = False
    oom_kills: int = 0
    memory_bytes: int | None = None
    failure: RailbusError | None = None
    stuck_pids: tuple[int, ...] = field(default=())

    async def verdict(
        self, ended: Ended | None, *, failure: RailbusError | None, output: Sequence[str], rules: Sequence[LogRule]
    ) -> Verdict:
        """The cause and the error; with what the end of the output says, where better evidence is missing.

        Args:
            ended: the trainer's last frame, if it came.
            failure: why the trainer could not be served.
            output: the last lines that the trainer printed.
            rules: of the runner's settings.
        """
        cause, error = self._verdict(ended, failure=failure)
        if cause not in log_rules.JUDGED:
            return cause, error
        own = (*self.spec.retry.log_rules, *rules)
        match = await asyncio.to_thread(log_rules.judge, output, error=error, own=own)
        return by_rule((cause, error), match) if match is not None else (cause, error)

    def _verdict(self, ended: Ended | None, *, failure: RailbusError | None) -> Verdict:
        limits = Limits(time_s=self.spec.time_limit_s, memory_bytes=self.memory_bytes)
        return end_cause(
            self.exit_code,
            ended=ended,
            stop=self.stop,
            timed_out=self.is_timed_out,
            lost_lease=self.is_fenced,
            oom_kills=self.oom_kills,
            failure=self.failure or failure,
            limits=limits,
        )
