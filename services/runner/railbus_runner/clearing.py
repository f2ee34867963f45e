"""GPUs after an attempt: whether they broke under it, and whether its memory is back before they are granted again.

The device_manager of this host reads the driver; the runner asks it once the processes of an attempt are gone. A GPU
that is not clear yet, or of which nothing can be learned now, gets a reclaim mark: then the placer grants it only after
the host has reported it clear. CPU slots are clear with their processes.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Final

from railbus_shared import clock
from railbus_shared.bus.bucket import Bucket
from railbus_shared.bus.connection import Bus
from railbus_shared.contracts.checks import CheckDevices, CheckedDevices
from railbus_shared.contracts.devices import AttemptRef, ReclaimMark
from railbus_shared.contracts.jobs import EndCause, ErrorBody
from railbus_shared.errors import DeviceBroken, RailbusError
from railbus_shared.leases import reclaim_key

logger = logging.getLogger(__name__)

_CHECK_S: Final = 5.0
_BLAMELESS: Final = frozenset[EndCause](
    {"user_error", "signal", "hang", "runner_lost", "start_refused", "setup_failed"}
)
"""Ends that a GPU which broke explains better than what the trainer could say of it."""


class Clearing:
    """Asks after the GPUs of this host."""

    def __init__(self, bus: Bus, leases: Bucket, *, host: str) -> None:
        self._bus = bus
        self._leases = leases
        self._host = host

    async def check(self, ref: AttemptRef, gpus: Sequence[str]) -> CheckedDevices | None:
        """What the driver says of the attempt's GPUs; None where nobody answers, or there are none."""
        if not gpus:
            return CheckedDevices(devices=())
        request = CheckDevices(job=ref.job, lease_epoch=ref.lease_epoch, devices=tuple(gpus))
        subject = self._bus.subjects.request(f"devices.{self._host}", "check")
        try:
            return CheckedDevices.parse(await self._bus.request(subject, request.to_map(), timeout_s=_CHECK_S))
        except RailbusError as exc:
            logger.warning("GPUs not checked; they are left to be reclaimed", extra={"problem": str(exc)})
            return None

    async def mark(self, ref: AttemptRef, devices: Sequence[str]) -> None:
        """Keep devices from being granted until they are shown to be clear."""
        for device in devices:
            mark = ReclaimMark(
                device=device, host=self._host, job=ref.job, lease_epoch=ref.lease_epoch, marked_at=clock.now()
            )
            await self._leases.put(reclaim_key(device), mark.to_map())


def unclear(checked: CheckedDevices | None, gpus: Sequence[str]) -> list[str]:
    """Which of the GPUs need a mark."""
    clear = {one.device for one in checked.devices if one.clear} if checked is not None else set[str]()
    return [gpu for gpu in gpus if gpu not in clear]


def blamed(
    cause: EndCause, error: ErrorBody | None, checked: CheckedDevices | None
) -> tuple[EndCause, ErrorBody | None]:
    """The verdict, or `device_fault` where a GPU broke and the trainer failed in a way that this explains."""
    broken = [one for one in checked.devices if one.fault] if checked is not None else []
    if not broken or cause not in _BLAMELESS:
        return cause, error
    said = f"; the trainer said: {error.message}" if error is not None else ""
    told = broken_device("; ".join(f"device {one.device}: {one.fault}" for one in broken) + said)
    return "device_fault", ErrorBody.parse(told.to_wire())


def broken_device(why: str) -> DeviceBroken:
    """The error of an attempt whose GPU broke."""
    return DeviceBroken(why[:2000], hint="the job goes on elsewhere; `railbus devices` shows the cordon and its reason")
