"""Repair: damaged shards of a dataset made again from what its samples came from, or taken from a copy of it.

Only a file whose hash is the one in the index takes a place. So it does no harm to try each source for each version:
the first version is imported again, a later one appended again to the version before it, both beside the dataset.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from railbus.appending import append_source
from railbus.importers.builtin_data import BUILTIN
from railbus.importers.choosing import checked_path
from railbus.importers.scratch import scratch_folder
from railbus.importers.source import Options
from railbus.importing import import_dataset
from railbus_shared import files
from railbus_shared.contracts.artifacts import Shard
from railbus_shared.data.index import DatasetIndex
from railbus_shared.data.journal import files_of, is_whole
from railbus_shared.data.writer import SHARD_BYTES
from railbus_shared.errors import InvalidField, RejectedError, WireError
from railbus_shared.layout import Layout, version_folder


@dataclass(frozen=True)
class AsBefore:
    """How the samples were imported and appended; see `import_dataset`."""

    held_out_frac: float = 0.1
    shuffle: bool = True
    block: int = 128
    shard_bytes: int = SHARD_BYTES
    options: Options = field(default_factory=Options)


@dataclass(frozen=True)
class _Version:
    """One version of a dataset, and the shards that came with it."""

    number: int
    before: DatasetIndex | None
    shards: tuple[Shard, ...]


def repair_dataset(layout: Layout, index: DatasetIndex, sources: Sequence[str], *, how: AsBefore) -> list[str]:
    """Restore damaged or missing shards from sources, or from folders of copies of the dataset; the restored files.

    What can be restored is, also if the rest cannot. Raises InvalidField for what no source gives, NotFound for a
    source that is not there, StorageFull, and what is wrong with an older version's index.
    """
    for source in sources:
        if source not in BUILTIN:
            checked_path(source)
    folder = layout.shards(index.schema.name)
    folder.mkdir(exist_ok=True)
    missing = {
        file: sha256
        for shard in index.file.shards
        for file, sha256 in files_of(shard)
        if not is_whole(folder / file, sha256)
    }
    broken = list(missing)
    for source in sources:
        _restore(missing, Path(source) / "shards", folder)
    for version in _versions(layout, index):
        _repair_version(layout, index.schema.name, version, missing, sources=sources, how=how)
    if missing:
        raise InvalidField(
            field="from",
            value=list(sources),
            problem=f"they do not give {', '.join(sorted(missing))}, and nothing else is put in its place",
            hint="name all sources, in the order in which they were imported and appended, with the same options; or a "
            "copy of the dataset's folder",
        )
    return broken


def _versions(layout: Layout, index: DatasetIndex) -> Iterator[_Version]:
    """All versions, the first one first."""
    before: DatasetIndex | None = None
    for number in range(1, index.file.version + 1):
        present = DatasetIndex.load(layout.dataset(index.schema.name), number)
        yield _Version(number, before, present.file.shards[len(before.file.shards) if before else 0 :])
        before = present


def _repair_version(
    layout: Layout, name: str, version: _Version, missing: dict[str, str], *, sources: Sequence[str], how: AsBefore
) -> None:
    """Restore what is missing of a version's shards; the source that stands at its place is tried first."""
    own = {file for shard in version.shards for file, _ in files_of(shard)}
    for source in (*sources[version.number - 1 :], *sources[: version.number - 1]):
        if not own & missing.keys():
            return
        if _is_copy(source):
            continue
        with scratch_folder(layout) as scratch:
            beside = Layout(scratch)
            try:
                _make_again(beside, layout.dataset(name), version, source, how=how)
            except (WireError, RejectedError) as exc:
                how.options.note(f"{source} does not give version {version.number}: {exc.message}")
                continue
            _restore(missing, beside.shards(name), layout.shards(name))


def _make_again(beside: Layout, dataset: Path, version: _Version, source: str, *, how: AsBefore) -> None:
    """A version's own shards, in another root; raises what an import or an append does."""
    if version.before is None:
        import_dataset(
            beside,
            source,
            name=dataset.name,
            held_out_frac=how.held_out_frac,
            shuffle=how.shuffle,
            block=how.block,
            shard_bytes=how.shard_bytes,
            options=how.options,
        )
        return
    target = beside.dataset(dataset.name)
    target.mkdir(parents=True)
    for file in ("schema.json", "index.json"):
        shutil.copy(version_folder(dataset, version.number - 1) / file, target / file)
    beside.shards(dataset.name).mkdir()
    split = next(iter(version.before.schema.splits))  # which one is no matter: it does not stand in the shards
    append_source(beside, version.before, source, split=split, shard_bytes=how.shard_bytes, options=how.options)


def _restore(missing: dict[str, str], found: Path, folder: Path) -> None:
    """Put files with the hashes that are wanted into their places, and forget that they were missing."""
    for file, sha256 in list(missing.items()):
        if is_whole(found / file, sha256) and _copied(found / file, folder / file, sha256):
            del missing[file]


def _copied(source: Path, final: Path, sha256: str) -> bool:
    """Whether a copy of a file with this hash has taken its place."""
    temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    with files.storage_errors(temporary):
        try:
            with source.open("rb") as read, temporary.open("wb") as written:
                shutil.copyfileobj(read, written, 1 << 20)
                written.flush()
                os.fsync(written.fileno())
            if not is_whole(temporary, sha256):
                return False
            temporary.replace(final)
            files.fsync_dir(final.parent)
        finally:
            temporary.unlink(missing_ok=True)
    return True


def _is_copy(source: str) -> bool:
    return (Path(source) / "index.json").is_file() and (Path(source) / "shards").is_dir()
