"""What devices this host has: its CPU slots and its GPUs under ids that last, ready for a host report.

An id is made of the host's id and something of the device that a restart does not change: the number of a CPU slot, the
UUID of a GPU or MIG slice. The order of enumeration, which the driver may change, is in no id.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

from railbus_device_manager.faults import GpuFault
from railbus_shared.contracts.devices import DeviceInfo
from railbus_shared.names import DeviceId, HostId

MAX_ID: Final = 64
_HASH_LENGTH: Final = 8
_UUID: Final = re.compile(r"(?:GPU|MIG)-([0-9a-f]{8})-[0-9a-f-]+\Z")


class CpuSource(Protocol):
    """Where CPU slots come from."""

    def scan(self) -> list[DeviceInfo]:
        """Slots in the order of their numbers; blocking; raises BadSetting."""
        ...


class GpuSource(Protocol):
    """Where GPUs come from; all calls block, and come from one thread at a time."""

    def scan(self) -> list[DeviceInfo]:
        """GPUs and MIG slices as they are now, with the processes that compute on them.

        Empty without a driver; a broken GPU comes as unhealthy.
        """
        ...

    def faults(self) -> list[GpuFault]:
        """What has befallen GPUs since the last call, as events and at scans; the same may be told at every scan."""
        ...

    def close(self) -> None:
        """Let go of the driver."""
        ...


def device_id(host: str, suffix: str) -> DeviceId:
    """`<host>-<suffix>`, a valid id however long the host's is: one that does not fit is cut and its hash put in."""
    whole = f"{host}-{suffix}"
    if len(whole) <= MAX_ID:
        return DeviceId(whole)
    room = MAX_ID - len(suffix) - _HASH_LENGTH - 2
    return DeviceId(f"{host[:room]}-{_hash(host)}-{suffix}")


def gpu_id(host: str, uuid: str, *, is_mig: bool) -> DeviceId:
    """`<host>-gpu-<first 8 of the UUID>` or `<host>-mig-<8>`; a UUID of another form is hashed.

    Old drivers name a slice `MIG-GPU-<UUID of the GPU>/<instance>/<instance>`: its first characters do not tell slices
    of one GPU apart.
    """
    match = _UUID.match(uuid)
    token = match[1] if match else _hash(uuid)
    return device_id(host, f"{'mig' if is_mig else 'gpu'}-{token}")


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:_HASH_LENGTH]


@dataclass(frozen=True)
class Reading:
    """One look at a host's devices."""

    devices: tuple[DeviceInfo, ...]
    faults: tuple[GpuFault, ...] = ()


@dataclass(frozen=True)
class Inventory:
    """The devices of one host."""

    host: HostId
    cpus: CpuSource
    gpus: GpuSource
    labels: Mapping[str, str] = field(default_factory=dict)
    """Given to every device; they win over labels of the same name that a source gave."""
    gpu_shares: int = 1
    """Into how many a whole GPU is divided for jobs that share one; a MIG slice is a part already."""

    def read(self) -> Reading:
        """Every device as it is now, CPU slots first; reads files and the driver, so call it in a thread."""
        found = [*self.cpus.scan(), *self.gpus.scan()]
        return Reading(tuple(map(self._completed, found)), tuple(self.gpus.faults()))

    def _completed(self, device: DeviceInfo) -> DeviceInfo:
        shares = self.gpu_shares if device.kind == "gpu" and not device.is_mig else 1
        return device.changed(labels={**device.labels, **self.labels}, shares=shares)
