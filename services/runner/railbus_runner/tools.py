"""What all attempts of a runner share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from railbus_runner.cgroups import GroupTree
from railbus_runner.clearing import Clearing
from railbus_runner.measures import Measures
from railbus_runner.reaping import AttemptLedger
from railbus_runner.warm_process import WarmProcess
from railbus_runner.workdirs import Workdirs
from railbus_shared.bus.bucket import Bucket
from railbus_shared.contracts.jobs import LogRule
from railbus_shared.records import JobRecords
from railbus_shared.service import Context


@dataclass(frozen=True)
class Tools:
    """Of one runner."""

    context: Context
    measures: Measures
    records: JobRecords
    leases: Bucket
    warm: WarmProcess
    groups: GroupTree | None
    ledger: AttemptLedger
    clearing: Clearing
    workdirs: Workdirs
    entrypoint_dirs: tuple[Path, ...]
    log_rules: tuple[LogRule, ...]
    reap_s: float
    may_gain_privileges: bool = False
