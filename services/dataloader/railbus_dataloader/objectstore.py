"""`ObjectStoreSource`: files of a dataset from object storage, by obstore. The only module that imports it.

Under an origin such as `s3://bucket/prefix` datasets lie as they do under a root: `<origin>/<dataset>/schema.json`,
`index.json`, `shards/…`, `versions/…`. Credentials and endpoints come from the environment that each store's own tools
read, for instance `AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, `GOOGLE_APPLICATION_CREDENTIALS`. Ranges are requested side
by side and written in order.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Final

from railbus_dataloader.arrival import Arrival, Intake
from railbus_dataloader.sources import WantedFile
from railbus_shared.bus.chunks import Chunk
from railbus_shared.data.verified import Fingerprint
from railbus_shared.errors import BadSetting, NoSource, shorten

if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.store import ObjectStore, RetryConfig

SCHEMES: Final = ("s3", "gs", "file")
_RANGE_BYTES: Final = 8 << 20
_AT_ONCE: Final = 4
_RANGE_S: Final = 60.0
"""For one range, whatever the library has tried meanwhile."""
_RETRIES: Final[RetryConfig] = {"max_retries": 3, "retry_timeout": timedelta(seconds=20)}
_MAX_JSON_BYTES: Final = 1 << 28
_MAX_KNOWN: Final = 1000


@dataclass(frozen=True)
class OriginFiles:
    """The two files that say what a dataset is, as an origin has them now."""

    schema: bytes
    index: bytes

    @property
    def index_sha256(self) -> str:
        return hashlib.sha256(self.index).hexdigest()


class ObjectStoreSource:
    """A `Source`: one origin."""

    def __init__(self, url: str) -> None:
        """Looks at no network. Raises BadSetting for a URL of another kind, and if the library is not installed."""
        check_origin(url)
        self.url = url
        self._store: ObjectStore | None = None
        self._known: dict[str, tuple[str, OriginFiles]] = {}
        self._older: set[tuple[str, str]] = set()
        """Versions before an append, by dataset and hash of the index; they never change."""

    async def fetch(self, wanted: WantedFile, into: Path) -> Fingerprint:
        """See `Source.fetch`. Raises NoSource if the origin has not this version, ShardCorrupt for wrong bytes.

        Versions before an append are found as under a root: by their indexes under `versions/`.
        """
        if not await self._has_version(wanted.dataset, wanted.index_sha256):
            raise NoSource(f"{self.url} has not this version of dataset {wanted.dataset!r}")
        path = f"{wanted.dataset}/shards/{wanted.file}"
        arrival = Arrival(wanted, into)
        try:
            await asyncio.to_thread(arrival.open)
            arrival.expect(await self._size(path))
            await self._bring(path, arrival, arrival.size or 0)
            return await asyncio.to_thread(arrival.check, self.url)
        finally:
            arrival.close()

    async def _size(self, path: str) -> int:
        try:
            return int((await self._head(path))["size"])
        except FileNotFoundError as exc:
            raise NoSource(
                f"{self.url}/{path} is missing", hint="its index names it: upload the dataset again"
            ) from exc

    async def describe(self, dataset: str) -> OriginFiles | None:
        """Schema and index of a dataset, read again when the index has changed; None if it is not there.

        Raises NoSource if the origin cannot be asked.
        """
        try:
            version = _version(await self._head(f"{dataset}/index.json"))
            known = self._known.get(dataset)
            if known is None or known[0] != version:
                schema, index = await self._whole(f"{dataset}/schema.json"), await self._whole(f"{dataset}/index.json")
                known = (version, OriginFiles(schema, index))
        except FileNotFoundError:
            self._known.pop(dataset, None)
            return None
        if len(self._known) >= _MAX_KNOWN:
            self._known.clear()
        self._known[dataset] = known
        return known[1]

    async def _has_version(self, dataset: str, index_sha256: str) -> bool:
        """Whether this is the newest version of a dataset, or one before an append; raises NoSource."""
        newest = await self.describe(dataset)
        if newest is None:
            return False
        if index_sha256 == newest.index_sha256 or (dataset, index_sha256) in self._older:
            return True
        for path in await self._older_indexes(dataset):
            try:
                found = hashlib.sha256(await self._whole(path)).hexdigest()
            except FileNotFoundError:
                continue
            if len(self._older) >= _MAX_KNOWN:
                self._older.clear()
            self._older.add((dataset, found))
            if found == index_sha256:
                return True
        return False

    async def _bring(self, path: str, arrival: Arrival, end: int) -> None:
        """The rest of a file, a few ranges ahead of what is written."""
        ahead: deque[tuple[int, asyncio.Future[memoryview]]] = deque()
        intake = Intake(arrival)
        try:
            for start in range(arrival.position, end, _RANGE_BYTES):
                length = min(_RANGE_BYTES, end - start)
                ahead.append((start, asyncio.ensure_future(self._range(path, start, length))))
                if len(ahead) == _AT_ONCE:
                    await _take_first(ahead, intake)
            while ahead:
                await _take_first(ahead, intake)
        finally:
            for _, one in ahead:
                one.cancel()
            await asyncio.gather(*(one for _, one in ahead), return_exceptions=True)

    # --- the library -------------------------------------------------------------------------------------------------

    async def _range(self, path: str, start: int, length: int) -> memoryview:
        import obstore  # noqa: PLC0415 - an extra; most hosts do without

        with self._told(path):
            async with asyncio.timeout(_RANGE_S):
                return memoryview(await obstore.get_range_async(self._opened(), path, start=start, length=length))

    async def _head(self, path: str) -> ObjectMeta:
        """Raises FileNotFoundError, NoSource."""
        import obstore  # noqa: PLC0415

        with self._told(path):
            async with asyncio.timeout(_RANGE_S):
                return await obstore.head_async(self._opened(), path)

    async def _older_indexes(self, dataset: str) -> list[str]:
        """The paths of the indexes of versions before an append, the newest first; raises NoSource."""
        import obstore  # noqa: PLC0415

        folder = f"{dataset}/versions/"
        with self._told(folder):
            async with asyncio.timeout(_RANGE_S):
                found = await obstore.list(self._opened(), folder).collect_async()
        return sorted((one["path"] for one in found if one["path"].endswith("/index.json")), reverse=True)

    async def _whole(self, path: str) -> bytes:
        """A small file; raises FileNotFoundError, NoSource."""
        size = (await self._head(path))["size"]
        if size > _MAX_JSON_BYTES:
            raise NoSource(f"{self.url}/{path} has {size} bytes, which no index has")
        return bytes(await self._range(path, 0, size)) if size else b""

    def _opened(self) -> ObjectStore:
        from obstore.store import from_url  # noqa: PLC0415

        if self._store is None:
            is_local = self.url.startswith("file:")
            self._store = from_url(self.url) if is_local else from_url(self.url, retry_config=_RETRIES)
        return self._store

    @contextlib.contextmanager
    def _told(self, path: str) -> Iterator[None]:
        """What the library raises as NoSource, but for a file that is not there."""
        from obstore.exceptions import BaseError  # noqa: PLC0415

        try:
            yield
        except FileNotFoundError:
            raise
        except (BaseError, OSError, TimeoutError, ValueError) as exc:
            raise NoSource(
                f"{self.url}/{path} cannot be read: {shorten(str(exc), limit=300)}",
                hint="check the origin, its credentials and the network",
            ) from exc


async def _take_first(ahead: deque[tuple[int, asyncio.Future[memoryview]]], intake: Intake) -> None:
    start, data = ahead[0]
    chunk = Chunk(start, await data)
    ahead.popleft()
    await intake.take([chunk])


def _version(meta: ObjectMeta) -> str:
    """What changes when the object does."""
    return f"{meta['e_tag']} {meta['last_modified']} {meta['size']}"


def check_origin(url: str) -> None:
    """Raises BadSetting unless the URL is one of an origin and obstore is installed."""
    scheme, separator, rest = url.partition("://")
    if scheme not in SCHEMES or not separator or not rest.strip("/"):
        raise BadSetting(
            f"setting RAILBUS_DATALOADER_ORIGINS has value {shorten(url)}: no URL of an origin",
            hint="for instance s3://bucket/prefix, gs://bucket/prefix or file:///folder",
        )
    try:
        import obstore  # noqa: F401, PLC0415
    except ImportError as exc:
        raise BadSetting(
            "setting RAILBUS_DATALOADER_ORIGINS is set, but obstore is not installed",
            hint="pip install 'railbus[objects]'",
        ) from exc
