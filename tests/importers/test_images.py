"""Folders of images: files as they are, or pixels of one size."""

from __future__ import annotations

import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

from importers_for_tests import imported, kinds, picture_file, sizes
from railbus.importers.source import Options
from railbus_shared.errors import InvalidField, NotFound
from railbus_shared.layout import Layout


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "learning")


def test_a_folder_for_each_class_becomes_labels_and_files_as_they_are(tmp_path: Path, layout: Layout) -> None:
    folder = tmp_path / "pets"
    dog = picture_file(folder / "dog/b.png", width=5, height=7, seed=1)
    cats = [picture_file(folder / "cat" / name, seed=number) for number, name in enumerate(["a.png", "z.png"])]
    (folder / "cat/notes.txt").write_text("no image")
    (folder / ".git").mkdir()
    said: list[str] = []
    index, found = imported(layout, folder, options=Options(note=said.append))
    assert kinds(index) == {"image": "uint8… png", "label": "int64", "height": "int32", "width": "int32"}
    assert index.schema.columns["label"].labels == ("cat", "dog")
    assert found == {"image": [*cats, dog], "label": [0, 0, 1], "height": [6, 6, 7], "width": [8, 8, 5]}
    assert said == ["left out 1 files that are no images"]


def test_folders_of_splits_stay_splits_with_the_same_labels(tmp_path: Path, layout: Layout) -> None:
    for split, name in (("train", "a"), ("train", "b"), ("test", "b"), ("val", "a")):
        picture_file(tmp_path / "in" / split / name / "1.png")
    index, found = imported(layout, tmp_path / "in")
    assert sizes(index) == {"train": 2, "val": 1, "test": 1}
    assert (index.schema.columns["label"].labels, found["label"]) == (("a", "b"), [0, 1, 0, 1])


def test_formats_may_be_mixed_and_each_file_tells_its_own(tmp_path: Path, layout: Layout) -> None:
    jpeg = picture_file(tmp_path / "in/a/1.jpg", width=16, height=16)
    png = picture_file(tmp_path / "in/a/2.png")
    index, found = imported(layout, tmp_path / "in")
    assert (kinds(index)["image"], found["image"]) == ("uint8… image", [jpeg, png])


def test_pixels_of_one_size_are_kept_instead_of_files_when_asked(tmp_path: Path, layout: Layout) -> None:
    picture_file(tmp_path / "in/a/1.png", width=4, height=2, seed=3)
    picture_file(tmp_path / "in/a/2.jpg", width=40, height=30)
    index, found = imported(layout, tmp_path / "in", options=Options(decode=(4, 2)))
    assert kinds(index)["image"] == "uint8[2,4,3]"
    assert found["image"][0] == np.random.default_rng(3).integers(0, 256, (2, 4, 3), np.uint8).tolist()
    assert (found["height"], found["width"]) == ([2, 30], [4, 40])


def huge_png() -> bytes:
    """One that claims 100,000 by 100,000 pixels in 60 bytes."""
    head = b"IHDR" + (100_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    parts = (head, b"IDAT")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        (len(part) - 4).to_bytes(4, "big") + part + zlib.crc32(part).to_bytes(4, "big") for part in parts
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [(huge_png(), "claims"), (b"hello", "it is no image"), (b"", "it is no image"), (b"\xff\xd8\xff\xe0", "image")],
    ids=["bomb", "text", "empty", "cut"],
)
def test_a_file_that_is_no_image_is_told_by_name(content: bytes, said: str, tmp_path: Path, layout: Layout) -> None:
    picture_file(tmp_path / "in/a/1.png")
    (tmp_path / "in/a/2.jpg").write_bytes(content)
    with pytest.raises(InvalidField, match=rf"'a/2\.jpg'.*{said}"):
        imported(layout, tmp_path / "in")


def test_an_image_that_is_cut_is_told_when_its_pixels_are_wanted(tmp_path: Path, layout: Layout) -> None:
    whole = picture_file(tmp_path / "in/a/1.png", width=64, height=64)
    (tmp_path / "in/a/1.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InvalidField, match="damaged image"):
        imported(layout, tmp_path / "in", options=Options(decode=(8, 8)))


def test_a_folder_of_nothing_known_says_what_it_could_hold(tmp_path: Path, layout: Layout) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/readme.txt").write_text("x")
    with pytest.raises(NotFound, match=r"holds nothing that can be imported.*images by class"):
        imported(layout, tmp_path / "in")


def test_without_pillow_the_way_to_get_it_is_said(tmp_path: Path) -> None:
    picture_file(tmp_path / "in/a/1.png")
    code = """
import sys
sys.modules["PIL"] = None
from pathlib import Path
from railbus.importing import import_dataset
from railbus_shared.errors import ConfigError
from railbus_shared.layout import Layout
try:
    import_dataset(Layout(Path(sys.argv[1]) / "learning"), sys.argv[1] + "/in", name="d")
except ConfigError as exc:
    print(exc)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "pip install 'railbus[images]'" in done.stdout
