"""NVIDIA GPUs and MIG slices, read through NVML; the only module that imports `pynvml`.

A host without a driver has no GPUs, which is said once. A reading that a GPU does not support is left out. Any other
fault of a GPU makes that GPU unhealthy, with the driver's words as the reason, and leaves the others alone; a GPU that
has been seen once and then falls off the bus is therefore still reported, under its old id. What only a repair or a
reset mends is told as a fault as well, once: by XID events, which the driver keeps until they are asked for, and by
readings of the memory and of the handle itself.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import pynvml

from railbus_device_manager.faults import PENDING, GpuFault, memory_fault, xid_fault
from railbus_device_manager.inventory import gpu_id
from railbus_device_manager.links import SWITCH, Linked, numa_node, peers
from railbus_shared.contracts.devices import DeviceInfo

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
_GONE: Final = (pynvml.NVML_ERROR_GPU_IS_LOST, pynvml.NVML_ERROR_RESET_REQUIRED)
"""Only a reset or a repair brings it back."""
_NO_DRIVER: Final = (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED)
_MAX_PIDS: Final = 64
_NO_INSTANCE: Final = 0xFFFFFFFF
_EVENT_WAIT_MS: Final = 1  # the least that is surely not for ever


@dataclass(frozen=True)
class _Shared:
    """What a GPU and its MIG slices have in common."""

    temperature_c: float | None
    health_reason: str
    """Empty if the GPU is healthy."""
    is_broken: bool
    """Whether only a reset or a repair makes it healthy again."""
    numa_node: int | None


class NvmlGpus:
    """The GPUs of this host; satisfies `GpuSource`."""

    def __init__(self, host: str) -> None:
        self._host = host
        self._is_open = False
        self._problem = ""
        self._seen: dict[int, list[DeviceInfo]] = {}
        self._events = _XidEvents()
        self._linked: dict[int, Linked] = {}
        self._faults: list[GpuFault] = []

    def scan(self) -> list[DeviceInfo]:
        if not self._open():
            return []
        try:
            num_gpus = int(pynvml.nvmlDeviceGetCount())
        except pynvml.NVMLError as exc:
            return self._all_lost(str(exc))
        found = [device for number in range(num_gpus) for device in self._gpu(number)]
        reached = peers(self._linked.values())
        return [
            device.changed(index=index, nvlink_peers=reached.get(device.uuid, ())) for index, device in enumerate(found)
        ]

    def faults(self) -> list[GpuFault]:
        told, self._faults = self._faults, []
        for number, instance, xid in self._events.drain():
            told += [xid_fault(device.uuid, xid) for device in self._parts_of(number, instance)]
        return told

    def _parts_of(self, number: int, instance: int | None) -> Iterator[DeviceInfo]:
        """What of a GPU an event is about: one slice where it names one that is known, else all there is."""
        devices = self._seen.get(number, [])
        named = [device for device in devices if instance is not None and self._instance(device) == instance]
        yield from named or devices

    def _instance(self, device: DeviceInfo) -> int | None:
        if not device.is_mig:
            return None
        try:
            handle = pynvml.nvmlDeviceGetHandleByUUID(device.uuid)
            return int(pynvml.nvmlDeviceGetGpuInstanceId(handle))
        except pynvml.NVMLError:
            return None

    def close(self) -> None:
        if self._is_open:
            self._is_open = False
            self._linked = {}
            self._events.close()
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
            shared = self._shared(gpu)
            devices = [self._device(handle, is_mig=is_mig, shared=shared) for handle, is_mig in _parts(gpu)]
        except pynvml.NVMLError as exc:
            known = self._seen.get(number, [])
            lost = [_unhealthy(device, str(exc)) for device in known]
            if _code(exc) in _GONE:
                self._faults += [GpuFault(device.uuid, "fault", str(exc)) for device in known]
            logger.warning("a GPU cannot be read", extra={"number": number, "problem": str(exc), "known": len(lost)})
            return lost
        self._seen[number] = devices
        self._events.register(number, gpu)
        if number not in self._linked and len(devices) == 1 and not devices[0].is_mig:
            self._linked[number] = _linked(gpu, devices[0].uuid)
        if shared.is_broken:
            self._faults += [GpuFault(device.uuid, "fault", shared.health_reason) for device in devices]
        return devices

    def _shared(self, gpu: Handle) -> _Shared:
        """Raises NVMLError where the GPU is gone; any other trouble is its health reason."""
        try:
            bus = _bus(gpu)
            reason = _fault(gpu)
            return _Shared(_temperature_c(gpu), reason, reason not in {"", PENDING}, numa_node(bus) if bus else None)
        except pynvml.NVMLError as exc:
            if _code(exc) in _GONE:
                raise
            return _Shared(temperature_c=None, health_reason=str(exc), is_broken=False, numa_node=None)

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
            numa_node=shared.numa_node,
        )
        try:
            return _with_use(device, handle)
        except pynvml.NVMLError as exc:
            if _code(exc) in _GONE:
                self._faults.append(GpuFault(uuid, "fault", str(exc)))
            return _unhealthy(device, str(exc))


class _XidEvents:
    """The XID events of all GPUs; what has come is asked for without waiting."""

    def __init__(self) -> None:
        self._set: Any = None
        self._numbers: dict[int, int] = {}

    def register(self, number: int, gpu: Handle) -> None:
        """Hear of a GPU from now on; one that gives no events is left out."""
        if _address(gpu) in self._numbers:
            return
        self._numbers[_address(gpu)] = number
        try:
            if self._set is None:
                self._set = pynvml.nvmlEventSetCreate()
            pynvml.nvmlDeviceRegisterEvents(gpu, pynvml.nvmlEventTypeXidCriticalError, self._set)
        except pynvml.NVMLError as exc:
            logger.info("a GPU gives no XID events", extra={"number": number, "problem": str(exc)})

    def drain(self) -> Iterator[tuple[int, int | None, int]]:
        """The number of the GPU, its instance where the event names one, and the XID, of each event so far."""
        while self._set is not None:
            try:
                event = pynvml.nvmlEventSetWait_v2(self._set, _EVENT_WAIT_MS)
            except pynvml.NVMLError as exc:
                if _code(exc) != pynvml.NVML_ERROR_TIMEOUT:  # of a GPU that is gone: the set is made anew
                    logger.warning("XID events cannot be read", extra={"problem": str(exc)})
                    self.close()
                return
            if event.eventType == pynvml.nvmlEventTypeXidCriticalError and _address(event.device) in self._numbers:
                instance = None if event.gpuInstanceId == _NO_INSTANCE else int(event.gpuInstanceId)
                yield self._numbers[_address(event.device)], instance, int(event.eventData)

    def close(self) -> None:
        if self._set is not None:
            with suppress(pynvml.NVMLError):  # the driver is gone already
                pynvml.nvmlEventSetFree(self._set)
        self._set, self._numbers = None, {}


def _linked(gpu: Handle, uuid: str) -> Linked:
    """Where a GPU sits and what its NVLinks lead to; nothing where it has none."""
    bus = _bus(gpu)
    ends: set[str] = set()
    for link in range(pynvml.NVML_NVLINK_MAX_LINKS):
        try:
            if not pynvml.nvmlDeviceGetNvLinkState(gpu, link):
                continue
            ends.add(_end_of(gpu, link))
        except pynvml.NVMLError:  # no more links, or none at all
            break
    return Linked(uuid, bus, frozenset(ends))


def _bus(gpu: Handle) -> str:
    """The GPU's place, for instance `00000000:3B:00.0`; empty where it is not told."""
    return _reading(lambda: _text(pynvml.nvmlDeviceGetPciInfo(gpu).busId)) or ""


def _end_of(gpu: Handle, link: int) -> str:
    kind = _reading(lambda: int(pynvml.nvmlDeviceGetNvLinkRemoteDeviceType(gpu, link)))
    if kind == pynvml.NVML_NVLINK_DEVICE_TYPE_SWITCH:
        return SWITCH
    return _text(pynvml.nvmlDeviceGetNvLinkRemotePciInfo(gpu, link).busId)


def _address(handle: Handle) -> int:
    return ctypes.cast(handle, ctypes.c_void_p).value or 0


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


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
    memory = _memory(handle)
    use = _reading(lambda: pynvml.nvmlDeviceGetUtilizationRates(handle))
    processes = _reading(lambda: pynvml.nvmlDeviceGetComputeRunningProcesses(handle)) or ()
    return device.changed(
        memory_bytes=int(memory.total) if memory else 0,
        memory_used_bytes=int(memory.used) if memory else 0,
        compute_pids=tuple(sorted({int(process.pid) for process in processes}))[:_MAX_PIDS],
        utilisation_frac=min(1.0, int(use.gpu) / 100) if use else None,
    )


def _memory(handle: Handle) -> Any:
    """Total and used bytes; what the driver keeps for itself is left out of `used` where it tells the two apart."""
    with suppress(pynvml.NVMLError):  # an older driver, or one that knows another version of the structure
        return pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2)
    return _reading(lambda: pynvml.nvmlDeviceGetMemoryInfo(handle))


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
    """As last seen, without what would say that it is in use."""
    return device.changed(
        healthy=False,
        health_reason=reason,
        utilisation_frac=None,
        temperature_c=None,
        memory_used_bytes=0,
        compute_pids=(),
    )
