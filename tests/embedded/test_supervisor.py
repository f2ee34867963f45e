"""`railbus up` with real processes and real signals."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from railbus.embedded.run_files import RunPaths, read_bus
from until import PATIENCE_S

TINY = Path(__file__).with_name("tiny_services.py")
NAMES = ("device_manager", "dataloader", "runner", "telemetry")


class Up:
    """A running `railbus up` of the tiny services."""

    def __init__(self, root: Path, *arguments: str) -> None:
        self.paths = RunPaths(root)
        self.process = subprocess.Popen(
            [sys.executable, str(TINY), str(root), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.lines: list[str] = []

    def wait_for(self, pattern: str) -> str:
        """Read until a line matches; the test's own timeout bounds it."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))
            if re.search(pattern, line):
                return self.lines[-1]
        raise AssertionError(f"{pattern!r} never came:\n" + "\n".join(self.lines))

    def wait_ready(self) -> None:
        self.wait_for("submit a job")
        self.wait_for("nats --server")

    def pid_of(self, name: str) -> int:
        return int(json.loads((self.paths.run / f"{name}.json").read_bytes())["pid"])

    def pids(self) -> dict[str, int]:
        """Of everything that was started."""
        server = int((self.paths.nats / "nats-server.pid").read_text())
        return {"nats-server": server, **{name: self.pid_of(name) for name in NAMES}}

    def wish(self, name: str, word: str, text: str = "") -> None:
        (self.paths.run / f"{name}.{word}").write_text(text)

    def drained(self) -> list[str]:
        path = self.paths.run / "drained"
        return path.read_text().split() if path.exists() else []

    def finish(self) -> int:
        """The rest of its lines, and its exit status."""
        assert self.process.stdout is not None
        self.lines += [line.rstrip("\n") for line in self.process.stdout]
        return self.process.wait()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """With the folder in which wishes may be left before the start."""
    RunPaths(tmp_path / "learning").make()
    return tmp_path / "learning"


@pytest.fixture
def ups() -> Iterator[list[Up]]:
    """Those that a test starts; whatever happens, nothing of them stays."""
    started: list[Up] = []
    yield started
    for up in started:
        with contextlib.suppress(ProcessLookupError):
            up.process.kill()
        assert up.process.stdout is not None
        up.process.stdout.close()
        up.process.wait()
        with contextlib.suppress(FileNotFoundError):
            for pid in up.pids().values():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


@pytest.fixture
def up(root: Path, ups: list[Up]) -> Up:
    """Ready."""
    ups.append(Up(root))
    ups[0].wait_ready()
    return ups[0]


def _is_alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rsplit(") ", 1)[1][0] not in "ZX"


def _alive(pids: dict[str, int], *, within_s: float = PATIENCE_S) -> list[str]:
    """Those that still run when the time is over; returns early if none does."""
    deadline_s = time.monotonic() + within_s
    while left := [name for name, pid in pids.items() if _is_alive(pid)]:
        if time.monotonic() > deadline_s:
            return left
        time.sleep(0.01)
    return []


def test_the_first_screen_says_how_to_reach_everything(up: Up, root: Path) -> None:
    bus = read_bus(root)
    assert bus is not None
    assert bus.pid == up.process.pid
    text = "\n".join(up.lines)
    for shown in (str(root), bus.url, bus.user_key_file, f"nats --server {bus.url} --nkey {bus.user_key_file} pub"):
        assert shown in text
    for name in NAMES:
        url = json.loads((up.paths.run / f"{name}.json").read_bytes())["http_url"]
        assert re.search(rf"^  {name} +{url}/healthz$", text, re.MULTILINE)
    assert "\x1b" not in text


@pytest.mark.parametrize("name", NAMES)
def test_a_service_is_told_where_everything_is_and_has_nothing_of_the_terminal(up: Up, root: Path, name: str) -> None:
    facts = json.loads((up.paths.run / f"{name}.facts").read_bytes())
    bus = read_bus(root)
    assert bus is not None
    assert facts["RAILBUS_ROOT"] == str(root)
    assert facts["RAILBUS_NATS_URL"] == bus.url
    assert facts["RAILBUS_NATS_KEY_FILE"] == f"{bus.keys_dir}/{name}.nk"
    assert Path(facts["RAILBUS_NATS_KEY_FILE"]).read_text().startswith("SU")
    assert facts["RAILBUS_EXTRA"] == "1"
    assert facts[f"RAILBUS_{name.upper()}_HTTP_PORT"] == "0"
    pid = up.pid_of(name)
    assert facts["sid"] == pid
    assert facts["stdin"] == os.devnull
    log = up.paths.run / f"{name}.log"
    assert log.read_text() == f"{name} speaks\n"
    assert [Path(f"/proc/{pid}/fd/{fd}").readlink() for fd in (1, 2)] == [log, log]


def test_a_service_holds_neither_the_lock_nor_other_descriptors_of_the_supervisor(up: Up) -> None:
    held = {path.readlink().name for path in Path(f"/proc/{up.pid_of('runner')}/fd").iterdir()}
    assert "up.lock" not in held
    assert len([name for name in held if name.startswith("socket:")]) == 1  # its own HTTP server


def test_what_crashes_is_started_again_later_each_time(up: Up) -> None:
    before = up.pid_of("dataloader")
    for wait in ("0.25", "0.5"):
        killed_s = time.monotonic()
        os.kill(up.pid_of("dataloader"), signal.SIGKILL)
        up.wait_for(rf"dataloader +ended killed by SIGKILL; starts again in {wait} s")
        up.wait_for("dataloader +started")
        assert time.monotonic() - killed_s > float(wait) - 0.05
        up.wait_for("dataloader +ready")
    assert up.pid_of("dataloader") != before
    assert _is_alive(up.pid_of("dataloader"))
    assert not [line for line in up.lines if re.search("(runner|telemetry|device_manager) +ended", line)]


def test_a_killed_nats_server_comes_back_on_its_port(up: Up, root: Path) -> None:
    bus = read_bus(root)
    assert bus is not None
    before = up.pids()["nats-server"]
    os.kill(before, signal.SIGKILL)
    up.wait_for(r"nats-server +ended killed by SIGKILL; starts again in 0\.25 s")
    up.wait_for(f"nats-server +restarting {bus.url}")
    port = int(bus.url.rsplit(":", 1)[1])
    deadline_s = time.monotonic() + PATIENCE_S
    while True:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
                assert connection.recv(4) == b"INFO"
                break
        except OSError:
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
    assert up.pids()["nats-server"] != before


def test_a_nats_server_that_a_full_disk_has_left_unable_to_write_is_started_anew(up: Up) -> None:
    """The server's words for it are put into its log; the disk, as it happens, has room."""
    before = up.pids()["nats-server"]
    assert up.process.stdout is not None
    with (up.paths.nats / "nats-server.log").open("a") as log:
        for _ in range(100):
            log.write("[ERR] JetStream failed to store a msg on stream: write 1.blk: no space left on device\n")
            log.flush()
            if select.select([up.process.stdout], [], [], 0.3)[0]:
                break
    up.wait_for("nats-server +stopped its store still refuses writes after a full disk")
    up.wait_for("nats-server +restarting")
    assert not _is_alive(before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_first_signal_drains_in_order_and_nothing_is_left(up: Up, root: Path, number: signal.Signals) -> None:
    pids = up.pids()
    for name in NAMES:
        up.wish(name, "slow")  # so that an order that is not waited for would show
    os.kill(up.process.pid, number)
    assert up.finish() == 0
    order = up.drained()
    assert order[0] == "runner"
    assert sorted(order[1:3]) == ["dataloader", "device_manager"]
    assert order[3:] == ["telemetry"]
    assert re.search("nats-server +stopped", up.lines[-1])
    assert _alive(pids, within_s=0) == []
    assert read_bus(root) is None
    assert not up.paths.bus.exists()


def test_ctrl_c_reaches_the_supervisor_only(up: Up) -> None:
    """A terminal sends SIGINT to the whole foreground group, in which no service is."""
    os.killpg(up.process.pid, signal.SIGINT)
    assert up.finish() == 0
    assert sorted(up.drained()) == sorted(NAMES)


def test_a_second_signal_kills_what_does_not_end(root: Path, ups: list[Up]) -> None:
    (root / ".railbus/run/runner.stubborn").touch()
    ups.append(Up(root, "drain_s=600"))
    ups[0].wait_ready()
    pids = ups[0].pids()
    os.kill(ups[0].process.pid, signal.SIGTERM)
    ups[0].wait_for("railbus +draining")
    os.kill(ups[0].process.pid, signal.SIGINT)
    assert ups[0].finish() == 130
    assert ups[0].drained() == []
    assert [line for line in ups[0].lines if re.search("runner +killed", line)]
    assert _alive(pids, within_s=0) == []


def test_a_service_that_does_not_end_in_time_is_killed_and_the_others_still_drain(root: Path, ups: list[Up]) -> None:
    (root / ".railbus/run/runner.stubborn").touch()
    ups.append(Up(root, "drain_s=2"))
    ups[0].wait_ready()
    pids = ups[0].pids()
    os.kill(ups[0].process.pid, signal.SIGTERM)
    assert ups[0].finish() == 130
    assert sorted(ups[0].drained()) == ["dataloader", "device_manager", "telemetry"]
    assert _alive(pids, within_s=0) == []


def test_a_second_up_on_the_same_root_is_refused_and_names_the_first(up: Up, root: Path, ups: list[Up]) -> None:
    ups.append(Up(root))
    assert ups[1].finish() == 2
    bus = read_bus(root)
    assert bus is not None
    said = ups[1].lines[-1]
    assert said.startswith("ALREADY_RUNNING")
    assert str(up.process.pid) in said
    assert bus.url in said
    assert _alive(up.pids(), within_s=0) == ["nats-server", *NAMES]


def test_where_a_usual_port_is_taken_the_services_take_free_ones(root: Path, ups: list[Up]) -> None:
    with socket.socket() as other:
        with contextlib.suppress(OSError):  # somebody else has it, which is as good
            other.bind(("127.0.0.1", 8702))
            other.listen()
        ups.append(Up(root, "http=usual"))
        ups[0].wait_ready()
        urls = [json.loads((ups[0].paths.run / f"{name}.json").read_bytes())["http_url"] for name in NAMES]
    assert len(set(urls)) == len(NAMES)
    assert not [url for url in urls if url.rsplit(":", 1)[1] in {"8701", "8702", "8703", "8704"}]


def test_killed_with_sigkill_it_leaves_nothing_behind_and_can_be_started_again(
    up: Up, root: Path, ups: list[Up]
) -> None:
    pids = up.pids()
    up.process.kill()
    up.process.wait()
    assert _alive(pids) == []
    assert up.paths.bus.exists()
    assert read_bus(root) is None
    ups.append(Up(root))
    ups[1].wait_ready()
    bus = read_bus(root)
    assert bus is not None
    assert bus.pid == ups[1].process.pid


def test_a_setting_that_must_change_ends_the_start_with_the_services_own_words(root: Path, ups: list[Up]) -> None:
    (root / ".railbus/run/telemetry.crash").write_text("2")
    ups.append(Up(root))
    assert ups[0].finish() == 2
    assert "CONFIG_ERROR: service telemetry cannot run: telemetry lacks a setting (set it)" in ups[0].lines[-1]
    assert read_bus(root) is None
    assert not _is_alive(int((ups[0].paths.nats / "nats-server.pid").read_text()))


def test_a_service_that_never_gets_ready_is_named_with_its_problem(root: Path, ups: list[Up]) -> None:
    (root / ".railbus/run/runner.unready").touch()
    ups.append(Up(root, "ready_s=4"))
    assert ups[0].finish() == 2
    assert re.search(r"SERVICES_NOT_READY: .*runner: work: there is none.*runner\.log", ups[0].lines[-1])
    assert "telemetry:" not in ups[0].lines[-1]


def test_a_service_that_keeps_crashing_does_not_stop_the_start_of_the_others(root: Path, ups: list[Up]) -> None:
    (root / ".railbus/run/runner.crash").write_text("7")
    ups.append(Up(root))
    ups[0].wait_for(r"runner +ended exit status 7: runner lacks a setting \(set it\); starts again in 0\.25 s")
    ups[0].wait_for(r"runner +ended .*starts again in 0\.5 s")
    (root / ".railbus/run/runner.crash").unlink()
    ups[0].wait_ready()
    assert _alive(ups[0].pids(), within_s=0) == ["nats-server", *NAMES]


def test_a_signal_while_starting_stops_it(root: Path, ups: list[Up]) -> None:
    (root / ".railbus/run/runner.unready").touch()
    ups.append(Up(root))
    ups[0].wait_for("telemetry +ready")
    os.kill(ups[0].process.pid, signal.SIGINT)
    assert ups[0].finish() == 0
    assert sorted(ups[0].drained()) == sorted(NAMES)


def test_within_a_command_substitution_it_returns_and_nothing_holds_the_pipe(root: Path) -> None:
    """The supervisor is killed inside `$(…)`; the shell goes on once the last writer of the pipe is gone."""
    shell = 'out=$("$0" "$1" "$2" & up=$!; while [ ! -e "$2/.railbus/run/telemetry.json" ]; do sleep 0.05; done; '
    done = subprocess.run(
        ["/bin/sh", "-c", shell + 'kill -9 $up); echo "returned"', sys.executable, str(TINY), str(root)],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=True,
    )
    assert done.stdout == "returned\n"


def test_importing_it_loads_no_service_no_nats_and_no_torch() -> None:
    code = "import sys, railbus.embedded.up; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE_S, check=True
    ).stdout
    assert "railbus" in loaded.split()
    assert not {"nats", "torch", "aiohttp", "numpy", *(f"railbus_{name}" for name in NAMES)} & set(loaded.split())
