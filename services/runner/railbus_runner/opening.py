"""`open_dataset`: a dataset in a script or a notebook, without NATS and without a job.

A shard is hashed before its first byte is used, once for this user on this host.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

import numpy as np
import torch

from railbus_runner.gathering import Batch, Gatherer
from railbus_runner.objects import SCHEMES, StoredDataset, open_object_store
from railbus_runner.pipeline import Transform
from railbus_runner.places import Part
from railbus_runner.reading import Ranges, Shuffle
from railbus_runner.shards import OpenShards
from railbus_runner.stream import ShardStream
from railbus_runner.vouching import HashedHere, user_memory
from railbus_shared.data.index import DatasetIndex
from railbus_shared.data.order import Window
from railbus_shared.data.selection import Selection
from railbus_shared.data.shard_paths import ShardPaths
from railbus_shared.errors import InvalidField, NotSupported

if TYPE_CHECKING:
    from railbus_shared.contracts.artifacts import DatasetSchema, Split


def open_dataset(path_or_url: str | Path, *, split: str | None = None, version: int | None = None) -> Dataset:
    """The dataset in a folder, for instance `learning/datasets/digits`, or at a URL of one: `file://`, `s3://`, `gs://`.

    Out of object storage (`pip install 'railbus[objects]'`) each shard comes into this user's cache when it is first
    read, and stays there.

    Args:
        path_or_url: of the folder that holds `schema.json`, `index.json` and `shards/`.
        split: the only one that is wanted; all samples unless given.
        version: an older one; the newest unless given.

    Raises DatasetNotFound, SchemaInvalid, IndexInvalid, NotFound for a split or version, NotSupported for another URL,
    NoSource if object storage cannot be asked.
    """
    stored: StoredDataset | None = None
    if str(path_or_url).partition("://")[0] in SCHEMES:
        stored = open_object_store(str(path_or_url), version=version)
        index, folder = stored.index, stored.folder
    else:
        folder = _folder(path_or_url)
        index = DatasetIndex.load(folder, version)
    selection = Selection.of([(0, index.shard_map.samples)] if split is None else [])
    if split is not None:
        selection = Selection.of_split(index.split(split))
    return Dataset(index, folder, split=split, selection=selection, stored=stored)


class Dataset:
    """A dataset that is open: its samples by number, its splits as streams of batches.

    Attributes:
        index: where the samples lie.
        paths: of the shards, by their numbers.
    """

    def __init__(
        self,
        index: DatasetIndex,
        folder: Path,
        *,
        split: str | None,
        selection: Selection,
        stored: StoredDataset | None = None,
    ) -> None:
        """`stored` brings shards that lie in object storage."""
        self.index = index
        self._split = split
        self._selection = selection
        self.paths = ShardPaths(index.shard_map, folder / "shards")
        self._stored = stored
        self._verify = stored or HashedHere(index, self.paths, memory=user_memory())

    def __repr__(self) -> str:
        name, version = self.index.about.name, self.index.shard_map.version
        return f"<Dataset {name} version {version}: {len(self)} samples of {', '.join(self.index.about.columns)}>"

    @property
    def schema(self) -> DatasetSchema:
        """Columns, splits, licence, source."""
        return self.index.schema

    @property
    def splits(self) -> Mapping[str, Split]:
        """Which samples each split has."""
        return MappingProxyType(self.schema.splits)

    def __len__(self) -> int:
        """Samples of the split, or of the whole dataset."""
        return self._selection.num_samples

    def __getitem__(self, number: int) -> Batch:
        """One sample: a tensor of each column. Raises IndexError for one that is not there, ShardCorrupt."""
        if not -len(self) <= number < len(self):
            raise IndexError(f"sample {number} of {len(self)}")
        samples = self._selection.samples(np.array([number % len(self)]))
        (shard,), rows = self.index.locate(samples)
        batch = self._gatherer.gather(Part(rows, ((int(shard), 0, 1),), None))
        return {name: column[0] for name, column in batch.items()}

    def __iter__(self) -> Iterator[Batch]:
        """The samples one by one; a stream is many times faster."""
        return (self[number] for number in range(len(self)))

    def stream(  # noqa: PLR0913 - what a stream is made of
        self,
        split: str | None = None,
        *,
        batch_size: int,
        seed: int = 0,
        shuffle: Shuffle = True,
        window: int | Window = 8,
        ranges: Ranges = (),
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        transform: Transform | None = None,
        workers: int = 0,
    ) -> ShardStream:
        """Batches of a split, of the one that the dataset was opened with unless another is given.

        See `ShardStream` for the settings. Raises InvalidField for one that does not fit, NotFound for a split.
        """
        return ShardStream(
            self.index,
            self.paths,
            split=self.chosen(split),
            batch_size=batch_size,
            seed=seed,
            shuffle=shuffle,
            window=window,
            ranges=ranges,
            drop_last=drop_last,
            rank=rank,
            world_size=world_size,
            device=torch.device(device),
            transform=transform,
            workers=workers,
            is_fetched=self._stored is not None and not self._stored.is_complete,
            ensure_verified=self._verify,
        )

    def chosen(self, split: str | None) -> str:
        """The split of that name, or the one that the dataset was opened with. Raises InvalidField if that is none."""
        name = split or self._split
        if name is None:
            raise InvalidField(
                field="split",
                value=None,
                problem="no split is chosen",
                hint=f"it has {', '.join(sorted(self.index.about.splits))}",
            )
        return name

    def shards(self) -> OpenShards:
        """Its shards, none of them open yet; each is hashed before it is opened."""
        return OpenShards(self.index, self.paths, ensure_verified=self._verify)

    def ensure_verified(self, numbers: Sequence[int]) -> None:
        """Hash these shards unless that is remembered. Raises ShardCorrupt for the first that is damaged."""
        self._verify(numbers)

    def verify(self) -> None:
        """Hash every shard, also those that are remembered. Raises ShardCorrupt for the first that is damaged."""
        self._verify(range(len(self.index.shard_map.shards)), again=True)

    @cached_property
    def _gatherer(self) -> Gatherer:
        return Gatherer(self.index.about.columns, self.shards())

    def __getstate__(self) -> dict[str, object]:
        """A copy for another process opens shards by itself."""
        return {name: value for name, value in self.__dict__.items() if name != "_gatherer"}


def _folder(path_or_url: str | Path) -> Path:
    """Raises NotSupported for a URL of anything but a local file."""
    text = str(path_or_url)
    if "://" not in text:
        return Path(path_or_url).expanduser().resolve()
    url = urlsplit(text)
    if url.scheme != "file" or url.netloc not in {"", "localhost"}:
        raise NotSupported(
            f"path_or_url has value {text!r}: only folders, file://, s3:// and gs:// URLs are opened here",
            hint="let the dataloader fetch it for a job, or copy the dataset to this host",
        )
    return Path(unquote(url.path))
