"""Telemetry as it runs, producers that note what the bus has acknowledged, and the clocks and disks they run on."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

import dying_telemetry
from commands import environment
from railbus.embedded.nats_server import NatsServer
from servers import Server
from until import PATIENCE_S

HERE = Path(__file__).parent
Key = tuple[str, int]
"""Producer and number of an event."""


class Process:
    """A child whose output goes to a file; gone at the end of the `with`."""

    def __init__(self, command: Iterable[str | Path], output: Path, env: dict[str, str]) -> None:
        self._command = [str(word) for word in command]
        self._output = output
        self._env = env
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, **env: str) -> None:
        env = environment({**self._env, **env})
        with self._output.open("ab") as file:
            self.process = subprocess.Popen(self._command, stdout=file, stderr=file, env=env)

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def is_alive(self) -> bool:
        assert self.process is not None
        return self.process.poll() is None

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(PATIENCE_S)

    def stop(self, *, timeout_s: float = PATIENCE_S) -> int:
        """Ask it to end, and return its exit status."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_s)

    def output(self) -> str:
        return self._output.read_text()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.kill()


class Telemetry(Process):
    """The service, as `python -m railbus_telemetry` runs it."""

    def __init__(
        self,
        folder: Path,
        server: Server | NatsServer,
        *,
        name: str = "telemetry",
        ack_wait_s: float | None = 2,
        env: dict[str, str] | None = None,
    ) -> None:
        self.run_dir = folder / name
        settings = {
            "RAILBUS_ROOT": str(folder / "learning"),
            "RAILBUS_NATS_URL": server.url,
            "RAILBUS_HOST": "testhost",
            "RAILBUS_RUN_DIR": str(self.run_dir),
            "RAILBUS_TELEMETRY_HTTP_PORT": "0",
        }
        shorter = {} if ack_wait_s is None else {dying_telemetry.ACK_WAIT_S: str(ack_wait_s)}
        settings |= shorter | (env or {})
        super().__init__([sys.executable, HERE / "dying_telemetry.py"], folder / f"{name}.txt", settings)

    def get(self, path: str) -> str:
        """The text of an answer, whatever its status; nothing if nobody answers."""
        try:
            found = json.loads((self.run_dir / "telemetry.json").read_bytes())
            if self.process is None or found["pid"] != self.pid:
                return ""
            with urllib.request.urlopen(f"{found['http_url']}{path}", timeout=5) as answer:  # noqa: S310 - our own URL
                return str(answer.read().decode())
        except urllib.error.HTTPError as exc:
            return exc.read().decode()
        except OSError:
            return ""

    def is_ready(self) -> bool:
        return self.get("/readyz").startswith("ok")

    def peak_bytes(self) -> int:
        """The most memory that it has ever held."""
        return self._status("VmHWM")

    def held_bytes(self) -> int:
        return self._status("VmRSS")

    def _status(self, name: str) -> int:
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


class Clock:
    """The wall clock of a process that is started with `env`; it can be set while the process runs."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.set(0)

    def set(self, ahead_s: int) -> None:
        draft = self._file.with_suffix(".tmp")
        draft.write_text(f"{ahead_s:+d}")
        draft.replace(self._file)

    @property
    def env(self) -> dict[str, str]:
        libraries = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
        if not libraries:
            pytest.skip("no libfaketime: apt install faketime")
        return {
            "LD_PRELOAD": str(libraries[0]),
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A disk of its own at a folder; yields where a file may be put that fills it."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    folder.mkdir(parents=True, exist_ok=True)
    mount("-t", "tmpfs", "-o", f"size={size}", "none", folder)
    try:
        yield folder / "ballast"
    finally:
        subprocess.run(["/bin/umount", "--lazy", folder], check=True)


def mount(*arguments: str | Path) -> bool:
    return subprocess.run(["/bin/mount", *arguments], capture_output=True, check=False).returncode == 0


def fill(ballast: Path) -> None:
    """Take all the space that is left."""
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass


class Producer(Process):
    """`log_producer.py`: the events that it has noted are acknowledged."""

    def __init__(self, folder: Path, server: Server, *, name: str = "producer", rate: float = 200) -> None:
        self.notes = folder / f"{name}.notes"
        self.notes.touch()
        command = (sys.executable, HERE / "log_producer.py", server.url, self.notes, str(rate))
        super().__init__(command, folder / f"{name}.txt", {})

    def start(self, **env: str) -> None:
        self._noted_bytes = self.notes.stat().st_size
        super().start(**env)

    def is_sending(self) -> bool:
        """Whether anything has been acknowledged since it was started."""
        return self.notes.stat().st_size > self._noted_bytes

    def noted_bytes(self) -> int:
        return self.notes.stat().st_size

    def acknowledged(self, limit_bytes: int | None = None) -> set[Key]:
        """All that is noted, or what the first so many bytes of the notes say."""
        whole, _, _ = self.notes.read_bytes()[:limit_bytes].rpartition(b"\n")
        words = (line.split() for line in whole.splitlines())
        return {(producer.decode(), int(number)) for producer, number in words}
