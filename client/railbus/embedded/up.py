"""`railbus up`: everything that is needed on one machine, in one process that forks."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, TextIO

from railbus.embedded.supervisor import READY_S, Options, Supervisor
from railbus.embedded.view import Joined, View, wants_colour
from railbus_shared.subjects import Subjects

EXIT_KILLED: Final = 130
_TICK_S: Final = 1.0


def up(
    root: Path,
    *,
    options: Options | None = None,
    until: Callable[[], bool] | None = None,
    stream: TextIO | None = None,
    ready_timeout_s: float = READY_S,
) -> int:
    """Run on `root` until a signal, or until `until`, asked every second, says so; returns the exit status.

    That is 0 after a clean stop, and 130 if something had to be killed.
    Raises what `Supervisor.start` and `Supervisor.wait_ready` raise, with nothing left running.
    """
    options = options or Options()
    shown: TextIO = stream or sys.stdout
    view = View(shown, is_live=wants_colour(shown, os.environ))
    supervisor = Supervisor(root, options=options, on_event=view.event)
    started_s = time.monotonic()
    supervisor.start()
    is_clean = False
    try:
        is_running = supervisor.wait_ready(ready_timeout_s)
        if is_running:
            view.first_screen(joined(supervisor, options))
        while is_running and not (until and until()):
            view.status(status_line(supervisor, options, up_s=time.monotonic() - started_s))
            is_running = supervisor.tick(_TICK_S)
    finally:
        is_clean = supervisor.stop()
        view.close()
    return 0 if is_clean else EXIT_KILLED


def joined(supervisor: Supervisor, options: Options) -> Joined:
    """How to reach what a supervisor runs."""
    return Joined(
        root=supervisor.paths.root,
        nats_url=supervisor.server.url,
        key_file=supervisor.user_key_file,
        submit_subject=Subjects(options.subject_prefix).submit,
        health_urls=supervisor.health_urls,
    )


def status_line(supervisor: Supervisor, options: Options, *, up_s: float) -> str:
    """One line: how many services are ready, and for how long it has been up."""
    minutes, seconds = divmod(int(up_s), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{supervisor.num_ready}/{len(options.services)} ready, up {hours}:{minutes:02d}:{seconds:02d}, Ctrl-C drains"
    )
