"""What has befallen a GPU, in words, and what follows from it; pure.

The numbers are those of NVIDIA's catalogue of XID messages, with the action that it recommends: a GPU that must be
reset or replaced is a `fault`, one that wants a reset at the next opportunity is `worn`, and what an application
brought upon itself (13, 31, 43, 45 and the like) is only noted.
Source: https://docs.nvidia.com/deploy/xid-errors/analyzing-xid-catalog.html; the application's errors are those that
NVIDIA/k8s-device-plugin leaves out of account (internal/rm/health.go).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

Level = Literal["fault", "worn", "note"]


@dataclass(frozen=True)
class GpuFault:
    """Something that befell one GPU or slice."""

    uuid: str
    level: Level
    words: str
    xid: int | None = None


_XIDS: Final[Mapping[int, tuple[Level, str]]] = {
    13: ("note", "the application made an invalid access in a kernel of its own"),
    31: ("note", "the application accessed memory that it does not have"),
    43: ("note", "the application's channel was reset after an error of its own"),
    45: ("note", "the application's channel was removed, as it is when a process is killed"),
    48: ("fault", "an uncorrectable ECC error"),
    62: ("fault", "its power management has halted"),
    63: ("worn", "a bad row of memory was marked, to be taken out at the next reset"),
    64: ("fault", "a bad row of memory could not be marked"),
    74: ("fault", "an error of NVLink"),
    79: ("fault", "it has fallen off the bus"),
    92: ("worn", "many ECC errors that could be corrected"),
    94: ("fault", "an uncorrectable ECC error that was contained to one application"),
    95: ("fault", "an uncorrectable ECC error that was not contained"),
    119: ("fault", "its system processor did not answer in time"),
    120: ("fault", "an error of its system processor"),
    140: ("fault", "an unrecovered ECC error"),
}


PENDING: Final = "bad memory waits to be taken out at the next reset of the GPU"
"""What a reset mends by itself: the GPU takes no new jobs until then, and what runs on it may finish."""


def xid_fault(uuid: str, xid: int) -> GpuFault:
    """What an XID message says; one that is not in the table is noted with its number alone."""
    level, words = _XIDS.get(xid, ("note", "see NVIDIA's catalogue"))
    return GpuFault(uuid, level, f"XID {xid}: {words}", xid)


def memory_fault(*, ecc_errors: int | None, retired_pending: int | None, remapped: tuple[int, ...] | None) -> str:
    """The health reason of three readings, each None where it is not supported.

    `remapped` is corrected rows, uncorrected rows, whether a remapping waits for a reset, whether one has failed.
    """
    if remapped is not None and remapped[3]:
        return "remapping a row of memory has failed: the GPU wants replacing"
    if ecc_errors:
        return f"{ecc_errors} uncorrected ECC errors since the last reset of the GPU"
    if retired_pending or (remapped is not None and remapped[2]):
        return PENDING
    return ""
