"""NVIDIA GPUs and MIG slices, read through NVML; the only module that imports `pynvml`.

A host without a driver has no GPUs, which is said once. A reading that a GPU does not support is left out. Any other
fault of a GPU makes that GPU unhealthy, with the driver's words as the reason, and leaves the others alone; a GPU that
has been seen once and then falls off the bus is therefore still reported, under its old id.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import pynvml

from railbus_device_manager.inventory import gpu_id
from railbus_shared.contracts.devices import DeviceInfo
from railbus_shared.errors import DeviceUnreadable

logger = logging.getLogger(__name__)

T = TypeVar("T")
Handle = Any
"""An opaque pointer of NVML."""

_LEFT_OUT: Final = (
    pynvml.NVML_ERROR_NOT_SUPPORTED,
    pynvml.NVML_ERROR_FUNCTION_NOT_FOUND,  # an older driver
    pynvml.NVML_ERROR_NO_PERMISSION,  # some readings of a MIG parent are for root
    pynvml.NVML_ERROR_NO_DATA,
)
_NO_DRIVER: Final = (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED)


@dataclass(frozen=True)
class _Shared:
    """What a GPU and its MIG slices have in common."""

    temperature_c: float | None
    health_reason: str
    """Empty if the GPU is healthy."""


class NvmlGpus:
    """The GPUs of this host; satisfies `GpuSource`."""

    def __init__(self, host: str) -> None:
        self._host = host
        self._is_open = False
        self._problem = ""
        self._seen: dict[int, list[DeviceInfo]] = {}

    def scan(self) -> list[DeviceInfo]:
        if not self._open():
            return []
        try:
            num_gpus = int(pynvml.nvmlDeviceGetCount())
        except pynvml.NVMLError as exc:
            return self._all_lost(str(exc))
        found = [device for number in range(num_gpus) for device in self._gpu(number)]
        return [device.changed(index=index) for index, device in enumerate(found)]

    def compute_pids(self, uuid: str) -> list[int]:
        if not self._open():
            return []
        try:
            handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            processes = _reading(lambda: pynvml.nvmlDeviceGetComputeRunningProcesses(handle))
        except pynvml.NVMLError as exc:
            raise DeviceUnreadable(
                f"NVML cannot say which processes use {uuid!r}: {exc}",
                hint="see `nvidia-smi -q` and the kernel's log on that host",
                details={"uuid": uuid},
            ) from exc
        return sorted({int(process.pid) for process in processes or ()})

    def close(self) -> None:
        if self._is_open:
            self._is_open = False
            with suppress(pynvml.NVMLError):  # the driver is gone already
                pynvml.nvmlShutdown()

    def _open(self) -> bool:
        """Whether NVML can be asked; tried again at every scan, because a driver may be loaded later."""
        if self._is_open:
            return True
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as exc:
            self._say(exc)
            return False
        self._is_open, self._problem = True, ""
        return True

    def _say(self, problem: pynvml.NVMLError) -> None:
        if str(problem) == self._problem:
            return
        self._problem = str(problem)
        level = logging.INFO if _code(problem) in _NO_DRIVER else logging.WARNING
        logger.log(level, "no NVIDIA GPUs on this host", extra={"problem": self._problem})

    def _all_lost(self, reason: str) -> list[DeviceInfo]:
        """The driver itself fails: what was seen is unhealthy, and the next scan begins anew."""
        logger.warning("NVML cannot count its GPUs", extra={"problem": reason})
        self.close()
        return [_unhealthy(device, reason) for devices in self._seen.values() for device in devices]

    def _gpu(self, number: int) -> list[DeviceInfo]:
        """The GPU of that number or its slices; as last seen, and unhealthy, if it cannot be read."""
        try:
            gpu = pynvml.nvmlDeviceGetHandleByIndex(number)
            shared = _shared(gpu)
            devices = [self._device(handle, is_mig=is_mig, shared=shared) for handle, is_mig in _parts(gpu)]
        except pynvml.NVMLError as exc:
            lost = [_unhealthy(device, str(exc)) for device in self._seen.get(number, [])]
            logger.warning("a GPU cannot be read", extra={"number": number, "problem": str(exc), "known": len(lost)})
            return lost
        self._seen[number] = devices
        return devices

    def _device(self, handle: Handle, *, is_mig: bool, shared: _Shared) -> DeviceInfo:
        """One GPU or slice; its place among the others is set later. Raises NVMLError if it cannot even be named."""
        uuid = str(pynvml.nvmlDeviceGetUUID(handle))
        device = DeviceInfo(
            id=gpu_id(self._host, uuid, is_mig=is_mig),
            host=self._host,
            kind="gpu",
            name=str(pynvml.nvmlDeviceGetName(handle)),
            uuid=uuid,
            index=0,
            is_mig=is_mig,
            memory_bytes=0,
            temperature_c=shared.temperature_c,
            healthy=not shared.health_reason,
            health_reason=shared.health_reason,
        )
        try:
            return _with_use(device, handle)
        except pynvml.NVMLError as exc:
            return _unhealthy(device, str(exc))


def _parts(gpu: Handle) -> Iterator[tuple[Handle, bool]]:
    """What can be leased of a GPU, and whether it is a slice: itself, or its slices if it is in MIG mode."""
    mode = _reading(lambda: pynvml.nvmlDeviceGetMigMode(gpu))
    if mode is None or mode[0] != pynvml.NVML_DEVICE_MIG_ENABLE:
        yield gpu, False
        return
    for number in range(int(pynvml.nvmlDeviceGetMaxMigDeviceCount(gpu))):
        try:
            mig_slice = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu, number)
        except pynvml.NVMLError as exc:
            if _code(exc) == pynvml.NVML_ERROR_NOT_FOUND:
                continue  # their numbers have holes
            raise
        yield mig_slice, True


def _with_use(device: DeviceInfo, handle: Handle) -> DeviceInfo:
    memory = _reading(lambda: pynvml.nvmlDeviceGetMemoryInfo(handle))
    use = _reading(lambda: pynvml.nvmlDeviceGetUtilizationRates(handle))
    return device.changed(
        memory_bytes=int(memory.total) if memory else 0,
        memory_used_bytes=int(memory.used) if memory else 0,
        utilisation_frac=min(1.0, int(use.gpu) / 100) if use else None,
    )


def _shared(gpu: Handle) -> _Shared:
    try:
        return _Shared(temperature_c=_temperature_c(gpu), health_reason=_fault(gpu))
    except pynvml.NVMLError as exc:
        return _Shared(temperature_c=None, health_reason=str(exc))


def _temperature_c(gpu: Handle) -> float | None:
    sensor = pynvml.NVML_TEMPERATURE_GPU
    celsius = _reading(lambda: float(pynvml.nvmlDeviceGetTemperatureV(gpu, sensor)))
    if celsius is not None:
        return celsius
    return _reading(lambda: float(pynvml.nvmlDeviceGetTemperature(gpu, sensor)))  # an older driver


def _fault(gpu: Handle) -> str:
    """What is wrong with the memory of a GPU, in words; empty if nothing is."""
    ecc = pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC
    errors = _reading(lambda: int(pynvml.nvmlDeviceGetTotalEccErrors(gpu, *ecc)))
    retired = _reading(lambda: int(pynvml.nvmlDeviceGetRetiredPagesPendingStatus(gpu)))
    remapped = _reading(lambda: tuple(map(int, pynvml.nvmlDeviceGetRemappedRows(gpu))))
    return memory_fault(ecc_errors=errors, retired_pending=retired, remapped=remapped)


def memory_fault(*, ecc_errors: int | None, retired_pending: int | None, remapped: tuple[int, ...] | None) -> str:
    """The health reason of three readings, each None where it is not supported.

    `remapped` is corrected rows, uncorrected rows, whether a remapping waits for a reset, whether one has failed.
    """
    if remapped is not None and remapped[3]:
        return "remapping a row of memory has failed: the GPU wants replacing"
    if ecc_errors:
        return f"{ecc_errors} uncorrected ECC errors since the last reset of the GPU"
    if retired_pending or (remapped is not None and remapped[2]):
        return "bad memory waits to be taken out at the next reset of the GPU"
    return ""


def _reading(read: Callable[[], T]) -> T | None:
    """One reading, None if this GPU or driver does not give it."""
    try:
        return read()
    except pynvml.NVMLError as exc:
        if _code(exc) in _LEFT_OUT:
            return None
        raise


def _code(problem: pynvml.NVMLError) -> int:
    """The number of an error; its class is made at run time, so its attributes have no types."""
    return int(getattr(problem, "value", pynvml.NVML_ERROR_UNKNOWN))


def _unhealthy(device: DeviceInfo, reason: str) -> DeviceInfo:
    return device.changed(healthy=False, health_reason=reason, utilisation_frac=None, temperature_c=None)
