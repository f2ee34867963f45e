"""The journal: what an import that was killed had finished, and under which plan.

It lies in the import's hidden folder: `plan.json`, the finished shards, and one JSON file for each of them, written
after the shard's bytes are durable. An entry counts only under the same plan, together with all before it, and while
the shard has its hash.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import orjson

from railbus_shared import files
from railbus_shared.contracts.artifacts import Shard
from railbus_shared.errors import WireError
from railbus_shared.layout import shard_name


@dataclass(frozen=True)
class Finished:
    """A shard that is whole, and what it weighed in the spool."""

    shard: Shard
    weight: int


@contextmanager
def journal(folder: Path, plan: bytes, *, first_number: int) -> Iterator[Journal]:
    """The journal of one import; gone at its end, and after any error.

    What was finished stays after an interruption only, by a signal or by whoever typed it: after bad input nobody comes
    to go on, and a full disk wants its space back.
    """
    found = Journal(folder, first_number=first_number)
    try:
        found.open(plan)
        yield found
    except Exception:
        found.remove()
        raise
    except BaseException:
        found.leave()
        raise
    found.remove()


class Journal:
    """The hidden folder of one import."""

    def __init__(self, folder: Path, *, first_number: int) -> None:
        """`first_number` is that of the first shard."""
        self._folder = folder
        self._first_number = first_number
        self._entries = folder / "journal"
        self.shards = folder / "shards"
        self.finished: list[Finished] = []

    def open(self, plan: bytes) -> None:
        """Keep what is there if it was made under the same plan, as far as it is whole; remove the rest.

        The plan is everything that decides which bytes come of which samples.
        """
        path = self._folder / "plan.json"
        if not path.is_file() or path.read_bytes() != plan:
            self.remove()
            self._folder.mkdir()
            files.write_new(path, plan)
        self.shards.mkdir(exist_ok=True)
        self._entries.mkdir(exist_ok=True)
        self.finished = list(self._whole())
        self._remove_unfinished()
        self._remove_spools()

    def record(self, finished: Finished) -> None:
        """Note that a shard's bytes are durable."""
        entry = {"weight": finished.weight, "shard": finished.shard.to_map()}
        files.write_new(self._entry(finished.shard.file), files.to_json(entry))

    def forget(self) -> Path:
        """Let finished shards count no longer; returns the folder where their files still lie until the import ends."""
        forgotten = self._folder / "forgotten"
        shutil.rmtree(self._entries)
        self.shards.rename(forgotten)
        self._entries.mkdir()
        self.shards.mkdir()
        self.finished = []
        return forgotten

    def new_spool(self) -> Path:
        """An empty folder that no other try finds."""
        return Path(tempfile.mkdtemp(prefix="spool-", dir=self._folder))

    def remove(self) -> None:
        if self._folder.exists():
            shutil.rmtree(self._folder)

    def leave(self) -> None:
        """Keep what is finished for the next try, if there is anything."""
        if self._entries.is_dir() and any(self._entries.iterdir()):
            self._remove_spools()
        else:
            self.remove()

    def _entry(self, shard_file: str) -> Path:
        return self._entries / f"{shard_file}.json"

    def _whole(self) -> Iterator[Finished]:
        number = self._first_number
        while (entry := self._entry(shard_name(number))).is_file():
            found = _parsed(entry.read_bytes())
            if found is None or not all(is_whole(self.shards / one, sha) for one, sha in files_of(found.shard)):
                return
            yield found
            number += 1

    def _remove_unfinished(self) -> None:
        """Remove what no entry vouches for."""
        kept = {name for one in self.finished for name, _ in files_of(one.shard)}
        entries = {self._entry(one.shard.file).name for one in self.finished}
        for folder, names in ((self.shards, kept), (self._entries, entries)):
            for path in folder.iterdir():
                if path.name not in names:
                    path.unlink()

    def _remove_spools(self) -> None:
        for path in self._folder.iterdir():
            if path.is_dir() and path not in {self.shards, self._entries}:
                shutil.rmtree(path)


def files_of(shard: Shard) -> list[tuple[str, str]]:
    """Names and hashes of the files that a shard is made of."""
    sidecar = [(shard.sidecar.file, shard.sidecar.sha256)] if shard.sidecar else []
    return [*sidecar, (shard.file, shard.sha256)]


def is_whole(path: Path, sha256: str) -> bool:
    """Whether a file is there and has its hash."""
    return path.is_file() and files.sha256_file(path) == sha256


def _parsed(data: bytes) -> Finished | None:
    """None for anything but an entry: then the shard is made again."""
    try:
        entry = orjson.loads(data)
        return Finished(Shard.parse(entry["shard"]), int(entry["weight"]))
    except (orjson.JSONDecodeError, WireError, TypeError, KeyError, ValueError):
        return None
