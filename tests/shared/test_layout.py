"""Where files lie, and that no name leads out of the root."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pytest

from railbus_shared.errors import InvalidName
from railbus_shared.layout import Layout, checkpoint_number, checkpoint_stem, shard_name


def test_the_tree_is_the_canonical_one() -> None:
    layout = Layout(Path("learning"))
    assert [
        str(path)
        for path in (
            layout.schema("digits"), layout.index("digits"), layout.shards("digits") / shard_name(0),
            layout.model_schema("cnn"), layout.checkpoints("cnn"), layout.day(date(2026, 1, 2)),
            layout.cached("ab" * 32),
        )
    ] == [
        "learning/datasets/digits/schema.json", "learning/datasets/digits/index.json",
        "learning/datasets/digits/shards/shard-00000.data", "learning/models/cnn/model_schema.json",
        "learning/models/cnn/checkpoints", "learning/logs/2026/01/02",
        f"learning/.railbus/cache/ab/{'ab' * 32}",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["../x", "", "/etc", "a/b", "a\0", ".railbus"])
@pytest.mark.parametrize("kind", ["dataset", "schema", "index", "shards", "model", "model_schema", "checkpoints"])
def test_no_name_leads_out_of_the_root(kind: str, name: str) -> None:
    with pytest.raises(InvalidName):
        getattr(Layout(Path("learning")), kind)(name)


@pytest.mark.parametrize("number", [1, 123, 999_999, 1_000_000, 12_345_678])
def test_a_checkpoint_is_found_by_the_name_of_its_meta(number: int) -> None:
    assert checkpoint_number(f"{checkpoint_stem(number)}.meta.json") == number


@pytest.mark.parametrize(
    "name",
    [
        "checkpoint-000123.pt", ".checkpoint-000123.meta.json", "checkpoint-123.meta.json",
        "checkpoint-0000123.meta.json",
        "checkpoint-000000.meta.json", "checkpoint-١٢٣٤٥٦.meta.json", "checkpoint-000123.meta.json.tmp",
        "checkpoint-000123.meta.json\n", "checkpoint--00123.meta.json", "checkpoint-" + "9" * 5000 + ".meta.json",
    ],
)  # fmt: skip
def test_other_names_are_no_checkpoints(name: str) -> None:
    assert checkpoint_number(name) is None


def test_log_days_are_told_oldest_first_and_folders_that_are_no_days_are_passed_over(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    assert list(layout.log_days()) == []
    for day in ("2026/11/23", "2025/01/02", "2026/02/30", "2026/13/01", "0000/01/01", "2026/11/x1"):
        (layout.logs / day).mkdir(parents=True)
    assert list(layout.log_days()) == [date(2025, 1, 2), date(2026, 11, 23)]
