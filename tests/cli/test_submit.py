"""Submitting and looking at jobs on a real bus with a real device_manager; nothing here can run them."""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from commands import Done, environment, railbus_here
from servers import Server
from until import PATIENCE_S

pytestmark = pytest.mark.timeout(120)  # each has a device_manager, and waits for what it does

_JOB = "model: m\ndataset: d\nentrypoint: classifier\ndevices: {kind: gpu, count: 7}\nwait_for_hosts: true\n"


class Place:
    """A folder with a job file, and the environment that leads to the test's bus."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder = folder
        self.env = {"RAILBUS_NATS_URL": url, "RAILBUS_ROOT": str(folder / "learning"), "RAILBUS_HEARTBEAT_S": "0.3"}
        (folder / "job.yaml").write_text(_JOB)

    def railbus(self, *words: str, stdin: bytes = b"") -> Done:
        return railbus_here(*words, cwd=self.folder, env=self.env, stdin=stdin)

    def start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, *words],
            cwd=self.folder,
            env=environment(self.env),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def start_manager(self) -> subprocess.Popen[bytes]:
        with (self.folder / "device_manager.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "railbus_device_manager"], env=environment(self.env), stdout=log, stderr=log
            )

    def wait_for_manager(self) -> None:
        deadline_s = time.monotonic() + PATIENCE_S
        while (done := self.railbus("jobs", "--json")).status != 0:
            assert time.monotonic() < deadline_s, f"{done.err}{(self.folder / 'device_manager.log').read_text()}"
            time.sleep(0.05)


@contextlib.contextmanager
def managed(folder: Path, url: str) -> Iterator[Place]:
    """A place with a device_manager."""
    made = Place(folder, url)
    made.env["RAILBUS_DEVICE_MANAGER_HTTP_PORT"] = "0"
    manager = made.start_manager()
    try:
        made.wait_for_manager()
        yield made
    finally:
        manager.terminate()
        manager.wait(PATIENCE_S)


@pytest.fixture
def alone(server: Server, tmp_path: Path) -> Iterator[Place]:
    """A bus on which no other test's jobs are."""
    with managed(tmp_path, server.url) as made:
        yield made


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a bus for all tests that look at their own jobs alone."""
    folder = tmp_path_factory.mktemp("shared")
    server = Server(folder)
    server.start()
    with managed(folder, server.url):
        yield server.url
    server.stop()


@pytest.fixture
def place(shared: str, tmp_path: Path) -> Place:
    return Place(tmp_path, shared)


def test_waiting_goes_on_while_nobody_answers(server: Server, tmp_path: Path) -> None:
    place = Place(tmp_path, server.url)
    place.env["RAILBUS_DEVICE_MANAGER_HTTP_PORT"] = "0"
    first = place.start_manager()
    place.wait_for_manager()
    waiting = place.start("-m", "railbus.cli.main", "submit", "job.yaml", "--wait")
    assert waiting.stdout is not None
    with contextlib.closing(waiting.stdout):
        assert waiting.stdout.readline().startswith("queued job ")
        first.kill()
        first.wait(PATIENCE_S)
        second = place.start_manager()
        try:
            place.wait_for_manager()
            assert waiting.poll() is None
            assert place.railbus("cancel", "@last").status == 0
            assert waiting.wait(PATIENCE_S) == 123
        finally:
            second.terminate()
            second.wait(PATIENCE_S)


def test_a_job_goes_from_submission_to_cancellation(alone: Place) -> None:
    assert alone.railbus("job", "@last").status == 3, "there is none yet"
    done = alone.railbus("submit", "job.yaml")
    job = done.out.split()[2].rstrip(";")
    assert done.out == f"queued job {job}; follow: railbus logs -f {job}\n"

    records = alone.railbus("jobs", "--json").json()
    assert isinstance(records, dict)
    assert [(record["id"], record["state"]) for record in records["jobs"]] == [(job, "queued")]
    assert alone.railbus("jobs", "-q").out == f"{job}\n"
    assert alone.railbus("jobs", "--state", "running", "-q").out == ""

    for name in (job, job[:5], "@last"):
        shown = alone.railbus("job", name, "--json").json()
        assert isinstance(shown, dict)
        assert shown["job"]["id"] == job

    assert alone.railbus("cancel", "@last").out == f"job {job} is cancelled\n"
    assert alone.railbus("cancel", job).out == f"job {job} had ended already: cancelled\n"
    assert "cancelled" in alone.railbus("job", job).out
    assert alone.railbus("logs", "-f", job).status == 123


def test_a_job_from_stdin_with_settings_is_what_was_asked_for(place: Place) -> None:
    done = place.railbus("submit", "-", "--set", "lr=1e-3", "--json", stdin=_JOB.encode())
    record = done.json()
    assert isinstance(record, dict)
    assert record["spec"]["params"] == {"lr": 0.001}


def test_the_same_id_with_another_spec_is_a_conflict(place: Place) -> None:
    (place.folder / "job.yaml").write_text(f"id: same\n{_JOB}")
    assert place.railbus("submit", "job.yaml", "-q").out == "same\n"
    assert place.railbus("submit", "job.yaml", "-q").out == "same\n"
    done = place.railbus("submit", "job.yaml", "--set", "x=1")
    assert done.status == 1
    assert done.err.startswith("error[CONFLICT]: field 'id' has value 'same'")


def test_a_sweep_is_many_jobs_once_and_its_group_is_asked_for_as_one(place: Place) -> None:
    sweep = str(Path(__file__).parents[2] / "examples" / "sweep.yaml")
    ids = place.railbus("submit", sweep, "-q", "--hold").out.split()
    assert (len(ids), ids[0][-2:]) == (6, "-1")
    assert place.railbus("submit", sweep, "-q", "--hold").out.split() == ids
    group = ids[0].removesuffix("-1")
    listed = place.railbus("jobs", "--group", group)
    assert "lr=0.001, seed=3" in listed.out
    assert f"6 jobs of group {group}: 6 queued" in listed.err
    found = place.railbus("jobs", "-g", group, "--json", "-n", "2").json()
    assert isinstance(found, dict)
    assert (len(found["jobs"]), found["total"], found["states"]) == (2, 6, {"queued": 6})
    assert place.railbus("cancel", "--group", group, "-q").out.split() == ids
    assert place.railbus("cancel", "--group", group).err.startswith(f"no job of group {group} is queued or")
    assert place.railbus("submit", sweep, "--follow").status == 2


def test_a_job_is_held_released_and_given_another_place(place: Place) -> None:
    job = place.railbus("submit", "job.yaml", "--hold", "--owner", "ana", "--priority", "3", "-q").out.strip()
    assert place.railbus("jobs", "--owner", "ana").out.splitlines()[1].split()[:2] == [job, "held"]
    assert place.railbus("jobs", "--owner", "ben").err == "no such jobs\n"
    assert place.railbus("release", job).out == f"job {job} is queued and no longer held\n"
    assert place.railbus("hold", job, "-q").out == f"{job}\n"
    assert place.railbus("priority", job, "-7").out == f"job {job} has priority -7\n"
    assert place.railbus("cancel", job, "@last").status == 0
    again = place.railbus("retry", job, "--json").json()
    assert isinstance(again, dict)
    assert (again["retry_of"], again["priority"], again.get("held_by")) == (job, -7, None)
    refused = place.railbus("hold", job)
    assert (refused.status, refused.err.startswith("error[CONFLICT]")) == (1, True)


def test_a_job_that_does_not_exist_is_not_found(place: Place) -> None:
    for command in ("job", "cancel"):
        done = place.railbus(command, "j-000000-9")
        assert (done.status, done.err.startswith("error[JOB_NOT_FOUND]")) == (3, True)


def test_following_tells_the_story_and_returns_the_jobs_code(place: Place) -> None:
    (place.folder / "job.yaml").write_text(f"id: followed\n{_JOB}")
    following = place.start("-m", "railbus.cli.main", "submit", "job.yaml", "--follow")
    assert following.stdout is not None
    story = iter(following.stdout.readline, "")
    assert any("queued: classifier of m on d" in line for line in story)
    place.railbus("cancel", "followed")
    rest = following.stdout.read()
    assert "cancelled" in rest
    assert following.wait(PATIENCE_S) == 123
    following.stdout.close()


def test_ctrl_c_only_leaves_and_says_so(place: Place) -> None:
    (place.folder / "job.yaml").write_text(f"id: mine\n{_JOB}")
    following = place.start("-m", "railbus.cli.main", "submit", "job.yaml", "--follow")
    assert following.stdout is not None
    with contextlib.closing(following.stdout):
        assert any("queued: " in line for line in iter(following.stdout.readline, ""))
        following.send_signal(signal.SIGINT)
        rest = following.stdout.read()
    assert following.wait(PATIENCE_S) == 130
    assert "left job mine, which goes on; follow it again: railbus logs -f mine" in rest
    assert "Traceback" not in rest
    record = place.railbus("job", "mine", "--json").json()
    assert isinstance(record, dict)
    assert record["job"]["state"] == "queued"


def test_jobs_and_devices_are_watched_until_ctrl_c(alone: Place) -> None:
    alone.railbus("submit", "job.yaml", "-q")
    once = alone.railbus("watch", "--once")
    assert (once.status, "0 active  1 queued  0 ended" in once.out) == (0, True), once.out + once.err
    assert any("cpu0" in line and "free" in line for line in once.out.splitlines())
    refused = alone.railbus("watch")
    assert (refused.status, "--once" in refused.err) == (2, True)
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "railbus.cli.main", "watch"]
    env = environment({**alone.env, "TERM": "xterm", "COLUMNS": "80", "LINES": "24", "CI": "", "NO_COLOR": ""})
    watching = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=env, start_new_session=True)
    os.close(theirs)
    shown = b""
    with os.fdopen(ours, "rb", buffering=0) as terminal:
        while b"queued" not in shown or b"cpu0" not in shown:
            shown += terminal.read(4096)
        watching.send_signal(signal.SIGINT)
        with contextlib.suppress(OSError):  # how a terminal ends whose other end is closed
            while more := terminal.read(4096):
                shown += more
    assert watching.wait(PATIENCE_S) == 130
    assert b"Traceback" not in shown
    assert shown.rstrip().endswith(b"\x1b[?25h") or b"\x1b[?1049l" in shown, "the terminal is as it was before"


def test_without_a_dataloader_its_questions_are_answered_by_the_remedy(place: Place) -> None:
    done = place.railbus("logs", "-n", "5")
    assert done.status == 5
    assert "error[NO_RESPONDER]" in done.err
    assert "railbus up" in done.err


def test_devices_are_listed(place: Place) -> None:
    found = place.railbus("devices", "--json").json()
    assert isinstance(found, dict)
    assert any(state["device"]["kind"] == "cpu" for state in found["devices"])
    assert "DEVICE" in place.railbus("devices").out
