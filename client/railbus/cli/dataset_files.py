"""What the dataset commands share: finding a dataset by name, and telling what it is."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

from railbus.cli.render import size
from railbus_shared.errors import DatasetNotFound

if TYPE_CHECKING:
    from railbus_shared.data.index import DatasetIndex
    from railbus_shared.layout import Layout


def load(layout: Layout, name: str) -> DatasetIndex:
    """A dataset's schema and index; raises DatasetNotFound with the nearest name, SchemaInvalid, IndexInvalid."""
    from railbus_shared.data.index import DatasetIndex

    folder = layout.dataset(name)
    if not folder.is_dir():
        known = names(layout)
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(known) or 'none'}"
        raise DatasetNotFound(
            f"dataset has value {name!r}: none of this name lies under {str(layout.datasets)!r}", hint=hint
        )
    return DatasetIndex.load(folder)


def names(layout: Layout) -> list[str]:
    """Folders that may be datasets."""
    if not layout.datasets.is_dir():
        return []
    return sorted(path.name for path in layout.datasets.iterdir() if path.is_dir() and not path.name.startswith("."))


def summary(index: DatasetIndex) -> dict[str, object]:
    """What `--json` tells of a dataset."""
    file = index.file
    return {
        "dataset": file.dataset,
        "samples": file.samples,
        "num_shards": len(file.shards),
        "bytes": file.bytes,
        "splits": {name: {"samples": split.samples} for name, split in index.schema.splits.items()},
        "index_sha256": index.sha256,
    }


def counted(index: DatasetIndex) -> str:
    """How much there is of a dataset, in words."""
    shards = len(index.file.shards)
    return f"{index.file.samples} samples in {shards} shard{'' if shards == 1 else 's'}, {size(index.file.bytes)}"
