"""Tells a running nats-server who may join now, without a restart: its configuration is written again, then SIGHUP.

A user that is gone is cut at once. An account that is new has no imports until the reload after the one that brought it
(nats-server 2.15.1), so there are always two, the second one once the first is over.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Final

from railbus.embedded.credentials import BELONGS_TO_OTHERS
from railbus.embedded.members import Place, ensure_members
from railbus.embedded.server_config import ServerFiles, accounts
from railbus_shared import files
from railbus_shared.errors import BusUnavailable, ConfigError
from railbus_shared.subjects import DEFAULT_PREFIX

_RELOADED: Final = b"Reloaded server configuration"
_FAILED: Final = b"Failed to reload server configuration"
_TIMEOUT_S: Final = 10.0
_POLL_S: Final = 0.01


def write_accounts(place: Place, prefix: str = DEFAULT_PREFIX) -> bool:
    """Bring a configuration that is there up to date with who may join; True if it has changed. Raises ConfigError."""
    try:
        before = place.config.read_bytes()
        settings = json.loads(before)
        keys, granted = ensure_members(place, prefix)
        content = files.to_json({**settings, "accounts": accounts(keys, granted)})
    except FileNotFoundError:
        return False
    except OSError as exc:
        raise ConfigError(f"{str(place.config)!r} cannot be read: {exc.strerror}", hint=BELONGS_TO_OTHERS) from exc
    except (ValueError, TypeError) as exc:
        raise ConfigError(
            f"{str(place.config)!r} is damaged: {exc!r}", hint="remove it, and have it made anew"
        ) from exc
    if content != before:
        files.write_whole(place.config, content, mode=0o600, keep_owner=True)
    return content != before


def reload_embedded(where: ServerFiles) -> bool:
    """Have the server of a `railbus up` read its configuration; False if it does not run.

    Raises BusUnavailable if it does not take it.
    """
    pid = _pid(where)
    if pid is None:
        return False
    for _ in range(2):
        start = where.log.stat().st_size
        try:
            os.kill(pid, signal.SIGHUP)
        except ProcessLookupError:
            return False
        _wait(where.log, start)
    return True


def _wait(log: Path, start: int) -> None:
    """Return once the log says that it is over; a log that was begun anew meanwhile is read from its beginning."""
    deadline_s = time.monotonic() + _TIMEOUT_S
    while time.monotonic() < deadline_s:
        with log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(start if start <= size else 0)
            said = file.read()
        if _FAILED in said:
            raise BusUnavailable("nats-server does not take its new configuration", hint=f"see {log}")
        if _RELOADED in said:
            return
        time.sleep(_POLL_S)
    raise BusUnavailable("nats-server did not read its configuration in time", hint=f"see {log}")


def _pid(where: ServerFiles) -> int | None:
    """Of the server that runs with this configuration; a stale file may name any process."""
    try:
        pid = int(where.pid.read_text())
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except (OSError, ValueError):
        return None
    config = where.config.resolve()  # a root may be named by any path
    return pid if any(Path(os.fsdecode(word)).resolve() == config for word in words if word[:1] == b"/") else None
