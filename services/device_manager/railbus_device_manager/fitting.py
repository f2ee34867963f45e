"""Whether some known host could ever meet a request; one that none can is refused at once, with what could be met."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from railbus_device_manager.lacks import Lack, lacks
from railbus_device_manager.wishes import fits, kinds_of
from railbus_shared.contracts.devices import DeviceInfo, RunnerReport
from railbus_shared.contracts.jobs import DevicePreference, JobSpec
from railbus_shared.errors import NeverFits, NotSupported


def check_fits(spec: JobSpec, devices: Sequence[DeviceInfo], runners: Mapping[str, RunnerReport]) -> None:
    """Raises NeverFits, and NotSupported for what several hosts could do together but none alone.

    Without any device nothing is known, and nothing is refused.
    """
    if not devices:
        return
    found = lacks(spec.entrypoint, spec.devices, devices, runners)
    if not found:
        return
    nearest = max(found, key=lambda lack: lack.nearness)
    if not spec.devices.same_host and _together(spec.devices, devices):
        raise NotSupported(
            f"field 'devices.count' has value {spec.devices.count}: a job over several hosts is not supported yet, and "
            f"{nearest.text}",
            hint=f"ask for at most {nearest.largest}",
            details={"field": "devices.count", "value": spec.devices.count, "largest": nearest.largest},
        )
    raise NeverFits(
        f"field {f'devices.{nearest.field}'!r} has value {nearest.value!r}: {'; '.join(lack.text for lack in found)}",
        hint=f"{_remedy(nearest)}or set `wait_for_hosts` to wait for a host that has it",
        details={"field": f"devices.{nearest.field}", "value": nearest.value, "largest": nearest.largest},
    )


def _remedy(lack: Lack) -> str:
    if lack.field in {"count", "min_memory_bytes"}:
        return f"ask for at most {lack.largest}, "
    return "leave it out, "


def _together(wanted: DevicePreference, devices: Sequence[DeviceInfo]) -> bool:
    """Whether all hosts together have enough of one kind."""
    counted = Counter(device.kind for device in devices if fits(device, wanted))
    return any(counted[kind] >= wanted.count for kind in kinds_of(wanted))
