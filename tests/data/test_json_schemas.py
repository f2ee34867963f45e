"""The published JSON Schemas: made from the contracts, and of one mind with them about real and broken files."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator, ValidationError

import small_datasets
from railbus_shared.errors import WireError
from railbus_shared.json_schemas import SCHEMAS
from railbus_shared.layout import Layout

PUBLISHED = Path(__file__).parents[2] / "docs" / "agi_json_schema"

Json = dict[str, Any]

MODEL: Json = {
    "model": "cnn", "entrypoint": "classifier", "params": {"lr": 0.1}, "dataset": "digits", "index_sha256": "0" * 64,
    "num_parameters": 3, "parameters": {"w": {"dtype": "float32", "shape": [3]}}, "libraries": {"torch": "2.13"},
    "created_by_job": "j-1", "created_at": "2026-01-02T03:04:05.123456789Z",
}  # fmt: skip
CHECKPOINT: Json = {
    "number": 123, "model": "cnn", "job": "j-1", "attempt": 1, "lease_epoch": 2, "step": 10, "epoch": 0,
    "samples_seen": 640, "entrypoint": "classifier", "seed": 7, "dataset": "digits", "index_sha256": "0" * 64,
    "devices": ["h-cpu0"], "precision": "float32", "libraries": {"torch": "2.13"}, "metrics": {"loss": 0.5},
    "files": [{"file": "checkpoint-000123.pt", "bytes": 10, "sha256": "f" * 64}],
    "created_at": "2026-01-02T03:04:05Z",
}  # fmt: skip


def published(name: str) -> Json:
    found: Json = json.loads((PUBLISHED / f"{name}.schema.json").read_bytes())
    return found


def example(name: str, folder: Path) -> Json:
    """A valid file of each kind; those of datasets as they are written."""
    if name == "model":
        return dict(MODEL)
    if name == "checkpoint":
        return dict(CHECKPOINT)
    layout = Layout(folder)
    small_datasets.write(layout, 30, num_shards=3, test=5)
    path = layout.schema("d") if name == "dataset" else layout.index("d")
    found: Json = json.loads(path.read_bytes())
    return found


def test_the_published_schemas_are_those_of_the_contracts(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "railbus_shared.json_schemas", str(tmp_path / "made")], check=True)
    made = {path.name: path.read_bytes() for path in (tmp_path / "made").iterdir()}
    assert made == {path.name: path.read_bytes() for path in PUBLISHED.iterdir()}
    assert sorted(made) == [f"{name}.schema.json" for name in ("checkpoint", "dataset", "index", "model")]


def test_without_a_folder_the_command_says_how_it_is_used() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "railbus_shared.json_schemas"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (1, "usage: python -m railbus_shared.json_schemas DIR\n")


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_published_schema_is_a_schema_and_says_what_it_is(name: str) -> None:
    schema = published(name)
    Draft202012Validator.check_schema(schema)
    assert list(schema)[:4] == ["$schema", "$id", "title", "description"]
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["$id"] == f"https://railbus.dev/schema/v1/{name}.schema.json"
    assert schema["title"] == SCHEMAS[name].__name__
    assert len(schema["description"]) > 20


@pytest.mark.parametrize("name", SCHEMAS)
def test_what_railbus_writes_is_valid(name: str, tmp_path: Path) -> None:
    value = example(name, tmp_path)
    Draft202012Validator(published(name)).validate(value)
    SCHEMAS[name].parse(value)


def put(*keys: str | int, value: object) -> Callable[[Json], None]:
    def edit(whole: Any) -> None:
        for key in keys[:-1]:
            whole = whole[key]
        whole[keys[-1]] = value

    return edit


BROKEN: list[tuple[str, Callable[[Json], object]]] = [
    ("dataset", put("columns", "x", "dtype", value="float31")),
    ("dataset", put("columns", "x", "shape", value=[-1])),
    ("dataset", put("columns", value={})),
    ("dataset", put("splits", "train", "samples", value=0)),
    ("dataset", put("splits", "train", "samples", value="24")),
    ("dataset", put("format_version", value=2)),
    ("dataset", put("name", value="../up")),
    ("dataset", put("name", value="a..b")),
    ("dataset", put("colour", value="red")),
    ("dataset", lambda value: value.pop("splits")),
    ("index", put("shards", value=[])),
    ("index", put("shards", 0, "file", value="../../x")),
    ("index", put("shards", 0, "sha256", value="beef")),
    ("index", put("shards", 0, "bytes", value=-1)),
    ("index", put("shards", 0, "columns", "id", "offset", value=1.5)),
    ("index", put("samples", value=None)),
    ("index", lambda value: value.pop("schema_sha256")),
    ("model", put("num_parameters", value=-1)),
    ("model", put("entrypoint", value="rm -rf")),
    ("model", lambda value: value.pop("parameters")),
    ("checkpoint", put("number", value=0)),
    ("checkpoint", put("job", value="J 1")),
    ("checkpoint", put("files", value=[])),
    ("checkpoint", put("reason", value="boredom")),
    ("checkpoint", put("seed", value=-1)),
]


@pytest.mark.parametrize(("name", "edit"), BROKEN, ids=[f"{number}-{name}" for number, (name, _) in enumerate(BROKEN)])
def test_what_is_broken_is_refused_by_schema_and_contract_alike(
    name: str, edit: Callable[[Json], object], tmp_path: Path
) -> None:
    value = example(name, tmp_path)
    edit(value)
    with pytest.raises(ValidationError):
        Draft202012Validator(published(name)).validate(value)
    with pytest.raises(WireError):
        SCHEMAS[name].parse(value)


@pytest.mark.parametrize("part", ["columns", "splits"])
@pytest.mark.parametrize("key", ["../up", "", "A", "a..b"])
def test_a_key_that_is_no_name_is_refused_by_schema_and_contract_alike(part: str, key: str, tmp_path: Path) -> None:
    value = example("dataset", tmp_path)
    value[part][key] = next(iter(value[part].values()))
    with pytest.raises(ValidationError):
        Draft202012Validator(published("dataset")).validate(value)
    with pytest.raises(WireError):
        SCHEMAS["dataset"].parse(value)
