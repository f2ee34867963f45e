"""The thread behind `with LearningTelemetry(...)` in a script: joins the bus, sends, and leaves with everything sent.

It also ends well where the script forgets to leave the `with`: at the interpreter's exit. A process that the script
forks begins a thread of its own with the first event that it records.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import os
import sys
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, Final, Self

from railbus_shared import tracing
from railbus_shared.errors import RailbusError

if TYPE_CHECKING:
    from railbus_shared.settings import CommonSettings
    from railbus_shared.telemetry import LearningTelemetry

logger = logging.getLogger(__name__)

_CLOSE_S: Final = 10.0


class Script:
    """One script's way to the bus."""

    def __init__(self, telemetry: LearningTelemetry, settings: CommonSettings) -> None:
        self._telemetry = telemetry
        self._settings = settings
        self._joined: Future[None] = Future()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._leave = asyncio.Event()
        self._is_leaving = False
        self._thread = threading.Thread(target=self._main, name="railbus-telemetry", daemon=True)
        self._beginning = threading.Lock()

    def start(self) -> None:
        """Join the bus, and the trace that the environment names; raises BusUnavailable or NotAuthorized."""
        context = tracing.parsed(os.environ.get(tracing.VARIABLE))
        if context is not None and tracing.current.get() is None:
            tracing.current.set(str(context))
        self._thread.start()
        self._joined.result()
        atexit.register(self.stop)

    def stop(self) -> None:
        """Send what waits, and leave; does nothing in a process that has not joined."""
        atexit.unregister(self.stop)
        self._is_leaving = True
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has closed
                self._loop.call_soon_threadsafe(self._leave.set)
        if self._thread.ident is not None:
            self._thread.join(_CLOSE_S + 5)

    def of_child(self) -> Self:
        """The same for a process that was forked, which has no thread yet."""
        atexit.unregister(self.stop)
        return type(self)(self._telemetry, self._settings)

    def begin(self, _: bool) -> None:
        """Join with the first event that a forked process records, without waiting; who cannot is told in the log."""
        with self._beginning:
            if self._thread.ident is not None:
                return
            self._joined.set_result(None)
            self._thread.start()
        atexit.register(self.stop)
        if "multiprocessing" in sys.modules:  # its children do not come past `atexit`
            from multiprocessing.util import Finalize  # noqa: PLC0415

            Finalize(None, self.stop, exitpriority=0)

    def _main(self) -> None:
        try:
            asyncio.run(self._send())
        except* RailbusError as group:
            self._fail(group.exceptions[0])
        except* BaseException as group:  # a bug; whoever waits in `start` must not wait for ever
            if self._joined.done():
                raise
            self._joined.set_exception(group.exceptions[0])

    def _fail(self, error: Exception) -> None:
        """There is no bus to join, or it takes nothing from us any more."""
        if self._joined.done():
            logger.warning("events lost", extra={"problem": str(error)})
        else:
            self._joined.set_exception(error)

    async def _send(self) -> None:
        from railbus_shared.bus.connection import Bus  # noqa: PLC0415 - a trainer must not import nats
        from railbus_shared.bus.sink import BusSink  # noqa: PLC0415

        self._loop = asyncio.get_running_loop()
        async with Bus.open(self._settings, name=self._telemetry.source) as bus, asyncio.TaskGroup() as tasks:
            self._telemetry.with_sink(BusSink(bus))
            sender = tasks.create_task(self._telemetry.run())
            if not self._joined.done():
                self._joined.set_result(None)
            if not self._is_leaving:
                await self._leave.wait()
            await self._telemetry.flush(timeout_s=_CLOSE_S)
            sender.cancel()
