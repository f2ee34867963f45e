"""The dataloader: what datasets there are, and shards that a trainer can map and trust.

Requests: `data.list`, `data.describe`, and on each host `data.<host>.open` and `data.<host>.verify` (any host answers
`data.open` and `data.verify`). No sample crosses the bus: a stream is opened by telling where its shards lie on this
host, and a shard may be read once its hash has been verified here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Mapping
from typing import Final

from railbus_dataloader.loader import ShardLoader
from railbus_dataloader.settings import Settings
from railbus_shared.bus.bucket import Bucket
from railbus_shared.bus.endpoints import AnyEndpoint, Endpoint
from railbus_shared.contracts.requests import (
    DatasetList,
    DatasetRef,
    DatasetSummary,
    Nothing,
    OpenedStream,
    OpenStream,
    VerifiedShards,
    VerifyShards,
)
from railbus_shared.errors import RejectedError, ShardCorrupt, TransientError
from railbus_shared.names import key_token
from railbus_shared.service import Context, Description
from railbus_shared.waiting import end, is_set_within

logger = logging.getLogger(__name__)

DESCRIPTION: Final = Description("dataloader", "Datasets: validated, verified, and opened for trainers.")


class DataloaderService:
    """Answers for the datasets under one root on one host."""

    def __init__(self, context: Context, settings: Settings) -> None:
        self._context = context
        self._settings = settings
        self._layout = context.common.layout
        self._bucket = Bucket(context.bus, context.bus.subjects.datasets)
        self._loader = ShardLoader(
            self._layout, host=context.common.host_id, state_dir=self._layout.state / "dataloader"
        )
        self._told: dict[str, DatasetSummary] = {}

    def endpoints(self) -> list[AnyEndpoint]:
        request = self._context.bus.subjects.request
        area = f"data.{self._context.common.host}"
        return [
            Endpoint("list", request("data", "list"), Nothing, self._list),
            Endpoint("describe", request("data", "describe"), DatasetRef, self._describe),
            Endpoint("open", request("data", "open"), OpenStream, self._open),
            Endpoint("verify", request("data", "verify"), VerifyShards, self._verify),
            Endpoint("open-here", request(area, "open"), OpenStream, self._open),
            Endpoint("verify-here", request(area, "verify"), VerifyShards, self._verify),
        ]

    async def run(self) -> None:
        """Look at the datasets from time to time, and look ahead of trainers, until told to stop."""
        async with asyncio.TaskGroup() as tasks:
            ahead = tasks.create_task(self._loader.run())
            while not self._context.stopping.is_set():
                await self._scan()
                await is_set_within(self._context.stopping, self._settings.scan_s)
            await end(ahead)
        await self._loader.close()

    async def checks(self) -> Mapping[str, str]:
        root = self._layout.root
        readable = root.is_dir() and os.access(root, os.R_OK | os.X_OK)
        return {"root": "" if readable else f"{str(root)!r} cannot be read"}

    async def _scan(self) -> None:
        """Tell the bucket of datasets what lies here."""
        self._layout.datasets.mkdir(parents=True, exist_ok=True)
        try:
            for summary in await self._loader.list_all():
                await self._tell(summary)
        except TransientError as exc:
            logger.info("datasets not told now", extra={"problem": str(exc)})

    async def _tell(self, summary: DatasetSummary) -> None:
        """Write a dataset's summary where anyone can read it, if it is news."""
        before = self._told.get(summary.dataset)
        if before is not None and before.index_sha256 == summary.index_sha256:
            return
        await self._bucket.put(key_token(summary.dataset), summary.to_map())
        self._told[summary.dataset] = summary
        self._context.telemetry.event(
            "dataset.described",
            dataset=summary.dataset,
            samples=summary.samples,
            bytes=summary.bytes,
            shards=summary.num_shards,
            index_sha256=summary.index_sha256,
        )

    async def _list(self, _: Nothing) -> DatasetList:
        return DatasetList(datasets=tuple(await self._loader.list_all()))

    async def _describe(self, request: DatasetRef) -> DatasetSummary:
        summary = await self._loader.describe(request.dataset)
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
            shards=len(opened.shards),
            verified=sum(shard.verified for shard in opened.shards),
        )
        return opened

    async def _verify(self, request: VerifyShards) -> VerifiedShards:
        try:
            verified = await self._loader.verify(request.dataset, list(request.shards) or None, again=request.again)
        except (ShardCorrupt, RejectedError) as exc:
            self._context.telemetry.event(
                "dataset.damaged", severity="error", dataset=request.dataset, error=exc.to_wire()
            )
            raise
        self._context.telemetry.event(
            "dataset.verified", dataset=request.dataset, shards=list(verified.shards), bytes=verified.bytes
        )
        return verified
