"""Hosts whose dataloaders answer for files only, over a real NATS."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

from railbus_dataloader.catalogue import Catalogue
from railbus_dataloader.serving import FileServer, SendLimits
from railbus_shared.bus.connection import Bus
from railbus_shared.bus.endpoints import Endpoint, serving
from railbus_shared.contracts.requests import SendFile, SendingFile
from railbus_shared.layout import Layout
from railbus_shared.metrics import Metrics
from railbus_shared.settings import CommonSettings

SEND = SendLimits(transfers=2, stall_s=2.0, sign_s=0.2)


@dataclass
class Host:
    """A host whose dataloader answers for files only."""

    name: str
    layout: Layout
    bus: Bus
    requests: list[SendFile] = field(default_factory=list)


@contextlib.asynccontextmanager
async def serving_host(
    common: CommonSettings, folder: Path, name: str, limits: SendLimits = SEND
) -> AsyncIterator[Host]:
    layout = Layout(folder / name)
    catalogue = Catalogue(layout, host=name)
    async with bulk(common) as control, bulk(common) as bus:
        host = Host(name, layout, bus)
        server = FileServer(bus, layout, catalogue.index_here, limits=limits)

        async def send(request: SendFile) -> SendingFile:
            host.requests.append(request)
            return await server.send(request)

        endpoint = Endpoint("shard", f"railbus.req.data.{name}.shard", SendFile, send)
        endpoints = serving(control, "dataloader", "", [endpoint], metrics=Metrics(name), rejected=lambda *_: None)
        async with server.running(), endpoints:
            yield host


@contextlib.asynccontextmanager
async def bulk(common: CommonSettings) -> AsyncIterator[Bus]:
    async with Bus.open(common, name="dataloader", service=True) as bus:
        yield bus
