"""The dataloader's second connection: shards to and from other hosts, so that no request waits behind 500 MB.

It belongs to the same user of NATS and listens in the same inboxes; only its name differs. If it closes for good the
process ends and is started anew, as with the first.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Final

from railbus_dataloader.fetching import FetchLimits, NatsSource
from railbus_dataloader.measures import Measures
from railbus_dataloader.objectstore import ObjectStoreSource
from railbus_dataloader.remote import RemoteDatasets
from railbus_dataloader.serving import FileServer, FindIndex, SendLimits
from railbus_dataloader.settings import Settings
from railbus_dataloader.sources import WantedFile
from railbus_shared.bus.bucket import Bucket
from railbus_shared.bus.connection import Bus, BusClosed
from railbus_shared.contracts.requests import DatasetSummary
from railbus_shared.errors import TransientError, WireError
from railbus_shared.names import key_token
from railbus_shared.service import Context
from railbus_shared.subjects import SERVICE_INBOX

logger = logging.getLogger(__name__)

_USER: Final = "dataloader"


class Bulk:
    """What goes over it: files that are sent, and files that are fetched."""

    def __init__(self, context: Context, settings: Settings, find_index: FindIndex, *, measures: Measures) -> None:
        """`find_index` knows the datasets under the root; raises BadSetting for an origin that is none."""
        common = context.common
        self._bucket = Bucket(context.bus, context.bus.subjects.datasets)
        self._bus = Bus(common, name=f"{_USER}-bulk", inbox=f"{SERVICE_INBOX}.{_USER}")
        self._host = common.host
        sending = SendLimits(transfers=settings.transfers, stall_s=settings.stall_s)
        self.server = FileServer(self._bus, common.layout, find_index, limits=sending, sent=measures.sent_bytes.inc)
        fetching = FetchLimits(window_bytes=settings.window_bytes, stall_s=settings.stall_s)
        self.finder = RemoteDatasets(
            common.layout.cached_indexes,
            self._summary,
            host=self._host,
            peers=NatsSource(self._bus, self._hosts, host=self._host, limits=fetching),
            origins=[ObjectStoreSource(url) for url in settings.origins],
        )

    async def run(self) -> None:
        """Be connected until cancelled; raises BusClosed if that is over for good, NotAuthorized."""
        try:
            await self._bus.connect()
        except TransientError as exc:
            raise BusClosed(f"no second connection to NATS: {exc.message}", hint="the process starts anew") from exc
        try:
            await self.finder.tidy()
            async with self.server.running():
                await self._bus.run()
        finally:
            await asyncio.shield(self._bus.close())

    async def _summary(self, dataset: str) -> DatasetSummary | None:
        """What the hosts have told of a dataset."""
        entry = await self._bucket.get(key_token(dataset))
        if entry is None or entry.value is None:
            return None
        try:
            return DatasetSummary.parse(entry.value)
        except WireError as exc:
            logger.warning("summary cannot be read", extra={"dataset": dataset, "problem": str(exc)})
            return None

    async def _hosts(self, wanted: WantedFile) -> Sequence[str]:
        """The hosts that have told of the dataset; one that has another version by now may have kept the older one."""
        summary = await self._summary(wanted.dataset)
        return summary.hosts if summary is not None else ()
