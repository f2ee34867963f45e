"""What a host makes of the readings of its own devices: faults, memory that is not given back, leaked processes; pure.

A device that broke, or whose memory is not back within a while after an attempt, is cordoned. A cordon is a key that
outlives restarts and that a person lifts; the host itself lifts only the cordon of a device that is clear after all.
What runs on a device that broke is to be ended, which is asked for at every look until its leases are gone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from railbus_device_manager.inventory import Reading
from railbus_device_manager.sharing import division
from railbus_shared.contracts.devices import Cordon, DeviceInfo, Lease, ReclaimMark
from railbus_shared.contracts.events import Severity
from railbus_shared.contracts.requests import StopAttempt

CLEAR_S: Final = 30.0
"""How long the memory of an attempt may take to come back before its device is cordoned."""
SLACK_BYTES: Final = 200 << 20
"""Use above the least seen that still counts as clear: a driver's own use wanders a little."""
_STOP_GRACE_S: Final = 5.0
"""For a trainer whose GPU broke: what it could still save is what lies on the host."""
_MIB: Final = 1 << 20


@dataclass(frozen=True)
class Use:
    """Who uses this host's devices, as the buckets say."""

    leases: Mapping[str, Sequence[Lease]] = field(default_factory=dict)
    """Live ones on devices of this host, by device."""
    marks: Mapping[str, tuple[ReclaimMark, float]] = field(default_factory=dict)
    """With the time at which this process first saw it."""
    named: frozenset[str] = frozenset()
    """Devices of jobs that are placed or run."""
    cordons: Mapping[str, Cordon] = field(default_factory=dict)

    def is_used(self, device: str) -> bool:
        return device in self.marks or device in self.named or bool(self.leases.get(device))

    def job_on(self, device: str) -> str | None:
        """The one job that has it; None if a person has, or several jobs share it."""
        holders = {lease.holder for lease in self.leases.get(device, ()) if lease.lease_epoch}
        return holders.pop() if len(holders) == 1 else None


@dataclass(frozen=True)
class Told:
    """A fact for the record."""

    what: Literal["device.xid", "device.cordoned", "device.uncordoned", "device.leaked"]
    severity: Severity
    data: Mapping[str, object]
    job: str | None = None
    """The job that runs on the device, if one does alone."""


@dataclass
class Findings:
    """What one look came to."""

    devices: list[DeviceInfo] = field(default_factory=list)
    cordons: list[Cordon] = field(default_factory=list)
    """To be written."""
    lifted: list[str] = field(default_factory=list)
    """Devices whose cordon is to be removed."""
    stops: list[StopAttempt] = field(default_factory=list)
    """Attempts that are to end, for what they run on broke."""
    told: list[Told] = field(default_factory=list)


def is_clear(device: DeviceInfo) -> bool:
    """Whether nobody computes on the device and its memory is back; a CPU slot is clear with its processes."""
    if device.kind != "gpu":
        return True
    return not device.compute_pids and device.memory_used_bytes <= device.memory_idle_bytes + SLACK_BYTES


def in_use(device: DeviceInfo) -> str:
    """What keeps a device from being clear, in words."""
    used = f"{max(0, device.memory_used_bytes - device.memory_idle_bytes) // _MIB} MiB"
    if not device.compute_pids:
        return f"{used} of its memory are in use and the driver names no process"
    pids = ", ".join(map(str, device.compute_pids[:8]))
    return f"{used} of its memory are in use, and these processes compute on it: {pids}"


class DeviceWatch:
    """Remembers what the readings of one host said before."""

    def __init__(self, host: str, *, tolerates_strangers: bool = False) -> None:
        self._host = host
        self._tolerates_strangers = tolerates_strangers
        self._strangers: dict[str, frozenset[int]] = {}
        self._idle_bytes: dict[str, int] = {}
        self._known_faults: dict[str, set[str]] = {}
        self._leaks: dict[str, tuple[int, ...]] = {}
        self._dirty: set[str] = set()

    def look(self, reading: Reading, use: Use, *, now: float, at: str) -> Findings:
        """Judge one reading; `now` is of this process's clock, `at` the time for what is written."""
        found = Findings(devices=[self._completed(device, use) for device in reading.devices])
        cordoned = dict(use.cordons)
        for cordon in (*self._broken(reading, found, use, at), *self._unclear(found.devices, use, now, at)):
            if cordoned.setdefault(cordon.device, cordon) is cordon or _is_worse(cordon, cordoned[cordon.device]):
                cordoned[cordon.device] = cordon
                found.cordons.append(cordon)
                found.told.append(Told("device.cordoned", "error", _words(cordon), use.job_on(cordon.device)))
        self._lift(found, use)
        self._tell_leaks(found, use)
        self._dirty = {device for device, cordon in cordoned.items() if cordon.cause == "dirty"} - {*found.lifted}
        found.stops = list(_stops(cordoned.values(), use))
        return found

    def _completed(self, device: DeviceInfo, use: Use) -> DeviceInfo:
        """With what the reading alone does not say."""
        if device.kind != "gpu":
            return device
        used, pids = device.memory_used_bytes, self._counted(device, use)
        was_lifted = device.id in self._dirty and device.id not in use.cordons  # by a person: it is to be used as it is
        is_strangers = self._tolerates_strangers and not pids
        least = used if was_lifted or is_strangers else self._idle_bytes.get(device.id, used)
        if device.healthy:
            self._idle_bytes[device.id] = least = min(least, used)
        shares = division(use.leases.get(device.id, ()), wanted=device.shares)
        return device.changed(memory_idle_bytes=least, shares=shares, compute_pids=pids)

    def _counted(self, device: DeviceInfo, use: Use) -> tuple[int, ...]:
        """The processes that keep the device from being granted; without those that were there before, if so set."""
        if not self._tolerates_strangers:
            return device.compute_pids
        if not use.is_used(device.id):
            self._strangers[device.id] = frozenset(device.compute_pids)
        return tuple(pid for pid in device.compute_pids if pid not in self._strangers.get(device.id, ()))

    def _broken(self, reading: Reading, found: Findings, use: Use, at: str) -> Iterator[Cordon]:
        """Cordons of faults that are new, each told."""
        by_uuid = {device.uuid: device for device in reading.devices if device.uuid}
        still: dict[str, set[str]] = {}
        for fault in reading.faults:
            device = by_uuid.get(fault.uuid)
            if device is None:
                continue
            if fault.xid is not None:
                data = {"device": device.id, "xid": fault.xid, "words": fault.words}
                severity: Severity = "info" if fault.level == "note" else "warning"
                found.told.append(Told("device.xid", severity, data, use.job_on(device.id)))
            still.setdefault(device.id, set()).add(fault.words)
            if fault.level != "note" and fault.words not in self._known_faults.get(device.id, ()):
                yield self._cordon(device, fault.level, fault.words, at)
        self._known_faults = still

    def _unclear(self, devices: Iterable[DeviceInfo], use: Use, now: float, at: str) -> Iterator[Cordon]:
        """Cordons of devices whose memory should long be back."""
        for device in devices:
            mark, since = use.marks.get(device.id, (None, now))
            is_shared = bool(use.leases.get(device.id))  # with others, whose use cannot be told apart
            if mark is not None and now - since >= CLEAR_S and not is_clear(device) and not is_shared:
                words = f"{CLEAR_S:g} s after the attempt of {mark.job} was to be gone, {in_use(device)}"
                yield self._cordon(device, "dirty", words, at)

    def _cordon(self, device: DeviceInfo, cause: Literal["fault", "worn", "dirty"], words: str, at: str) -> Cordon:
        return Cordon(device=device.id, cause=cause, reason=words[:1000], by=self._host, cordoned_at=at)

    def _lift(self, found: Findings, use: Use) -> None:
        """Of dirty devices that are clear after all."""
        for device in found.devices:
            cordon = use.cordons.get(device.id)
            if cordon is not None and cordon.cause == "dirty" and device.healthy and is_clear(device):
                found.lifted.append(device.id)
                data = {"device": device.id, "by": self._host, "why": "its memory is back"}
                found.told.append(Told("device.uncordoned", "info", data))

    def _tell_leaks(self, found: Findings, use: Use) -> None:
        """Processes on devices that nobody has; each set of them once."""
        leaks = {d.id: d.compute_pids for d in found.devices if d.compute_pids and not use.is_used(d.id)}
        for device, pids in leaks.items():
            if self._leaks.get(device) != pids:
                found.told.append(Told("device.leaked", "warning", {"device": device, "pids": list(pids)}))
        self._leaks = leaks


def _is_worse(new: Cordon, old: Cordon) -> bool:
    """A fault overrides what is only a wish or a wait: what runs there is to be ended."""
    return new.cause == "fault" and old.cause != "fault"


def _words(cordon: Cordon) -> dict[str, object]:
    return {"device": cordon.device, "cause": cordon.cause, "reason": cordon.reason, "by": cordon.by}


def _stops(cordons: Iterable[Cordon], use: Use) -> Iterator[StopAttempt]:
    """Orders for the attempts that run on broken devices of this host; people's leases are theirs to end."""
    asked: set[tuple[str, int]] = set()
    for cordon in cordons:
        if cordon.cause != "fault":
            continue
        for lease in use.leases.get(cordon.device, ()):
            attempt = lease.holder, lease.lease_epoch
            if lease.lease_epoch and attempt not in asked:
                asked.add(attempt)
                why = f"device {cordon.device}: {cordon.reason}"[:1000]
                yield StopAttempt(
                    job=lease.holder,
                    lease_epoch=lease.lease_epoch,
                    grace_s=_STOP_GRACE_S,
                    reason="device_fault",
                    why=why,
                )
