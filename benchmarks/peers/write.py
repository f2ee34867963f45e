"""The samples of `benchmarks.data` in the format of every peer, from two NumPy files.

    python -m benchmarks.peers.write FOLDER

FOLDER holds `tokens.npy` int32 (samples, 2048), `images.npy` uint8 (bytes,), `offsets.npy` int64 (samples + 1,) and
`labels.npy` int64 (samples,). Runs in the environment of the peers, without railbus. What is there already stays.
"""

from __future__ import annotations

import io
import shutil
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.loaders import _stand_in_for_torchvision


def samples(folder: Path, kind: str) -> Iterator[tuple[Any, int]]:
    """Each sample's array, with its label (0 for tokens)."""
    values = np.load(folder / f"{kind}.npy", mmap_mode="r")
    if kind == "tokens":
        yield from ((np.array(row), 0) for row in values)
        return
    offsets, labels = np.load(folder / "offsets.npy"), np.load(folder / "labels.npy")
    for row, label in enumerate(labels):
        yield np.array(values[offsets[row] : offsets[row + 1]]), int(label)


def mds(folder: Path, kind: str, target: Path) -> None:
    _stand_in_for_torchvision()
    from streaming import MDSWriter

    columns = {"tokens": "ndarray:int32"} if kind == "tokens" else {"image": "bytes", "label": "int"}
    with MDSWriter(out=str(target), columns=columns) as out:
        for values, label in samples(folder, kind):
            out.write({"tokens": values} if kind == "tokens" else {"image": values.tobytes(), "label": label})


def tfrecord(folder: Path, kind: str, target: Path) -> None:
    import tensorflow as tf

    target.mkdir()
    for number, part in enumerate(_parts(samples(folder, kind))):
        with tf.io.TFRecordWriter(str(target / f"{number:05d}.tfrecord")) as out:
            for values, _ in part:
                out.write(values.tobytes())


def wds(folder: Path, kind: str, target: Path) -> None:
    target.mkdir()
    row = 0
    for number, part in enumerate(_parts(samples(folder, kind))):
        with tarfile.open(target / f"{number:05d}.tar", "w") as out:
            for values, _ in part:
                member = tarfile.TarInfo(f"{row:08d}.bin")
                member.size = values.nbytes
                out.addfile(member, io.BytesIO(values.tobytes()))
                row += 1


def hf(folder: Path, kind: str, target: Path) -> None:
    import pyarrow as pa
    from datasets import Dataset

    values = np.load(folder / f"{kind}.npy", mmap_mode="r")
    if kind == "tokens":
        rows = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
        Dataset(pa.table({"tokens": rows})).save_to_disk(str(target))
        return
    offsets, labels = np.load(folder / "offsets.npy"), np.load(folder / "labels.npy")
    images = pa.array([values[offsets[i] : offsets[i + 1]].tobytes() for i in range(len(labels))], pa.large_binary())
    Dataset(pa.table({"image": images, "label": pa.array(labels)})).save_to_disk(str(target))


def litdata(folder: Path, kind: str, target: Path) -> None:
    from litdata import optimize

    pick = _Pick(folder, kind)
    optimize(fn=pick, inputs=list(range(len(pick))), output_dir=str(target), chunk_bytes="64MB", num_workers=1)


class _Pick:
    """A sample by its number, for a worker process."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder, self.kind = folder, kind

    def __len__(self) -> int:
        return len(np.load(self.folder / ("tokens.npy" if self.kind == "tokens" else "labels.npy"), mmap_mode="r"))

    def __call__(self, row: int) -> Any:
        values = np.load(self.folder / f"{self.kind}.npy", mmap_mode="r")
        if self.kind == "tokens":
            return np.array(values[row])
        offsets = np.load(self.folder / "offsets.npy", mmap_mode="r")
        label = np.load(self.folder / "labels.npy", mmap_mode="r")[row]
        return bytes(values[offsets[row] : offsets[row + 1]]), int(label)


def _parts(rows: Iterator[tuple[Any, int]], *, part_bytes: int = 64 << 20) -> Iterator[Iterator[tuple[Any, int]]]:
    """The samples in parts of about so many bytes, each to be read to its end before the next."""
    held = next(rows, None)

    def part() -> Iterator[tuple[Any, int]]:
        nonlocal held
        size = 0
        while held is not None and size < part_bytes:
            size += held[0].nbytes
            yield held
            held = next(rows, None)

    while held is not None:
        yield part()


def main() -> None:
    folder = Path(sys.argv[1])
    for name in ("tfrecord", "wds", "hf", "mds", "litdata"):
        for kind in ("tokens", "images"):
            target = folder / f"{name}-{kind}"
            if not target.exists():
                beside = folder / f"unfinished-{name}-{kind}"
                shutil.rmtree(beside, ignore_errors=True)
                globals()[name](folder, kind, beside)
                beside.rename(target)
            print(target.name, flush=True)


if __name__ == "__main__":
    main()
