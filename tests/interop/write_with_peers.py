# pyright: reportMissingImports=false
"""Writes a few samples with other people's writers; run by the Python of `.venv-peers`, never imported.

    .venv-peers/bin/python tests/interop/write_with_peers.py FORMAT FOLDER

`tests/interop/fixtures/` was made by it, so that `make test` reads what they wrote where they are not installed.
"""

from __future__ import annotations

import importlib.util
import struct
import sys
import types
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

COUNT = 5
NAMES = ["cat", "dog", "eel"]


def png(number: int) -> bytes:
    """A grey picture of 2 by 2 pixels."""

    def part(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    lines = zlib.compress(bytes([0, number, number, 0, number, number]))
    head = struct.pack(">IIBBBBB", 2, 2, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", head) + part(b"IDAT", lines) + part(b"IEND", b"")


def sample(number: int) -> dict[str, Any]:
    """Sample `number`, of which every value tells the number."""
    return {
        "id": number,
        "f": number / 4,
        "text": "ä" * number,
        "fix": np.array([number, 1, 2], np.float32),
        "var": np.arange(number + 1, dtype=np.int32),
        "label": number % 3,
        "image": png(number),
    }


def webdataset(folder: Path) -> None:
    import webdataset as wds

    folder.mkdir(parents=True)
    with wds.TarWriter(str(folder / "train-000000.tar"), mtime=0) as sink:
        for number in range(COUNT):
            one = sample(number)
            sink.write(
                {
                    "__key__": f"sample{number}",
                    "id.cls": one["id"],
                    "text.txt": one["text"],
                    "fix.npy": one["fix"],
                    "var.npy": one["var"],
                    "label.cls": one["label"],
                    "image.png": one["image"],
                    "meta.json": {"f": one["f"]},
                }
            )


def stand_in_for_torchvision() -> None:
    """MosaicML's package imports torchvision for datasets that are not used here, and no build of it fits our torch."""
    if importlib.util.find_spec("torchvision") is not None:
        return
    from transformers.feature_extraction_utils import BatchFeature  # noqa: F401 - it asks whether there is one

    for name in ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional"):
        sys.modules[name] = types.ModuleType(name)
    datasets: Any = sys.modules["torchvision.datasets"]
    datasets.VisionDataset = type("VisionDataset", (), {})
    datasets.CIFAR10 = type("CIFAR10", (), {})
    functional: Any = sys.modules["torchvision.transforms.functional"]
    functional.to_tensor = None


def mds(folder: Path, *, compression: str | None = None) -> None:
    stand_in_for_torchvision()
    from streaming import MDSWriter

    columns = {
        "id": "int", "f": "float64", "text": "str", "fix": "ndarray:float32:3", "var": "ndarray", "label": "int32",
        "image": "bytes", "meta": "json", "digits": "str_int",
    }  # fmt: skip
    settings = {"columns": columns, "compression": compression, "hashes": ["sha1"], "size_limit": 1024}
    with MDSWriter(out=str(folder), **settings) as writer:
        for number in range(COUNT):
            writer.write({**sample(number), "meta": {"k": number}, "digits": number})


def mds_zstd(folder: Path) -> None:
    mds(folder, compression="zstd:3")


def saved(folder: Path) -> None:
    import datasets

    features = datasets.Features(
        {
            "id": datasets.Value("int64"),
            "f": datasets.Value("float64"),
            "text": datasets.Value("string"),
            "fix": datasets.List(datasets.Value("float32"), length=3),
            "var": datasets.List(datasets.Value("int32")),
            "label": datasets.ClassLabel(names=NAMES),
            "image": datasets.Image(),
        }
    )
    rows = [{**sample(number), "image": {"bytes": png(number), "path": None}} for number in range(COUNT)]
    columns = {name: [row[name] for row in rows] for name in features}
    whole = datasets.Dataset.from_dict(columns, features=features)
    parts = {"train": whole.select(range(3)), "test": whole.select(range(3, COUNT))}
    datasets.DatasetDict(parts).save_to_disk(str(folder))


def parquet(folder: Path) -> None:
    import datasets

    saved(folder / "saved")
    for name, part in datasets.load_from_disk(str(folder / "saved")).items():
        part.to_parquet(str(folder / f"{name}-00000-of-00001.parquet"))


WRITERS: dict[str, Callable[[Path], None]] = {
    "webdataset": webdataset,
    "mds": mds,
    "mds-zstd": mds_zstd,
    "saved": saved,
    "parquet": parquet,
}

if __name__ == "__main__":
    WRITERS[sys.argv[1]](Path(sys.argv[2]))
