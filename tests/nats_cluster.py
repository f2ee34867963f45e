"""A cluster of three real nats-servers on loopback: nodes can be killed, paused, emptied and started again."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import nats.errors
from nats.js.api import ClusterInfo

from railbus_shared.bus.connection import Bus
from railbus_shared.errors import TransientError
from railbus_shared.settings import CommonSettings
from railbus_shared.topology import Consumer
from servers import kept_port, pause, server_binary
from until import PATIENCE_S, until

NUM_NODES: Final = 3


@dataclass
class Node:
    """One server of a cluster, with a store of its own."""

    name: str
    folder: Path
    port: int
    route_port: int
    route_ports: tuple[int, ...]
    process: subprocess.Popen[bytes] | None = field(default=None)

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Returns at once: a node is of use only together with others."""
        self.folder.mkdir(exist_ok=True)
        config = self.folder / "nats.conf"
        config.write_text(json.dumps(self._config()))
        with (self.folder / "nats.log").open("ab") as log:
            self.process = subprocess.Popen([server_binary(), "-c", str(config)], stdout=log, stderr=log)

    @property
    def is_alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def kill(self, number: int = signal.SIGKILL) -> None:
        assert self.process is not None
        self.process.send_signal(number)
        self.process.wait(PATIENCE_S)

    def pause(self) -> None:
        assert self.process is not None
        pause(self.process)

    def resume(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def empty(self) -> None:
        """Lose its store; it must have been killed."""
        shutil.rmtree(self.folder / "store")

    def _config(self) -> dict[str, object]:
        others = [f"nats-route://127.0.0.1:{port}" for port in self.route_ports if port != self.route_port]
        return {
            "server_name": self.name,
            "listen": f"127.0.0.1:{self.port}",
            "ping_interval": "2s",  # a paused node is found out after three times as long
            "jetstream": {"store_dir": str(self.folder / "store"), "sync_interval": "always"},
            "cluster": {"name": "railbus", "listen": f"127.0.0.1:{self.route_port}", "routes": others},
        }


@dataclass
class Cluster:
    """Three nodes, of which any two are enough."""

    nodes: list[Node]

    @property
    def url(self) -> str:
        return ",".join(node.url for node in self.nodes)

    async def leader(self, stream: str) -> Node:
        """The node that leads a stream, once one does."""
        return await self._leading(stream)

    async def consumer_leader(self, consumer: Consumer) -> Node:
        """The node that leads a durable consumer, once one does."""
        return await self._leading(consumer.stream, consumer.name)

    async def is_whole(self, stream: str) -> bool:
        """Whether a stream has a leader and every other node is up to date."""
        info = await self._info(stream)
        if info is None or info.leader is None:
            return False
        return len(info.replicas or ()) == 2 and all(one.current for one in info.replicas or ())

    async def _leading(self, stream: str, consumer: str = "") -> Node:
        found: list[Node] = []

        async def is_found() -> bool:
            info = await self._info(stream, consumer)
            found.extend(node for node in self.nodes if info is not None and node.name == info.leader)
            return bool(found)

        await until(is_found)
        return found[0]

    async def _info(self, stream: str, consumer: str = "") -> ClusterInfo | None:
        """Of a stream or of its consumer; None while nobody tells."""
        try:
            async with Bus.open(CommonSettings(nats_url=self.url), name="look") as bus:
                asked = bus.client.jetstream()
                if consumer:
                    told: ClusterInfo | None = (await asked.consumer_info(stream, consumer)).cluster
                else:
                    told = (await asked.stream_info(stream)).cluster
                return told
        except (TransientError, nats.errors.Error, TimeoutError):
            return None

    def others(self, node: Node) -> list[Node]:
        return [other for other in self.nodes if other is not node]

    def settings(self, root: Path) -> CommonSettings:
        """Of a process on this cluster, with short lives and periods."""
        return CommonSettings(root=root, nats_url=self.url, replicas=3, host="testhost", heartbeat_s=0.5)


@contextlib.contextmanager
def running_cluster(folder: Path) -> Iterator[Cluster]:
    """Three nodes; they may still be electing their leader. Nothing of them runs afterwards.

    Routes must be known before any node starts, so the ports cannot be left to the servers.
    """
    kept = [kept_port() for _ in range(2 * NUM_NODES)]
    ports = [int(one.getsockname()[1]) for one in kept]
    routes = tuple(ports[NUM_NODES:])
    nodes = [
        Node(f"n{number + 1}", folder / f"n{number + 1}", ports[number], routes[number], routes)
        for number in range(NUM_NODES)
    ]
    try:
        for node in nodes:
            node.start()
        yield Cluster(nodes)
    finally:
        for node in nodes:
            if node.process is not None:
                node.process.kill()
                node.process.wait(PATIENCE_S)
        for one in kept:
            one.close()
