"""The runner's end of the pre-warmed process: starts it, keeps it alive, orders trainers from it.

Invariants: whoever waits gets an answer; if the pre-warmed process dies, its trainers have died with it, so every
wait ends with TrainerLost, and a new process is started after a pause that grows. Imports no torch.
Out: fork. In: ready, forked, exited (`frames`).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import secrets
import socket
import sys
import time
from collections.abc import Mapping
from typing import Final

from railbus_runner.descriptors import send_some
from railbus_runner.forked import COOKIE, scrubbed
from railbus_runner.frames import Exited, Fork, Forked, Frame, FrameBuffer, Ready, pack
from railbus_runner.warm import DEFAULT_TARGET
from railbus_shared.errors import BadMessage, RunnerLost, TrainerLost

logger = logging.getLogger(__name__)

_PAUSE_MIN_S: Final = 0.2
_PAUSE_MAX_S: Final = 10.0
_HEALTHY_AFTER_S: Final = 60.0
_EXIT_S: Final = 5.0
_DEAD_S: Final = 1.0  # from the end of its stream to its own end
_READ_BYTES: Final = 1 << 16
_DIED: Final = "the pre-warmed process died, and every trainer with it"
_AGAIN: Final = "the job is placed again; the runner's log says why the process ended"


class WarmProcess:
    """One pre-warmed process at a time, and the trainers and writers that it has forked."""

    def __init__(self, *, env: Mapping[str, str], target: str = DEFAULT_TARGET, fork_timeout_s: float = 30.0) -> None:
        self._env = scrubbed(env)
        self._target = target
        self._fork_timeout_s = fork_timeout_s
        self._process: asyncio.subprocess.Process | None = None
        self._sock: socket.socket | None = None
        self._sending = asyncio.Lock()
        self._ready = asyncio.Event()
        self._stop = asyncio.Event()
        self._idle = asyncio.Event()  # nobody reads the socket
        self._idle.set()
        self._forks: dict[str, asyncio.Future[int]] = {}
        self._exits: dict[str, asyncio.Future[int]] = {}
        self.cookie = ""
        """What the environment of every process below begins with; another one after each restart."""
        self.torch_version = ""

    @property
    def is_alive(self) -> bool:
        """Whether a fork could be ordered now."""
        return self._ready.is_set()

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    async def start(self) -> None:
        """Start the process; must be called on the main thread, whose end would kill it."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        ours.setblocking(False)
        self.cookie = secrets.token_hex(8)
        try:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "railbus_runner.warm", str(theirs.fileno()), self._target),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=2,
                env={**self._env, COOKIE: self.cookie},
                pass_fds=(theirs.fileno(),),
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self._sock = ours

    async def run(self) -> None:
        """Read what the process says, and start another one whenever it has died, until `close`."""
        pause_s = _PAUSE_MIN_S
        while not self._stop.is_set():
            began = time.monotonic()
            try:
                if self._process is None:
                    await self.start()
                await self._read()
            except OSError:
                logger.exception("the pre-warmed process cannot be started")
            await self._end_process(grace_s=_DEAD_S)
            if time.monotonic() - began > _HEALTHY_AFTER_S:
                pause_s = _PAUSE_MIN_S
            await self._pause(pause_s)
            pause_s = min(2 * pause_s, _PAUSE_MAX_S)

    async def wait_ready(self, timeout_s: float) -> None:
        """Return once a fork can be ordered; raises TrainerLost after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._ready.wait()
        except TimeoutError as exc:
            raise _not_ready(f"after {timeout_s:g} s") from exc

    async def fork(self, fork: Fork, *, sock: socket.socket, stdout_fd: int, stderr_fd: int, extra_fd: int) -> int:
        """Start a trainer or writer with the descriptors that `Fork` names; the caller closes its copies of them.

        Gives its pid.

        Raises TrainerLost if none was started, or none is known to have been: then the caller must close its own end of
        the socket, by which one that did start ends. Raises ValueError for an attempt that has one already.
        """
        if not self.is_alive:
            raise _not_ready("at present")
        if fork.process in self._exits:
            raise ValueError(f"attempt {fork.attempt!r} has a {fork.role} already")
        loop = asyncio.get_running_loop()
        forked: asyncio.Future[int] = loop.create_future()
        self._forks[fork.process] = forked
        self._exits[fork.process] = loop.create_future()
        try:
            async with asyncio.timeout(self._fork_timeout_s):
                await self._send(fork, (sock.fileno(), stdout_fd, stderr_fd, extra_fd))
                return await forked
        except BaseException as exc:
            self._exits.pop(fork.process, None)
            if isinstance(exc, OSError | TimeoutError):
                raise TrainerLost(f"the fork for {fork.process!r} was not answered: {exc!r}", hint=_AGAIN) from exc
            raise
        finally:
            self._forks.pop(fork.process, None)

    async def wait_exit(self, process: str) -> int:
        """How a trainer or writer (`Fork.process`) ended: its exit code, or minus a signal's number; to be asked once.

        Raises TrainerLost if the pre-warmed process died, and all of them with it, or if there is none of this name.
        """
        future = self._exits.get(process)
        if future is None:
            raise TrainerLost(f"{process!r} is no trainer here", hint=_AGAIN)
        try:
            return await asyncio.shield(future)
        finally:
            if future.done():
                self._exits.pop(process, None)

    def forget(self, process: str) -> None:
        """Nobody will ask how this one ended; it may live still."""
        if (future := self._exits.get(process)) is not None:
            future.add_done_callback(lambda _: self._exits.pop(process, None))

    async def close(self) -> None:
        """End the process and its trainers with it; every wait ends with RunnerLost."""
        self._stop.set()
        await self._end_process(grace_s=_EXIT_S)

    async def _read(self) -> None:
        """Until the process has closed its end, or says what is no frame."""
        sock, buffer, loop = self._sock, FrameBuffer(), asyncio.get_running_loop()
        if sock is None or self._stop.is_set():
            return
        self._idle.clear()
        try:
            while data := await loop.sock_recv(sock, _READ_BYTES):
                for frame in buffer.feed(data):
                    self._take(frame)
        except ConnectionResetError:
            logger.info("the pre-warmed process has closed the socket")
        except BadMessage:
            logger.exception("the pre-warmed process sent what is no frame")
        finally:
            self._idle.set()

    def _take(self, frame: Frame) -> None:
        match frame:
            case Ready():
                self._ready.set()
                logger.info("the pre-warmed process is ready", extra=frame.model_dump(exclude={"f"}))
            case Forked() if frame.process in self._forks:
                _resolve(self._forks[frame.process], frame.pid)
            case Exited(pid=0) if frame.process in self._forks:
                _fail(
                    self._forks[frame.process], TrainerLost("the system refused the fork", hint="see the runner's log")
                )
            case Exited() if frame.process in self._exits:
                _resolve(self._exits[frame.process], frame.status)
            case _:
                logger.warning("nobody waits for a frame", extra={"frame": frame.f})

    async def _send(self, fork: Fork, descriptors: tuple[int, ...]) -> None:
        """The frame with its descriptors; a frame that is cut short would spoil the stream, so it ends the process."""
        data, sent, loop = memoryview(pack(fork)), 0, asyncio.get_running_loop()
        async with self._sending:
            if self._sock is None:
                raise ConnectionResetError("the pre-warmed process has ended")
            try:
                sent = await send_some(self._sock, data, descriptors)
                await loop.sock_sendall(self._sock, data[sent:])
                sent = len(data)
            finally:
                if 0 < sent < len(data):
                    self._kill()

    async def _end_process(self, *, grace_s: float) -> None:
        """Wait for the end, with force after the grace, and answer everyone who waits."""
        self._ready.clear()
        process, sock = self._process, self._sock
        if process is not None and sock is not None:
            _shut_down(sock)
            try:
                async with asyncio.timeout(grace_s):
                    await process.wait()
            except TimeoutError:
                self._kill()
                await process.wait()
            await self._idle.wait()
            logger.info("the pre-warmed process has ended", extra={"pid": process.pid, "status": process.returncode})
            sock.close()
            self._process, self._sock = None, None
        self._answer_all()

    def _answer_all(self) -> None:
        for future in (*self._forks.values(), *self._exits.values()):
            _fail(future, RunnerLost("the runner stops") if self._stop.is_set() else TrainerLost(_DIED, hint=_AGAIN))

    def _kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.kill()

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stop.wait()


def _resolve(future: asyncio.Future[int], value: int) -> None:
    if not future.done():
        future.set_result(value)


def _fail(future: asyncio.Future[int], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
        future.exception()  # seen: the loop need not complain if nobody asks


def _shut_down(sock: socket.socket) -> None:
    """The end of the stream for the other side; it may be gone already."""
    try:
        sock.shutdown(socket.SHUT_WR)
    except OSError as exc:
        if exc.errno != errno.ENOTCONN:
            raise


def _not_ready(when: str) -> TrainerLost:
    return TrainerLost(f"the pre-warmed process is not ready {when}", hint=_AGAIN)
