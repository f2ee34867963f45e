"""Text by its bytes and by a trained tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from importers_for_tests import imported, kinds, samples, sizes
from railbus.appending import append_source
from railbus.importers.bpe import tokenizer_of
from railbus.importers.source import Options
from railbus.importing import import_dataset
from railbus_shared.errors import InvalidField, SchemaInvalid
from railbus_shared.layout import Layout

TEXT = "The quick brown fox jumps over the lazy dog — größer, höher → ∞.\n  def f(x):\n\treturn x\n\n" * 60


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "learning")


def write(folder: Path, content: str | bytes) -> Path:
    path = folder / "t.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def joined(blocks: list[list[int]]) -> list[int]:
    """The tokens of overlapping blocks, each once."""
    return [token for block in blocks for token in block[:-1]] + [blocks[-1][-1]]


def test_any_file_can_be_taken_as_its_bytes(tmp_path: Path, layout: Layout) -> None:
    data = np.random.default_rng(0).integers(0, 256, 10_000, np.uint8).tobytes()
    index, found = imported(layout, write(tmp_path, data), block=9, options=Options(tokenizer="byte"))
    assert kinds(index) == {"tokens": "uint8[10]"}
    assert index.schema.columns["tokens"].num_classes == 256
    assert bytes(joined(found["tokens"])) == data[: 9 * len(found["tokens"]) + 1]


def test_a_trained_tokenizer_stands_whole_in_the_schema(tmp_path: Path, layout: Layout) -> None:
    path = write(tmp_path, TEXT)
    index, found = imported(layout, path, block=16, options=Options(tokenizer="bpe", vocab_size=300))
    column = index.schema.columns["tokens"]
    assert (column.dtype, column.shape, column.encoding, len(column.labels)) == ("uint16", (17,), "bpe", 300)
    tokenizer = tokenizer_of(column.labels)
    tokens = joined(found["tokens"])
    assert TEXT.startswith(tokenizer.decode(tokens).rstrip("\N{REPLACEMENT CHARACTER}"))
    assert len(tokens) < len(TEXT.encode()) / 1.5
    lines = TEXT.splitlines(keepends=True)
    assert [one for line in lines for one in tokenizer.encode(line).ids][: len(tokens)] == tokens


def test_a_trained_tokenizer_is_the_same_every_time(tmp_path: Path, layout: Layout) -> None:
    path = write(tmp_path, TEXT)
    options = Options(tokenizer="bpe", vocab_size=400)
    first = import_dataset(layout, str(path), options=options)
    assert import_dataset(Layout(tmp_path / "other"), str(path), options=options).sha256 == first.sha256
    assert set(sizes(first)) == {"train", "validation"}


@pytest.mark.parametrize(
    ("content", "options", "said"),
    [
        (TEXT, {"tokenizer": "bpe", "vocab_size": 256}, "'vocab_size' has value 256"),
        (TEXT, {"tokenizer": "bpe", "vocab_size": 70_000}, "'vocab_size' has value 70000"),
        ("short", {"tokenizer": "bpe"}, "too short for two blocks"),
        ("short", {"tokenizer": "byte"}, "too short for two blocks"),
        (b"\xff" * 1000, {"tokenizer": "bpe"}, r"not UTF-8.*--tokenizer byte"),
    ],
)
def test_a_text_that_cannot_be_cut_is_told(
    content: str | bytes, options: dict[str, Any], said: str, tmp_path: Path, layout: Layout
) -> None:
    with pytest.raises(InvalidField, match=said):
        imported(layout, write(tmp_path, content), options=Options(**options))


def test_labels_that_are_no_tokenizer_are_told() -> None:
    with pytest.raises(SchemaInvalid, match="which no tokens before it make"):
        tokenizer_of(["a", "b", "c", "abc"])


@pytest.mark.parametrize("tokenizer", ["char", "byte", "bpe"])
def test_appended_text_has_the_tokens_that_the_dataset_has(tokenizer: Any, tmp_path: Path, layout: Layout) -> None:
    options = Options(tokenizer=tokenizer, vocab_size=300)
    index = import_dataset(layout, str(write(tmp_path, TEXT)), name="d", block=16, options=options)
    more = "The lazy dog jumps.\n" * 40
    grown = append_source(layout, index, str(write(tmp_path, more)), split="validation")
    assert grown.schema.columns == index.schema.columns
    assert grown.file.version == 2
    old, found = samples(layout, index)["tokens"], samples(layout, grown)["tokens"]
    assert found[: len(old)] == old
    tokens, column = joined(found[len(old) :]), grown.schema.columns["tokens"]
    shown = {
        "char": lambda: "".join(column.labels[token] for token in tokens),
        "byte": lambda: bytes(tokens).decode(),
        "bpe": lambda: tokenizer_of(column.labels).decode(tokens),
    }
    assert more.startswith(shown[tokenizer]())


def test_a_symbol_that_a_dataset_lacks_is_not_appended(tmp_path: Path, layout: Layout) -> None:
    index = import_dataset(layout, str(write(tmp_path, "abcab" * 200)), name="d")
    with pytest.raises(InvalidField, match=r"'columns\.tokens' has value 'z': the dataset has no such"):
        append_source(layout, index, str(write(tmp_path, "abz" * 200)), split="train")
