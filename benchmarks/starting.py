"""Other ways to have a script run: seconds from typing the command to the end of its first optimizer step.

Each runs `benchmarks/one_step.py` in a process of its own, which prints the time after its step.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import psutil

REPO: Final = Path(__file__).parents[1]
SCRIPT: Final = REPO / "benchmarks" / "one_step.py"
PEERS: Final = REPO / ".venv-peers" / "bin"
RAY: Final = PEERS / "ray"
_TIME_NS: Final = re.compile(r"^(\d{19})$", re.MULTILINE)
_RAY_URL: Final = "http://127.0.0.1:8265"
_RAY_READY: Final = "This command will now block forever"
_RAY_S: Final = 120.0


def bare(env: Mapping[str, str]) -> float:
    """`python script`."""
    return _first_step_s([sys.executable, str(SCRIPT)], env)


def torchrun(env: Mapping[str, str]) -> float:
    """PyTorch's launcher, with one process."""
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", str(SCRIPT)]
    return _first_step_s([sys.executable, *words], env)


def ray_submit(env: Mapping[str, str]) -> float:
    """`ray job submit`, to a head that runs."""
    words = ["job", "submit", "--address", _RAY_URL, "--", str(PEERS / "python"), str(SCRIPT)]
    return _first_step_s([str(RAY), *words], env)


def _first_step_s(command: Sequence[str], env: Mapping[str, str]) -> float:
    began = time.time_ns()
    done = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
    found = _TIME_NS.search(done.stdout)
    assert found is not None, done.stdout
    return (int(found[1]) - began) / 1e9


@contextlib.contextmanager
def ray_head(env: Mapping[str, str]) -> Iterator[None]:
    """A Ray head on its usual ports, ended with all that it started."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as log:
        words = ["--head", "--block", "--port=0", "--num-cpus", str(os.cpu_count()), "--disable-usage-stats"]
        words += ["--node-ip-address=127.0.0.1", f"--temp-dir={folder}"]
        head = subprocess.Popen([RAY, "start", *words], env=env, stdout=log, stderr=log, start_new_session=True)
        try:
            _wait_for(head, Path(f"/proc/self/fd/{log.fileno()}"))
            yield
        finally:
            _end(head)


def _wait_for(head: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _RAY_S
    while _RAY_READY not in log.read_text():
        assert head.poll() is None, f"ray start has ended: {log.read_text()}"
        assert time.monotonic() < deadline, f"ray is not ready: {log.read_text()}"
        time.sleep(0.1)


def _end(head: subprocess.Popen[bytes]) -> None:
    started = psutil.Process(head.pid).children(recursive=True) if head.poll() is None else []
    head.send_signal(signal.SIGTERM)
    try:
        head.wait(40)
    except subprocess.TimeoutExpired:
        head.kill()
        head.wait()
    _, alive = psutil.wait_procs(started, timeout=5)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
