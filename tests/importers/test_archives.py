"""WebDataset archives and MDS shards: what peers write is read, what lies is refused."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from importers_for_tests import imported, kinds, picture_file, samples, sizes
from railbus.importers.mds_encoding import ArrayEncoding
from railbus.importers.source import Options
from railbus.importing import import_dataset
from railbus_shared.errors import InvalidField
from railbus_shared.layout import Layout


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "learning")


def npy(value: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, value, allow_pickle=True)
    return file.getvalue()


def info(name: str, data: bytes = b"", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    found = tarfile.TarInfo(name)
    found.size = len(data)
    for field, value in fields.items():
        setattr(found, field, value)
    return found, data


def archive(path: Path, files: Mapping[str, bytes]) -> Path:
    return archive_of(path, [info(name, data) for name, data in files.items()])


def archive_of(path: Path, members: list[tuple[tarfile.TarInfo, bytes]]) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        for member, data in members:
            tar.addfile(member, io.BytesIO(data))
    return path


# --- WebDataset ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["my data.tar", "my data.tar.gz"])
def test_files_of_one_base_name_are_a_sample(name: str, tmp_path: Path, layout: Layout) -> None:
    image = picture_file(tmp_path / "1.png")
    files: dict[str, bytes] = {}
    for key, label, size in (("a/x", 1, 2), ("a/y", 0, 3)):
        files |= {f"{key}.png": image, f"{key}.cls": str(label).encode(), f"{key}.txt": "ä".encode() * size}
        files |= {f"{key}.json": b'{"k":1}', f"{key}.v.npy": npy(np.arange(size)), f"{key}.w.npy": npy(np.eye(2))}
    index = import_dataset(layout, str(archive(tmp_path / name, files)), held_out_frac=0, shuffle=False)
    assert index.schema.name == "my-data"
    assert kinds(index) == {
        "cls": "int64", "json": "uint8… json", "png": "uint8… png", "txt": "uint8… utf-8", "v": "int64…",
        "w": "float64[2,2]", "key": "uint8… utf-8",
    }  # fmt: skip
    assert index.schema.columns["cls"].num_classes == 2
    assert samples(layout, index) == {
        "cls": [1, 0], "json": ['{"k":1}'] * 2, "png": [image] * 2, "txt": ["ää", "äää"], "v": [[0, 1], [0, 1, 2]],
        "w": [[[1, 0], [0, 1]]] * 2, "key": ["a/x", "a/y"],
    }  # fmt: skip


def test_names_that_only_count_the_samples_are_no_column(tmp_path: Path, layout: Layout) -> None:
    path = archive(tmp_path / "t.tar", {f"{number:06d}.cls": b"0" for number in range(20)})
    assert set(kinds(imported(layout, path)[0])) == {"cls"}


def test_a_folder_of_archives_is_one_dataset_with_its_splits(tmp_path: Path, layout: Layout) -> None:
    for name, count in (("train-000000", 3), ("train-000001", 2), ("val-000000", 2)):
        archive(tmp_path / f"{name}.tar", {f"{name}-{number}.cls": b"%d" % number for number in range(count)})
    index, found = imported(layout, tmp_path)
    assert sizes(index) == {"train": 5, "val": 2}
    assert found["cls"] == [0, 1, 2, 0, 1, 0, 1]


def test_a_mixed_archive_is_mixed_by_way_of_the_disk(tmp_path: Path, layout: Layout) -> None:
    files = {f"s{number}.{kind}": b"%d" % number for number in range(300) for kind in ("cls", "txt")}
    index = import_dataset(layout, str(archive(tmp_path / "t.tar", files)))
    found = samples(layout, index)
    assert found["cls"] != sorted(found["cls"])
    assert found["txt"] == [str(number) for number in found["cls"]]
    assert list((layout.state / "imports/scratch").iterdir()) == []


def odd(**fields: Any) -> list[tuple[tarfile.TarInfo, bytes]]:
    return [info("a.cls", b"1"), info(fields.pop("name", "b.cls"), b"1", **fields)]


BAD_TARS: list[tuple[str, list[tuple[tarfile.TarInfo, bytes]], str]] = [
    ("path up", odd(name="../b.cls"), "'../b.cls' leads out of the archive"),
    ("absolute path", odd(name="/etc/b.cls"), "'/etc/b.cls' leads out of the archive"),
    ("symbolic link", odd(type=tarfile.SYMTYPE, linkname="/etc/passwd", size=0), "is a link or a device"),
    ("hard link", odd(type=tarfile.LNKTYPE, linkname="a.cls", size=0), "is a link or a device"),
    ("device", odd(type=tarfile.CHRTYPE, size=0), "is a link or a device"),
    ("other extensions", [info("a.cls", b"1"), info("b.txt", b"1")], r"sample 'b' of 't\.tar' has these"),
    ("lacks one", [info("a.cls", b"1"), info("a.txt", b"x"), info("b.cls", b"1")], "sample 'b'"),
    ("twice", [info("a.cls", b"1"), info("a.cls", b"2")], "sample 'a' has more than one 'cls'"),
    ("pickle", [info("a.pyd", b"\x80\x04N.")], "pickles could run code"),
    ("pickled array", [info("a.npy", npy(np.array([{}], object)))], "cannot be read"),
    ("no number", [info("a.cls", b"one")], "'cls' of sample 'a' cannot be read"),
    ("latin-1", [info("a.txt", b"\xe9")], "'txt' of sample 'a' is not UTF-8"),
    ("shapes", [info("a.npy", npy(np.zeros((2, 2)))), info("b.npy", npy(np.zeros((2, 3))))], "sample b has this"),
    ("types", [info("a.npy", npy(np.zeros(2))), info("b.npy", npy(np.zeros(2, int)))], "sample b has this"),
    ("words", [info("a.npy", npy(np.array(["x"])))], "not a type of number"),
    ("no samples", [info("README", b"hello")], "holds no samples"),
    ("same name", [info("a.x_y", b"1"), info("a.x y", b"1")], "another column has this name"),
]


@pytest.mark.parametrize(("members", "said"), [case[1:] for case in BAD_TARS], ids=[case[0] for case in BAD_TARS])
def test_an_archive_that_is_not_what_it_should_be_is_told(
    members: list[tuple[tarfile.TarInfo, bytes]], said: str, tmp_path: Path, layout: Layout
) -> None:
    with pytest.raises(InvalidField, match=said):
        imported(layout, archive_of(tmp_path / "t.tar", members))
    assert not layout.datasets.exists()


@pytest.mark.parametrize("name", ["t.tar", "t.tar.gz"])
@pytest.mark.parametrize("keep", [0, 100, 512, 1024, 1500, 2048])
def test_an_archive_that_is_cut_anywhere_is_told(keep: int, name: str, tmp_path: Path, layout: Layout) -> None:
    """Also between two samples, where tar itself sees nothing wrong."""
    path = archive(tmp_path / name, {f"{number}.bin": os.urandom(400) for number in range(4)})
    whole = path.read_bytes()
    path.write_bytes(whole[: min(keep, len(whole) - 9)])
    with pytest.raises(InvalidField, match="cannot be imported"):
        imported(layout, path)


def test_an_archive_whose_checksum_is_wrong_is_told(tmp_path: Path, layout: Layout) -> None:
    path = archive(tmp_path / "t.tar.gz", {"a.bin": b"x" * 100})
    whole = bytearray(path.read_bytes())
    whole[-6] ^= 0xFF
    path.write_bytes(whole)
    with pytest.raises(InvalidField, match="no whole tar archive: CRC"):
        imported(layout, path)


def test_a_packed_archive_unpacks_to_no_more_than_it_may(tmp_path: Path, layout: Layout) -> None:
    path = tmp_path / "t.tar.gz"
    member, data = info("a.bin", bytes(3_000_000))
    archive_of(path, [(member, data)])
    assert path.stat().st_size < 10_000
    with pytest.raises(InvalidField, match=r"unpacks to more than 1000000 bytes.*--max-bytes"):
        imported(layout, path, options=Options(max_bytes=1_000_000))


def test_a_member_that_claims_to_be_huge_is_refused_before_it_is_read(tmp_path: Path, layout: Layout) -> None:
    member, _ = info("a.bin")
    member.size = 1 << 40
    (tmp_path / "t.tar").write_bytes(member.tobuf() + bytes(2048))
    with pytest.raises(InvalidField, match=r"'a\.bin' claims 1099511627776 bytes"):
        imported(layout, tmp_path / "t.tar")


def test_an_archive_in_an_archive_stays_bytes(tmp_path: Path, layout: Layout) -> None:
    inner = gzip.compress(bytes(1000))
    _, found = imported(layout, archive(tmp_path / "t.tar", {"a.gz": inner, "b.gz": inner}))
    assert [bytes(one) for one in found["gz"]] == [inner] * 2


# --- MDS -------------------------------------------------------------------------------------------------------------


def shard_of(samples_of_shard: list[bytes]) -> bytes:
    head = b"{}"
    ends = np.cumsum([0, *map(len, samples_of_shard)]) + 4 * (len(samples_of_shard) + 2) + len(head)
    count = np.array([len(samples_of_shard)], "<u4")
    return count.tobytes() + ends.astype("<u4").tobytes() + head + b"".join(samples_of_shard)


def mds(folder: Path, samples_of_shard: list[bytes], columns: Mapping[str, str], **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    data = shard_of(samples_of_shard)
    (folder / "shard.00000.mds").write_bytes(data)
    about: dict[str, Any] = {
        "column_encodings": list(columns.values()),
        "column_names": list(columns),
        "compression": None,
        "format": "mds",
        "raw_data": {"basename": "shard.00000.mds", "bytes": len(data), "hashes": {}},
        "samples": len(samples_of_shard),
        "version": 2,
        "zip_data": None,
    }
    (folder / "index.json").write_text(json.dumps({"shards": [{**about, **changes}], "version": 2}))
    return folder


def word(*numbers: int) -> bytes:
    return np.array(numbers, "<u4").tobytes()


def test_mds_shards_are_read_without_their_library(tmp_path: Path, layout: Layout) -> None:
    columns = {"n": "int", "t": "str", "v": "ndarray:int16", "w": "ndarray:float32:2", "s": "str_float"}
    rows = [
        word(2, 8, 3) + np.int64(7).tobytes() + b"ab" + b"\x04\x03" + np.arange(3, dtype="<i2").tobytes()
        + np.array([1, 2], "<f4").tobytes() + b"1.5",
        word(0, 4, 1) + np.int64(8).tobytes() + b"\x04\x01" + np.array([9], "<i2").tobytes()
        + np.array([3, 4], "<f4").tobytes() + b"2",
    ]  # fmt: skip
    index, found = imported(layout, mds(tmp_path / "in", rows, columns))
    assert kinds(index) == {"n": "int64", "t": "uint8… utf-8", "v": "int16…", "w": "float32[2]", "s": "float64"}
    assert found == {"n": [7, 8], "t": ["ab", ""], "v": [[0, 1, 2], [9]], "w": [[1, 2], [3, 4]], "s": [1.5, 2]}


def test_folders_of_mds_are_splits(tmp_path: Path, layout: Layout) -> None:
    for split, count in (("train", 3), ("val", 2)):
        mds(tmp_path / "in" / split, [bytes([number]) for number in range(count)], {"label": "uint8"})
    index, found = imported(layout, tmp_path / "in")
    assert (sizes(index), found["label"]) == ({"train": 3, "val": 2}, [0, 1, 2, 0, 1])
    assert index.schema.columns["label"].num_classes == 3


def zstd(folder: Path, *, claim: int | None = None) -> Path:
    data = shard_of([bytes([number]) for number in range(5)])
    packed = pa.compress(data, codec="zstd", asbytes=True)
    mds(
        folder,
        [],
        {"x": "uint8"},
        compression="zstd:3",
        samples=5,
        raw_data={"basename": "shard.00000.mds", "bytes": claim or len(data), "hashes": {}},
        zip_data={"basename": "shard.00000.mds.zstd", "bytes": len(packed), "hashes": {}},
    )
    (folder / "shard.00000.mds").unlink()
    (folder / "shard.00000.mds.zstd").write_bytes(packed)
    return folder


def test_packed_shards_are_unpacked_to_what_the_index_says_and_no_more(tmp_path: Path, layout: Layout) -> None:
    assert imported(layout, zstd(tmp_path / "in"))[1] == {"x": [0, 1, 2, 3, 4]}
    with pytest.raises(InvalidField, match="unpacks to more than the 30 bytes that are stated"):
        imported(layout, zstd(tmp_path / "less", claim=30), name="e")
    packed = tmp_path / "in/shard.00000.mds.zstd"
    packed.write_bytes(packed.read_bytes()[:-5])
    with pytest.raises(InvalidField, match="cannot be imported"):
        imported(layout, tmp_path / "in", name="e")


ONE = {"x": "uint8"}
RAW = {"basename": "shard.00000.mds", "bytes": 17, "hashes": {}}
BAD_MDS: list[tuple[str, Callable[[Path], Path], str]] = [
    ("pickle", lambda folder: mds(folder, [b"x"], {"x": "pkl"}), "'pkl': an encoding of MDS that is not read"),
    ("unknown", lambda folder: mds(folder, [b"x"], {"x": "ndarray:object"}), "that is not read"),
    ("path", lambda folder: mds(folder, [b"x"], ONE, raw_data={**RAW, "basename": "../x"}), "none of this folder"),
    ("no name", lambda folder: mds(folder, [b"x"], ONE, raw_data={**RAW, "basename": ""}), "none of this folder"),
    ("size", lambda folder: mds(folder, [b"x"], ONE, raw_data={**RAW, "bytes": 99}), "the index says 99"),
    (
        "hash",
        lambda folder: mds(folder, [b"x"], ONE, raw_data={**RAW, "hashes": {"sha1": "00"}}),
        "but the index says 00",
    ),
    ("columns", lambda folder: mds(folder, [b"xy"], ONE), "columns have 1 bytes, but the sample 2"),
    ("text", lambda folder: mds(folder, [word(1) + b"\xe9"], {"x": "str"}), "cannot be imported"),
    ("array", lambda folder: mds(folder, [word(2) + b"\x04\x09"], {"x": "ndarray:int16"}), "claims another size"),
    ("compression", lambda folder: mds(folder, [b"x"], ONE, compression="snappy"), "'snappy' is not known"),
    ("no samples", lambda folder: mds(folder, [], ONE), "holds no samples"),
    ("no shards", lambda folder: mds(folder, [b"x"], ONE, column_names=None), "not of a dataset in MDS"),
]


@pytest.mark.parametrize(("made", "said"), [case[1:] for case in BAD_MDS], ids=[case[0] for case in BAD_MDS])
def test_mds_that_is_not_what_it_should_be_is_told(
    made: Callable[[Path], Path], said: str, tmp_path: Path, layout: Layout
) -> None:
    with pytest.raises(InvalidField, match=said):
        imported(layout, made(tmp_path / "in"))
    assert not layout.datasets.exists()


@pytest.mark.parametrize("head", [word(2**32 - 1), word(3, 0), word(1, 900, 901), word(2, 22, 20, 24), b"\1"])
def test_an_mds_shard_whose_offsets_lie_is_refused(head: bytes, tmp_path: Path, layout: Layout) -> None:
    folder = mds(tmp_path / "in", [b"x"], ONE, raw_data={**RAW, "bytes": max(len(head), 17)})
    whole = shard_of([b"x"])
    (folder / "shard.00000.mds").write_bytes(head + whole[len(head) : 17])
    with pytest.raises(InvalidField, match="cannot be imported"):
        imported(layout, folder)


@pytest.mark.parametrize("data", [b"", b"\x22", b"\x63\x04\x01", b"\x22\xff\x01", b"\x22\x04\x05"])
def test_the_head_of_an_array_that_lies_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"head|claims|buffer"):
        ArrayEncoding.parse("ndarray").decode(data)
