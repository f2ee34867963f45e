"""The services as children: forked from the supervisor, which has imported their code once for all of them.

A service's `main() -> int | None` reads its settings from the environment. Its child has its own session (so that the
terminal's Ctrl-C reaches the supervisor only), its log as stdout and stderr, and dies with the supervisor.
"""

from __future__ import annotations

import gc
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, cast

from railbus.embedded.backoff import Backoff
from railbus.embedded.process import STOP_SIGNALS, die_with_parent
from railbus_shared.errors import ConfigError

Main = Callable[[], int | None]

_LOG_LIMIT_BYTES: Final = 10 << 20
_BUG_STATUS: Final = 1


@dataclass(frozen=True)
class ServiceSpec:
    """One service of `railbus up`."""

    name: str
    target: str
    """`package.module:function`."""
    drain_stage: int
    """Services are stopped stage by stage: whoever works first, whoever writes down what happened last."""
    port_offset: int = 0
    """Added to the base of the HTTP ports."""


SERVICES: Final = (
    ServiceSpec("device_manager", "railbus_device_manager.__main__:main", drain_stage=1, port_offset=0),
    ServiceSpec("dataloader", "railbus_dataloader.__main__:main", drain_stage=1, port_offset=1),
    ServiceSpec("runner", "railbus_runner.__main__:main", drain_stage=0, port_offset=2),
    ServiceSpec("telemetry", "railbus_telemetry.__main__:main", drain_stage=2, port_offset=3),
)


def preload(specs: Sequence[ServiceSpec]) -> dict[str, Main]:
    """Import every service's code, once for all; raises ConfigError for one whose dependencies are not installed."""
    mains: dict[str, Main] = {}
    for spec in specs:
        module, _, function = spec.target.partition(":")
        try:
            mains[spec.name] = cast("Main", getattr(importlib.import_module(module), function))
        except ImportError as exc:
            raise ConfigError(
                f"service {spec.name} cannot be loaded: {exc}", hint="pip install 'railbus[all]' installs every service"
            ) from exc
    gc.collect()
    gc.freeze()  # so that a collection in a child does not copy the pages that all share
    return mains


class Child:
    """One service and its process. `leave` is called in the new process to let go of what is the supervisor's."""

    def __init__(self, spec: ServiceSpec, *, main: Main, log: Path, leave: Callable[[], None]) -> None:
        self.spec = spec
        self.log = log
        self.backoff = Backoff()
        self.pid: int | None = None
        self.url = ""
        """Of its HTTP server, once it is ready."""
        self.is_ready = False
        self._main = main
        self._leave = leave

    @property
    def name(self) -> str:
        return self.spec.name

    def start(self, env: Mapping[str, str], *, now_s: float) -> None:
        """Fork it. Signals wait until the child has let go of the supervisor's handlers."""
        self._open_log().close()
        sys.stdout.flush()
        sys.stderr.flush()
        parent = os.getpid()
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            pid = os.fork()
            if pid == 0:
                self._live(parent, env)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        self.pid, self.url, self.is_ready = pid, "", False
        self.backoff.started(now_s)

    def reap(self) -> int | None:
        """Its exit status (negative: the signal) if it has ended since the last call, else None."""
        if self.pid is None:
            return None
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid == 0:
            return None
        self.pid, self.is_ready = None, False
        return os.waitstatus_to_exitcode(status)

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal, if it runs; SIGKILL goes to its whole group."""
        if self.pid is None:
            return
        if number is signal.SIGKILL:
            try:
                os.killpg(self.pid, number)
                return
            except ProcessLookupError:
                pass  # it has not come to its setsid yet, so the group does not exist
        os.kill(self.pid, number)  # not reaped yet, so the id is still its own

    def _live(self, parent: int, env: Mapping[str, str]) -> None:
        """The whole life of the child; never returns."""
        status = _BUG_STATUS
        try:
            os.setsid()
            die_with_parent(parent)
            self._redirect()
            self._leave()
            os.environ.update(env)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
            status = _status_of(self._main)
        except BaseException:  # noqa: BLE001 - the log is where a service's last words belong
            traceback.print_exc()
        finally:
            try:
                sys.stdout.flush()
                sys.stderr.flush()
            finally:
                os._exit(status)

    def _redirect(self) -> None:
        with Path(os.devnull).open("rb") as nothing, self._open_log() as log:
            os.dup2(nothing.fileno(), 0)
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        sys.stdout = open(1, "w", encoding="utf-8", buffering=1, closefd=False)  # noqa: SIM115 - a descriptor
        sys.stderr = open(2, "w", encoding="utf-8", buffering=1, closefd=False)  # noqa: SIM115

    def _open_log(self) -> BinaryIO:
        """Appended to; one that has grown large is set aside first."""
        if self.log.exists() and self.log.stat().st_size > _LOG_LIMIT_BYTES:
            self.log.replace(self.log.with_suffix(".log.1"))
        return self.log.open("ab")


def _status_of(main: Main) -> int:
    try:
        return main() or 0
    except SystemExit as exc:
        return exc.code if isinstance(exc.code, int) else int(exc.code is not None)
