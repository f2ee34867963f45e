"""What a backup says of itself: `manifest.json`, which is written last.

For each stream it names a file with the server's snapshot, and for a bucket one with what came while the snapshot was
read; with the size and SHA-256 of each, and a SHA-256 of its own content, so that nothing damaged is put back.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

import orjson

from railbus_shared import files
from railbus_shared.errors import WireError

MANIFEST: Final = "manifest.json"
_VERSION: Final = 1
_READ_BYTES: Final = 1 << 20


class BackupDamaged(WireError):
    """A backup is not what its manifest states, or has none that can be read; seen by whoever would restore it."""


@dataclass(frozen=True)
class FileEntry:
    """One file of the folder."""

    file: str
    bytes: int
    sha256: str
    messages: int
    """That it holds."""


@dataclass(frozen=True)
class StreamEntry:
    """One stream or bucket."""

    name: str
    config: dict[str, Any]
    state: dict[str, Any]
    """As the server told it when the snapshot began."""
    least_messages: int
    """How many messages the snapshot holds at least; others were overwritten or removed while it was read."""
    snapshot: FileEntry
    later: FileEntry | None = None
    """Of a bucket: what came while the snapshot was read."""

    @property
    def files(self) -> tuple[FileEntry, ...]:
        return (self.snapshot,) if self.later is None else (self.snapshot, self.later)


@dataclass(frozen=True)
class Manifest:
    """A whole backup."""

    railbus: str
    """Version that wrote it."""
    nats_server: str
    created_at: str
    """When it began: what had been acknowledged by then is in it."""
    completed_at: str
    prefix: str
    incarnation: str
    """Of the store that it was taken from."""
    streams: tuple[StreamEntry, ...]
    """In the order in which they were copied."""

    @property
    def num_bytes(self) -> int:
        return sum(one.bytes for stream in self.streams for one in stream.files)


def write(folder: Path, manifest: Manifest) -> None:
    """Write it into a folder in one step; raises StorageFull."""
    content = asdict(manifest)
    whole = {"v": _VERSION, "sha256": _digest(content), "content": content}
    files.write_whole(folder / MANIFEST, files.to_json(whole), mode=0o600)


def read(folder: Path) -> Manifest:
    """Read it; raises BackupDamaged."""
    path = folder / MANIFEST
    try:
        found = orjson.loads(path.read_bytes())
        version, content = found["v"], found["content"]
        if version != _VERSION:
            _refuse(path, f"it is of version {version}, and this railbus knows version {_VERSION}")
        if found["sha256"] != _digest(content):
            _refuse(path, "its content does not have the hash that it states")
        return Manifest(**{**content, "streams": tuple(_stream(one) for one in content["streams"])})
    except FileNotFoundError:
        _refuse(path, "there is no such file")
    except (OSError, ValueError, KeyError, TypeError) as exc:
        _refuse(path, f"it cannot be read: {exc!r}")


def verify(folder: Path, manifest: Manifest, *, report: Callable[[str, int, int | None], None]) -> None:
    """Hash every file; raises BackupDamaged that names the first one that is not what it should be."""
    done = 0
    for entry in (one for stream in manifest.streams for one in stream.files):
        path, digest, size = folder / entry.file, hashlib.sha256(), 0
        try:
            for chunk in read_in_chunks(path, _READ_BYTES):
                digest.update(chunk)
                size += len(chunk)
                report("verify", done + size, manifest.num_bytes)
        except OSError as exc:
            _refuse(path, f"it cannot be read: {exc.strerror}")
        if size != entry.bytes:
            _refuse(path, f"it has {size} bytes, and the manifest states {entry.bytes}")
        if digest.hexdigest() != entry.sha256:
            _refuse(path, "its bytes do not have the hash that the manifest states")
        done += size


def read_in_chunks(path: Path, num_bytes: int) -> Iterator[bytes]:
    """The bytes of a file."""
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(num_bytes):
            yield chunk


def _stream(content: dict[str, Any]) -> StreamEntry:
    later = content["later"]
    return StreamEntry(
        **{**content, "snapshot": _file(content["snapshot"]), "later": None if later is None else _file(later)}
    )


def _file(content: dict[str, Any]) -> FileEntry:
    entry = FileEntry(**content)
    if Path(entry.file).name != entry.file:
        raise ValueError(f"{entry.file!r} is no file of the folder")
    return entry


def _digest(content: object) -> str:
    return hashlib.sha256(orjson.dumps(content, option=orjson.OPT_SORT_KEYS)).hexdigest()


def _refuse(path: Path, problem: str) -> NoReturn:
    raise BackupDamaged(
        f"{str(path)!r} is damaged: {problem}",
        hint="nothing was put back; take another backup",
        details={"path": str(path)},
    )
