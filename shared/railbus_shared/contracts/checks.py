"""What a runner asks the device_manager of its host about GPUs, once the processes of an attempt are gone."""

from __future__ import annotations

from pydantic import Field

from railbus_shared.contracts.model import Contract, Id, Items


class CheckDevices(Contract):
    """A runner asks the device_manager of its host about the GPUs of an attempt whose processes are gone."""

    job: Id
    lease_epoch: int = Field(ge=1)
    devices: Items[Id] = Field(min_length=1, max_length=64)


class CheckedDevice(Contract):
    """What the driver says of one device."""

    device: Id
    fault: str = ""
    """What broke it; empty if nothing did."""
    clear: bool
    """Whether the attempt's memory is back and nobody computes on it, so that it may be granted again."""


class CheckedDevices(Contract):
    """Answer to CheckDevices."""

    devices: Items[CheckedDevice]
