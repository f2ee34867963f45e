"""What devices this host has: its CPU slots and its GPUs under ids that last, ready for a host report.

An id is made of the host's id and something of the device that a restart does not change: the number of a CPU slot, the
UUID of a GPU or MIG slice. The order of enumeration, which the driver may change, is in no id.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

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
        """GPUs and MIG slices as they are now; empty without a driver; a broken GPU comes as unhealthy."""
        ...

    def compute_pids(self, uuid: str) -> list[int]:
        """Processes that compute on a GPU or slice, as this process numbers them; raises DeviceUnreadable."""
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
class Inventory:
    """The devices of one host."""

    host: HostId
    cpus: CpuSource
    gpus: GpuSource
    labels: Mapping[str, str] = field(default_factory=dict)
    """Given to every device; they win over labels of the same name that a source gave."""

    def scan(self) -> tuple[DeviceInfo, ...]:
        """Every device as it is now, CPU slots first; reads files and the driver, so call it in a thread."""
        found = [*self.cpus.scan(), *self.gpus.scan()]
        return tuple(device.changed(labels={**device.labels, **self.labels}) for device in found)

    def foreign_pids(self, is_own: Callable[[int], bool]) -> dict[DeviceId, tuple[int, ...]]:
        """Processes that compute on healthy GPUs of this host and are not ours; GPUs without any are left out.

        Blocking. Raises DeviceUnreadable if the driver cannot say.
        """
        foreign: dict[DeviceId, tuple[int, ...]] = {}
        for gpu in self.gpus.scan():
            pids = tuple(pid for pid in self.gpus.compute_pids(gpu.uuid) if not is_own(pid)) if gpu.healthy else ()
            if pids:
                foreign[DeviceId(gpu.id)] = pids
        return foreign
