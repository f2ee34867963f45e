"""Runs `railbus` as a user does: a process of its own, its output on pipes."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from railbus.cli.main import main
from until import PATIENCE_S


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    status: int
    out: str
    err: str

    def json(self) -> object:
        return json.loads(self.out)


def environment(env: Mapping[str, str]) -> dict[str, str]:
    """This process's environment without what belongs to railbus, and with `env`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAILBUS_")}
    return {**kept, **env}


def railbus(
    *arguments: str, cwd: Path, env: Mapping[str, str] | None = None, stdin: bytes = b"", timeout_s: float = PATIENCE_S
) -> Done:
    """Run a command line to its end."""
    done = subprocess.run(
        [sys.executable, "-m", "railbus.cli.main", *arguments],
        cwd=cwd,
        env=environment(env or {}),
        input=stdin,
        capture_output=True,
        timeout=timeout_s,
        check=False,
    )
    return Done(done.returncode, done.stdout.decode(), done.stderr.decode())


def railbus_here(*arguments: str, cwd: Path, env: Mapping[str, str] | None = None, stdin: bytes = b"") -> Done:
    """Run a command line to its end in this process, which is quick; for commands that start nothing."""
    out, err = io.StringIO(), io.StringIO()
    status: object = 0
    with (
        contextlib.chdir(cwd),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        _given(environment(env or {}), stdin),
    ):
        try:
            main(arguments)
        except SystemExit as exc:
            status = exc.code
    assert isinstance(status, int)
    return Done(status, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def _given(env: Mapping[str, str], stdin: bytes) -> Iterator[None]:
    """This process with another environment and another stdin."""
    kept_env, kept_stdin = dict(os.environ), sys.stdin
    os.environ.clear()
    os.environ.update(env)
    sys.stdin = io.TextIOWrapper(io.BytesIO(stdin))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(kept_env)
        sys.stdin = kept_stdin
