"""railbus: train PyTorch models from events.

`import railbus` is cheap: it loads neither torch nor nats. Names come when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from railbus.client import Client
    from railbus_runner.context import TrainContext
    from railbus_shared.contracts.jobs import JobRecord, JobSpec
    from railbus_shared.errors import RailbusError
    from railbus_shared.telemetry import LearningTelemetry

__all__ = ["Client", "JobRecord", "JobSpec", "LearningTelemetry", "RailbusError", "TrainContext"]

_HOMES: Final = {
    "Client": "railbus.client",
    "JobRecord": "railbus_shared.contracts.jobs",
    "JobSpec": "railbus_shared.contracts.jobs",
    "LearningTelemetry": "railbus_shared.telemetry",
    "RailbusError": "railbus_shared.errors",
    "TrainContext": "railbus_runner.context",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'railbus' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
