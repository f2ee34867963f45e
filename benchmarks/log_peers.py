"""Other ways to keep events in a file, for the benchmark `telemetry`: events a second of each."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from benchmarks.peers.loggers import events
from benchmarks.starting import PEERS, REPO

_CONFIG: Final = """
global(workDirectory="{folder}" maxMessageSize="64k")
module(load="imptcp")
input(type="imptcp" address="127.0.0.1" port="{port}" ruleset="bench")
template(name="raw" type="string" string="%rawmsg%\\n")
ruleset(name="bench" queue.type="LinkedList" queue.size="2000000" queue.timeoutShutdown="600000"
        queue.timeoutEnqueue="600000" queue.dequeueBatchSize="1024") {{
    action(type="omfile" file="{folder}/log.jsonl.gz" template="raw" zipLevel="6" veryRobustZip="off"
           flushOnTXEnd="off" ioBufferSize="256k")
}}
"""
_PATIENCE_S: Final = 300.0


class NotInstalled(Exception):
    """A peer that is not here; its text says how to get it."""


def queue_listener(count: int) -> float:
    """The standard library's QueueListener, rotating by size, with gzip."""
    return _logger(Path(sys.executable), "queue_listener", count)


def structlog(count: int) -> float:
    """structlog with orjson to a plain file."""
    python = PEERS / "python"
    if not python.exists() or subprocess.run([python, "-c", "import structlog, orjson"], check=False).returncode:
        raise NotInstalled("structlog and orjson are not in .venv-peers: make bench-loggers")
    return _logger(python, "structlog", count)


def rsyslog(count: int) -> float:
    """rsyslog: TCP in, gzip out, nothing synced; from the first byte sent until it has written all and ended."""
    program = shutil.which("rsyslogd")
    if program is None:
        raise NotInstalled("rsyslogd is not on the PATH")
    # A complete syslog header, so that it takes the line as it is.
    head = "<134>1 2026-11-26T00:00:00Z bench app - - - "
    lines = b"".join(f"{head}{json.dumps(event)}\n".encode() for event in events(count))
    with tempfile.TemporaryDirectory() as folder:
        seconds = _through_rsyslog(program, Path(folder), lines)
        with gzip.open(Path(folder) / "log.jsonl.gz") as file:
            written = sum(1 for _ in file)
    assert written == count, f"rsyslog wrote {written} of {count} lines"
    return count / seconds


def _through_rsyslog(program: str, folder: Path, lines: bytes) -> float:
    port = free_port()
    config = folder / "rsyslog.conf"
    config.write_text(_CONFIG.format(folder=folder, port=port))
    process = subprocess.Popen([program, "-n", "-f", str(config), "-i", str(folder / "pid")])
    try:
        with _connected(port, process) as sock:
            began = time.perf_counter()
            sock.sendall(lines)
            sock.shutdown(socket.SHUT_WR)
            assert sock.recv(1) == b""  # it closes its end once it has read all
        process.terminate()
        process.wait(_PATIENCE_S)
        return time.perf_counter() - began
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _connected(port: int, process: subprocess.Popen[bytes]) -> socket.socket:
    deadline = time.monotonic() + 20
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=_PATIENCE_S)
        except ConnectionRefusedError:
            assert process.poll() is None, "rsyslogd ended"
            assert time.monotonic() < deadline, "rsyslogd does not listen"
            time.sleep(0.05)


def free_port() -> int:
    """A port that nobody has just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _logger(python: Path, name: str, count: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [python, "-m", "benchmarks.peers.loggers", name, str(count), folder],
            cwd=REPO, env={**os.environ, "PYTHONPATH": str(REPO)}, check=True, capture_output=True, text=True,
        )  # fmt: skip
    return count / float(json.loads(done.stdout)["seconds"])


PEERS_OF_LOGS: Final[dict[str, Callable[[int], float]]] = {
    "stdlib QueueListener, rotation, gzip": queue_listener,
    "structlog + orjson": structlog,
    "rsyslog, gzip": rsyslog,
}
"""Events a second of each, or NotInstalled."""
