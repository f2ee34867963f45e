"""The memory that a state is copied into, and how much there is to spare for it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from railbus_runner.checkpointing.arena import Arena, make_arena, with_growth
from railbus_runner.checkpointing.headroom import available_bytes, group_left, spare_bytes
from railbus_shared.errors import NotSupported

MIB = 1 << 20
VERSIONS = {
    2: ("memory.max", "memory.current", "inactive_file", "active_file"),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file", "total_active_file"),
}


def group(folder: Path, *, version: int, limit: object, used: int, inactive: int = 0, active: int = 0) -> Path:
    limit_name, use_name, inactive_name, active_name = VERSIONS[version]
    (folder / limit_name).write_text(f"{limit}\n")
    (folder / use_name).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{inactive_name} {inactive}\n{active_name} {active}\n")
    return folder


@pytest.mark.parametrize("version", VERSIONS)
def test_a_group_leaves_what_is_below_its_limit_and_what_it_keeps_of_files(tmp_path: Path, version: int) -> None:
    assert group_left(group(tmp_path, version=version, limit=100, used=70, inactive=20, active=5)) == 55
    assert group_left(group(tmp_path, version=version, limit=100, used=130)) == 0


def test_a_group_without_a_limit_or_without_an_answer_is_none_that_counts(tmp_path: Path) -> None:
    assert group_left(tmp_path) is None
    assert group_left(group(tmp_path, version=2, limit="max", used=70)) is None


def test_what_the_host_has_is_read_in_bytes() -> None:
    assert available_bytes("MemTotal:  9 kB\nMemAvailable:   20 kB\n") == 20 << 10
    assert 0 < spare_bytes() < available_bytes(Path("/proc/meminfo").read_text()) + (1 << 30)


@pytest.mark.parametrize("nbytes", [1, 5 * MIB, 1 << 30])
def test_an_arena_has_room_for_what_grows_and_whole_pages(nbytes: int) -> None:
    assert with_growth(nbytes) >= nbytes + max(MIB, nbytes // 64)
    assert with_growth(nbytes) % os.sysconf("SC_PAGE_SIZE") == 0


def test_two_maps_of_an_arena_are_one_memory_which_is_there_before_it_is_used() -> None:
    made = make_arena(20 * MIB, is_wanted=lambda: True)
    assert made is not None
    assert os.fstat(made.descriptor).st_blocks * 512 >= made.nbytes
    other = Arena(os.dup(made.descriptor), made.nbytes)
    assert other.populate(goes_on=lambda: True)
    torch.frombuffer(other.memory, dtype=torch.uint8)[-1] = 7
    assert made.memory[made.nbytes - 1] == 7
    for arena in (made, other):
        arena.close()


def num_open() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_an_arena_that_is_not_wanted_any_more_is_given_up_half_way() -> None:
    wanted = iter([True, False, False])
    before = num_open()
    assert make_arena(40 * MIB, is_wanted=lambda: next(wanted)) is None
    assert num_open() == before


def test_an_arena_that_does_not_fit_takes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("railbus_runner.checkpointing.arena.spare_bytes", lambda: 0)
    with pytest.raises(NotSupported, match="no memory to spare"):
        make_arena(40 * MIB, is_wanted=lambda: True)
    with pytest.raises(NotSupported, match="no arena of"):
        make_arena(1 << 62, is_wanted=lambda: True)
