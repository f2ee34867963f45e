"""Files of `torch.save` and safetensors: proven before they are believed, and read to where the values belong."""

from __future__ import annotations

import os
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from railbus_runner.checkpointing import filling, state_file
from railbus_runner.checkpointing.filling import Placement, fill
from railbus_runner.checkpointing.proving import BUFFER_BYTES, NotProven, digest, prove
from railbus_runner.checkpointing.safetensors_file import open_safetensors
from railbus_runner.checkpointing.state_file import open_state
from railbus_shared import files
from railbus_shared.archive import Extent, NotAnArchive, read_directory
from railbus_shared.errors import CheckpointCorrupt

SHARED = torch.arange(100, dtype=torch.float64)
STATES: dict[str, Callable[[], object]] = {
    "nested": lambda: {"a": [torch.ones(3), {"b": (torch.zeros(2, 2, dtype=torch.bfloat16), 7)}], 3: {"s", 1.5}},
    "views of one storage": lambda: {"whole": SHARED, "part": SHARED[10:20], "every other": SHARED[::2]},
    "transposed": lambda: torch.arange(12).view(3, 4).T,
    "channels last": lambda: torch.rand(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    "a scalar, nothing, and numbers of two": lambda: [
        torch.tensor(5),
        torch.empty(0),
        torch.ones(2, dtype=torch.cfloat),
    ],
    "sparse": lambda: torch.eye(4).to_sparse(),
    "a parameter": lambda: torch.nn.Parameter(torch.rand(4, 4)),
    "no tensor": lambda: {"step": 1 << 100, "name": "ü", "bytes": b"\0\1", "flag": True, "none": None},
}


def saved(path: Path, state: object) -> Path:
    torch.save(state, path)
    return path


def opened(path: Path) -> int:
    return os.open(path, os.O_RDONLY)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        one, other = (value.to_dense() if value.is_sparse else value for value in (one, other))
        return one.dtype == other.dtype and one.stride() == other.stride() and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@pytest.mark.parametrize("kind", STATES)
@pytest.mark.parametrize("is_ahead", [False, True])
def test_a_state_comes_back_as_torch_loads_it(tmp_path: Path, kind: str, is_ahead: bool) -> None:
    path = saved(tmp_path / "a.pt", STATES[kind]())
    records = read_directory(opened(path), path.stat().st_size).records
    ahead = {extent.offset for extent in records.values()} if is_ahead else ()
    expected = torch.load(path, weights_only=True)
    with open_state(path, nbytes=path.stat().st_size, sha256=files.sha256_file(path), ahead=ahead) as file:
        file.fill(file.state)
    path.write_bytes(b"")  # what was read is not the file's memory
    assert type(file.state) is type(expected)
    assert same(file.state, expected)


def test_values_go_straight_into_live_tensors_that_lie_alike(tmp_path: Path) -> None:
    state = {
        "a": torch.rand(5, 7),
        "c": torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "t": torch.rand(3, 4).T,
    }
    with open_state(saved(tmp_path / "a.pt", state)) as file:
        assert isinstance(file.state, dict)
        live = {name: torch.zeros_like(value) for name, value in state.items()}
        places = {name: file.place(file.state[name], live[name]) for name in state}
        assert places["t"] is None, "its elements lie in no order that is known to be whole"
        assert file.place(file.state["c"], torch.zeros(2, 3, 4, 5)) is None, "in another order"
        file.fill({}, [place for place in places.values() if place is not None])
    assert torch.equal(live["a"], state["a"])
    assert torch.equal(live["c"], state["c"])


def test_the_bytes_that_are_unpickled_are_those_that_were_hashed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path / "a.pt", {"word": "right"})
    sha256 = files.sha256_file(path)
    real = state_file._digest

    def change_after(*args: Any) -> Any:
        answer = real(*args)
        path.write_bytes(path.read_bytes().replace(b"right", b"wrong"))
        return answer

    monkeypatch.setattr(state_file, "_digest", change_after)
    with open_state(path, sha256=sha256) as file:
        assert file.state == {"word": "right"}
    assert b"wrong" in path.read_bytes()


def test_a_file_that_takes_the_name_meanwhile_is_not_read(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", {"w": torch.ones(4)})
    with open_state(path, sha256=files.sha256_file(path)) as file:
        saved(tmp_path / "b.pt", {"w": torch.zeros(4)}).replace(path)
        file.fill(file.state)
    assert same(file.state, {"w": torch.ones(4)})


def test_a_file_that_is_cut_short_after_it_was_proven_is_an_error(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", {"w": torch.ones(100_000)})
    with open_state(path) as file:
        os.truncate(path, 1000)
        with pytest.raises(CheckpointCorrupt, match="the file ends"):
            file.fill(file.state)


def _kilobytes(path: Path) -> Path:
    path.write_bytes(random.Random(0).randbytes(3000))
    return path


NO_STATE: dict[str, Callable[[Path], object]] = {
    "nothing": lambda path: path.touch(),
    "noise": _kilobytes,
    "an old format": lambda path: torch.save({}, path, _use_new_zipfile_serialization=False),
    "a zip that is packed": lambda path: zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED).writestr(
        "a/data.pkl", b"x" * 99
    ),
    "a zip of something": lambda path: zipfile.ZipFile(path, "w").writestr("a/b", b"x"),
    "a folder": lambda path: path.mkdir(),
    "a pipe": os.mkfifo,
}


@pytest.mark.parametrize("kind", NO_STATE)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_what_is_no_state_is_refused_by_its_path(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.pt"
    NO_STATE[kind](path)
    with pytest.raises(CheckpointCorrupt, match=r"a\.pt"):
        open_state(path)


def test_a_record_that_is_shorter_than_the_state_says_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", {"w": torch.ones(4)})
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "b.pt", "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name)[: 8 if name.endswith("data/0") else None])
    with pytest.raises(CheckpointCorrupt, match="does not have the 16 bytes"):
        open_state(tmp_path / "b.pt")


def test_the_directory_of_a_large_archive_is_read_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 10)
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 1)
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(3):
            archive.writestr(f"a/data/{number}", bytes([number]) * 100)
    found = read_directory(opened(path), path.stat().st_size).records
    assert {name: path.read_bytes()[at.offset : at.offset + at.nbytes] for name, at in found.items()} == {
        f"data/{number}": bytes([number]) * 100 for number in range(3)
    }


@pytest.mark.parametrize("seed", range(3))
def test_a_damaged_directory_is_told_or_stays_within_the_file(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    whole = saved(tmp_path / "a.pt", {"w": torch.ones(4), "v": [torch.zeros(2)] * 3}).read_bytes()
    path = tmp_path / "b.pt"
    for _ in range(200):
        data = bytearray(whole[: chance.randint(0, len(whole))] if chance.random() < 0.3 else whole)
        for _ in range(chance.randint(1, 4) if data else 0):
            data[-chance.randint(1, min(len(data), 700))] = chance.randrange(256)
        path.write_bytes(data)
        descriptor = opened(path)
        try:
            records = list(read_directory(descriptor, len(data)).records.values())
        except NotAnArchive:
            records = []
        finally:
            os.close(descriptor)
        assert all(0 <= extent.offset <= extent.offset + extent.nbytes <= len(data) for extent in records)


# --- hashing and filling ---------------------------------------------------------------------------------------------


def test_what_is_kept_is_what_was_hashed_wherever_it_lies(tmp_path: Path) -> None:
    data = random.Random(0).randbytes(3 * BUFFER_BYTES + 17)
    path = tmp_path / "a"
    path.write_bytes(data)
    extents = [
        Extent(0, 5),
        Extent(BUFFER_BYTES - 3, 6),
        Extent(100, 2 * BUFFER_BYTES),
        Extent(len(data) - 1, 1),
        Extent(7, 0),
    ]
    found, kept = digest(opened(path), nbytes=len(data), keep=extents)
    assert found == files.sha256_file(path)
    assert kept == {extent: data[extent.offset : extent.offset + extent.nbytes] for extent in extents}
    with pytest.raises(NotProven, match="sha256 0"):
        prove(opened(path), nbytes=len(data), sha256="0" * 64)
    with pytest.raises(NotProven, match="bytes"):
        prove(opened(path), nbytes=len(data) + 1, sha256=found)


def test_a_device_gets_its_values_through_buffers_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filling, "STAGING_BYTES", 64)
    values = torch.arange(1000, dtype=torch.int16)
    (tmp_path / "a").write_bytes(b"xxx" + values.numpy().tobytes())
    staged = torch.zeros(2000, dtype=torch.uint8)
    stage = filling._Staging(torch.device("cpu"))  # as every device but the CPU is filled
    stage.read(opened(tmp_path / "a"), staged, 3)
    stage.finish()
    assert torch.equal(staged.view(torch.int16), values)
    part = torch.zeros(3, 50, dtype=torch.int16)
    assert fill(opened(tmp_path / "a"), [Placement(Extent(203, 100), part[1])]) == 100
    assert part.tolist() == [[0] * 50, list(range(100, 150)), [0] * 50]


# --- safetensors -----------------------------------------------------------------------------------------------------


def test_safetensors_come_back_as_they_were_written(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    state = {
        "w": torch.rand(3, 4),
        "b": torch.ones(2, dtype=torch.bfloat16),
        "n": torch.tensor(7),
        "e": torch.empty(0, 3),
    }
    save_file(state, tmp_path / "a.safetensors", metadata={"format": "pt"})
    with open_safetensors(tmp_path / "a.safetensors", sha256=files.sha256_file(tmp_path / "a.safetensors")) as file:
        file.fill(file.state)
    assert same(file.state, state)
    with pytest.raises(CheckpointCorrupt, match="sha256 0"):
        open_safetensors(tmp_path / "a.safetensors", sha256="0" * 64)


def _header(text: bytes, *, length: int | None = None) -> bytes:
    return (len(text) if length is None else length).to_bytes(8, "little") + text


ENTRY = b'{"w": {"dtype": "%b", "shape": %b, "data_offsets": %b}}'


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"1234567",
        _header(b"{}", length=1 << 40),
        _header(b"{"),
        _header(b"[]"),
        _header(b'{"w": 3}'),
        _header(ENTRY % (b"F99", b"[1]", b"[0, 4]")) + b"1234",
        _header(ENTRY % (b"F32", b"[1]", b"[0, 5]")) + b"12345",
        _header(ENTRY % (b"F32", b"[2]", b"[0, 8]")) + b"1234",
        _header(ENTRY % (b"F32", b"[-1]", b"[4, 0]")) + b"1234",
        _header(ENTRY % (b"F32", b'["1"]', b"[0, 4]")) + b"1234",
        _header(ENTRY % (b"F32", b"[1]", b"[0]")) + b"1234",
    ],
)
def test_a_bad_header_of_safetensors_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.safetensors").write_bytes(data)
    with pytest.raises(CheckpointCorrupt, match="a file of safetensors"):
        open_safetensors(tmp_path / "a.safetensors")
