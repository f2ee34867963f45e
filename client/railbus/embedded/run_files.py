"""What a running `railbus up` leaves for others under `<root>/.railbus/`.

up.lock        held by flock while it runs; the system lets go of it whatever kills the process
bus.json       how to join the bus; there from when NATS is ready until the clean stop
keys/          the users' seeds
nats/          the server's configuration, store and log
run/           <service>.json (written by the service) and <service>.log
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from railbus_shared import files
from railbus_shared.errors import AlreadyRunning, BadSetting
from railbus_shared.layout import Layout

_ENDING_S: Final = 0.3  # one that has just been killed may have a child that has not let go yet
_READERS_S: Final = 10.0  # one that looks whether the lock is held takes it for an instant, and may be halted in that
_LOCK_POLL_S: Final = 0.02


@dataclass(frozen=True)
class RunPaths:
    """Where all of it lies."""

    root: Path

    @property
    def state(self) -> Path:
        return Layout(self.root).state

    @property
    def lock(self) -> Path:
        return self.state / "up.lock"

    @property
    def bus(self) -> Path:
        return self.state / "bus.json"

    @property
    def keys(self) -> Path:
        return self.state / "keys"

    @property
    def nats(self) -> Path:
        return self.state / "nats"

    @property
    def run(self) -> Path:
        return self.state / "run"

    def make(self) -> None:
        """Make the folders; what others must not read has mode 0700."""
        self.state.mkdir(parents=True, exist_ok=True)
        for folder in (self.nats, self.run):
            folder.mkdir(mode=0o700, exist_ok=True)


@dataclass(frozen=True)
class BusFile:
    """How to join the bus of a running `railbus up`."""

    url: str
    keys_dir: str
    user_key_file: str
    pid: int
    started_at: str


class UpLock:
    """The right to run `railbus up` on a root; a child of its holder must call `close`, too."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def close(self) -> None:
        """Let go of this process's descriptor; the lock ends with the last one."""
        os.close(self._fd)


def acquire(paths: RunPaths) -> UpLock:
    """Take the lock of a root; raises AlreadyRunning that names the other's process id and URL."""
    fd = os.open(paths.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    began_s = time.monotonic()
    while not _try_lock(fd, fcntl.LOCK_EX):
        patience_s = _ENDING_S if _is_held(paths.lock) else _READERS_S
        if time.monotonic() - began_s > patience_s:
            pid = os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(fd)
            raise _already_running(paths, pid)
        time.sleep(_LOCK_POLL_S)
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return UpLock(fd)


def write_bus(paths: RunPaths, bus: BusFile) -> None:
    """Tell clients how to join; raises StorageFull."""
    files.write_whole(paths.bus, files.to_json(asdict(bus)), mode=0o600)


def read_bus(root: Path) -> BusFile | None:
    """How to join the `railbus up` that runs on `root`, or None if none does (also when it was killed).

    Raises BadSetting for a damaged file.
    """
    paths = RunPaths(root)
    bus = _read(paths)
    return bus if bus is not None and _is_held(paths.lock) else None


def _read(paths: RunPaths) -> BusFile | None:
    try:
        found = json.loads(paths.bus.read_bytes())
        texts = {name: str(found[name]) for name in ("url", "keys_dir", "user_key_file", "started_at")}
        return BusFile(pid=int(found["pid"]), **texts)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as exc:
        raise BadSetting(f"{paths.bus} is damaged: {exc!r}", hint="stop `railbus up` and remove the file") from exc


def _is_held(lock: Path) -> bool:
    try:
        fd = os.open(lock, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        return not _try_lock(fd, fcntl.LOCK_SH)
    finally:
        os.close(fd)


def _try_lock(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _already_running(paths: RunPaths, pid: str) -> AlreadyRunning:
    try:
        bus = _read(paths)
    except BadSetting:
        bus = None  # it is named in the error only
    where = f", NATS at {bus.url}" if bus else ""
    return AlreadyRunning(
        f"`railbus up` runs already on {str(paths.root)!r}: process {pid}{where}",
        hint=f"use that one, stop it with `kill {pid}`, or give another root",
        details={"pid": pid, "url": bus.url if bus else None},
    )
