"""The JSON Schemas of the files in the tree, made from the contracts: `python -m railbus_shared.json_schemas DIR`.

A test fails when the committed files and the contracts differ.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Final

from railbus_shared import files
from railbus_shared.contracts import artifacts
from railbus_shared.contracts.artifacts import CheckpointMeta, DatasetSchema, IndexFile, ModelSchema
from railbus_shared.contracts.model import Contract
from railbus_shared.field_docs import field_docs

SCHEMAS: Final[dict[str, type[Contract]]] = {
    "dataset": DatasetSchema,
    "index": IndexFile,
    "model": ModelSchema,
    "checkpoint": CheckpointMeta,
}
_BASE: Final = "https://railbus.dev/schema/v1"


def json_schema(name: str) -> dict[str, Any]:
    """The published schema of one kind of file, draft 2020-12."""
    contract = SCHEMAS[name]
    schema = contract.model_json_schema(mode="validation")
    _explain(schema, contract)
    for part, inner in schema.get("$defs", {}).items():
        if isinstance(of_part := getattr(artifacts, part), type):
            _explain(inner, of_part)
    head = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"{_BASE}/{name}.schema.json",
        "title": contract.__name__,
        "description": " ".join((contract.__doc__ or "").split()),
    }
    closed: dict[str, Any] = _closed({key: value for key, value in schema.items() if key not in head})
    return head | closed


def _explain(schema: dict[str, Any], contract: type[Contract]) -> None:
    """Put what is written under a contract's fields into its schema."""
    for name, text in field_docs(contract).items():
        explained = {**schema["properties"][name], "description": text}
        schema["properties"][name] = dict(sorted(explained.items()))


def _closed(part: Any) -> Any:
    """Refuse, in every map whose keys have a pattern, the keys that do not match it; pydantic lets them pass."""
    if isinstance(part, list):
        return [_closed(item) for item in part]
    if not isinstance(part, dict):
        return part
    found = {key: _closed(value) for key, value in part.items()}
    if "patternProperties" in found:
        found.pop("propertyNames", None)
        found["additionalProperties"] = False
    return found


def main(folder: Path) -> int:
    """Write all of them into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in SCHEMAS:
        files.write_whole(folder / f"{name}.schema.json", files.to_json(json_schema(name)))
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m railbus_shared.json_schemas DIR")
    sys.exit(main(Path(sys.argv[1])))
