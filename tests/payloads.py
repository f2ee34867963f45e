"""Small datasets of every payload, made by hand and by the libraries that own the formats, not by our writers."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from railbus_shared import files
from railbus_shared.contracts.artifacts import Column, DatasetSchema, IndexFile, PayloadFormat, Split
from railbus_shared.data.index import DatasetIndex
from railbus_shared.data.ragged import Ragged
from railbus_shared.layout import shard_name

Json = dict[str, Any]
Samples = dict[str, np.ndarray | Ragged]

ALIGN = 64
GROUP = 4
"""Samples of a row group."""

X = Column(dtype="float32", shape=(2, 3))
HALF = Column(dtype="bfloat16", shape=())
FLAG = Column(dtype="bool", shape=())
WORDS = Column(dtype="uint8", shape=(), variable_length=True)
ITEMS = Column(dtype="int32", shape=(), variable_length=True)
PAIRS = Column(dtype="int16", shape=(2,), variable_length=True)
COLUMNS: dict[PayloadFormat, dict[str, Column]] = {
    "columns": {"x": X, "half": HALF, "flag": FLAG, "words": WORDS, "pairs": PAIRS},
    "npy": {"x": X},
    "raw": {"words": WORDS},
    "parquet": {"x": X, "half": HALF, "flag": FLAG, "words": WORDS, "items.of": ITEMS},
}


def samples(first: int, count: int) -> Samples:
    """Of every column; each sample tells its own number. Every fourth sample of variable length is empty."""
    ids = np.arange(first, first + count)
    lengths = np.where(ids % 4 == 0, 0, ids * 7 % 300)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    items = np.repeat(ids, lengths) * 1000 + np.arange(offsets[-1])
    return {
        "x": (ids[:, None, None] * 10 + np.arange(6).reshape(2, 3)).astype(np.float32),
        "half": ids.astype(np.uint16),
        "flag": ids % 3 == 0,
        "words": Ragged(items.astype(np.uint8), offsets),
        "items.of": Ragged(items.astype(np.int32), offsets),
        "pairs": Ragged(np.stack([items, -items], axis=1).astype(np.int16), offsets),
    }


def write(folder: Path, payload: PayloadFormat, *, sizes: tuple[int, ...] = (10, 7)) -> DatasetIndex:
    """A dataset with shards of so many samples, in a folder of its name."""
    (folder / "shards").mkdir(parents=True)
    schema = DatasetSchema(
        name=folder.name, payload=payload, columns=COLUMNS[payload], splits={"all": Split(first=0, samples=sum(sizes))}
    )
    schema_bytes = files.to_json(schema.to_map())
    (folder / "schema.json").write_bytes(schema_bytes)
    shards, first = [], 0
    for number, size in enumerate(sizes):
        path = folder / "shards" / shard_name(number)
        held = {name: value for name, value in samples(first, size).items() if name in schema.columns}
        extra = _WRITERS[payload](path, held)
        shards.append({"file": path.name, **_file(path), "first_sample": first, "samples": size, **extra})
        first += size
    index = {
        "dataset": folder.name, "schema_sha256": hashlib.sha256(schema_bytes).hexdigest(), "payload": payload,
        "samples": first, "bytes": sum(shard["bytes"] for shard in shards), "shards": shards,
    }  # fmt: skip
    (folder / "index.json").write_bytes(files.to_json(IndexFile.parse(index).to_map()))
    return DatasetIndex.load(folder)


def _file(path: Path) -> Json:
    return {"bytes": path.stat().st_size, "sha256": files.sha256_file(path)}


def _columns(path: Path, held: Samples) -> Json:
    names = {"float32": "F32", "uint16": "BF16", "bool": "BOOL", "uint8": "U8", "int16": "I16", "int64": "I64"}
    tensors: dict[str, np.ndarray] = {}
    for name, value in held.items():
        tensors[name] = value.values if isinstance(value, Ragged) else value
        if isinstance(value, Ragged):
            tensors[f"__offsets__.{name}"] = value.offsets
    entries, places, data = {}, {}, b""
    for name, array in tensors.items():
        places[name] = (len(data), array.nbytes)
        entries[name] = _entry(names[array.dtype.name], list(array.shape), len(data), array.nbytes)
        data += array.tobytes()
        if gap := -len(data) % ALIGN:
            entries[f"__padding__.{name}"] = _entry("U8", [gap], len(data), gap)
            data += bytes(gap)
    header = json.dumps(entries).encode()
    header += b" " * (-(len(header) + 8) % ALIGN)
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    extents: Json = {name: {"offset": 8 + len(header) + places[name][0], "bytes": places[name][1]} for name in held}
    for name, value in held.items():
        if isinstance(value, Ragged):
            at, size = places[f"__offsets__.{name}"]
            extents[name]["offsets"] = {"offset": 8 + len(header) + at, "bytes": size}
    return {"columns": extents}


def _entry(dtype: str, shape: list[int], at: int, size: int) -> Json:
    return {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}


def _npy(path: Path, held: Samples) -> Json:
    x, file = held["x"], io.BytesIO()
    assert isinstance(x, np.ndarray)
    np.save(file, x)
    path.write_bytes(file.getvalue())
    return {"columns": {"x": {"offset": len(file.getvalue()) - x.nbytes, "bytes": x.nbytes}}}


def _raw(path: Path, held: Samples) -> Json:
    words = held["words"]
    assert isinstance(words, Ragged)
    sidecar = path.with_suffix(".offsets")
    path.write_bytes(words.values.tobytes())
    sidecar.write_bytes(words.offsets.tobytes())
    extent = {"offset": 0, "bytes": words.values.nbytes, "offsets": {"offset": 0, "bytes": words.offsets.nbytes}}
    return {"columns": {"words": extent}, "sidecar": {"file": sidecar.name, **_file(sidecar)}}


def _parquet(path: Path, held: Samples) -> Json:
    x, items, words = held["x"], held["items.of"], held["words"]
    assert isinstance(x, np.ndarray)
    assert isinstance(items, Ragged)
    assert isinstance(words, Ragged)
    table = pa.table(
        {
            "words": pa.array([words[row].tobytes() for row in range(len(words))], pa.binary()),
            "x": pa.FixedSizeListArray.from_arrays(pa.FixedSizeListArray.from_arrays(x.ravel(), 3), 2),
            "half": pa.array(held["half"]),
            "flag": pa.array(held["flag"]),
            "items.of": pa.ListArray.from_arrays(items.offsets.astype(np.int32), items.values),
        }
    )
    pq.write_table(table, path, row_group_size=GROUP)
    count = len(x)
    return {"row_groups": [{"samples": min(GROUP, count - at)} for at in range(0, count, GROUP)]}


_WRITERS = {"columns": _columns, "npy": _npy, "raw": _raw, "parquet": _parquet}
