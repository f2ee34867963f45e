"""Devices, the reports that hosts give of them, and the leases on them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from railbus_shared.contracts.jobs import DeviceKind
from railbus_shared.contracts.model import Contract, Count, EntrypointName, Id, Items, Time


class DeviceInfo(Contract):
    """One GPU, one MIG slice, or one CPU slot of a host, as its device_manager saw it last."""

    id: Id
    """Unique in the cluster; begins with the host's id."""
    host: Id
    kind: DeviceKind
    name: str
    """The product's name, for people."""
    uuid: str = ""
    """NVML's UUID of a GPU or MIG slice; empty for a CPU slot."""
    index: int = Field(ge=0)
    """Among the devices of its kind on the host."""
    is_mig: bool = False
    cores: Items[int] = ()
    """CPU numbers of a slot."""
    numa_node: int | None = None
    nvlink_peers: Items[str] = ()
    """UUIDs of the host's GPUs that this one reaches over NVLink."""
    shares: int = Field(default=1, ge=1, le=64)
    """Into how many parts the GPU may be shared by memory; 1 for a device that has one holder at a time."""
    memory_bytes: Count
    """Of the GPU; for a CPU slot its share of the host's memory."""
    memory_used_bytes: Count = 0
    memory_idle_bytes: Count = 0
    """Least use of a GPU's memory that its device_manager has seen: what it comes back to when nobody uses it."""
    compute_pids: Items[int] = Field(default=(), max_length=64)
    """Processes that compute on a GPU, as the driver numbers them for the device_manager; the first 64."""
    utilisation_frac: float | None = Field(default=None, ge=0, le=1)
    temperature_c: float | None = None
    healthy: bool = True
    health_reason: str = ""
    cordoned: bool = False
    """Whether it takes no new jobs, by a person's word or after a fault; `health_reason` says why."""
    labels: dict[str, str] = Field(default_factory=dict)


class HostReport(Contract):
    """What a device_manager says of its host; key `<host>` in `railbus_devices`, gone when it is not renewed."""

    v: Literal[1] = 1
    host: Id
    devices: Items[DeviceInfo]
    draining: bool = False
    """Whether the host takes no new jobs."""
    reported_at: Time


class AttemptRef(Contract):
    """One attempt that a runner has processes of."""

    job: Id
    lease_epoch: int = Field(ge=1)


class RunnerReport(Contract):
    """What a runner says of itself; key `<host>.runner` in `railbus_devices`, gone when it is not renewed.

    A job that is active on the host and not in `attempts` has no process there: the report of a runner that has swept
    what its predecessor left is what frees a device whose lease has lapsed.
    """

    v: Literal[1] = 1
    host: Id
    runner: Id
    """This start of the runner."""
    ready: bool
    """Whether the pre-warmed process is alive."""
    attempts: Items[AttemptRef] = ()
    entrypoints: Items[EntrypointName] = ()
    """Built-in names and the user functions that its settings allow."""
    reported_at: Time


class Lease(Contract):
    """The right to use a device until it expires; a key in `railbus_leases`, created once, with a TTL.

    The key is `<device>`, or `<device>.<share>` of a GPU that is shared. Who has such a GPU alone has all its shares.
    """

    v: Literal[1] = 1
    device: Id
    host: Id
    holder: Id
    """A job's id, or the name that a person gave in `railbus.req.devices.lease`."""
    lease_epoch: int = Field(default=0, ge=0)
    """Of the job; 0 for a lease that a person holds."""
    share: int = Field(default=0, ge=0, le=64)
    """Which share of the device, from 1; 0 for the whole of a device that is not shared."""
    shares: int = Field(default=1, ge=1, le=64)
    """Into how many the device was divided when the lease was granted."""
    nonce: str
    """Tells a writer whose acknowledgement was lost that the value is its own."""
    granted_at: Time

    @property
    def key(self) -> str:
        return lease_key(self.device, self.share)


def lease_key(device: str, share: int) -> str:
    """The key of a lease in its bucket; `share` is 0 for the whole of a device that is not shared."""
    return f"{device}.{share}" if share else device


class Cordon(Contract):
    """Keeps a device from being granted, also over restarts; key `<device>.cordon` in `railbus_devices`.

    A person lifts it. One that says `dirty` is lifted by the host as soon as the memory is back.
    """

    v: Literal[1] = 1
    device: Id
    cause: Literal["asked", "fault", "worn", "dirty"] = "asked"
    """`asked`: by a person. `fault`: the device broke, and what runs on it is ended. `worn`: it wants a reset, and what
    runs on it may finish. `dirty`: an attempt has ended and its memory was not given back."""
    reason: str = Field(max_length=1000)
    by: Id
    """A person, or the host whose service saw the fault."""
    cordoned_at: Time


class ReclaimMark(Contract):
    """Keeps a device from being granted while processes of a lost attempt may still use it.

    Key `<device>.reclaim` in `railbus_leases`, without a time-to-live: made before the job is queued again, deleted
    once the host's runner has reported itself without the attempt.
    """

    v: Literal[1] = 1
    device: Id
    host: Id
    job: Id
    lease_epoch: int = Field(ge=1)
    """Of the lost attempt."""
    marked_at: Time


class HeldLease(Contract):
    """A lease and the revision of its key, which renewal and release must name."""

    lease: Lease
    revision: Count
