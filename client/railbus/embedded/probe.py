"""Whether a service is ready: its run file says where it listens, and its `/readyz` answers 200."""

from __future__ import annotations

import http.client
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

_TIMEOUT_S: Final = 1.0
_TAIL_BYTES: Final = 16_384


@dataclass(frozen=True)
class Readiness:
    """`problem` is empty if it is ready."""

    url: str
    problem: str


def probe(run_file: Path, *, pid: int) -> Readiness:
    """Ask the service of process `pid`; takes at most a second."""
    url = _url(run_file, pid=pid)
    if not url:
        return Readiness("", "does not listen yet")
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=_TIMEOUT_S)
    try:
        connection.request("GET", "/readyz")
        answer = connection.getresponse()
        body = answer.read(_TAIL_BYTES).decode(errors="replace")
    except (OSError, http.client.HTTPException) as exc:
        return Readiness(url, f"/readyz does not answer: {exc!r}")
    finally:
        connection.close()
    return Readiness(url, "" if answer.status == 200 else _first_line(body) or f"/readyz answers {answer.status}")


def last_words(log: Path) -> str:
    """What a service that ended said last: the message and hint of its last JSON line, or the last line of words."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return ""
    last = next((line for line in reversed(lines) if any(map(str.isalpha, line))), "").strip(" |")
    try:
        line = json.loads(last)
        said = line["error"] if isinstance(line.get("error"), dict) else line
        message, hint = str(said.get("message") or line["event"]), str(said.get("hint", ""))
    except (ValueError, KeyError, AttributeError, TypeError):
        return last
    return f"{message} ({hint})" if hint else message


def _url(run_file: Path, *, pid: int) -> str:
    """Empty as long as this process has not written its file; a former one's does not count."""
    try:
        found = json.loads(run_file.read_bytes())
        return str(found["http_url"]) if found["pid"] == pid else ""
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return ""


def _first_line(body: str) -> str:
    return next((line.removeprefix("[-]") for line in body.splitlines() if line.startswith("[-]")), "")
