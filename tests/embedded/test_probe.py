"""What the supervisor learns of a service from outside."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

from railbus.embedded.probe import Readiness, last_words, probe


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        (b"", ""),
        (b"\n\n", ""),
        (b'{"event": "cannot run", "message": "no disk", "hint": "buy one"}\n', "no disk (buy one)"),
        (b'{"event": "cannot run", "message": "no disk", "hint": ""}\n', "no disk"),
        (
            b'{"event": "cannot go on", "error": {"message": "no store", "hint": "restore it"}}\n',
            "no store (restore it)",
        ),
        (b'{"event": "cannot go on", "error": "odd"}\n', "cannot go on"),
        (b'{"event": "stopping"}\n', "stopping"),
        (b'{"level": "info"}\n', '{"level": "info"}'),
        (b"[1, 2]x\n", "[1, 2]x"),
        (b"Traceback (most recent call last):\nValueError: no\n", "ValueError: no"),
        (b"    | IndexError: list index\n    +------------\n", "IndexError: list index"),
        (b"\xff\xfe broken\n", "\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER} broken"),
        (b"x" * 40_000 + b"\nlast\n", "last"),
    ],
)
def test_last_words_are_what_a_person_needs(tmp_path: Path, log: bytes, expected: str) -> None:
    path = tmp_path / "x.log"
    path.write_bytes(log)
    assert last_words(path) == expected


def test_a_service_without_a_log_has_no_last_words(tmp_path: Path) -> None:
    assert last_words(tmp_path / "nothing.log") == ""


@pytest.mark.parametrize(
    "content", [None, b"", b"{", b"{}", b"[]", b'{"pid": 1}', b'{"pid": 1, "http_url": "http://x"}']
)
def test_a_run_file_that_is_missing_cut_or_of_a_former_process_means_not_yet(
    tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content)
    assert probe(path, pid=os.getpid()) == Readiness("", "does not listen yet")


def test_a_port_at_which_nobody_answers_is_a_problem_and_no_error(tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        (tmp_path / "x.json").write_text(json.dumps({"pid": 7, "http_url": url}))
        found = probe(tmp_path / "x.json", pid=7)
    assert found.url == url
    assert "ConnectionRefused" in found.problem
