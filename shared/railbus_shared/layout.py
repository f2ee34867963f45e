"""The canonical tree: where everything lies under one root.

    <root>/
    ├── datasets/<dataset_name>/{schema.json, index.json, shards/shard-00000.data, versions/000001/}
    ├── models/<model_name>/{model_schema.json, checkpoints/checkpoint-000123.{pt,meta.json}}
    ├── logs/<YYYY>/<MM>/<DD>/{trainer.log.jsonl.gz, trainer.log.jsonl, trainer.log.jsonl.begun}
    └── .railbus/                       what railbus keeps for itself: keys, NATS store, run files
        └── cache/<key[:2]>/<key>/      a shard of a dataset that lies elsewhere, with its sidecar

No other module joins these names. Every name is checked before a path is built from it.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Final

from railbus_shared.names import checked_name

LOG_NAME: Final = "trainer.log.jsonl"
CLOSED_LOG_NAME: Final = "trainer.log.jsonl.gz"
BEGUN_LOG_NAME: Final = "trainer.log.jsonl.begun"
"""What is written while the plain file joins the closed one, whose name it then takes.

A shell opens it between the two, by its name: a line moves only to what is opened later, or an open says that a file
has gone.
"""
LOG_INDEX_NAME: Final = ".index"
"""Beside a day's closed log: what it holds, as far as readers can pass over it."""
_CHECKPOINT: Final = re.compile(r"checkpoint-([0-9]{6,})\.meta\.json\Z")


@dataclass(frozen=True)
class Layout:
    """Paths under one root."""

    root: Path

    @property
    def datasets(self) -> Path:
        return self.root / "datasets"

    @property
    def models(self) -> Path:
        return self.root / "models"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def state(self) -> Path:
        """What railbus keeps for itself; nothing in it is part of the canonical layout."""
        return self.root / ".railbus"

    @property
    def cache(self) -> Path:
        """Shards of datasets that lie elsewhere; all of it can be fetched again."""
        return self.state / "cache"

    def cached(self, key: str) -> Path:
        """Folder of one shard and its sidecar, under the names that their index gives; `key` is a hex SHA-256."""
        return cached_shard(self.cache, key)

    @property
    def cached_indexes(self) -> Path:
        """Schemas and indexes of datasets that lie elsewhere, by the hash of the index; outside the cache's budget."""
        return self.cache / "indexes"

    def dataset(self, name: str) -> Path:
        return self.datasets / checked_name(name, kind="dataset")

    def schema(self, name: str) -> Path:
        return self.dataset(name) / "schema.json"

    def index(self, name: str) -> Path:
        return self.dataset(name) / "index.json"

    def shards(self, name: str) -> Path:
        return self.dataset(name) / "shards"

    def version(self, name: str, number: int) -> Path:
        """Schema and index of a version of a dataset that has been appended to since."""
        return version_folder(self.dataset(name), number)

    def model(self, name: str) -> Path:
        return self.models / checked_name(name, kind="model")

    def model_schema(self, name: str) -> Path:
        return self.model(name) / "model_schema.json"

    def checkpoints(self, name: str) -> Path:
        return self.model(name) / "checkpoints"

    def checkpoint_meta(self, name: str, number: int) -> Path:
        """The commit record of a checkpoint of a model."""
        return self.checkpoints(name) / f"{checkpoint_stem(number)}.meta.json"

    def day(self, day: date) -> Path:
        return self.logs / f"{day:%Y}" / f"{day:%m}" / f"{day:%d}"

    def log_days(self) -> Iterator[date]:
        """Days that have a log folder, oldest first; a folder that looks like a day and is none is passed over."""
        for year in _numbered(self.logs, 4):
            for month in _numbered(self.logs / year, 2):
                for day in _numbered(self.logs / year / month, 2):
                    with contextlib.suppress(ValueError):
                        yield date(int(year), int(month), int(day))


def _numbered(folder: Path, digits: int) -> list[str]:
    """Names in a folder that are numbers of so many digits, in order; none if the folder vanishes meanwhile."""
    try:
        names = [path.name for path in folder.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(name for name in names if len(name) == digits and name.isascii() and name.isdigit())


def cached_shard(cache: Path, key: str) -> Path:
    """In the folder of a cache, that of one shard and its sidecar."""
    return cache / key[:2] / key


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.data"


def version_folder(dataset: Path, number: int) -> Path:
    """Where a dataset in a folder keeps an older version; at least six digits."""
    return dataset / "versions" / f"{number:06d}"


def checkpoint_stem(number: int) -> str:
    """`checkpoint-000123`; at least six digits, more where the serial needs them."""
    return f"checkpoint-{number:06d}"


def checkpoint_number(meta_name: str) -> int | None:
    """The serial in the name of a checkpoint's meta file, or None if it is no such name."""
    match = _CHECKPOINT.match(meta_name)
    number = int(match[1]) if match and len(match[1]) <= 12 else 0
    return number if number > 0 and meta_name == f"{checkpoint_stem(number)}.meta.json" else None
