"""Which devices of a host belong together: NVLink first, then one NUMA node."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Final

from railbus_device_manager.cluster import Slot

_BEHIND_LINKED: Final = 1_000
_LAST: Final = 1_000_000


def together(slots: Sequence[Slot], count: int) -> tuple[Slot, ...]:
    """`count` of the slots: connected by NVLink if that can be, else of one NUMA node, else whatever comes first.

    Of several such sets the smallest is taken from, so that larger ones stay whole; `slots` are in the order in which
    they are taken.
    """
    if len(slots) == count:
        return tuple(slots)
    if count == 1 and not slots[0].state.device.nvlink_peers:
        return (slots[0],)
    groups = [*_linked(slots), *_of_one_node(slots), (_LAST, list(slots))]
    sets = [
        (rank, sum(slot.memory_bytes for slot in group[:count]), group) for rank, group in groups if len(group) >= count
    ]
    return tuple(min(sets, key=lambda one: (one[1] if count == 1 else 0, one[0], one[1], one[2][0].order))[2][:count])


def _linked(slots: Sequence[Slot]) -> Iterable[tuple[int, list[Slot]]]:
    """Sets of slots that NVLink connects, with their sizes."""
    by_uuid = {slot.state.device.uuid: slot for slot in slots if slot.state.device.nvlink_peers}
    seen: set[str] = set()
    for uuid in by_uuid:
        if uuid not in seen:
            component = _reachable(uuid, by_uuid)
            seen |= component
            yield len(component), [slot for slot in slots if slot.state.device.uuid in component]


def _reachable(uuid: str, by_uuid: dict[str, Slot]) -> set[str]:
    found, waiting = {uuid}, [uuid]
    while waiting:
        peers = by_uuid[waiting.pop()].state.device.nvlink_peers
        new = [peer for peer in peers if peer in by_uuid and peer not in found]
        found.update(new)
        waiting += new
    return found


def _of_one_node(slots: Sequence[Slot]) -> Iterable[tuple[int, list[Slot]]]:
    """Slots by NUMA node, ranked behind every set that NVLink connects."""
    nodes: dict[int, list[Slot]] = defaultdict(list)
    for slot in slots:
        if slot.state.device.numa_node is not None:
            nodes[slot.state.device.numa_node].append(slot)
    return [(_BEHIND_LINKED + len(group), group) for group in nodes.values()]


def on_fewest_hosts(slots: Sequence[Slot], count: int) -> tuple[Slot, ...]:
    """`count` slots of several hosts, on as few of them as can be; empty if there are not so many."""
    by_host: dict[str, list[Slot]] = defaultdict(list)
    for slot in slots:
        by_host[slot.host].append(slot)
    found: list[Slot] = []
    while by_host and len(found) < count:
        missing = count - len(found)
        enough = [host for host, group in by_host.items() if len(group) >= missing]
        host = min(enough or by_host, key=lambda one: (len(by_host[one]) if enough else -len(by_host[one]), one))
        group = by_host.pop(host)
        found += together(group, min(missing, len(group)))
    return tuple(found) if len(found) == count else ()
