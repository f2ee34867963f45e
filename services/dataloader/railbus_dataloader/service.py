"""The dataloader: what datasets there are, and shards that a trainer can map and trust.

Requests: `data.list`, `data.describe`, and on each host `data.<host>.open`, `.progress`, `.verify`, `.close`, and
`.shard` for other hosts (any host answers `data.open` and `data.verify`). No sample crosses the bus: a stream is opened
by telling where its shards lie on this host, and a shard may be read once its hash has been verified here. What it
lacks is fetched into a cache, from other hosts or from object storage.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
from collections.abc import Mapping
from typing import Final

from railbus_dataloader.bulk import Bulk
from railbus_dataloader.loader import Limits, ShardLoader
from railbus_dataloader.measures import Measures
from railbus_dataloader.settings import Settings
from railbus_dataloader.summaries import Summaries
from railbus_shared.bus.bucket import Bucket
from railbus_shared.bus.endpoints import AnyEndpoint, Endpoint
from railbus_shared.contracts.requests import (
    CloseStream,
    DatasetList,
    DatasetRef,
    DatasetSummary,
    Nothing,
    OpenedStream,
    OpenStream,
    SendFile,
    StreamProgress,
    VerifiedShards,
    VerifyShards,
)
from railbus_shared.data.index import DatasetIndex
from railbus_shared.errors import RejectedError, ShardCorrupt, TransientError
from railbus_shared.service import Context, Description
from railbus_shared.telemetry import About
from railbus_shared.waiting import end, is_set_within

logger = logging.getLogger(__name__)

DESCRIPTION: Final = Description("dataloader", "Datasets: validated, verified, and opened for trainers.")


class DataloaderService:
    """Answers for the datasets under one root on one host."""

    def __init__(self, context: Context, settings: Settings) -> None:
        self._context = context
        self._settings = settings
        self._layout = context.common.layout
        self._summaries = Summaries(Bucket(context.bus, context.bus.subjects.datasets), host=context.common.host_id)
        measures = Measures.of(context.metrics)
        context.telemetry.heard = measures.heard
        self._bulk = Bulk(context, settings, self._index_here, measures=measures)
        self._loader = ShardLoader(
            self._layout,
            host=context.common.host_id,
            state_dir=self._layout.state / "dataloader",
            measures=measures,
            tell=functools.partial(context.telemetry.record, about=About()),
            limits=Limits(settings.session_ttl_s, settings.cache_bytes, settings.ahead_bytes),
            finder=self._bulk.finder,
        )

    def endpoints(self) -> list[AnyEndpoint]:
        request = self._context.bus.subjects.request
        area = f"data.{self._context.common.host}"
        return [
            Endpoint("list", request("data", "list"), Nothing, self._list),
            Endpoint("describe", request("data", "describe"), DatasetRef, self._describe),
            Endpoint("open", request("data", "open"), OpenStream, self._open),
            Endpoint("verify", request("data", "verify"), VerifyShards, self._verify, may_wait=True),
            Endpoint("open-here", request(area, "open"), OpenStream, self._open),
            Endpoint("verify-here", request(area, "verify"), VerifyShards, self._verify, may_wait=True),
            Endpoint("progress", request(area, "progress"), StreamProgress, self._progress),
            Endpoint("close", request(area, "close"), CloseStream, self._close),
            Endpoint("shard", request(area, "shard"), SendFile, self._bulk.server.send),
        ]

    async def run(self) -> None:
        """Look at the datasets from time to time, and look ahead of trainers, until told to stop."""
        async with asyncio.TaskGroup() as tasks:
            ahead, bulk = tasks.create_task(self._loader.run()), tasks.create_task(self._bulk.run())
            while not self._context.stopping.is_set():
                await self._scan()
                await is_set_within(self._context.stopping, self._settings.scan_s)
            await end(ahead, bulk)
        await self._loader.close()

    async def checks(self) -> Mapping[str, str]:
        root = self._layout.root
        readable = root.is_dir() and os.access(root, os.R_OK | os.X_OK)
        return {"root": "" if readable else f"{str(root)!r} cannot be read"}

    async def _scan(self) -> None:
        """Tell the bucket of datasets what lies here."""
        self._layout.datasets.mkdir(parents=True, exist_ok=True)
        try:
            found = await self._loader.list_all()
            for summary in found:
                await self._tell(summary)
            for name in await self._summaries.withdraw_others({summary.dataset for summary in found}):
                self._context.telemetry.event("dataset.withdrawn", dataset=name)
        except TransientError as exc:
            logger.info("datasets not told now", extra={"problem": str(exc)})

    async def _tell(self, summary: DatasetSummary) -> None:
        """Say where anyone can read it that this host has a dataset."""
        if not await self._summaries.tell(summary):
            return
        self._context.telemetry.event(
            "dataset.described",
            dataset=summary.dataset,
            samples=summary.samples,
            bytes=summary.bytes,
            shards=summary.num_shards,
            index_sha256=summary.index_sha256,
        )

    async def _index_here(self, name: str) -> DatasetIndex:
        return await self._loader.index_here(name)

    async def _list(self, _: Nothing) -> DatasetList:
        return DatasetList(datasets=tuple(await self._loader.list_all()))

    async def _describe(self, request: DatasetRef) -> DatasetSummary:
        summary = await self._loader.describe(request.dataset)
        if summary.hosts == (self._context.common.host_id,):
            with contextlib.suppress(TransientError):
                await self._tell(summary)
        return summary

    async def _open(self, request: OpenStream) -> OpenedStream:
        opened = await self._loader.open(request)
        self._context.telemetry.event(
            "dataset.opened",
            job=request.job,
            lease_epoch=request.lease_epoch,
            dataset=request.dataset,
            shards=opened.num_shards,
            verified=sum(one.shards for one in opened.verified),
        )
        return opened

    async def _progress(self, told: StreamProgress) -> Nothing:
        await self._loader.progress(told)
        return Nothing()

    async def _close(self, request: CloseStream) -> Nothing:
        self._loader.end_session(request.stream)
        return Nothing()

    async def _verify(self, request: VerifyShards) -> VerifiedShards:
        try:
            verified = await self._loader.verify(
                request.dataset, list(request.shards) or None, again=request.again, stream=request.stream
            )
        except (ShardCorrupt, RejectedError) as exc:
            self._context.telemetry.event(
                "dataset.damaged", severity="error", dataset=request.dataset, error=exc.to_wire()
            )
            raise
        self._context.telemetry.event(
            "dataset.verified", dataset=request.dataset, shards=list(verified.shards), bytes=verified.bytes
        )
        return verified
