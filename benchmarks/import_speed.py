"""How near an import comes to the disk and the hash: a dataset against the same bytes written and hashed raw.

    python -m benchmarks import_speed [FOLDER [MIB]]

Tokens are samples of 2048 int32, images of 8 to 16 KiB of bytes and of variable length; both come in chunks of some
megabytes that lie in memory. The raw limit writes, hashes and flushes the same bytes into files of the size of shards,
in one thread; it is measured in turns with the import, on the same disk. `CPU` is the ratio of processor time; above 1
the import is better in both.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks.results import Cell, command, show, tell
from railbus_shared.contracts.artifacts import Column, DatasetSchema, Split
from railbus_shared.data.ragged import Ragged
from railbus_shared.data.writer import SHARD_BYTES, Chunk, write_dataset
from railbus_shared.layout import Layout

ROUNDS = 5
CHUNK_BYTES = 8 << 20
NUM_CHUNKS = 8
"""Different ones; they come again and again."""
BLOCK_BYTES = 1 << 20
TOKENS = Column(dtype="int32", shape=(2048,))
IMAGES = Column(dtype="uint8", shape=(), variable_length=True)


def token_chunks() -> list[Chunk]:
    random = np.random.default_rng(0)
    shape = (CHUNK_BYTES // 8192, 2048)
    return [{"x": random.integers(0, 50_000, shape, np.int32)} for _ in range(NUM_CHUNKS)]


def image_chunks() -> list[Chunk]:
    random = np.random.default_rng(1)
    chunks: list[Chunk] = []
    for _ in range(NUM_CHUNKS):
        ends = np.cumsum(random.integers(8 << 10, 16 << 10, CHUNK_BYTES // (12 << 10)))
        offsets = np.concatenate([[0], ends])
        chunks.append({"x": Ragged(random.integers(0, 256, int(ends[-1]), np.uint8), offsets)})
    return chunks


def repeated(chunks: list[Chunk], *, size: int) -> Iterator[Chunk]:
    """Chunks until there are so many bytes."""
    sizes = [len(memoryview(blob(chunk)).cast("B")) for chunk in chunks]
    number = 0
    while size > 0:
        yield chunks[number % len(chunks)]
        size -= sizes[number % len(chunks)]
        number += 1


def blob(chunk: Chunk) -> memoryview:
    """A chunk's values as bytes."""
    column = chunk["x"]
    return memoryview((column.values if isinstance(column, Ragged) else column).reshape(-1).view(np.uint8))


def raw(folder: Path, chunks: Iterator[Chunk]) -> None:
    """The limit: the same bytes in files as large as shards, each hashed, flushed and closed."""
    folder.mkdir()
    number = size = 0
    fd, digest = -1, hashlib.sha256()
    for chunk in chunks:
        data = blob(chunk)
        for at in range(0, len(data), BLOCK_BYTES):
            if fd < 0:
                fd = os.open(folder / str(number), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            block = data[at : at + BLOCK_BYTES]
            os.write(fd, block)
            digest.update(block)
            size += len(block)
            if size >= SHARD_BYTES:
                close(fd)
                fd, digest, number, size = -1, hashlib.sha256(), number + 1, 0
    if fd >= 0:
        close(fd)


def close(fd: int) -> None:
    os.fsync(fd)
    os.close(fd)


def imported(folder: Path, column: Column, chunks: Iterator[Chunk]) -> None:
    schema = DatasetSchema(name="bench", columns={"x": column}, splits={"train": Split(first=0, samples=1)})
    write_dataset(Layout(folder), schema, chunks)


@dataclass(frozen=True)
class Took:
    """Seconds of one piece of work."""

    wall_s: float
    cpu_s: float


def took(work: Callable[[], None], folder: Path) -> Took:
    """How long work into a folder takes that is gone afterwards."""
    began, used = time.perf_counter(), time.process_time()
    work()
    found = Took(time.perf_counter() - began, time.process_time() - used)
    shutil.rmtree(folder)
    return found


def measured(root: Path, column: Column, chunks: list[Chunk], *, size: int) -> tuple[list[Took], list[Took]]:
    """Each raw write and each import, in turns."""
    raws, imports = [], []
    for _ in range(ROUNDS):
        raws.append(took(lambda: raw(root / "raw", repeated(chunks, size=size)), root / "raw"))
        imports.append(took(lambda: imported(root / "tree", column, repeated(chunks, size=size)), root / "tree"))
    return raws, imports


def row(name: str, raws: list[Took], imports: list[Took], *, size: int) -> list[Cell]:
    ratios = sorted(one.wall_s / other.wall_s for one, other in zip(raws, imports, strict=True))
    cpu = statistics.median(one.cpu_s / other.cpu_s for one, other in zip(raws, imports, strict=True))
    return [
        name,
        size / statistics.median(one.wall_s for one in raws) / 1e6,
        size / statistics.median(one.wall_s for one in imports) / 1e6,
        statistics.median(ratios),
        f"{ratios[0]:.2f} to {ratios[-1]:.2f}",
        cpu,
    ]


def main() -> None:
    """Measure, tell, and leave nothing."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.gettempdir())
    size = (int(sys.argv[2]) if len(sys.argv) > 2 else 1024) << 20
    rows = []
    with tempfile.TemporaryDirectory(dir=folder, prefix="import-speed-") as root:
        for name, column, chunks in (("tokens", TOKENS, token_chunks()), ("images", IMAGES, image_chunks())):
            raws, imports = measured(Path(root), column, chunks, size=size)
            rows.append(row(name, raws, imports, size=size))
            tell(
                "import_speed",
                kind=name,
                bytes=size,
                raw=[asdict(one) for one in raws],
                imported=[asdict(one) for one in imports],
            )
    show(
        f"import of {size >> 20} MiB, {ROUNDS} rounds in turns: {command('import_speed')}",
        header=["dataset", "raw MB/s", "import MB/s", "import / raw", "range", "CPU"],
        rows=rows,
    )


if __name__ == "__main__":
    main()
