"""A real `railbus up` on a root of its own, as a user starts it."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

from railbus_shared.layout import Layout
from railbus_shared.settings import CommonSettings, running_bus

JOBS: Final = Path(__file__).parent / "jobs"
"""Entrypoints of the benchmarks' jobs."""
SERVICES: Final = ("device_manager", "dataloader", "runner", "telemetry")
_READY_S: Final = 90.0
_STOP_S: Final = 40.0
WARM: Final = "railbus_runner.warm"
_FIRST_SCREEN: Final = "submit a job with any NATS client"


@dataclass(frozen=True)
class Running:
    """One `railbus up` that has shown its first screen."""

    root: Path
    pid: int
    ready_s: float
    """From the moment before its process was started to the first screen, which says that all services are ready."""
    lines: tuple[tuple[float, str], ...]
    """What it showed until then, and after how many seconds."""

    @property
    def settings(self) -> CommonSettings:
        """How to join its bus."""
        found = running_bus(Layout(self.root))
        assert found is not None, f"no bus runs on {self.root}"
        return found

    def cpu_s(self) -> float:
        """CPU seconds that the supervisor, NATS and the services have used; trainers and what forks them left out."""
        up = psutil.Process(self.pid)
        all_of_it = [up, *up.children(recursive=True)]
        times = {process.pid: process.cpu_times() for process in all_of_it if WARM not in process.cmdline()}
        return sum(used.user + used.system for used in times.values())

    def cpu_by_service(self) -> dict[str, float]:
        """CPU seconds used so far, by service; trainers and what forks them left out."""
        found: dict[str, float] = collections.defaultdict(float)
        for name, process in self._processes():
            times = process.cpu_times()
            found[name] += times.user + times.system
        return dict(found)

    def pss_by_service(self) -> dict[str, int]:
        """Bytes of memory: a process's own, and its share of what it shares; trainers and what forks them left out."""
        found: dict[str, int] = collections.defaultdict(int)
        for name, process in self._processes():
            found[name] += process.memory_full_info().pss
        return dict(found)

    def pid_of(self, service: str) -> int:
        """The process of a service."""
        return int(json.loads((Layout(self.root).state / "run" / f"{service}.json").read_bytes())["pid"])

    def _processes(self) -> Iterator[tuple[str, psutil.Process]]:
        """The supervisor (`up`), `nats-server` and the services."""
        services = {self.pid_of(name): name for name in SERVICES}
        up = psutil.Process(self.pid)
        for process in [up, *up.children(recursive=True)]:
            words = process.cmdline()
            if WARM in words or (process.ppid() != self.pid and process.pid != self.pid):
                continue
            if process.pid == self.pid:
                yield "up", process
            elif process.pid in services:
                yield services[process.pid], process
            else:
                yield Path(words[0] if words else process.name()).name, process

    def log(self, service: str) -> str:
        return (Layout(self.root).state / "run" / f"{service}.log").read_text()


@contextlib.contextmanager
def running_up(root: Path, *options: str) -> Iterator[Running]:
    """Start `railbus up` with free ports, wait until it is ready, and drain it at the end."""
    command = [sys.executable, "-m", "railbus.cli.main", "--root", str(root), "up", "--nats-port", "0"]
    command += ["--http-port-base", "0", "--entrypoints", str(JOBS), *options]
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAILBUS_")}
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
    try:
        lines = tuple(_until_ready(process, began))
        yield Running(root, process.pid, lines[-1][0], lines)
    finally:
        process.terminate()
        process.communicate(timeout=_STOP_S)
    assert process.returncode == 0, f"railbus up ended with {process.returncode}"


def _until_ready(process: subprocess.Popen[str], began: float) -> Iterator[tuple[float, str]]:
    assert process.stdout is not None
    for line in process.stdout:
        since_s = time.perf_counter() - began
        yield since_s, line.rstrip()
        if _FIRST_SCREEN in line:
            return
        assert since_s < _READY_S, f"not ready after {_READY_S:g} s"
    raise AssertionError(f"railbus up ended with {process.wait()} before it was ready")
