"""The first moments of a trainer, or of the writer of its checkpoints: from the fork to its `main`.

The child leaves everything of the pre-warmed process behind but its memory: session, cgroup, CPUs, standard streams,
descriptors, environment, signal handlers. It never returns into the code that forked it.
"""

from __future__ import annotations

import faulthandler
import fcntl
import io
import logging
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, NoReturn

from railbus_runner import processes
from railbus_runner.frames import Fork

EXIT_SETUP_FAILED: Final = 125
"""Exit code of a child that could not reach the trainer's `main`; as `env` and `docker run` use it."""
SECRET_PREFIXES: Final = ("RAILBUS_", "NATS_")
"""Variables of the services, with their credentials; no trainer sees one."""
COOKIE: Final = "TRAINER_COOKIE"
"""Variable that names the pre-warmed process, and in a trainer the attempt too; by it a sweep knows its own."""
STACKS_SIGNAL: Final = signal.SIGRTMIN + 5
"""At which a trainer writes the Python stacks of its threads into its file of stacks, wherever it is: also in native
code, and also while that holds the interpreter. One of the real-time signals, which nobody else is known to use."""
_SOCKET_FD: Final = 3
_EXTRA_FD: Final = 4

TrainerMain = Callable[[socket.socket], int]
WriterMain = Callable[[socket.socket, socket.socket], int]


@dataclass(frozen=True)
class Mains:
    """What a child does, by its role; each gives the exit code."""

    trainer: TrainerMain
    """Called with the socket to the runner."""
    writer: WriterMain
    """Called with the socket to the runner and the one to the trainer."""


@dataclass(frozen=True)
class ForkOrder:
    """What a child needs of the frame and its descriptors."""

    fork: Fork
    sock: int
    stdout: int
    stderr: int
    extra: int
    """The file of stacks of a trainer, a writer's socket to its trainer."""
    base_env: Mapping[str, str]


def scrubbed(env: Mapping[str, str]) -> dict[str, str]:
    """The variables that a trainer may see."""
    return {name: value for name, value in env.items() if not name.upper().startswith(SECRET_PREFIXES)}


def trainer_env(base: Mapping[str, str], given: Mapping[str, str], *, attempt: str) -> dict[str, str]:
    """Base and given, the given winning, without secrets, and with the cookie that tells whose process this is."""
    env = scrubbed({**base, **given})
    if cookie := base.get(COOKIE):
        env[COOKIE] = f"{cookie}/{attempt}"
    return env


def run_child(order: ForkOrder, *, parent: int, mains: Mains) -> NoReturn:
    """Everything that happens in the child, with its exit."""
    code = EXIT_SETUP_FAILED
    try:
        sock = _become(order, parent=parent)
        code = 1
        if order.fork.role == "writer":
            trainer = socket.socket(fileno=_EXTRA_FD)
            code = mains.writer(sock, trainer)
        else:
            code = mains.trainer(sock)
    except SystemExit as exc:
        code = _code_of(exc)
    except BaseException:  # noqa: BLE001 - nothing may climb back into the parent's loop; the traceback is told
        traceback.print_exc()
    finally:
        _flush()
        os._exit(code & 0xFF)


def _become(order: ForkOrder, *, parent: int) -> socket.socket:
    os.setsid()
    processes.die_with_parent(parent)
    sock = _take_descriptors(order)
    for path in order.fork.cgroup_procs:
        _enter_cgroup(path)
    if order.fork.cores:
        os.sched_setaffinity(0, order.fork.cores)
    os.environ.clear()
    os.environ.update(trainer_env(order.base_env, order.fork.env, attempt=order.fork.attempt))
    os.umask(0o022)
    processes.confine(may_gain_privileges=order.fork.may_gain_privileges)
    del sys.argv[1:]
    _forget_logging()
    _reset_signals()
    _use_cores()
    faulthandler.enable(sys.stderr, all_threads=True)  # a crash in native code says where it was
    if order.fork.role == "trainer":
        faulthandler.register(STACKS_SIGNAL, file=_EXTRA_FD, all_threads=True)
    if order.fork.workdir:
        os.chdir(order.fork.workdir)
    return sock


def _take_descriptors(order: ForkOrder) -> socket.socket:
    """Standard streams at 0 to 2, the socket at 3, the file of stacks or the other socket at 4, nothing else open."""
    null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    for source, target in ((null, 0), (order.stdout, 1), (order.stderr, 2)):
        os.dup2(source, target)
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _EXTRA_FD + 1) for fd in (order.sock, order.extra)]
    for source, target in zip(high, (_SOCKET_FD, _EXTRA_FD), strict=True):  # by way of others: each may be the other's
        os.dup2(source, target, inheritable=False)
    os.closerange(_EXTRA_FD + 1, 1 + max(int(name) for name in os.listdir("/proc/self/fd")))  # noqa: PTH208 - bare names
    # New ones: those that were inherited remember what kind of file they wrote to, which may have been seekable.
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(io.FileIO(fd, "wb", closefd=False), "utf-8", "backslashreplace", line_buffering=True)
        for fd in (1, 2)
    )
    return socket.socket(fileno=_SOCKET_FD)


def _enter_cgroup(path: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, b"0")  # the writer itself, whatever its pid is in the reader's namespace
    finally:
        os.close(descriptor)


def _reset_signals() -> None:
    """As a fresh interpreter has them; they were blocked since before the fork."""
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _forget_logging() -> None:
    """The parent's lines go to its log; how this process logs is the trainer's to say."""
    root = logging.getLogger()
    root.handlers.clear()
    root.setLevel(logging.WARNING)


def _use_cores() -> None:
    """As many threads in PyTorch's pool as this process has CPUs; the parent was held to one."""
    import torch  # noqa: PLC0415 - imported long ago, by the parent

    torch.set_num_threads(len(os.sched_getaffinity(0)))


def _code_of(exc: SystemExit) -> int:
    """As the interpreter itself would exit."""
    if exc.code is None or isinstance(exc.code, int):
        return exc.code or 0
    sys.stderr.write(f"{exc.code}\n")
    return 1


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):  # its reader is gone, or user code closed it: nobody is left to tell
            continue
