"""What the known devices lack that a request asks for: the reason why it can never be met."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from railbus_device_manager.wishes import fits, kinds_of
from railbus_shared.contracts.devices import DeviceInfo, RunnerReport
from railbus_shared.contracts.jobs import DeviceKind, DevicePreference

_MIB: Final = 1 << 20
_GIB: Final = 1 << 30

_FIELDS: Final = ("kind", "labels", "sharing", "min_memory_bytes", "count")
"""From the coarsest to the finest: the further, the nearer the request came to being met."""


@dataclass(frozen=True)
class Lack:
    """What there is not."""

    field: str
    """Of the preference that cannot be met."""
    value: str | int | float
    what: str
    """For instance `a gpu with 80 GiB`."""
    largest: str | int
    """The most that could be met, as a value of the field."""
    best: str = ""
    """The same as a sentence; empty if there is nothing like it."""

    @property
    def text(self) -> str:
        return f"no host has {self.what}" + (f"; {self.best}" if self.best else "")

    @property
    def nearness(self) -> int:
        return _FIELDS.index(self.field)


def lacks(
    entrypoint: str, wanted: DevicePreference, devices: Sequence[DeviceInfo], runners: Mapping[str, RunnerReport]
) -> list[Lack]:
    """What is lacking of each kind; empty if some host could meet the request once its devices are free and in order.

    A host whose runner is not there now may get one that offers the entrypoint.
    """
    usable = [device for device in devices if not _refuses(runners.get(device.host), entrypoint)]
    found = [
        lack_of(kind, wanted, [device for device in usable if device.kind == kind]) for kind in kinds_of(wanted)
    ] or [Lack("sharing", "fraction", "a gpu, which alone can be shared", "exclusive")]
    return [] if None in found else [lack for lack in found if lack is not None]


def _refuses(runner: RunnerReport | None, entrypoint: str) -> bool:
    return runner is not None and entrypoint not in runner.entrypoints


def lack_of(kind: DeviceKind, wanted: DevicePreference, devices: Sequence[DeviceInfo]) -> Lack | None:
    """What no host has of one kind, or None if one has enough; `devices` are of that kind."""
    if not devices:
        return Lack("kind", kind, f"a {kind}", "")
    labelled = [device for device in devices if wanted.labels.items() <= device.labels.items()]
    if not labelled:
        return Lack("labels", _labels(wanted), f"a {kind} with {_labels(wanted)}", "")
    shared = [device for device in labelled if wanted.fraction is None or device.shares > 1]
    if not shared:
        how = "an operator shares them by RAILBUS_DEVICE_MANAGER_GPU_SHARES"
        return Lack("sharing", "fraction", f"a {kind} that is shared", "exclusive", how)
    fitting = Counter(device.host for device in shared if fits(device, wanted))
    if not fitting:
        largest, least = max(device.memory_bytes for device in shared), wanted.min_memory_bytes
        return Lack(
            "min_memory_bytes", least, f"a {kind} with {size(least)}", largest, f"the largest has {size(largest)}"
        )
    host, most = min(fitting.items(), key=lambda item: (-item[1], item[0]))
    if most >= wanted.count:
        return None
    return Lack("count", wanted.count, described(kind, wanted), most, f"{host} has the most: {most}")


def described(kind: DeviceKind, wanted: DevicePreference) -> str:
    """For instance `2 gpu devices of at least 40 GiB with zone=a`."""
    if wanted.fraction is not None:
        words = [f"{wanted.fraction:g} of a {kind}"]
    else:
        words = [f"{wanted.count} {kind} {'device' if wanted.count == 1 else 'devices'}"]
    if wanted.min_memory_bytes:
        words.append(f"of at least {size(wanted.min_memory_bytes)}")
    if wanted.labels:
        words.append(f"with {_labels(wanted)}")
    return " ".join(words)


def _labels(wanted: DevicePreference) -> str:
    return " and ".join(f"{name}={value}" for name, value in sorted(wanted.labels.items()))


def size(num_bytes: int) -> str:
    """Memory for people: `40 GiB`, `1.5 GiB`, `512 MiB`."""
    unit, name = (_GIB, "GiB") if num_bytes >= _GIB else (_MIB, "MiB")
    return f"{round(num_bytes / unit, 2):g} {name}"
