"""Which GPUs reach each other over NVLink, and which NUMA node a PCI device sits at."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

SWITCH: Final = "switch"
"""The far end of a link that leads to an NVSwitch: by it a GPU reaches every other GPU that has such a link."""
_SYS: Final = Path("/sys")
_DOMAIN_DIGITS: Final = 4


@dataclass(frozen=True)
class Linked:
    """One GPU and the far ends of its active links."""

    uuid: str
    bus: str
    """Its own place, for instance `00000000:3B:00.0`."""
    ends: frozenset[str]
    """Places of GPUs, or SWITCH."""


def peers(gpus: Iterable[Linked]) -> dict[str, tuple[str, ...]]:
    """The UUIDs of the GPUs that each reaches directly or through a switch; a GPU without any is left out."""
    known = tuple(gpus)
    found = {one.uuid: tuple(sorted(other.uuid for other in known if _reach(one, other))) for one in known}
    return {uuid: reached for uuid, reached in found.items() if reached}


def _reach(one: Linked, other: Linked) -> bool:
    if one.uuid == other.uuid:
        return False
    by_switch = SWITCH in one.ends and SWITCH in other.ends
    return by_switch or other.bus in one.ends or one.bus in other.ends


def numa_node(bus: str, sys_root: Path = _SYS) -> int | None:
    """The node that the kernel names for a PCI device; None where it names none, as for one without NUMA.

    The driver writes the domain with eight digits and in capitals, the kernel with four and small.
    """
    domain, _, rest = bus.lower().partition(":")
    path = sys_root / "bus/pci/devices" / f"{domain[-_DOMAIN_DIGITS:]}:{rest}" / "numa_node"
    try:
        node = int(path.read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None
