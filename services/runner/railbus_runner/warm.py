"""The pre-warmed process: it has PyTorch imported, and forks a trainer whenever the runner asks.

    python -m railbus_runner.warm FD [module:function]

FD is its end of a Unix socket pair; its peer is the runner, and must be its parent. The function (by default the
trainer's `main`) is called in each fork with the trainer's own socket; what it returns is the exit code. A fork may
also be the writer of a trainer's checkpoints (`checkpointing.writer`), a sibling of its trainer.

Invariants: one thread, so that a fork copies no lock in an unknown state; CUDA is never touched, so that a child may;
it dies with its runner and its trainers die with it; it adopts the orphans of its trainers, so nothing below it escapes
the kill at its end. In: fork, with four descriptors. Out: ready, forked, exited (`frames`).
"""

from __future__ import annotations

import gc
import importlib
import logging
import os
import selectors
import signal
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Final, cast

from railbus_runner import processes
from railbus_runner.descriptors import receive
from railbus_runner.forked import ForkOrder, Mains, TrainerMain, WriterMain, run_child
from railbus_runner.frames import Exited, Fork, Forked, Frame, FrameBuffer, Ready, pack
from railbus_shared import logs

logger = logging.getLogger(__name__)

DEFAULT_TARGET: Final = "railbus_runner.trainer:main"
_ONE_THREAD: Final = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
_PASSIVE: Final = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Threads that wait for each other sleep instead of spinning: where another process shares the cores, and NATS and the
services do, spinning was measured to make steps up to ten times slower. Read by OpenMP as torch is imported."""
_FDS_PER_FORK: Final = 4
_WRITER: Final = "railbus_runner.checkpointing.writer:main"
_LAST_KILL_S: Final = 2.0


def main(argv: list[str]) -> int:
    """Warm up, then serve the runner until it closes the socket."""
    runner = socket.socket(fileno=int(argv[1]))
    processes.die_with_parent(_peer_pid(runner))
    processes.adopt_orphans()
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole service; the runner decides when this one ends
        signal.signal(number, signal.SIG_IGN)
    logs.configure("runner.warm")
    base_env = dict(os.environ)
    mains, ready = warm_up(argv[2] if len(argv) > 2 else DEFAULT_TARGET)
    server = WarmServer(runner, mains=mains, base_env=base_env)
    server.serve(ready)
    return 0


def warm_up(target: str) -> tuple[Mains, Ready]:
    """Import what trainers and writers need, and take one step of an optimizer where that leaves no thread behind."""
    began = time.monotonic()
    os.environ.update(_PASSIVE)
    os.environ.update(_ONE_THREAD)  # pools of threads would be born by the imports and lost in the fork
    import numpy  # noqa: F401, ICN001, PLC0415
    import torch  # noqa: PLC0415
    import torch._dynamo  # loads at the first optimizer step otherwise, and takes over a second  # noqa: PLC0415
    import torch.optim  # noqa: PLC0415

    mains = Mains(trainer=cast("TrainerMain", _imported(target)), writer=cast("WriterMain", _imported(_WRITER)))
    if torch.version.cuda is None and torch.version.hip is None:  # else a backward pass starts a thread per GPU
        _take_one_step()
    _report_threads()
    gc.collect()
    gc.freeze()  # else the first collection in a child copies every page that holds an object
    return mains, Ready(pid=os.getpid(), torch=str(torch.__version__), seconds=time.monotonic() - began)


def _imported(target: str) -> object:
    module, _, function = target.partition(":")
    return cast("object", getattr(importlib.import_module(module), function))


def _take_one_step() -> None:
    import torch  # noqa: PLC0415

    torch.set_num_threads(1)
    generator_state = torch.get_rng_state()
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    torch.set_rng_state(generator_state)


def _report_threads() -> None:
    num_threads = len(list(Path("/proc/self/task").iterdir()))
    if num_threads > 1:
        logger.warning("the pre-warmed process has more than one thread", extra={"num_threads": num_threads})


class WarmServer:
    """Forks on order and tells what became of each child; owns the runner's socket."""

    def __init__(self, runner: socket.socket, *, mains: Mains, base_env: dict[str, str]) -> None:
        self._runner = runner
        self._mains = mains
        self._base_env = base_env
        self._buffer = FrameBuffer()
        self._descriptors: list[int] = []
        self._processes: dict[int, str] = {}
        self._wake_read, self._wake_write = socket.socketpair()

    def serve(self, ready: Ready) -> None:
        """Until the runner has closed its end; then kill whatever is left below."""
        self._wake_write.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # a handler must be there for the wake-up to be written
        signal.set_wakeup_fd(self._wake_write.fileno(), warn_on_full_buffer=False)
        try:
            self._send(ready)
            self._loop()
        except (BrokenPipeError, ConnectionResetError):
            logger.info("the runner has closed the socket")
        finally:
            kill_descendants(deadline_s=_LAST_KILL_S)

    def _loop(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._runner, selectors.EVENT_READ)
            selector.register(self._wake_read, selectors.EVENT_READ)
            while True:
                ready = {key.fileobj for key, _ in selector.select()}
                if self._wake_read in ready:
                    self._wake_read.recv(4096)
                    self._reap()
                if self._runner in ready and not self._receive():
                    return

    def _receive(self) -> bool:
        """Handle what the runner sent; False once it has closed its end."""
        data, descriptors = receive(self._runner, 1 << 16, max_descriptors=64)
        self._descriptors += descriptors
        for frame in self._buffer.feed(data):
            if isinstance(frame, Fork):
                given, self._descriptors = self._descriptors[:_FDS_PER_FORK], self._descriptors[_FDS_PER_FORK:]
                self._fork(frame, given)
        return bool(data)

    def _fork(self, fork: Fork, descriptors: list[int]) -> None:
        """One child; where the system refuses, `exited` with pid 0 takes the place of `forked`."""
        sock, stdout, stderr, extra = descriptors
        order = ForkOrder(fork=fork, sock=sock, stdout=stdout, stderr=stderr, extra=extra, base_env=self._base_env)
        parent = os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            pid = os.fork()
            if pid == 0:
                run_child(order, parent=parent, mains=self._mains)
        except OSError:
            logger.exception("the system refused a fork", extra={"child": fork.process})
            pid = 0
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            for descriptor in descriptors:
                os.close(descriptor)
        if pid:
            self._processes[pid] = fork.process
            self._send(Forked(process=fork.process, pid=pid))
        else:
            self._send(Exited(process=fork.process, pid=0, status=1))

    def _reap(self) -> None:
        """Every child that has ended, trainers, writers and adopted orphans alike."""
        for pid, status in ended_children():
            process = self._processes.pop(pid, None)
            if process is not None:
                self._send(Exited(process=process, pid=pid, status=os.waitstatus_to_exitcode(status)))

    def _send(self, frame: Frame) -> None:
        self._runner.sendall(pack(frame))


def ended_children() -> Iterator[tuple[int, int]]:
    """Reap what has ended: pid and wait status of each."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        yield pid, status


def kill_descendants(*, deadline_s: float) -> None:
    """SIGKILL to everything below, again until nothing is left: orphans are ours, so none is out of sight."""
    until = time.monotonic() + deadline_s
    while below := processes.descendants([os.getpid()], among=processes.all_processes()):
        if time.monotonic() > until:
            logger.error("processes outlive SIGKILL", extra={"pids": [info.id.pid for info in below]})
            return
        for info in below:
            processes.kill_exactly(info.id)
        time.sleep(0.002)
        deque(ended_children(), maxlen=0)


def _peer_pid(sock: socket.socket) -> int:
    """The process that made the socket pair."""
    size = struct.calcsize("3i")
    return cast("int", struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))[0])


if __name__ == "__main__":
    sys.exit(main(sys.argv))
