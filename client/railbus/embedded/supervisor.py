"""Keeps nats-server and the services of one root running: starts, watches, starts again, and drains.

It is synchronous and has one thread, because it forks. Nothing happens outside its methods: whoever owns it calls
`tick` again and again (`up` does; `railbus demo` does so while its client works).

- What ends without having been told to is started again, later and later (`backoff`); nats-server on its port.
- nats-server is started anew where a full disk, which has room again, has left it unable to write (`store_watch`).
- The first signal makes `tick` return False; then `stop` drains stage by stage. Any further signal kills all at once.
- If the supervisor itself is killed, the kernel sends SIGTERM to all that it has started.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from railbus.embedded import run_files
from railbus.embedded.backoff import Backoff
from railbus.embedded.members import Place, ensure_members
from railbus.embedded.nats_server import NatsServer, find_server, is_free
from railbus.embedded.permissions import HUMAN
from railbus.embedded.probe import last_words, probe
from railbus.embedded.process import STOP_SIGNALS, Wakeup
from railbus.embedded.run_files import BusFile, RunPaths, UpLock
from railbus.embedded.server_config import ServerFiles, render
from railbus.embedded.services import SERVICES, Child, ServiceSpec, preload
from railbus.embedded.store_watch import StoreWatch
from railbus_shared import clock
from railbus_shared.errors import ConfigError, PortInUse, ServicesNotReady
from railbus_shared.subjects import DEFAULT_PREFIX

HTTP_PORT_BASE: Final = 8701
NATS: Final = "nats-server"
READY_S: Final = 180.0
"""Longest wait at the start. Importing torch takes more than a minute from a slow disk, or beside much other work."""

_EXIT_CONFIG: Final = 2
_PROBE_S: Final = 0.05
_LEAST_GRACE_S: Final = 2.0
_NATS_STOP_S: Final = 5.0

What = Literal["started", "ready", "ended", "restarting", "draining", "stopped", "killed"]


@dataclass(frozen=True)
class ServiceEvent:
    """Something happened to a service, to nats-server, or to the supervisor (named `railbus`)."""

    name: str
    what: What
    detail: str = ""


@dataclass(frozen=True)
class Options:
    """What may be chosen."""

    nats_port: int | None = None
    """None: 4222, or any free one if that is taken. 0: any free one."""
    http_port_base: int | None = None
    """Port of the first service; the others follow. None: 8701, or any free ones if one of these is taken. 0: any."""
    subject_prefix: str = DEFAULT_PREFIX
    services: Sequence[ServiceSpec] = SERVICES
    drain_s: float = 20.0
    """Longest wait for the services at a clean stop; then they are killed."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Further settings of the services."""


class Supervisor:
    """Everything that `railbus up` runs on one root. Main thread only."""

    def __init__(self, root: Path, *, options: Options, on_event: Callable[[ServiceEvent], None]) -> None:
        self.paths = RunPaths(root.absolute())
        self._options = options
        self._on_event = on_event
        self._wakeup = Wakeup()
        self._lock: UpLock | None = None
        self._server: NatsServer | None = None
        self._server_backoff = Backoff()
        self._store_watch = StoreWatch(ServerFiles(self.paths.nats))
        self._children: list[Child] = []
        self._http_base = 0
        self._probe_at_s = 0.0
        self._is_told_to_stop = False

    @property
    def server(self) -> NatsServer:
        """The embedded server; only after `start`."""
        assert self._server is not None, "the supervisor has not been started"  # noqa: S101
        return self._server

    @property
    def user_key_file(self) -> Path:
        """The human's credentials."""
        return self.paths.keys / f"{HUMAN}.nk"

    @property
    def health_urls(self) -> dict[str, str]:
        """Where each service serves HTTP; empty for one that does not yet."""
        return {child.name: child.url for child in self._children}

    @property
    def num_ready(self) -> int:
        return sum(child.is_ready for child in self._children)

    def start(self) -> None:
        """Start the server, and then the services; `wait_ready` waits for them.

        Raises AlreadyRunning, PortInUse, ServerNotFound, ConfigError or BusUnavailable, with nothing left behind.
        """
        self.paths.make()
        self._wakeup.install((*STOP_SIGNALS, signal.SIGCHLD))
        try:
            self._lock = run_files.acquire(self.paths)
            self._start_server()
            self._http_base = self._choose_http_base()
            mains = preload(self._options.services)  # while the server gets ready
            self.server.wait_ready()
            self._write_bus_file()
            self._emit(NATS, "ready", self.server.url)
            for spec in self._options.services:
                log = self.paths.run / f"{spec.name}.log"
                self._children.append(Child(spec, main=mains[spec.name], log=log, leave=self._leave_in_child))
            for child in self._children:
                self._start_child(child)
        except BaseException:
            self._kill_all()
            self._release()
            raise

    def wait_ready(self, timeout_s: float = READY_S) -> bool:
        """True once every service is ready, False if told to stop before.

        Raises ServicesNotReady after `timeout_s`, and ConfigError if a service says that a setting must change.
        """
        deadline_s = time.monotonic() + timeout_s
        while self.num_ready < len(self._children):
            if not self.tick(min(_PROBE_S, max(0.0, deadline_s - time.monotonic())), is_starting=True):
                return False
            if time.monotonic() > deadline_s:
                raise self._not_ready(timeout_s)
        return True

    def tick(self, timeout_s: float, *, is_starting: bool = False) -> bool:
        """Wait for the next thing to do, at most so long, and do it; False once a signal has asked for the end.

        Raises ConfigError if a service says so while the first start `is_starting`.
        """
        self._take_signals(min(timeout_s, self._next_due_s()))
        if self._is_told_to_stop:
            return False
        now_s = time.monotonic()
        self._watch_server(now_s)
        for child in self._children:
            self._watch_child(child, now_s, is_starting=is_starting)
        if now_s >= self._probe_at_s:
            self._probe_at_s = now_s + _PROBE_S
            self._probe_all()
        return True

    def stop(self) -> bool:
        """Drain: stage by stage, nats-server last. True if nothing had to be killed.

        A signal that comes meanwhile, or the end of `drain_s`, kills what is left.
        """
        self._is_told_to_stop = False
        self._emit("railbus", "draining")
        deadline_s = time.monotonic() + self._options.drain_s
        is_clean = True
        try:
            for stage in sorted({child.spec.drain_stage for child in self._children}):
                members = [child for child in self._children if child.spec.drain_stage == stage]
                is_clean &= self._drain(members, deadline_s)
                deadline_s = max(
                    deadline_s, time.monotonic() + _LEAST_GRACE_S
                )  # whoever was slow, the next get a while
                if self._is_told_to_stop:
                    is_clean = False
                    break
            if self._server and not self._is_told_to_stop:
                self._server.stop(_NATS_STOP_S)
                self._emit(NATS, "stopped")
        finally:
            self._kill_all()
            self._release()
        return is_clean

    # --- starting ----------------------------------------------------------------------------------------------------

    def _start_server(self) -> None:
        where, place = ServerFiles(self.paths.nats), Place.of_root(self.paths.root)

        def configuration(port: int) -> bytes:
            keys, granted = ensure_members(place, self._options.subject_prefix)  # as they are at this start
            return render(where, port=port, name="railbus", keys=keys, policy=granted)

        binary = find_server()
        self._server = NatsServer(binary, where=where, render=configuration, port=self._options.nats_port)
        self._server.spawn()
        self._server_backoff.started(time.monotonic())

    def _choose_http_base(self) -> int:
        """Two on one machine, each on a root of its own, must both start as typed."""
        if self._options.http_port_base is not None:
            return self._options.http_port_base
        usual = [HTTP_PORT_BASE + spec.port_offset for spec in self._options.services]
        return HTTP_PORT_BASE if all(map(is_free, usual)) else 0

    def _write_bus_file(self) -> None:
        bus = BusFile(
            url=self.server.url,
            keys_dir=str(self.paths.keys),
            user_key_file=str(self.user_key_file),
            pid=os.getpid(),
            started_at=clock.now(),
        )
        run_files.write_bus(self.paths, bus)

    def _start_child(self, child: Child) -> None:
        self._run_file(child).unlink(missing_ok=True)
        child.start(self._env_of(child.spec), now_s=time.monotonic())
        self._emit(child.name, "started", f"process {child.pid}")

    def _env_of(self, spec: ServiceSpec) -> dict[str, str]:
        base = self._http_base
        return {
            **self._options.env,
            "RAILBUS_ROOT": str(self.paths.root),
            "RAILBUS_NATS_URL": self.server.url,
            "RAILBUS_NATS_KEY_FILE": str(self.paths.keys / f"{spec.name}.nk"),
            "RAILBUS_SUBJECT_PREFIX": self._options.subject_prefix,
            "RAILBUS_RUN_DIR": str(self.paths.run),
            f"RAILBUS_{spec.name.upper()}_HTTP_PORT": str(base + spec.port_offset if base else 0),
        }

    def _leave_in_child(self) -> None:
        self._wakeup.leave_in_child()
        if self._lock:
            self._lock.close()

    def _run_file(self, child: Child) -> Path:
        return self.paths.run / f"{child.name}.json"

    # --- watching ----------------------------------------------------------------------------------------------------

    def _take_signals(self, timeout_s: float) -> None:
        came = self._wakeup.wait(timeout_s) & set(STOP_SIGNALS)
        if came:
            self._is_told_to_stop = True

    def _next_due_s(self) -> float:
        """Seconds until the next start or probe."""
        backoffs = [self._server_backoff, *(child.backoff for child in self._children)]
        due_s = [backoff.due_s for backoff in backoffs if backoff.due_s is not None]
        if any(child.pid is not None and not child.is_ready for child in self._children):
            due_s.append(self._probe_at_s)
        return min(due_s, default=float("inf")) - time.monotonic()

    def _watch_server(self, now_s: float) -> None:
        if self.server.pid is not None and self._store_watch.is_stuck(now_s):
            self._emit(NATS, "stopped", "its store still refuses writes after a full disk, which has room again")
            self.server.stop(_NATS_STOP_S)
        status = self.server.poll()
        if status is not None and self._server_backoff.due_s is None:
            wait_s = self._server_backoff.ended(now_s)
            self._emit(NATS, "ended", f"{_how(status)}; starts again in {wait_s:g} s")
        if not self._server_backoff.is_due(now_s):
            return
        self._server_backoff.started(now_s)
        try:
            self.server.spawn()
        except PortInUse as exc:
            wait_s = self._server_backoff.ended(now_s)
            self._emit(NATS, "ended", f"{exc.message}; tried again in {wait_s:g} s")
            return
        self._emit(NATS, "restarting", self.server.url)

    def _watch_child(self, child: Child, now_s: float, *, is_starting: bool) -> None:
        status = child.reap()
        if status is not None:
            words = last_words(child.log) if status > 0 else ""
            if is_starting and status == _EXIT_CONFIG:
                raise ConfigError(f"service {child.name} cannot run: {words}", hint=f"see {child.log}")
            wait_s = child.backoff.ended(now_s, hopeless=status == _EXIT_CONFIG)
            self._emit(child.name, "ended", f"{_how(status, words)}; starts again in {wait_s:g} s")
        if child.backoff.is_due(now_s):
            self._emit(child.name, "restarting")
            self._start_child(child)

    def _probe_all(self) -> None:
        for child in self._children:
            if child.pid is None or child.is_ready:
                continue
            found = probe(self._run_file(child), pid=child.pid)
            child.url = found.url
            if not found.problem:
                child.is_ready = True
                self._emit(child.name, "ready", found.url)

    def _not_ready(self, timeout_s: float) -> ServicesNotReady:
        late = [child for child in self._children if not child.is_ready]
        problems = []
        for child in late:
            problem = probe(self._run_file(child), pid=child.pid).problem if child.pid else last_words(child.log)
            problems.append(f"{child.name}: {problem or 'ready just now'}")
        return ServicesNotReady(
            f"not ready after {timeout_s:g} s: {'; '.join(problems)}",
            hint=f"see {', '.join(str(child.log) for child in late)}",
        )

    # --- stopping ----------------------------------------------------------------------------------------------------

    def _drain(self, members: Sequence[Child], deadline_s: float) -> bool:
        for child in members:
            child.signal(signal.SIGTERM)
        while any(child.pid is not None for child in members):
            for child in members:
                status = child.reap()
                if status is not None:
                    self._emit(child.name, "stopped", _how(status))
            left_s = deadline_s - time.monotonic()
            if left_s <= 0 or self._is_told_to_stop:
                self._kill(members)
                return False
            if any(child.pid is not None for child in members):
                self._take_signals(left_s)
        return True

    def _kill(self, members: Sequence[Child]) -> None:
        for child in members:
            if child.pid is not None:
                child.signal(signal.SIGKILL)
                os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
                child.reap()
                self._emit(child.name, "killed")

    def _kill_all(self) -> None:
        """Nothing that was started is left after this."""
        self._kill(self._children)
        if self._server:
            self._server.stop(timeout_s=0)

    def _release(self) -> None:
        """Clients see from here on that nothing runs."""
        self._wakeup.restore()
        if self._server:
            self.paths.bus.unlink(missing_ok=True)
        if self._lock:
            self._lock.close()
            self._lock = None

    def _emit(self, name: str, what: What, detail: str = "") -> None:
        self._on_event(ServiceEvent(name, what, detail))


def _how(status: int, words: str = "") -> str:
    """How a process ended, for a person."""
    how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
    return f"{how}: {words}" if words else how
