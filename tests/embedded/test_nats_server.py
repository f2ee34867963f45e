"""The embedded nats-server as a process: found, started, killed, started again, and never left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from railbus.embedded.credentials import ensure_keys
from railbus.embedded.nats_server import BINARY_SETTING, NatsServer, find_server
from railbus.embedded.permissions import USERS, policy
from railbus.embedded.server_config import ServerFiles, render
from railbus_shared.errors import BusUnavailable, PortInUse, ServerNotFound
from until import PATIENCE_S

Make = Callable[..., NatsServer]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Makes servers, and stops at the end what runs."""
    made: list[NatsServer] = []
    keys = ensure_keys(tmp_path / "keys", USERS)

    def build(port: int | None = 0, *, folder: str = "nats") -> NatsServer:
        where = ServerFiles(tmp_path / folder)

        def content(chosen: int) -> bytes:
            return render(where, port=chosen, name="test", keys=keys, policy=policy())

        made.append(NatsServer(find_server(), where=where, render=content, port=port))
        return made[-1]

    yield build
    for server in made:
        server.stop(timeout_s=0)


def _greeting(port: int) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as connection:
        return connection.recv(5)


def _is_alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has reaped yet does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rsplit(") ", 1)[1][0] not in "ZX"


def _gone(pid: int, *, within_s: float = PATIENCE_S) -> bool:
    deadline_s = time.monotonic() + within_s
    while _is_alive(pid):
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.01)
    return True


def test_it_starts_on_a_free_port_and_stops_cleanly(make: Make) -> None:
    server = make()
    server.start()
    assert server.port > 0
    assert _greeting(server.port) == b"INFO "
    assert server.url == f"nats://127.0.0.1:{server.port}"
    server.stop()
    assert server.wait() == 0
    assert server.pid is None
    with pytest.raises(ConnectionRefusedError):
        _greeting(server.port)


def test_its_files_are_private_and_its_log_is_a_file(make: Make, tmp_path: Path) -> None:
    make().start()
    where = ServerFiles(tmp_path / "nats")
    assert where.config.stat().st_mode & 0o077 == 0
    assert where.folder.stat().st_mode & 0o077 == 0
    assert where.store.is_dir()
    assert "Server is ready" in where.log.read_text()


def test_killed_it_starts_again_on_the_same_port(make: Make) -> None:
    server = make()
    server.start()
    port, pid = server.port, server.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    assert server.wait(PATIENCE_S) == -signal.SIGKILL
    assert server.poll() == -signal.SIGKILL
    server.start()
    assert server.port == port
    assert server.pid not in {None, pid}
    assert _greeting(port) == b"INFO "


def test_a_port_that_was_asked_for_and_is_taken_is_refused(make: Make) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(PortInUse, match=f"port {port} .*--nats-port"):
            make(port).start()


def test_a_default_port_that_is_taken_is_replaced_and_the_substitute_is_kept(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        monkeypatch.setattr("railbus.embedded.nats_server.DEFAULT_PORT", taken)
        server = make(None)
        server.start()
        chosen = server.port
        assert chosen not in {0, taken}
    server.stop()
    server.start()
    assert server.port == chosen


def test_a_free_default_port_is_used(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        free = other.getsockname()[1]
    monkeypatch.setattr("railbus.embedded.nats_server.DEFAULT_PORT", free)
    server = make(None)
    server.start()
    assert server.port == free


def test_a_server_that_cannot_run_says_why_and_is_not_left_behind(make: Make, tmp_path: Path) -> None:
    server = make()
    (tmp_path / "nats").mkdir()
    (tmp_path / "nats" / "store").write_text("a file where a folder must be")
    with pytest.raises(BusUnavailable, match=r"not a directory.*nats-server\.log"):
        server.start()
    assert server.pid is None


_PARENT = """
import sys, time
from pathlib import Path
from railbus.embedded.credentials import ensure_keys
from railbus.embedded.nats_server import NatsServer, find_server
from railbus.embedded.permissions import USERS, policy
from railbus.embedded.server_config import ServerFiles, render

folder = Path(sys.argv[1])
keys, where = ensure_keys(folder / "keys", USERS), ServerFiles(folder / "nats")
server = NatsServer(
    find_server(), where=where, port=0,
    render=lambda port: render(where, port=port, name="test", keys=keys, policy=policy()),
)
server.start()
print(server.pid, flush=True)
if sys.argv[2] == "stay":
    time.sleep(60)
"""


def test_it_dies_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _PARENT, str(tmp_path), "stay"], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert _is_alive(pid)
        parent.kill()
    assert _gone(pid)


def test_it_holds_no_pipe_of_its_parent_so_a_command_substitution_returns(tmp_path: Path) -> None:
    """The parent ends without stopping it; a shell's `$(…)` waits for the end of the pipe, not of the parent."""
    shell = 'pid=$("$0" -c "$1" "$2" leave); echo "got $pid"'
    done = subprocess.run(
        ["/bin/sh", "-c", shell, sys.executable, _PARENT, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=True,
    )
    assert done.stdout.startswith("got ")
    assert _gone(int(done.stdout.split()[1]))


def test_its_standard_streams_are_nothing_and_its_log(make: Make, tmp_path: Path) -> None:
    server = make()
    server.start()
    log = ServerFiles(tmp_path / "nats").log
    targets = [Path(f"/proc/{server.pid}/fd/{fd}").readlink() for fd in (0, 1, 2)]
    assert targets == [Path(os.devnull), log, log]


def test_it_runs_in_a_session_of_its_own_so_that_ctrl_c_does_not_reach_it(make: Make) -> None:
    server = make()
    server.start()
    assert server.pid is not None
    assert os.getsid(server.pid) == server.pid


# --- find_server -----------------------------------------------------------------------------------------------------


def _binary(folder: Path, script: str) -> Path:
    path = folder / "nats-server"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_the_setting_comes_first(tmp_path: Path) -> None:
    named = _binary(tmp_path, "echo 'nats-server: v2.12.0'")
    assert find_server({BINARY_SETTING: str(named)}) == named


def test_without_the_setting_an_installed_one_is_found() -> None:
    assert find_server({}).name == "nats-server"


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'nats-server: v2.11.9'", "older than v2.12"),
        ("echo 'nats-server: v1.99.0'", "older than v2.12"),
        ("echo hello", "says 'hello'"),
        ("exit 1", "says ''"),
    ],
)
def test_a_named_one_that_is_unfit_is_refused_and_not_replaced_in_silence(
    tmp_path: Path, script: str, reason: str
) -> None:
    with pytest.raises(ServerNotFound, match=reason) as caught:
        find_server({BINARY_SETTING: str(_binary(tmp_path, script))})
    for remedy in ("pip install", "PATH", BINARY_SETTING, "RAILBUS_NATS_URL"):
        assert remedy in caught.value.hint


def test_a_named_one_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ServerNotFound, match="cannot be run"):
        find_server({BINARY_SETTING: str(tmp_path / "nothing")})


def test_a_store_that_was_made_before_people_had_accounts_is_kept(make: Make, tmp_path: Path) -> None:
    """The streams lie in a folder that is named after the account."""
    server = make()
    server.start()
    server.stop()
    folder = tmp_path / "nats" / "store" / "jetstream"
    (folder / "RAILBUS").mkdir(parents=True, exist_ok=True)
    (folder / "RAILBUS" / "kept").write_text("all that is true")
    (folder / "RAILBUS").rename(folder / "$G")
    server.start()
    assert (folder / "RAILBUS" / "kept").read_text() == "all that is true"
    assert not (folder / "$G").exists()
