"""railbus: train PyTorch models from events.

`import railbus` is cheap: it loads neither torch nor nats. Names come when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Final

from railbus_shared import collecting

if TYPE_CHECKING:
    from railbus.client import Client
    from railbus.job import Job
    from railbus.leasing import DeviceLease
    from railbus.sync_client import SyncClient, SyncJob, SyncLease, connect
    from railbus_runner.context import TrainContext
    from railbus_runner.mixing import MixtureStream, open_mixture
    from railbus_runner.opening import Dataset, open_dataset
    from railbus_runner.packed import Packed
    from railbus_runner.stream import ShardStream
    from railbus_shared.contracts.jobs import JobRecord, JobSpec
    from railbus_shared.errors import RailbusError
    from railbus_shared.telemetry import LearningTelemetry

__all__ = [
    "Client",
    "Dataset",
    "DeviceLease",
    "Job",
    "JobRecord",
    "JobSpec",
    "LearningTelemetry",
    "MixtureStream",
    "Packed",
    "RailbusError",
    "ShardStream",
    "SyncClient",
    "SyncJob",
    "SyncLease",
    "TrainContext",
    "connect",
    "open_dataset",
    "open_mixture",
]

_HOMES: Final = {
    "Client": "railbus.client",
    "Dataset": "railbus_runner.opening",
    "DeviceLease": "railbus.leasing",
    "Job": "railbus.job",
    "JobRecord": "railbus_shared.contracts.jobs",
    "JobSpec": "railbus_shared.contracts.jobs",
    "LearningTelemetry": "railbus_shared.telemetry",
    "MixtureStream": "railbus_runner.mixing",
    "Packed": "railbus_runner.packed",
    "RailbusError": "railbus_shared.errors",
    "ShardStream": "railbus_runner.stream",
    "SyncClient": "railbus.sync_client",
    "SyncJob": "railbus.sync_client",
    "SyncLease": "railbus.sync_client",
    "TrainContext": "railbus_runner.context",
    "connect": "railbus.sync_client",
    "open_dataset": "railbus_runner.opening",
    "open_mixture": "railbus_runner.mixing",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'railbus' has no attribute {name!r}")
    with collecting.paused():
        return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
