"""Batches a second against every loader that people use, and against the limit of the machine.

    python -m benchmarks data [FOLDER]

Tokens are samples of 2048 int32 (512 MiB in all), images 8 to 16 KiB of bytes with a label (480 MiB); batches of 32.
Each loader is a process of its own that waits until it is told to deliver for a second; they take turns, five rounds,
so that whatever else happens on the machine happens to all. The peers live in an environment of their own (`make
bench-peers`); without it only the hand-written gather and the limit are told. FOLDER keeps the data (8 GB) for the next
time.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.results import Cell, command, show, tell
from railbus_shared import files
from railbus_shared.contracts.artifacts import Column, ColumnExtent, DatasetSchema, IndexFile, Shard, Split
from railbus_shared.data.ragged import Ragged
from railbus_shared.data.writer import write_dataset
from railbus_shared.layout import Layout, shard_name

REPO: Final = Path(__file__).parents[1]
PEERS_PYTHON: Final = REPO / ".venv-peers" / "bin" / "python"
PEERS: Final = (
    "gather", "dataset", "litdata", "mosaicml", "webdataset", "hf_datasets", "grain", "tf_data", "tf_data_service"
)  # fmt: skip
TARGETS: Final[dict[tuple[str, str], dict[str, float]]] = {
    ("tokens", "shuffled"): {"tf_data_service": 8, "litdata": 6, "mosaicml": 50, "gather": 1.5},
    ("images", "shuffled"): {"tf_data_service": 6, "litdata": 1.3, "mosaicml": 30, "gather": 1},
}
"""How many times as fast railbus is to be."""
FIRST_BATCH_S: Final = 0.05
OPEN_S: Final = 0.1
OPEN_BYTES: Final = 100 << 20
HELD_BATCHES: Final = 2
MANY_SHARDS: Final = {"tokens": "tokens8", "images": "images8"}
"""The same in shards of 64 MiB, so that a batch comes out of several."""

_MANY_SHARD_BYTES: Final = 64 << 20
_ROUNDS: Final = 5
_ROUND_S: Final = 1.0
_TOKENS: Final = (65_536, 2048)
_IMAGES: Final = 40_960
_LARGE: Final = (10_000_000, 1000)


@dataclass
class Loader:
    """A process that delivers batches while it is told to."""

    name: str
    process: subprocess.Popen[str]
    first_batch_s: float = 0.0
    rates: list[float] = field(default_factory=list)
    """Thousand samples a second, of each round."""

    def deliver(self, seconds: float) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{seconds}\n")
        self.process.stdin.flush()
        found = self.answer()
        self.rates.append(found["samples"] / found["seconds"] / 1000)

    def answer(self) -> dict[str, float]:
        """Its next JSON line; other lines are the libraries' own."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                found: dict[str, float] = json.loads(line)
                return found
        raise AssertionError(f"{self.name} ended with {self.process.wait()}")

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)


@contextlib.contextmanager
def started(name: str, kind: str, order: str, folder: Path) -> Iterator[Loader]:
    """A loader that has delivered its first batch."""
    ours = name in {"railbus", "limit"} or (name == "gather" and not PEERS_PYTHON.exists())
    module = "benchmarks.our_loader" if name in {"railbus", "limit"} else "benchmarks.peers.loader"
    python = sys.executable if ours else str(PEERS_PYTHON)
    process = subprocess.Popen(
        [python, "-m", module, name, kind, order, str(folder)],
        cwd=REPO, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
    )  # fmt: skip
    loader = Loader(name, process)
    try:
        loader.first_batch_s = loader.answer()["first_batch_s"]
        yield loader
    finally:
        process.kill()
        process.communicate()


def measure(kind: str, order: str, folder: Path) -> list[Loader]:
    """All loaders in turns; a first round warms them and does not count."""
    names = ["railbus", "limit", *(PEERS if PEERS_PYTHON.exists() else ("gather",))]
    with contextlib.ExitStack() as stack:
        loaders = [stack.enter_context(started(name, kind, order, folder)) for name in names]
        for number in range(_ROUNDS + 1):
            for loader in loaders:
                loader.deliver(_ROUND_S)
                if number == 0:
                    loader.rates.clear()
        return loaders


def report(kind: str, order: str, loaders: list[Loader]) -> None:
    railbus, targets = loaders[0], TARGETS.get((kind, order), {})
    rows: list[list[Cell]] = []
    for loader in loaders:
        ratios = [ours / theirs for ours, theirs in zip(railbus.rates, loader.rates, strict=True)]
        spread = f"{min(loader.rates):.0f} to {max(loader.rates):.0f}"
        target = f"{targets[loader.name]:g}" if loader.name in targets else ""
        rows.append(
            [
                loader.name,
                f"{loader.rate:.1f}",
                spread,
                f"{statistics.median(ratios):.2f}",
                target,
                loader.first_batch_s,
            ]
        )
    header = ["", "thousand/s", "range", "railbus is", "target", "first batch, s"]
    show(f"$ {command('data')}   {kind}, {order}: thousand samples a second", header=header, rows=rows)
    ratios_told = {row[0]: float(str(row[3])) for row in rows}
    tell(
        "data",
        kind=kind,
        order=order,
        rounds=_ROUNDS,
        thousand_samples_s={loader.name: round(loader.rate, 1) for loader in loaders},
        ratio=ratios_told,
        targets=targets,
        within_target=all(ratios_told.get(name, target) >= target for name, target in targets.items()),
    )


def report_costs(folder: Path) -> None:
    """First batches in fresh processes, a large index, and memory."""
    firsts = []
    for _ in range(_ROUNDS):
        with started("railbus", "tokens", "shuffled", folder) as loader:
            firsts.append(loader.first_batch_s)
    opened = [_said("index", str(folder)) for _ in range(_ROUNDS)]
    held = {kind: _said("memory", kind, str(folder)) for kind in ("tokens", "images", *MANY_SHARDS.values())}
    open_s = statistics.median(one["open_s"] + one["resume_s"] for one in opened)
    open_mib = max(one["bytes"] for one in opened) / (1 << 20)
    rows: list[list[Cell]] = [
        ["first batch in a process that has torch, s", statistics.median(firsts), FIRST_BATCH_S],
        ["open and resume ten million samples in 1000 shards, s", open_s, OPEN_S],
        ["the same, MiB", open_mib, OPEN_BYTES >> 20],
        *(
            [f"held beyond torch and maps, batches of {k}", h["bytes"] / h["batch_bytes"], HELD_BATCHES]
            for k, h in held.items()
        ),
    ]
    show(f"$ {command('data')}   costs (medians of five)", header=["", "measured", "target"], rows=rows)
    tell("data", costs={str(row[0]): round(float(row[1]), 4) for row in rows})


def _said(*arguments: str) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.our_loader", *arguments],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, float] = json.loads(done.stdout)
    return found


def make_data(folder: Path) -> None:
    """The samples as NumPy files, as datasets of ours, and in the formats of the peers that are installed."""
    if not (folder / "labels.npy").exists():
        _make_arrays(folder)
    layout = Layout(folder / "learning")
    _make_tokens(layout, folder)
    _make_images(layout, folder)
    _make_large(layout)
    if PEERS_PYTHON.exists():
        subprocess.run(
            [PEERS_PYTHON, "-m", "benchmarks.peers.write", str(folder)], cwd=REPO, check=True, stdout=sys.stderr
        )


def _make_arrays(folder: Path) -> None:
    random: Any = np.random.default_rng(7)
    np.save(folder / "tokens.npy", random.integers(0, 50_000, _TOKENS, dtype=np.int32))
    offsets = np.zeros(_IMAGES + 1, np.int64)
    np.cumsum(random.integers(8 << 10, 16 << 10, _IMAGES), out=offsets[1:])
    np.save(folder / "images.npy", random.integers(0, 256, int(offsets[-1]), dtype=np.uint8))
    np.save(folder / "offsets.npy", offsets)
    np.save(folder / "labels.npy", random.integers(0, 10, _IMAGES))


def _make_tokens(layout: Layout, folder: Path) -> None:
    tokens = np.load(folder / "tokens.npy", mmap_mode="r")
    schema = DatasetSchema(
        name="tokens",
        columns={"tokens": Column(dtype="int32", shape=(_TOKENS[1],))},
        splits={"train": Split(first=0, samples=len(tokens))},
    )
    _write(layout, schema, lambda: ({"tokens": tokens[at : at + 4096]} for at in range(0, len(tokens), 4096)))


def _make_images(layout: Layout, folder: Path) -> None:
    values, offsets = np.load(folder / "images.npy", mmap_mode="r"), np.load(folder / "offsets.npy")
    labels = np.load(folder / "labels.npy")
    schema = DatasetSchema(
        name="images",
        columns={
            "image": Column(dtype="uint8", shape=(), variable_length=True),
            "label": Column(dtype="int64", shape=(), num_classes=10),
        },
        splits={"train": Split(first=0, samples=len(labels))},
    )
    _write(layout, schema, lambda: [{"image": Ragged(values, offsets), "label": labels}])


def _write(layout: Layout, schema: DatasetSchema, parts: Callable[[], Iterable[Any]]) -> None:
    """The dataset in one shard, and in several, as far as they are missing."""
    if not layout.index(schema.name).exists():
        write_dataset(layout, schema, parts())
    if not layout.index(many := MANY_SHARDS[schema.name]).exists():
        write_dataset(layout, schema.changed(name=many), parts(), shard_bytes=_MANY_SHARD_BYTES)


def _make_large(layout: Layout) -> None:
    """An index of ten million samples of 8 KiB in a thousand shards, whose files are all hole."""
    samples, shards = _LARGE
    each = samples // shards
    size = each * 8192
    schema = DatasetSchema(
        name="large",
        columns={"tokens": Column(dtype="int32", shape=(2048,))},
        splits={"train": Split(first=0, samples=samples)},
    )
    if layout.index("large").exists():
        return
    layout.shards("large").mkdir(parents=True, exist_ok=True)
    listed = []
    for number in range(shards):
        with (layout.shards("large") / shard_name(number)).open("wb") as file:
            file.truncate(size + 64)
        extent = {"tokens": ColumnExtent(offset=64, bytes=size)}
        listed.append(
            Shard(
                file=shard_name(number),
                bytes=size + 64,
                sha256="0" * 64,
                first_sample=number * each,
                samples=each,
                columns=extent,
            )
        )
    files.write_whole(layout.schema("large"), files.to_json(schema.to_map()))
    index = IndexFile(
        dataset="large",
        schema_sha256=files.sha256_file(layout.schema("large")),
        samples=samples,
        bytes=shards * (size + 64),
        shards=tuple(listed),
    )
    files.write_whole(layout.index("large"), files.to_json(index.to_map()))


def main() -> None:
    with contextlib.ExitStack() as stack:
        if len(sys.argv) > 1:
            folder = Path(sys.argv[1])
            folder.mkdir(parents=True, exist_ok=True)
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        make_data(folder)
        for kind in ("tokens", "images"):
            for order in ("sequential", "shuffled"):
                report(kind, order, measure(kind, order, folder))
        report_costs(folder)


if __name__ == "__main__":
    main()
