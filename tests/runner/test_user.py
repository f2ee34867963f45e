"""Whom a runner becomes, what is left of root then, and what it refuses; with real processes."""

from __future__ import annotations

import grp
import json
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from railbus.embedded.credentials import ensure_keys
from railbus_runner.user import find_user
from railbus_shared.errors import BadSetting
from thief import as_user, can_import, launcher
from until import PATIENCE_S

UID = 23_456
NOBODY = pwd.getpwnam("nobody")


def test_a_user_is_named_as_systemd_and_docker_name_one() -> None:
    group = grp.getgrgid(NOBODY.pw_gid).gr_name
    forms = ("nobody", str(NOBODY.pw_uid), f"nobody:{group}", f"{NOBODY.pw_uid}:{NOBODY.pw_gid}")
    found = {(user.name, user.uid, user.gid, user.home) for user in map(find_user, forms)}
    assert found == {("nobody", NOBODY.pw_uid, NOBODY.pw_gid, NOBODY.pw_dir)}
    unknown = find_user(f"{UID}:{UID + 1}")
    assert (unknown.name, unknown.uid, unknown.gid, unknown.groups) == ("", UID, UID + 1, (UID + 1,))


def test_it_has_the_groups_that_the_system_knows_and_those_that_are_added() -> None:
    more = grp.getgrgid(1).gr_name
    assert set(find_user("nobody", (more, "4711")).groups) == {*os.getgrouplist("nobody", NOBODY.pw_gid), 1, 4711}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("root", "root is whom training code must not be"),
        ("0", "root is whom"),
        ("0:5", "root is whom"),
        ("no-such-user", "the system knows no such user"),
        ("-1", "the system knows no such user"),
        (str(UID), "the group must be said as well"),
        ("nobody:no-such-group", "the group 'no-such-group'"),
        ("nobody:", "the group ''"),
        ("4294967295:1", "the largest id is 4294967294"),
        ("nobody:4294967295", "the largest id is 4294967294"),
    ],
)
def test_a_user_that_cannot_be_is_refused_by_name(text: str, says: str) -> None:
    with pytest.raises(BadSetting, match=says):
        find_user(text)


def test_a_further_group_that_is_unknown_is_refused() -> None:
    with pytest.raises(BadSetting, match=r"RAILBUS_RUNNER_USER_GROUPS names the group 'no-such-group'"):
        find_user("nobody", ("no-such-group",))


BECOME = """
import ctypes, json, os, resource
from railbus_runner import processes
from railbus_runner.user import become, find_user
libc = ctypes.CDLL(None)
processes.set_death_signal(15)
become(find_user("nobody", ["4711"]))
def back(step):
    try:
        step()
    except PermissionError:
        return "refused"
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(json.dumps({
    "uids": status["Uid"].split(), "gids": status["Gid"].split(), "groups": status["Groups"].split(),
    "capabilities": [int(status[name], 16) for name in ("CapEff", "CapPrm", "CapInh", "CapAmb")],
    "dumpable": libc.prctl(3, 0, 0, 0, 0), "death_signal": processes.death_signal(),
    "back": [back(lambda: os.setuid(0)), back(lambda: os.setgid(0)), back(lambda: os.setgroups([]))],
    "home": [os.environ["HOME"], os.environ["USER"], os.environ["LOGNAME"]],
}))
"""


@pytest.mark.root
def test_nothing_of_root_is_left_to_who_has_become_another_user() -> None:
    done = subprocess.run([sys.executable, "-c", BECOME], capture_output=True, text=True, check=True)
    seen = json.loads(done.stdout)
    assert (set(seen["uids"]), set(seen["gids"])) == ({str(NOBODY.pw_uid)}, {str(NOBODY.pw_gid)})
    assert {int(group) for group in seen["groups"]} == {*os.getgrouplist("nobody", NOBODY.pw_gid), 4711}
    assert set(seen["capabilities"]) == {0}
    assert seen["back"] == ["refused"] * 3
    assert (seen["dumpable"], seen["death_signal"]) == (0, 15)
    assert seen["home"] == [NOBODY.pw_dir, "nobody", "nobody"]


@dataclass
class Place:
    """What a runner is told, and how root starts it; NATS does not answer, so that it only begins."""

    folder: Path
    start: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)

    @property
    def key(self) -> Path:
        return self.folder / "keys" / "runner.nk"

    @property
    def command(self) -> list[str]:
        return [*self.start, sys.executable, "-P", "-s", "-m", "railbus_runner"]

    def refused(self, *before: str, **settings: str) -> dict[str, Any]:
        """The error with which it ends at once."""
        self.start += before
        done = subprocess.run(
            self.command, env=self._env(settings), capture_output=True, text=True, timeout=PATIENCE_S, check=False
        )
        assert done.returncode == 2, done.stderr
        error: dict[str, Any] = json.loads(done.stderr.splitlines()[-1])["error"]
        return error

    def said_first(self, *before: str, **settings: str) -> dict[str, Any]:
        """The line of its log after that it starts, of one that goes on."""
        self.start += before
        with subprocess.Popen(self.command, env=self._env(settings), stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            starting, line = (json.loads(process.stderr.readline()) for _ in range(2))
            process.kill()
        assert starting["event"] == "starting"
        told: dict[str, Any] = line
        return told

    def _env(self, settings: dict[str, str]) -> dict[str, str]:
        no_more = ("RAILBUS_", "COVERAGE_")  # another user cannot write what a tracer tells
        kept = {name: value for name, value in os.environ.items() if not name.startswith(no_more)}
        own = {"ROOT": str(self.folder / "learning"), "NATS_URL": "nats://127.0.0.1:1", "RUNNER_HTTP_PORT": "0"}
        own |= {"NATS_KEY_FILE": str(self.key), "RUNNER_USER": f"{UID}:{UID}"}
        own |= {name.upper(): value for name, value in settings.items()}
        return {**kept, **{f"RAILBUS_{name}": value for name, value in own.items()}, **self.env}


@pytest.fixture
def place() -> Iterator[Place]:
    start = launcher(Path(sys.base_prefix), Path(sys.prefix), Path(__file__).parents[2])
    if os.geteuid() != 0 or not can_import(start, UID):
        pytest.skip("another user cannot run Python here")
    folder = Path(tempfile.mkdtemp(prefix="railbus-test-"))
    try:
        folder.chmod(0o755)
        ensure_keys(folder / "keys", ["runner"])
        (folder / "learning").mkdir()
        os.chown(folder / "learning", UID, UID)
        yield Place(folder, start)
    finally:
        shutil.rmtree(folder)


@pytest.mark.root
@pytest.mark.timeout(60)
class TestStart:
    """Of the whole process."""

    def test_it_says_whom_it_has_become(self, place: Place) -> None:
        line = place.said_first()
        assert (line["event"], line["uid"], line["gid"], line["groups"]) == ("became another user", UID, UID, [UID])

    def test_root_without_the_setting_is_told_what_that_means(self, place: Place) -> None:
        line = place.said_first(runner_user="")
        assert line["level"] == "warning"
        assert "training code runs as root" in line["event"]

    def test_who_is_that_user_already_goes_on_and_is_told_that_the_key_is_open(self, place: Place) -> None:
        for path in (place.key.parent, place.key):
            os.chown(path, UID, UID)
        line = place.said_first(*as_user(UID))
        assert line["level"] == "warning"
        assert "training code can read the key" in line["event"]

    def test_who_is_neither_root_nor_that_user_is_refused(self, place: Place) -> None:
        error = place.refused(*as_user(UID), runner_user="nobody")
        assert f"started as uid {UID}" in error["message"]
        assert "have root start it" in error["hint"]

    def test_root_without_the_capabilities_for_it_is_refused(self, place: Place) -> None:
        error = place.refused("setpriv", "--bounding-set=-all", "--")
        assert "may not become" in error["message"]
        assert "SETUID and SETGID" in error["hint"]

    def test_a_key_that_root_cannot_read_for_want_of_power_is_to_be_given_to_root(self, place: Place) -> None:
        os.chown(place.key, UID, UID)
        error = place.refused("setpriv", "--bounding-set=-all", "--")
        assert (error["code"], error["hint"]) == ("NOT_AUTHORIZED", f"chown 0:0 {place.key}")

    def test_a_key_that_the_user_can_read_is_refused(self, place: Place) -> None:
        place.key.parent.chmod(0o711)
        os.chown(place.key, UID, UID)
        error = place.refused()
        assert (error["code"], error["hint"]) == ("NOT_AUTHORIZED", f"chown 0:0 {place.key}")
        assert "training code" in error["message"]

    def test_a_tree_that_the_user_cannot_write_is_refused(self, place: Place) -> None:
        os.chown(place.folder / "learning", 0, 0)
        error = place.refused()
        assert f"'{place.folder}/learning/models' cannot be written" in error["message"]
        assert error["hint"].endswith(f"chown -R {UID}:{UID} {place.folder}/learning")

    def test_code_of_the_users_making_is_not_run_as_root(self, place: Place) -> None:
        """Neither where it lies, nor where it might be put until the next start."""
        for where in (place.folder / "learning", place.folder / "learning" / "not" / "there"):
            place.env = {"PYTHONPATH": str(where)}
            error = place.refused()
            assert f"root runs code from '{where}'" in error["message"]
            assert f"may write '{place.folder}/learning'" in error["message"]

    def test_a_package_that_the_user_may_write_is_not_run_as_root(self, place: Place) -> None:
        """Though the folder that holds it is root's."""
        package = place.folder / "code" / "uvloop"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("from asyncio import *\n")
        os.chown(package, UID, UID)
        place.env = {"PYTHONPATH": str(package.parent)}
        assert f"root runs code from '{package}'" in place.refused()["message"]
