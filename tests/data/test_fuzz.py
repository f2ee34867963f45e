"""Whatever bytes a dataset's files hold: a dataset, or an error of ours, and never much memory."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import payloads
from railbus_shared.contracts.artifacts import PayloadFormat
from railbus_shared.data.index import DatasetIndex
from railbus_shared.data.readers import numpy_dtype, open_shard
from railbus_shared.errors import IndexInvalid, RailbusError, SchemaInvalid, ShardCorrupt

PAYLOADS: tuple[PayloadFormat, ...] = get_args(PayloadFormat)
MAX_GROWTH_BYTES = 128 << 20
EXTREMES = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
JSON_PIECES = [
    b"-",
    b"null",
    b"1e999",
    b"99999999999999999999",
    b"../",
    b"[[[[",
    b"{}",
    b'"',
    b"\\ud800",
    b"\xff",
    b"0",
]

Edit = tuple[float, bytes]
"""Where in a file, from 0 to 1, and what is put there."""

places = st.floats(0, 1, exclude_max=True)
in_place = st.one_of(
    st.binary(min_size=1, max_size=4),
    st.sampled_from(EXTREMES).map(lambda number: number.to_bytes(8, "little")),
    st.sampled_from(EXTREMES[:5]).map(lambda number: number.to_bytes(4, "little")),
)


@contextmanager
def little_memory() -> Iterator[None]:
    """The process does not grow by more than so much."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    assert grown < MAX_GROWTH_BYTES


@contextmanager
def damaged(path: Path, edits: list[Edit], *, first: int = 0, keep_size: bool = True) -> Iterator[None]:
    """A file with other bytes from `first` on, for a while."""
    whole = path.read_bytes()
    data = bytearray(whole)
    for place, new in edits:
        at = first + int(place * (len(whole) - first))
        put = new[: len(data) - at] if keep_size else new
        data[at : at + (len(put) if keep_size else 1)] = put
    path.write_bytes(data)
    try:
        yield
    finally:
        path.write_bytes(whole)


def read_all(folder: Path, index: DatasetIndex) -> None:
    """Every sample of every column."""
    for number, shard in enumerate(index.file.shards):
        reader = open_shard(folder / "shards" / shard.file, index, number)
        rows = np.arange(shard.samples, dtype=np.int64)
        for name, column in index.schema.columns.items():
            count = int(reader.lengths(name, rows).sum()) if column.variable_length else len(rows)
            out = np.empty((count, *column.shape), numpy_dtype(column))
            (reader.take_items if column.variable_length else reader.take)(name, rows, out)


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> dict[PayloadFormat, Path]:
    folders: dict[PayloadFormat, Path] = {}
    for payload in PAYLOADS:
        folders[payload] = tmp_path_factory.mktemp(payload) / "d"
    for payload, folder in folders.items():
        payloads.write(folder, payload)
        read_all(folder, DatasetIndex.load(folder))
    return folders


@pytest.mark.parametrize("name", ["schema.json", "index.json"])
@pytest.mark.parametrize("payload", PAYLOADS)
def test_any_json_gives_a_dataset_or_an_error_of_ours(
    payload: PayloadFormat, name: str, datasets: dict[PayloadFormat, Path]
) -> None:
    folder = datasets[payload]

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.tuples(places, st.one_of(st.binary(max_size=3), st.sampled_from(JSON_PIECES))), max_size=3))
    def check(edits: list[Edit]) -> None:
        with damaged(folder / name, edits, keep_size=False):
            try:
                index = DatasetIndex.load(folder)
            except (SchemaInvalid, IndexInvalid):
                return
            try:
                index.check_files(folder / "shards")
                read_all(folder, index)
            except RailbusError as exc:
                assert isinstance(exc, ShardCorrupt | IndexInvalid)  # noqa: PT017 - an error is one of two good ends

    with little_memory():
        check()


HEADS: dict[PayloadFormat, tuple[str, int]] = {
    "columns": ("shard-00000.data", 0),
    "npy": ("shard-00000.data", 0),
    "raw": ("shard-00000.offsets", 0),
    "parquet": ("shard-00000.data", -1),
}


@pytest.mark.parametrize("payload", PAYLOADS)
def test_any_bytes_in_a_shard_give_samples_or_an_error_of_ours(
    payload: PayloadFormat, datasets: dict[PayloadFormat, Path]
) -> None:
    folder = datasets[payload]
    index = DatasetIndex.load(folder)
    path = folder / "shards" / HEADS[payload][0]
    footer = int.from_bytes(path.read_bytes()[-8:-4], "little") + 8
    starts = [0, path.stat().st_size - footer] if payload == "parquet" else [0]

    @settings(max_examples=200, deadline=None, derandomize=True)  # a fault in native code would end all tests
    @given(st.lists(st.tuples(places, in_place), min_size=1, max_size=3), st.sampled_from(starts))
    def check(edits: list[Edit], first: int) -> None:
        with damaged(path, edits, first=first):
            try:
                read_all(folder, index)
            except ShardCorrupt as exc:
                assert str(path) == exc.details["path"]  # noqa: PT017 - an error is one of two good ends

    with little_memory():
        check()
