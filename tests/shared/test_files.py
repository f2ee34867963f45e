"""Files appear whole or not at all: killed writers, several writers, a full disk."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from railbus_shared import files
from railbus_shared.errors import StorageFull

_MIB = 1 << 20


def _litter(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def test_a_file_is_replaced_whole_and_leaves_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.write_whole(path, b"old")
    files.write_whole(path, b"new", mode=0o600)
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o600
    assert _litter(tmp_path) == []


def test_a_new_file_is_never_put_in_place_of_another(tmp_path: Path) -> None:
    path = tmp_path / "a"
    files.write_new(path, b"first")
    with pytest.raises(FileExistsError):
        files.write_new(path, b"second")
    assert path.read_bytes() == b"first"
    assert _litter(tmp_path) == []


def test_a_writer_that_fails_leaves_the_older_file_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "a"
    files.write_new(path, b"first")
    with pytest.raises(TypeError), files.temporary(path) as file:
        file.write("no bytes")  # type: ignore[call-overload]
    assert path.read_bytes() == b"first"
    assert _litter(tmp_path) == []


def test_a_temporary_file_takes_its_final_name_only_when_published(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with files.temporary(path) as file:
        file.write(b"data")
    assert _litter(tmp_path) == [".a.tmp"]
    assert not path.exists()
    files.publish(files.temporary_path(path), path)
    assert path.read_bytes() == b"data"
    assert _litter(tmp_path) == []


def test_what_a_killed_writer_left_is_no_obstacle(tmp_path: Path) -> None:
    path = tmp_path / "a"
    files.temporary_path(path).write_bytes(b"half")
    with files.temporary(path) as file:
        file.write(b"whole")
    files.publish(files.temporary_path(path), path)
    assert path.read_bytes() == b"whole"


_WRITER = """
import sys
from pathlib import Path
from railbus_shared import files
path, word = Path(sys.argv[1]), sys.argv[2].encode()
print("ready", flush=True)
while True:
    files.write_whole(path, word * (8 << 20))
"""


@pytest.mark.parametrize("delay_s", [0.0, 0.01, 0.02, 0.035, 0.05])
def test_a_writer_killed_midway_leaves_the_old_file_or_the_new_one(tmp_path: Path, delay_s: float) -> None:
    path = tmp_path / "a"
    files.write_whole(path, b"a" * (8 * _MIB))
    with subprocess.Popen([sys.executable, "-c", _WRITER, str(path), "b"], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(delay_s)
        writer.send_signal(signal.SIGKILL)
    found = path.read_bytes()
    assert len(found) == 8 * _MIB
    assert len(set(found)) == 1


def _in_threads(count: int, work: object) -> None:
    assert callable(work)
    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_of_several_writers_of_one_file_each_writes_it_whole(tmp_path: Path) -> None:
    path, seen, done = tmp_path / "a", set[bytes](), threading.Event()
    files.write_whole(path, b"0" * _MIB)

    def read() -> None:
        while not done.is_set():
            seen.add(path.read_bytes())

    reader = threading.Thread(target=read)
    reader.start()

    def write(number: int) -> None:
        for _ in range(5):
            files.write_whole(path, str(number).encode() * _MIB)

    _in_threads(4, write)
    done.set()
    reader.join()
    assert {len(content) for content in seen} == {_MIB}
    assert all(len(set(content)) == 1 for content in seen)
    assert _litter(tmp_path) == []


def test_of_several_writers_of_a_new_file_one_wins_with_all_of_its_bytes(tmp_path: Path) -> None:
    for turn in range(10):
        path, outcomes = tmp_path / f"a{turn}", list[str]()

        def write(number: int, path: Path = path, outcomes: list[str] = outcomes) -> None:
            try:
                files.write_new(path, str(number).encode() * 100_000)
                outcomes.append("written")
            except FileExistsError:
                outcomes.append("taken")

        _in_threads(4, write)
        assert sorted(outcomes) == ["taken"] * 3 + ["written"]
        content = path.read_bytes()
        assert (len(content), len(set(content))) == (100_000, 1)
    assert _litter(tmp_path) == []


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["/bin/mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip(f"cannot mount: {done.stderr.decode().strip()}")
    yield folder
    subprocess.run(["/bin/umount", str(folder)], check=True)


@pytest.mark.root
def test_a_full_disk_is_told_and_the_older_file_stays(tiny_disk: Path) -> None:
    path = tiny_disk / "a"
    files.write_whole(path, b"old")
    for write in (files.write_whole, files.write_new):
        with pytest.raises(StorageFull, match="no space left") as caught:
            write(tiny_disk / ("a" if write is files.write_whole else "b"), b"x" * (4 * _MIB))
        assert caught.value.code == "STORAGE_FULL"
    with pytest.raises(StorageFull), files.temporary(path) as file:
        file.write(b"x" * (4 * _MIB))
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tiny_disk.iterdir()] == ["a"]
    files.write_whole(path, b"new")
    assert path.read_bytes() == b"new"


def test_other_faults_of_the_system_are_passed_on_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        files.write_whole(tmp_path / "nothing" / "a", b"")


@pytest.mark.parametrize("size", [0, 1, _MIB - 1, _MIB, _MIB + 1])
def test_a_file_is_hashed_in_pieces_as_it_would_be_whole(tmp_path: Path, size: int) -> None:
    data = bytes(range(256)) * (size // 256 + 1)
    path = tmp_path / "a"
    path.write_bytes(data[:size])
    assert files.sha256_file(path) == hashlib.sha256(data[:size]).hexdigest()


def test_json_for_people_is_indented_and_ends_with_a_newline() -> None:
    assert files.to_json({"b": 1, "a": [1]}) == b'{\n  "b": 1,\n  "a": [\n    1\n  ]\n}\n'
