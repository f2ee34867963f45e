"""A dataset in object storage, for a script or a notebook: shards come into this user's cache when they are first read.

Under `<cache>/railbus/datasets/<hash of the index>/<name>/` it lies as under a root. Nothing there is ever evicted, and
all of it may be removed. Credentials and endpoints come from the environment that each store's own tools read.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Final

from railbus_runner.vouching import HashedHere, user_memory
from railbus_shared import files
from railbus_shared.data.index import DatasetIndex
from railbus_shared.data.shard_paths import ShardPaths
from railbus_shared.errors import DatasetNotFound, NoSource, NotFound, NotSupported, ShardCorrupt, shorten
from railbus_shared.layout import version_folder

if TYPE_CHECKING:
    from obstore.store import ObjectStore, RetryConfig

logger = logging.getLogger(__name__)

SCHEMES: Final = ("s3", "gs")
_RANGE_BYTES: Final = 8 << 20
_AT_ONCE: Final = 4
_RETRIES: Final[RetryConfig] = {"max_retries": 3, "retry_timeout": timedelta(seconds=20)}
_MAX_JSON_BYTES: Final = 1 << 28


def open_object_store(url: str, *, version: int | None) -> StoredDataset:
    """The dataset at a URL such as `s3://bucket/prefix/digits`: its schema and index, and no shard yet.

    Raises NotSupported if obstore is not installed, DatasetNotFound, NotFound for a version, NoSource if the store
    cannot be asked, SchemaInvalid, IndexInvalid.
    """
    bucket = _Bucket(url)
    schema, index = bucket.pair("")
    found = DatasetIndex.parse(schema, index, folder=Path(bucket.name))
    if version is not None and version != found.file.version:
        schema, index = bucket.pair(f"{version_folder(Path(), version)}/")
        found = DatasetIndex.parse(schema, index, folder=Path(bucket.name))
    found.check_name(bucket.name)
    folder = user_memory().parent / "datasets" / found.sha256 / bucket.name
    with files.storage_errors(folder):
        (folder / "shards").mkdir(parents=True, exist_ok=True)
    files.write_whole(folder / "schema.json", schema)
    files.write_whole(folder / "index.json", index)
    return StoredDataset(found, folder, url)


class StoredDataset:
    """Shards that are fetched and verified when they are asked for; an `EnsureVerified`."""

    def __init__(self, index: DatasetIndex, folder: Path, url: str) -> None:
        self.index = index
        self.folder = folder
        self._url = url
        self._process = os.getpid()
        paths = ShardPaths(index.shard_map, folder / "shards")
        self._hashed = HashedHere(index, paths, memory=user_memory())

    @property
    def is_complete(self) -> bool:
        """Whether every shard is here."""
        return all(path.exists() for number in range(len(self.index.file.shards)) for path in self._files(number))

    def __call__(self, numbers: Sequence[int], *, again: bool = False) -> None:
        """Have these shards here, with their hashes; what is damaged here is fetched once more.

        Raises NoSource if one cannot be fetched, ShardCorrupt if it is damaged there, StorageFull, NotSupported in
        another process than the one that opened the dataset.
        """
        for number in numbers:
            is_new = self._bring(number)
            try:
                self._hashed([number], again=again)
            except ShardCorrupt as exc:
                for path in self._files(number):
                    path.unlink(missing_ok=True)
                if is_new:
                    raise ShardCorrupt(
                        path=f"{self._url}/shards/{Path(str(exc.details['path'])).name}",
                        expected=str(exc.details["expected"]),
                        actual=str(exc.details["actual"]),
                    ) from exc
                logger.warning("a damaged shard is fetched again", extra={"shard": number, "problem": str(exc)})
                self([number])

    def _files(self, number: int) -> dict[Path, int]:
        """Where a shard and its sidecar lie or will lie, and their sizes."""
        shard = self.index.file.shards[number]
        found = {self.folder / "shards" / shard.file: shard.bytes}
        if shard.sidecar is not None:
            found[self.folder / "shards" / shard.sidecar.file] = shard.sidecar.bytes
        return found

    def _bring(self, number: int) -> bool:
        """Fetch what is missing of a shard; whether anything was."""
        if all(path.exists() for path in self._files(number)):
            return False
        if os.getpid() != self._process:
            raise NotSupported(
                f"shard {number} of dataset {self.index.schema.name!r} is not here yet, and only the process that "
                "opened the dataset fetches it, not a worker of torch's DataLoader",
                hint="have every shard fetched before, by `dataset.verify()`, or use DataLoader(num_workers=0)",
            )
        bucket = _Bucket(self._url)
        with self._alone():
            for path, size in self._files(number).items():
                if not path.exists():
                    bucket.fetch(f"shards/{path.name}", path, size=size)
        return True

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """One process at a time fetches; the others then find what it has brought."""
        with (self.folder / ".lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


class _Bucket:
    """A folder of an object store."""

    def __init__(self, url: str) -> None:
        """Raises NotSupported if obstore is not installed."""
        self._url = url.rstrip("/")
        self.name = self._url.rpartition("/")[2]
        try:
            import obstore  # noqa: F401, PLC0415 - an extra; most hosts do without
        except ImportError as exc:
            raise NotSupported(
                f"path_or_url has value {url!r}, and obstore, which reads object storage, is not installed",
                hint="pip install 'railbus[objects]'; or copy the dataset to this host",
            ) from exc

    def pair(self, folder: str) -> tuple[bytes, bytes]:
        """Schema and index; raises DatasetNotFound, NotFound for an older version, NoSource."""
        try:
            return self._whole(f"{folder}schema.json"), self._whole(f"{folder}index.json")
        except FileNotFoundError as exc:
            if folder:
                raise NotFound(f"{self._url} has no {folder}", hint="leave the version out for the newest") from exc
            raise DatasetNotFound(
                f"path_or_url has value {self._url!r}: no dataset lies there",
                hint="give the folder that holds schema.json, index.json and shards/",
            ) from exc

    def fetch(self, path: str, into: Path, *, size: int) -> None:
        """Bring a file of so many bytes, whole or not at all; raises NoSource, StorageFull."""
        with files.temporary(into) as file:
            for piece in self._pieces(path, size):
                file.write(piece)
        files.temporary_path(into).replace(into)
        files.fsync_dir(into.parent)

    # --- the library -------------------------------------------------------------------------------------------------

    def _pieces(self, path: str, size: int) -> Iterator[memoryview]:
        """The bytes of a file in order, a few ranges at a time side by side; raises NoSource."""
        import obstore  # noqa: PLC0415

        store = self._opened()
        for start in range(0, size, _RANGE_BYTES * _AT_ONCE):
            starts = range(start, min(start + _RANGE_BYTES * _AT_ONCE, size), _RANGE_BYTES)
            lengths = [min(_RANGE_BYTES, size - at) for at in starts]
            with self._told(path):
                pieces = obstore.get_ranges(store, path, starts=starts, lengths=lengths)
            yield from (memoryview(piece) for piece in pieces)

    def _whole(self, path: str) -> bytes:
        """A small file; raises FileNotFoundError, NoSource."""
        import obstore  # noqa: PLC0415

        with self._told(path, is_missing_told=False):
            found = obstore.get(self._opened(), path)
            if found.meta["size"] > _MAX_JSON_BYTES:
                raise NoSource(f"{self._url}/{path} has {found.meta['size']} bytes, which no index has")
            return bytes(found.bytes())

    def _opened(self) -> ObjectStore:
        from obstore.store import from_url  # noqa: PLC0415

        is_local = self._url.startswith("file:")
        return from_url(self._url) if is_local else from_url(self._url, retry_config=_RETRIES)

    @contextlib.contextmanager
    def _told(self, path: str, *, is_missing_told: bool = True) -> Iterator[None]:
        """What the library raises, as NoSource; but for a missing file, where its absence is an answer."""
        from obstore.exceptions import BaseError  # noqa: PLC0415

        try:
            yield
        except (BaseError, OSError, ValueError) as exc:
            if isinstance(exc, FileNotFoundError) and not is_missing_told:
                raise
            raise NoSource(
                f"{self._url}/{path} cannot be read: {shorten(str(exc), limit=300)}",
                hint="check the URL, its credentials and the network",
            ) from exc
