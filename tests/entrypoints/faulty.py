"""Trainers that misbehave, for the tests of what the runner does about it."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from railbus import TrainContext

SLEEPER = [sys.executable, "-I", "-S", "-c", "import time; time.sleep(600)"]


def stubborn(ctx: TrainContext) -> None:
    """Ignores SIGTERM, leaves grandchildren of three kinds, and goes into native code with the interpreter held."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    pids = [os.getpid(), subprocess.Popen(SLEEPER).pid, subprocess.Popen(SLEEPER, start_new_session=True).pid]
    if os.fork() == 0:  # a daemon: its parent is gone, and its session and group are its own
        os.setsid()
        if os.fork() == 0:
            Path("daemon").write_text(str(os.getpid()))
            time.sleep(600)
        os._exit(0)
    while not (daemon := Path("daemon").read_text() if Path("daemon").exists() else ""):
        time.sleep(0.01)
    ctx.event("settled", pids=[*pids, int(daemon)], cwd=str(Path.cwd()))
    _say_ready(ctx)
    _stuck_in_native_code()


def heedless(ctx: TrainContext) -> None:
    """Takes no steps, and ends at SIGTERM."""
    asked: list[float] = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(time.monotonic()))
    _say_ready(ctx)
    while not asked:
        time.sleep(0.01)
    ctx.event("reminded")


def hang(ctx: TrainContext) -> None:
    """Makes progress, then none for ever."""
    for number in range(3):
        ctx.log(number=number)
        time.sleep(0.1)
    _stuck_in_native_code()


def trap(_: TrainContext) -> None:
    """Fails behind a line on which `(a+)+$` searches for ever."""
    print("a" * 40 + "b", flush=True)
    raise ValueError("as it should")


def _say_ready(ctx: TrainContext) -> None:
    """What was recorded is sent with what comes a moment later."""
    ctx.log(ready=1)
    time.sleep(0.2)
    ctx.log(ready=2)


def _stuck_in_native_code() -> None:
    """With the interpreter held, and again after a signal."""
    sleep = ctypes.PyDLL(None).sleep
    while True:
        sleep(600)


def messy(ctx: TrainContext) -> None:
    """Prints 1 GB, a line without end and noise; leaves a process and a file; and succeeds."""
    line = b"x" * 7999 + b"\n"
    for _ in range(1000):
        _write(1, line * 125)
    _write(1, b"y" * (1 << 20))
    _write(1, bytes(range(256)) * 4096)
    _write(1, b"\nthe last line\n")
    Path("left.txt").write_text("left")
    subprocess.Popen(SLEEPER, start_new_session=True)


def _write(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def hoard(ctx: TrainContext) -> None:
    """Once it is told to, takes memory until somebody objects."""
    _say_ready(ctx)
    while not Path("go").exists():
        time.sleep(0.01)
    held: list[bytes] = []
    while True:
        held.append(b"z" * (16 << 20))


def broken(ctx: TrainContext) -> None:
    """As CUDA ends a process whose GPU has a memory error."""
    os.write(2, b"CUDA error: uncorrectable ECC error encountered\n")
    os.abort()


def quick(ctx: TrainContext) -> None:
    """Says where it works."""
    ctx.event("worked", cwd=str(Path.cwd()))
