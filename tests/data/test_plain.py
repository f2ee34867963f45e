"""What is taken without pydantic is what the contracts take, with the same values; and it is not loaded for reading."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import small_datasets
from railbus_shared.contracts.artifacts import DatasetSchema, IndexFile
from railbus_shared.contracts.model import Contract
from railbus_shared.data.plain import plain_index, plain_schema
from railbus_shared.errors import WireError
from railbus_shared.layout import Layout

SHA = "0123456789abcdef" * 4
SCHEMA: dict[str, Any] = {
    "format_version": 1, "name": "d.e-f_1", "version": "2", "description": "é", "licence": "x", "source": "y",
    "payload": "columns", "created_at": "2026-11-23T21:45:35.000000001Z",
    "columns": {
        "x": {"dtype": "float32", "shape": [2, 3], "variable_length": False, "description": "z"},
        "label": {"dtype": "int64", "shape": [], "num_classes": 2, "labels": ["a", "b"]},
        "text": {"dtype": "uint8", "shape": [], "variable_length": True, "encoding": "utf-8"},
    },
    "splits": {"train": {"first": 0, "samples": 3}, "test": {"first": 3, "samples": 2, "ranges": [
        {"first": 3, "samples": 1}, {"first": 9, "samples": 1}]}},
}  # fmt: skip
INDEX: dict[str, Any] = {
    "format_version": 1, "dataset": "d", "version": 2, "parent_sha256": SHA, "schema_sha256": SHA, "payload": "raw",
    "samples": 5, "bytes": 12,
    "shards": [
        {
            "file": "shard-00000.data", "bytes": 12, "sha256": SHA, "first_sample": 0, "samples": 5,
            "columns": {"x": {"offset": 0, "bytes": 4}, "y": {"offset": 4, "bytes": 8, "offsets": {
                "offset": 0, "bytes": 48}}},
            "sidecar": {"file": "shard-00000.offsets", "bytes": 48, "sha256": SHA},
            "row_groups": [{"samples": 5}],
        },
        {"file": "shard-00001.data", "bytes": 1, "sha256": SHA, "first_sample": 5, "samples": 1},
    ],
}  # fmt: skip
ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 2**63 - 1, 2**63, 1.0, 0.5, "", "x", "X", "a..b", "a\n", "0", "é", SHA, f"{SHA}\n",
    SHA.upper(), "raw", "float32", "2026-11-23T21:45:35Z", "2026-13-23T21:45:35Z", [], [1], [-1], [True], ["a"], [[]],
    [{}], {}, {"a": 1}, {"a": {}}, {"A": {"first": 0, "samples": 1}}, {"x": {"offset": 0, "bytes": 1}},
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a tree of maps and lists."""
    yield path
    items: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in items:
        yield from places(one, (*path, key))


def variants(whole: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The map with one place changed, in every way that is thought of here."""
    yield whole
    for path in places(whole):
        if not path:
            continue
        for odd in (..., *ODD):
            changed = copy.deepcopy(whole)
            parent = changed
            for key in path[:-1]:
                parent = parent[key]
            if odd is ...:
                del parent[path[-1]]
            else:
                parent[path[-1]] = odd
            yield changed
        changed = copy.deepcopy(whole)
        at = changed
        for key in path:
            at = at[key]
        if isinstance(at, dict):
            at["further"] = 1
            yield changed


def judged(contract: type[Contract], told: dict[str, Any]) -> Any:
    try:
        return contract.parse(told)
    except WireError:
        return None


def same_schema(plain: Any, schema: DatasetSchema) -> None:
    assert (plain.name, plain.payload) == (schema.name, schema.payload)
    assert {n: tuple(c) for n, c in plain.columns.items()} == {
        n: (c.dtype, c.shape, c.variable_length, c.num_classes, c.labels) for n, c in schema.columns.items()
    }
    assert {n: (s.first, s.samples, [tuple(run) for run in s.runs]) for n, s in plain.splits.items()} == {
        n: (s.first, s.samples, [(run.first, run.samples) for run in s.runs]) for n, s in schema.splits.items()
    }


def same_index(plain: Any, file: IndexFile) -> None:
    names = ("dataset", "version", "schema_sha256", "payload", "samples", "bytes")
    assert [getattr(plain, name) for name in names] == [getattr(file, name) for name in names]
    assert len(plain.shards) == len(file.shards)
    for ours, theirs in zip(plain.shards, file.shards, strict=True):
        own = ("file", "bytes", "sha256", "first_sample", "samples")
        assert [getattr(ours, name) for name in own] == [getattr(theirs, name) for name in own]
        assert [group.samples for group in ours.row_groups] == [group.samples for group in theirs.row_groups]
        assert (ours.sidecar is None) == (theirs.sidecar is None)
        if theirs.sidecar is not None:
            assert tuple(ours.sidecar) == (theirs.sidecar.file, theirs.sidecar.bytes, theirs.sidecar.sha256)
        assert ours.columns.keys() == theirs.columns.keys()
        for name, extent in theirs.columns.items():
            offsets = None if extent.offsets is None else (extent.offsets.offset, extent.offsets.bytes)
            assert tuple(ours.columns[name]) == (extent.offset, extent.bytes, offsets)


def test_a_schema_is_taken_if_and_only_if_its_contract_takes_it() -> None:
    taken = 0
    for told in variants(SCHEMA):
        plain, schema = plain_schema(told), judged(DatasetSchema, told)
        assert (plain is None) == (schema is None) or _is_doubtful(told), told
        if plain is not None:
            taken += 1
            same_schema(plain, schema)
    assert taken > 100


def test_an_index_is_taken_if_and_only_if_its_contract_takes_it() -> None:
    taken = 0
    for told in variants(INDEX):
        plain, file = plain_index(told), judged(IndexFile, told)
        assert (plain is None) == (file is None) or _is_doubtful(told), told
        if plain is not None:
            taken += 1
            same_index(plain, file)
    assert taken > 100


def _is_doubtful(told: dict[str, Any]) -> bool:
    """What no writer writes is left to the contracts, which take some of it: version `true` or 1.0, huge numbers."""
    return type(told.get("format_version", 1)) is not int or str(2**63) in json.dumps(told)


@pytest.mark.parametrize("found", [None, 1, "x", [], [{}]])
def test_what_is_no_map_is_not_taken(found: object) -> None:
    assert plain_schema(found) is None
    assert plain_index(found) is None


SCRIPT = """
import pickle, sys
from pathlib import Path
import railbus
from railbus import open_dataset, RailbusError

whole, other = open_dataset(sys.argv[1]), Path(sys.argv[2])
batch = next(iter(whole.stream("train", batch_size=4, shuffle=False)))
assert batch["id"].tolist() == [0, 1, 2, 3]
assert repr(whole) == "<Dataset d version 1: 20 samples of x, id, flag>", repr(whole)
assert len(pickle.loads(pickle.dumps(whole))) == 20
assert "pydantic" not in sys.modules
for name in ("schema.json", "index.json"):
    path = other / name
    kept = path.read_bytes()
    path.write_bytes(kept.replace(b'"samples"', b'"simples"', 1))
    try:
        open_dataset(other)
    except RailbusError as exc:
        print(exc.code, exc.message)
    path.write_bytes(kept)
assert "pydantic" in sys.modules
assert whole.schema.columns["x"].shape == (2, 3)
assert whole.index == open_dataset(sys.argv[1]).index
"""


def test_reading_in_a_script_loads_no_pydantic_and_errors_are_those_of_the_contracts(tmp_path: Path) -> None:
    for root in ("one", "two"):
        small_datasets.write(Layout(tmp_path / root), 20, num_shards=2)
    folders = [str(Layout(tmp_path / root).dataset("d")) for root in ("one", "two")]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *folders],
        capture_output=True,
        text=True,
        env={"XDG_CACHE_HOME": str(tmp_path), "PATH": ""},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith("SCHEMA_INVALID")
    assert "splits.train.samples" in first
    assert second.startswith("INDEX_INVALID")
    assert "field 'samples'" in second
