"""A sample's values as they may stand in a table: short, and told as what they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from railbus.cli.render import Cell, size
from railbus.exporters.exporter import is_file, is_text
from railbus.importers.bpe import ENCODING as BPE
from railbus.importers.image_bytes import encoding_of, look
from railbus.importers.source import Array, Chunk
from railbus.reading_rows import as_numbers
from railbus_shared.contracts.artifacts import Column
from railbus_shared.errors import RailbusError

_MAX_TEXT: Final = 60
_MAX_ITEMS: Final = 6
_NUM_BYTES: Final = 256


def cell(column: Column, value: Array) -> Cell:
    """One value."""
    if is_text(column):
        return _cut(value.tobytes().decode("utf-8", "replace"))
    if is_file(column):
        return _image(value.tobytes())
    if _is_text_in_tokens(column):
        return _cut(_detokenized(column, value))
    numbers = as_numbers(np.asarray(value), column)
    if numbers.ndim == 0:
        return _scalar(column, numbers)
    if numbers.ndim == 1 and (column.variable_length or len(numbers) <= _MAX_ITEMS):
        shown = ", ".join(f"{one:.6g}" for one in numbers[:_MAX_ITEMS].tolist())
        return f"[{shown}, …] {len(numbers)}" if len(numbers) > _MAX_ITEMS else f"[{shown}]"
    shape = "×".join(map(str, numbers.shape))
    return f"{column.dtype} {shape}: {numbers.min():.4g} to {numbers.max():.4g}" if numbers.size else shape


def as_json(columns: Mapping[str, Column], chunk: Chunk, at: int) -> dict[str, Any]:
    """A sample as JSON; of a file of an image what it is, not its bytes."""
    return {name: _json(columns[name], values[at]) for name, values in chunk.items()}


def _json(column: Column, value: Array) -> object:
    if is_text(column):
        return value.tobytes().decode("utf-8", "replace")
    if is_file(column):
        return {"encoding": encoding_of(value.tobytes()) or column.encoding, "bytes": len(value)}
    return as_numbers(np.asarray(value), column).tolist()


def _scalar(column: Column, value: Array) -> Cell:
    plain: bool | int | float = value.item()
    if column.labels and isinstance(plain, int) and 0 <= plain < len(column.labels):
        label = column.labels[plain]
        return label if label == str(plain) else f"{plain} {label}"
    return str(plain) if isinstance(plain, bool) else plain


def _image(data: bytes) -> str:
    """Format, size and weight; what cannot be looked at is said by its weight alone."""
    try:
        looks = look(data, name="a sample")
    except RailbusError:
        return f"{encoding_of(data) or 'image'}, {size(len(data))}"
    return f"{looks.encoding} {looks.width}×{looks.height}, {size(len(data))}"


def _is_text_in_tokens(column: Column) -> bool:
    is_bytes = column.dtype == "uint8" and column.num_classes == _NUM_BYTES
    return len(column.shape) == 1 and not column.variable_length and (bool(column.labels) or is_bytes)


def _detokenized(column: Column, value: Array) -> str:
    if not column.labels:
        return value.tobytes().decode("utf-8", "replace")
    words = [column.labels[number] for number in value[:_MAX_TEXT].tolist()]
    return "".join(words).replace("Ġ", " ").replace("Ċ", "\n") if column.encoding == BPE else "".join(words)


def _cut(text: str) -> str:
    """One line of it, with what cannot be printed made visible."""
    line = "".join(one if one.isprintable() else {"\n": "⏎", "\t": " "}.get(one, "�") for one in text[: _MAX_TEXT + 1])
    return f"{line[:_MAX_TEXT]}…" if len(line) > _MAX_TEXT else line
