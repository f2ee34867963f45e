"""Progress is for people: it is drawn on a terminal, and nothing of it reaches a pipe."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from commands import environment, railbus_here
from railbus.cli.progress import short


def on_a_terminal(*arguments: str, cwd: Path) -> tuple[str, str]:
    """A command with its stderr on a terminal: what it wrote on stdout, and there."""
    reader, writer = pty.openpty()
    words = [sys.executable, "-m", "railbus.cli.main", *arguments]
    env = environment({"TERM": "xterm-256color", "COLUMNS": "80"})
    for name in ("CI", "NO_COLOR"):
        env.pop(name, None)
    with subprocess.Popen(words, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=writer, text=True) as process:
        os.close(writer)
        shown = b""
        try:
            while data := os.read(reader, 4096):
                shown += data
        except OSError:
            pass  # how a terminal says that its last writer has gone
        assert process.stdout is not None
        out = process.stdout.read()
    os.close(reader)
    assert process.returncode == 0, shown
    return out, shown.decode()


def test_an_import_draws_its_progress_on_a_terminal_and_not_on_a_pipe(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("x\n" + "1\n" * 9000)
    out, shown = on_a_terminal("dataset", "import", "t.csv", cwd=tmp_path)
    assert out.startswith("imported t: 9000 samples")
    assert "writing" in shown
    assert "100%" in shown
    done = railbus_here("dataset", "import", "t.csv", cwd=tmp_path)
    assert done.err == "look: railbus dataset show t\n"


@pytest.mark.parametrize(
    ("value", "expected"), [(0, "0"), (999, "999"), (12_345, "12.3k"), (2e6, "2.0M"), (3e9, "3.0G")]
)
def test_rates_are_short(value: float, expected: str) -> None:
    assert short(value) == expected
