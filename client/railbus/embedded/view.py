"""What `railbus up` shows: a line for each event and, on a terminal, one status line below them, redrawn in place."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TextIO

from railbus.embedded.supervisor import ServiceEvent

_EXAMPLE: Final = '{"model": "digits-cnn", "dataset": "digits", "entrypoint": "classifier"}'
_COLOURS: Final = (36, 32, 33, 35, 34)
_BAD: Final = frozenset({"ended", "killed"})
_RED: Final = 31
_NAME_WIDTH: Final = 14
_CLEAR_LINE: Final = "\r\x1b[2K"


@dataclass(frozen=True)
class Joined:
    """What the first screen tells: how to reach what runs."""

    root: Path
    nats_url: str
    key_file: Path
    submit_subject: str
    health_urls: Mapping[str, str]


def wants_colour(stream: TextIO, environ: Mapping[str, str]) -> bool:
    """On a terminal, unless NO_COLOR is set to anything or TERM says that it can do nothing."""
    return stream.isatty() and not environ.get("NO_COLOR") and environ.get("TERM") != "dumb"


class View:
    """Writes to one stream; `is_live` adds colours and the status line. Goes silent if its reader goes away."""

    def __init__(self, stream: TextIO, *, is_live: bool) -> None:
        self._stream: TextIO | None = stream
        self._is_live = is_live
        self._status = ""
        self._colours: dict[str, int] = {}

    def first_screen(self, joined: Joined) -> None:
        """Where everything is, and a line to submit a job by a foreign client."""
        rows = {
            "root": str(joined.root),
            "NATS": joined.nats_url,
            "credentials": f"{joined.key_file}  (nkey seed, for any NATS client)",
            **{name: f"{url}/healthz" for name, url in joined.health_urls.items()},
        }
        lines = [f"  {name:<{_NAME_WIDTH}} {value}" for name, value in rows.items()]
        command = f"nats --server {joined.nats_url} --nkey {shlex.quote(str(joined.key_file))}"
        lines += ["", "  submit a job with any NATS client:", f"    {command} pub {joined.submit_subject} '{_EXAMPLE}'"]
        self._write("\n".join(["", *lines, "", ""]))

    def event(self, event: ServiceEvent) -> None:
        """One line."""
        text = f"{event.what} {event.detail}".rstrip()
        self._write(f"{time.strftime('%H:%M:%S')} {self._painted(event)} {text}\n")

    def status(self, text: str) -> None:
        """Replace the status line; nothing where it cannot be redrawn."""
        if self._is_live and text != self._status:
            self._status = text
            self._write("")

    def close(self) -> None:
        """Remove the status line."""
        self.status("")

    def _painted(self, event: ServiceEvent) -> str:
        name = f"{event.name:<{_NAME_WIDTH}}"
        if not self._is_live:
            return name
        colour = self._colours.setdefault(event.name, _COLOURS[len(self._colours) % len(_COLOURS)])
        return f"\x1b[{_RED if event.what in _BAD else colour}m{name}\x1b[0m"

    def _write(self, text: str) -> None:
        if self._stream is None:
            return
        try:
            self._stream.write(f"{_CLEAR_LINE}{text}{self._status}" if self._is_live else text)
            self._stream.flush()
        except BrokenPipeError:
            self._stream = None  # `railbus up | head`: it goes on without being seen
