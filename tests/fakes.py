"""Stand-ins for our own protocols."""

from __future__ import annotations

from dataclasses import dataclass, field

from railbus_device_manager.inventory import gpu_id
from railbus_shared.contracts.devices import DeviceInfo


@dataclass
class FakeGpus:
    """A `GpuSource` whose GPUs a test sets; every call answers from what is set at that moment."""

    host: str
    memory_bytes: dict[str, int] = field(default_factory=dict)
    """By UUID; a UUID that begins with `MIG-` is a slice."""
    lost: set[str] = field(default_factory=set)
    pids: dict[str, list[int]] = field(default_factory=dict)
    is_closed: bool = False

    def scan(self) -> list[DeviceInfo]:
        return [
            DeviceInfo(
                id=gpu_id(self.host, uuid, is_mig=uuid.startswith("MIG-")),
                host=self.host,
                kind="gpu",
                name="Fake GPU",
                uuid=uuid,
                index=index,
                is_mig=uuid.startswith("MIG-"),
                memory_bytes=memory_bytes,
                healthy=uuid not in self.lost,
                health_reason="GPU is lost" if uuid in self.lost else "",
            )
            for index, (uuid, memory_bytes) in enumerate(self.memory_bytes.items())
        ]

    def compute_pids(self, uuid: str) -> list[int]:
        assert uuid not in self.lost, "a lost GPU cannot say which processes use it"
        return self.pids.get(uuid, [])

    def close(self) -> None:
        self.is_closed = True
