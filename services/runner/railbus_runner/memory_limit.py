"""Holding a control group to an amount of memory, so that a job which takes too much ends itself and nobody else."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from railbus_shared.contracts.devices import DeviceInfo

logger = logging.getLogger(__name__)

_LIMITS: Final = (("memory.max", "memory.swap.max"), ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes"))
"""Of version 2 and of version 1: the limit, and the one on swap, which is memory and swap together in version 1."""


def memory_of(devices: Iterable[DeviceInfo]) -> int | None:
    """What the leased CPU slots hold together; None where a GPU is leased, for no part of the host comes with it."""
    devices = tuple(devices)
    total = sum(device.memory_bytes for device in devices)
    return total if total and all(device.kind == "cpu" for device in devices) else None


def limit_memory(groups: Iterable[Path], num_bytes: int) -> bool:
    """Hold the groups to so many bytes, without swap beyond them; False where none of them can be."""
    is_held = False
    for group in groups:
        for limit, swap in _LIMITS:
            if (group / limit).exists() and _written(group / limit, num_bytes):
                is_held = True
                _written(group / swap, num_bytes if swap.startswith("memory.memsw") else 0)
    return is_held


def _written(path: Path, value: int) -> bool:
    try:
        path.write_text(str(value), encoding="ascii")
    except OSError as exc:  # not ours to write, or, for swap, not counted by this kernel
        logger.debug("memory not limited", extra={"path": str(path), "problem": str(exc)})
        return False
    return True
