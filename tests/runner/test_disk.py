"""Large files on real file systems: whole, hashed, and refused in time."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import mmap
import os
import random
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from checkpoints_for_tests import agree, describer, names, newest_step, pair, save, store, write
from railbus_runner.checkpointing import disk
from railbus_runner.checkpointing.disk import BLOCK_BYTES, write_draft
from railbus_shared import files
from railbus_shared.errors import BadSetting, StorageFull

PAGE = mmap.PAGESIZE
SIZES = [0, 1, PAGE - 1, PAGE, PAGE + 1, BLOCK_BYTES, BLOCK_BYTES + 1, 2 * BLOCK_BYTES + 3 * PAGE + 5]


@pytest.fixture(params=["disk", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """On a disk, which takes direct writes, and on a tmpfs."""
    if request.param == "disk":
        yield tmp_path
        return
    path = Path("/dev/shm") / f"railbus-test-{os.getpid()}"
    path.mkdir()
    try:
        yield path
    finally:
        files.remove_litter(path)
        path.rmdir()


@pytest.fixture(scope="module")
def memory() -> memoryview:
    """Random bytes, page aligned."""
    arena = mmap.mmap(-1, SIZES[-1] + PAGE)
    arena[: SIZES[-1]] = random.Random(7).randbytes(SIZES[-1])
    return memoryview(arena)


def pieces(memory: memoryview, *, seed: int) -> Iterator[memoryview]:
    """The same bytes as chunks of any length, none or odd ones or whole pages among them."""
    generator, start = random.Random(seed), 0
    while start < len(memory):
        length = generator.choice([0, 1, 64, PAGE, 100_003, BLOCK_BYTES - 17, 8 * PAGE, 2 * BLOCK_BYTES])
        yield memory[start : start + length]
        start += length


@pytest.mark.parametrize("nbytes", SIZES)
def test_the_bytes_and_the_hash_are_those_of_the_source(folder: Path, memory: memoryview, nbytes: int) -> None:
    source = memory[:nbytes]
    expected = hashlib.sha256(source).hexdigest()
    sources: list[memoryview | Iterator[memoryview]] = [source, *(pieces(source, seed=seed) for seed in range(2))]
    for number, given in enumerate([*sources, memory[1:][:nbytes]]):
        final = folder / f"x{number}"
        said = write_draft(final, given, nbytes=nbytes)
        assert said == files.sha256_file(files.temporary_path(final))
        assert said == (expected if number < 3 else hashlib.sha256(memory[1 : nbytes + 1]).hexdigest())
        assert files.temporary_path(final).stat().st_size == nbytes
        assert not final.exists()


def test_a_file_system_that_takes_direct_writes_back_gets_the_rest_through_the_cache(
    tmp_path: Path, memory: memoryview, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwrite
    refused: list[int] = []

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        if offset >= BLOCK_BYTES and not refused:
            refused.append(offset)
            raise OSError(errno.EINVAL, "no direct writes")
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    source = memory[: SIZES[-1]]
    assert write_draft(tmp_path / "x", pieces(source, seed=3), nbytes=SIZES[-1]) == hashlib.sha256(source).hexdigest()
    assert len(refused) == 1
    assert (tmp_path / ".x.tmp").read_bytes() == source


def test_no_name_is_replaced(tmp_path: Path) -> None:
    (tmp_path / ".x.tmp").write_bytes(b"somebody's")
    with pytest.raises(FileExistsError):
        write_draft(tmp_path / "x", memoryview(b"mine"), nbytes=4)
    assert (tmp_path / ".x.tmp").read_bytes() == b"somebody's"


@contextlib.contextmanager
def at_most(num_bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_without_room_no_byte_is_written_and_the_error_says_how_much_is_needed(tmp_path: Path) -> None:
    def never() -> Iterator[memoryview]:
        pytest.fail("the source was read")
        yield memoryview(b"")

    with pytest.raises(StorageFull) as caught:
        write_draft(tmp_path / "x", never(), nbytes=1 << 60)
    assert caught.value.details["needed_bytes"] == 1 << 60
    with at_most(1 << 20), pytest.raises(StorageFull):
        write_draft(tmp_path / "x", never(), nbytes=2 << 20)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_an_error_in_the_midst_of_writing_leaves_no_draft(
    tmp_path: Path, memory: memoryview, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    real = os.pwrite

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        if offset >= BLOCK_BYTES:
            raise OSError(number, os.strerror(number))
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(OSError if number == errno.EIO else StorageFull):
        write_draft(tmp_path / "x", memory, nbytes=len(memory))
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_fails_or_is_not_as_long_as_announced_leaves_no_draft(tmp_path: Path, memory: memoryview) -> None:
    def broken() -> Iterator[memoryview]:
        yield memory
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_draft(tmp_path / "x", broken(), nbytes=2 * len(memory))
    for nbytes in (PAGE - 1, PAGE + 1):
        with pytest.raises(ValueError, match="were announced"):
            write_draft(tmp_path / "x", memory[:PAGE], nbytes=nbytes)
    assert list(tmp_path.iterdir()) == []


def test_the_memory_that_an_iterable_takes_is_bounded(
    tmp_path: Path, memory: memoryview, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken, written, most = 0, 0, 0
    real = os.pwrite

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        nonlocal written
        written += len(data)
        return real(descriptor, data, offset)

    def source() -> Iterator[memoryview]:
        nonlocal taken, most
        for _ in range(6):
            yield memory[:BLOCK_BYTES]
            taken += BLOCK_BYTES
            most = max(most, taken - written)

    monkeypatch.setattr(os, "pwrite", pwrite)
    monkeypatch.setattr(disk, "MAX_AHEAD_BYTES", BLOCK_BYTES)
    write_draft(tmp_path / "x", source(), nbytes=6 * BLOCK_BYTES)
    assert most <= 2 * BLOCK_BYTES


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Of one megabyte."""
    done = subprocess.run(["/bin/mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path], check=False)
    if done.returncode:
        pytest.skip("cannot mount")
    yield tmp_path
    subprocess.run(["/bin/umount", "--lazy", tmp_path], check=True)


@pytest.mark.root
def test_on_a_full_disk_a_checkpoint_fails_whole_and_a_later_one_is_written(small_disk: Path) -> None:
    large = {"step": 2, "w": torch.ones(200_000)}
    write(small_disk, 1)
    (ballast := small_disk / "ballast").write_bytes(bytes(500_000))
    with pytest.raises(StorageFull):
        save(store(small_disk), large, describe=describer(step=2), commit=agree)
    assert names(small_disk) == pair(1)
    assert newest_step(small_disk) == (1, [])
    ballast.unlink()
    save(store(small_disk), large, describe=describer(step=2), commit=agree)
    assert newest_step(small_disk) == (2, [])


@pytest.mark.root
def test_wherever_on_its_way_a_checkpoint_finds_the_disk_full_nothing_of_it_is_left(small_disk: Path) -> None:
    """With room for none of its files, for its claim alone, and so on, up to all but the meta, page by page."""
    write(small_disk, 1)
    before = {path.name for path in store(small_disk).folder.iterdir()}
    ballast, left, told = small_disk / "ballast", 0, 0
    while newest_step(small_disk) == (1, []):
        room = os.statvfs(small_disk)
        ballast.write_bytes(bytes(room.f_bavail * room.f_frsize - left * PAGE))
        for _ in range(2):  # as one who looks for room again and again
            with contextlib.suppress(StorageFull):
                write(small_disk, 2)
                break
            told += 1
            left_over = {path.name for path in store(small_disk).folder.iterdir()} - before
            assert {name for name in left_over if not name.startswith(".serial-")} == set()
            assert len(left_over) <= 1
        ballast.unlink()
        left += 1
    assert told > 6, "the claim, the data, the meta: each found no room, twice"
    assert newest_step(small_disk) == (2, [])
    assert len(list(store(small_disk).folder.glob(".serial-*"))) == 1


@pytest.mark.root
def test_a_folder_that_cannot_be_written_to_is_named(small_disk: Path) -> None:
    write(small_disk, 1)
    subprocess.run(["/bin/mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(BadSetting, match="checkpoints': Read-only file system"):
        write(small_disk, 2)
    assert newest_step(small_disk) == (1, [])
