# pyright: reportMissingImports=false
"""Reads samples with other people's readers and prints them as JSON; run by the Python of `.venv-peers`.

.venv-peers/bin/python tests/interop/read_with_peers.py FORMAT PATH
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

Samples = Iterator[dict[str, Any]]


def webdataset(path: Path) -> Samples:
    import webdataset as wds

    urls = [str(one) for one in sorted(path.glob("train-*.tar"))]
    for one in wds.WebDataset(urls, shardshuffle=False, empty_check=False).decode():
        found = {name.rpartition(".")[0] or name: value for name, value in one.items() if not name.startswith("__")}
        yield {**found, "key": one["__key__"]}


def mds(path: Path) -> Samples:
    from write_with_peers import stand_in_for_torchvision  # type: ignore[import-not-found]  # it lies beside us

    stand_in_for_torchvision()
    from streaming import StreamingDataset

    dataset = StreamingDataset(local=str(path), split="train", batch_size=1, shuffle=False)
    yield from (dataset[number] for number in range(len(dataset)))


def parquet(path: Path) -> Samples:
    import datasets

    found = datasets.load_dataset("parquet", data_dir=str(path), split="train", cache_dir=str(path / ".cache"))
    names = found.features["label"].names
    yield from ({**row, "label": names[row["label"]]} for row in found)


def images(path: Path) -> Samples:
    import datasets

    found = datasets.load_dataset("imagefolder", data_dir=str(path), split="train", cache_dir=str(path / ".cache"))
    names = found.features["label"].names
    yield from ({"image": np.asarray(row["image"]), "label": names[row["label"]]} for row in found)


def plain(value: object) -> object:
    """Arrays as lists, pictures as the value of their first pixel."""
    if isinstance(value, bytes):
        from PIL import Image

        value = np.asarray(Image.open(io.BytesIO(value)))
    if hasattr(value, "getpixel"):
        value = np.asarray(value)
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    return value


READERS: dict[str, Callable[[Path], Samples]] = {
    "webdataset": webdataset,
    "mds": mds,
    "parquet": parquet,
    "images": images,
}

if __name__ == "__main__":
    rows = READERS[sys.argv[1]](Path(sys.argv[2]))
    print(json.dumps([{name: plain(value) for name, value in row.items()} for row in rows]))
