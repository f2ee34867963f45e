"""More samples for a dataset that is there, matched to what it has."""

from __future__ import annotations

from pathlib import Path

import pytest

from importers_for_tests import imported, picture_file, samples, sizes
from railbus.appending import append_source
from railbus_shared.data.index import DatasetIndex
from railbus_shared.errors import InvalidField
from railbus_shared.layout import Layout


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "learning")


def csv(folder: Path, content: str) -> Path:
    path = folder / "t.csv"
    path.write_text(content)
    return path


def test_classes_are_matched_by_name_and_not_by_number(tmp_path: Path, layout: Layout) -> None:
    index, _ = imported(layout, csv(tmp_path, "x,label\n1.5,ant\n2,bee\n3,cat\n"))
    more = append_source(layout, index, str(csv(tmp_path, "x,label\n7,cat\n8,bee\n")), split="test")
    assert samples(layout, more) == {"x": [1.5, 2, 3, 7, 8], "label": [0, 1, 2, 2, 1]}
    assert sizes(more) == {"train": 3, "test": 2}
    assert DatasetIndex.load(layout.dataset("d"), version=1) == index


def test_images_of_fewer_classes_join_the_folders_that_there_were(tmp_path: Path, layout: Layout) -> None:
    for name in ("a", "b"):
        picture_file(tmp_path / "one" / name / "1.png")
    index, _ = imported(layout, tmp_path / "one")
    image = picture_file(tmp_path / "two/b/2.png", seed=5)
    more = append_source(layout, index, str(tmp_path / "two"), split="train")
    found = samples(layout, more)
    assert (found["image"][-1], found["label"]) == (image, [0, 1, 1])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("x,label\n1.5,dog\n", r"'columns\.label' has value 'dog': the dataset has no such class"),
        ("x\n1.5\n", "not the columns of the dataset.*it has label, x"),
        ("x,label\nword,ant\n", r"'columns\.x'.*the dataset has float32"),
    ],
)
def test_what_does_not_fit_the_dataset_changes_nothing(content: str, said: str, tmp_path: Path, layout: Layout) -> None:
    index, found = imported(layout, csv(tmp_path, "x,label\n1.5,ant\n2,bee\n"))
    with pytest.raises(InvalidField, match=said):
        append_source(layout, index, str(csv(tmp_path, content)), split="train")
    assert DatasetIndex.load(layout.dataset("d")) == index
    assert samples(layout, index) == found
