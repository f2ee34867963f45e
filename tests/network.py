"""A network of two: this one, and a namespace that a virtual cable joins to it, which can be cut. Needs root."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Network:
    """The addresses of both ends, and the name of the namespace, with which those of the cable's ends begin."""

    name: str
    here: str
    there: str

    @property
    def inside(self) -> tuple[str, ...]:
        """The beginning of a command line that runs in the namespace."""
        return ("nsenter", f"--net=/run/netns/{self.name}")

    @contextlib.contextmanager
    def silent(self) -> Iterator[None]:
        """What is there hears what is said here, and cannot say anything."""
        _run(*self.inside, "ip", "route", "add", "blackhole", f"{self.here}/32")
        try:
            yield
        finally:
            _run(*self.inside, "ip", "route", "del", "blackhole", f"{self.here}/32")

    @contextlib.contextmanager
    def cut(self) -> Iterator[None]:
        """Neither end hears the other, and nobody is told."""
        _run("ip", "link", "set", f"{self.name}h", "down")
        try:
            yield
        finally:
            _run("ip", "link", "set", f"{self.name}h", "up")


@contextlib.contextmanager
def network() -> Iterator[Network]:
    """Gone at the end."""
    number = os.getpid() % 250
    made = Network(f"rb{number}", f"10.213.{number}.1", f"10.213.{number}.2")
    ends = (f"{made.name}h", f"{made.name}t")
    _run("ip", "netns", "add", made.name)
    try:
        _run("ip", "link", "add", ends[0], "type", "veth", "peer", "name", ends[1], "netns", made.name)
        _run("ip", "address", "add", f"{made.here}/30", "dev", ends[0])
        _run("ip", "link", "set", ends[0], "up")
        _run(*made.inside, "ip", "address", "add", f"{made.there}/30", "dev", ends[1])
        for name in ("lo", ends[1]):
            _run(*made.inside, "ip", "link", "set", name, "up")
        yield made
    finally:
        with contextlib.suppress(subprocess.CalledProcessError):  # it was never made
            _run("ip", "link", "delete", ends[0])
        _run("ip", "netns", "delete", made.name)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
