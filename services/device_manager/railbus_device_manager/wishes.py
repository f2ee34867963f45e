"""What of a job decides where it may run, and when its turn is.

Jobs of one wish may run on the same devices, so what is found out about one holds for all of them. Wishes are interned:
two of them are equal only if they are the same object, which makes them quick to look up.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Final

from railbus_shared.contracts.devices import DeviceInfo
from railbus_shared.contracts.jobs import DeviceKind, DevicePreference, JobRecord, JobSpec


@dataclass(frozen=True, eq=False, slots=True, weakref_slot=True)
class Wish:
    """An entrypoint and the devices for it."""

    entrypoint: str
    devices: DevicePreference


@dataclass(frozen=True, eq=False, slots=True)
class Waiting:
    """A queued job as placement looks at it."""

    record: JobRecord
    wish: Wish
    id: str
    owner: str
    """Empty for jobs without one: together they are one owner."""
    priority: int
    age: tuple[int, str]
    """Less is older."""
    count: int
    units: float
    """What it counts for in quotas and shares: devices, or a part of one."""
    limit_s: float
    """Its time limit; infinite without one."""
    run_kind: tuple[str, str]
    """Jobs of one entrypoint and model take similar times."""
    is_held: bool
    """Whether a person holds it back, or it is about to be cancelled."""

    @property
    def rank(self) -> tuple[int, int, str]:
        """Less comes first, by priority and age alone."""
        return -self.priority, *self.age

    @classmethod
    def of(cls, record: JobRecord) -> Waiting:
        spec = record.spec
        return cls(
            record=record,
            wish=wish(spec),
            id=record.id,
            owner=spec.owner or "",
            priority=record.priority,
            age=(record.sequence, record.id),
            count=spec.devices.count,
            units=units(spec.devices),
            limit_s=math.inf if spec.time_limit_s is None else spec.time_limit_s,
            run_kind=(spec.entrypoint, spec.model),
            is_held=record.cancel_requested or record.held_by is not None,
        )


def wish(spec: JobSpec) -> Wish:
    """The wish of a job; the same object for all jobs that want the same."""
    key = _key(spec)
    found = _KNOWN.get(key)
    if found is None:
        _KNOWN[key] = found = Wish(spec.entrypoint, spec.devices)
    return found


def units(wanted: DevicePreference) -> float:
    """Devices that a job holds; for one that shares a GPU, its part of it."""
    return wanted.fraction if wanted.fraction is not None else float(wanted.count)


def fits(device: DeviceInfo, wanted: DevicePreference) -> bool:
    """Whether a device has the memory and the labels that are wanted, and can be shared if it is to be."""
    return (
        device.memory_bytes >= wanted.min_memory_bytes
        and (wanted.fraction is None or (device.kind == "gpu" and device.shares > 1))
        and _labels_fit(wanted.labels, device.labels)
    )


def kinds_of(wanted: DevicePreference) -> tuple[DeviceKind, ...]:
    """Kinds in order of preference; a CPU slot cannot be shared."""
    return wanted.kind if wanted.fraction is None else tuple(kind for kind in wanted.kind if kind == "gpu")


def _labels_fit(wanted: Mapping[str, str], given: Mapping[str, str]) -> bool:
    return not wanted or wanted.items() <= given.items()


def _key(spec: JobSpec) -> Hashable:
    wanted = spec.devices
    labels = frozenset(wanted.labels.items())
    return (
        *(spec.entrypoint, wanted.kind, wanted.count, wanted.min_memory_bytes, labels),
        *(wanted.same_host, wanted.fraction),
    )


_KNOWN: Final[weakref.WeakValueDictionary[Hashable, Wish]] = weakref.WeakValueDictionary()
