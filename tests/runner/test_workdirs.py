"""Where a trainer works: in a fresh folder, or in one that the settings allow."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from railbus_runner.workdirs import Left, Workdirs
from railbus_shared.errors import InvalidField


@pytest.fixture
def allowed(tmp_path: Path) -> Path:
    folder = tmp_path / "allowed"
    (folder / "project").mkdir(parents=True)
    return folder


@pytest.fixture
def workdirs(tmp_path: Path, allowed: Path) -> Workdirs:
    return Workdirs(tmp_path / "state" / "work", allowed=[allowed])


def test_a_fresh_folder_is_empty_private_and_gone_afterwards(workdirs: Workdirs, tmp_path: Path) -> None:
    folder = workdirs.make("j-1.1", wanted=None)
    assert folder == tmp_path / "state" / "work" / "j-1.1"
    assert folder.stat().st_mode & 0o777 == 0o700
    (folder / "sub").mkdir()
    (folder / "sub" / "a.txt").write_text("a")
    (folder / "link").symlink_to("/etc/passwd")
    assert list(workdirs.make("j-1.1", wanted=None).iterdir()) == []
    (folder / "b.txt").write_text("b")
    assert workdirs.remove("j-1.1") == Left(1, ("b.txt",))
    assert not folder.exists()
    assert workdirs.remove("j-1.1") == Left(0, ())


def test_what_was_left_is_named_but_not_all_of_it(workdirs: Workdirs) -> None:
    folder = workdirs.make("j-1.1", wanted=None)
    for number in range(50):
        (folder / f"{number:02}").write_text("")
    left = workdirs.remove("j-1.1")
    assert (left.num_files, left.names) == (50, tuple(f"{n:02}" for n in range(10)))


def test_a_folder_within_an_allowed_one_is_taken_as_it_is_and_stays(workdirs: Workdirs, allowed: Path) -> None:
    (allowed / "project" / "kept").write_text("kept")
    for wanted in (allowed, allowed / "project", allowed / "project" / ".." / "project"):
        assert workdirs.make("j-1.1", wanted=str(wanted)) == wanted.resolve()
    assert workdirs.remove("j-1.1") == Left(0, ())
    assert (allowed / "project" / "kept").exists()


def test_any_other_folder_is_refused_links_and_dots_notwithstanding(
    workdirs: Workdirs, allowed: Path, tmp_path: Path
) -> None:
    (tmp_path / "allowed-not").mkdir()
    (allowed / "out").symlink_to(tmp_path / "allowed-not")
    for wanted in ("/", "/tmp", f"{allowed}-not", f"{allowed}/..", f"{allowed}/out"):
        with pytest.raises(InvalidField, match="workdir") as refused:
            workdirs.make("j-1.1", wanted=wanted)
        assert "RAILBUS_RUNNER_WORKDIRS" in refused.value.hint
    with pytest.raises(InvalidField, match="no such folder"):
        workdirs.make("j-1.1", wanted=f"{allowed}/missing")


def test_what_a_former_runner_left_is_removed_but_not_what_is_in_use(workdirs: Workdirs) -> None:
    old, stuck = workdirs.make("j-1.1", wanted=None), workdirs.make("j-2.1", wanted=None)
    workdirs.sweep(["j-2.1"])
    assert (old.exists(), stuck.exists()) == (False, True)
    workdirs.sweep()
    assert not stuck.exists()


SHUT = """
import os, pathlib, tempfile
from railbus_runner.workdirs import Workdirs
if os.geteuid() == 0:
    os.setuid(65534)
with tempfile.TemporaryDirectory() as root:
    workdirs = Workdirs(pathlib.Path(root), allowed=())
    fresh = workdirs.make("j-1.1", wanted=None)
    (fresh / "shut" / "inner").mkdir(parents=True)
    (fresh / "shut" / "file").write_text("x")
    (fresh / "shut" / "inner" / "file").write_text("x")
    for mode, path in ((0o000, fresh / "shut" / "inner"), (0o444, fresh / "shut"), (0o500, fresh)):
        path.chmod(mode)
    left = workdirs.remove("j-1.1")
    print(left.num_files, *left.names, fresh.exists())
"""


def test_folders_that_a_trainer_has_shut_are_removed_too() -> None:
    """By somebody who is not root, whom no mode keeps out, and who could not write what coverage measures."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    shown = subprocess.run([sys.executable, "-c", SHUT], capture_output=True, text=True, check=False, env=env)
    assert (shown.stdout.split(), shown.stderr) == (["2", "shut/file", "shut/inner/file", "False"], "")


def test_a_link_in_place_of_the_folder_is_removed_and_not_followed(workdirs: Workdirs, tmp_path: Path) -> None:
    folder = workdirs.make("j-1.1", wanted=None)
    (tmp_path / "else").mkdir(mode=0o755)
    (tmp_path / "else" / "kept").mkdir(mode=0o755)
    folder.rmdir()
    folder.symlink_to(tmp_path / "else")
    assert workdirs.remove("j-1.1") == Left(0, ())
    assert not folder.is_symlink()
    assert (tmp_path / "else" / "kept").stat().st_mode & 0o777 == 0o755
