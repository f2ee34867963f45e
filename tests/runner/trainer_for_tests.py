"""A trainer of a few lines for the tests of the pre-warmed process: carries out one order from its socket."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path


def main(sock: socket.socket) -> int:
    """Tell on the socket how many seconds of a core its beginning took, then do what the line says that it is sent."""
    sock.sendall(f"{time.process_time()}\n".encode())
    with sock.makefile("r") as lines:
        order = json.loads(lines.readline() or '{"do": "nothing"}')
    match order["do"]:
        case "nothing":
            return 0
        case "exit":
            return int(order["code"])
        case "raise":
            raise RuntimeError(order["message"])
        case "leave":
            sys.exit(order["code"])
        case "signal":
            os.kill(os.getpid(), order["number"])
        case "sleep":
            time.sleep(60)
        case "describe":
            sock.sendall((json.dumps(describe()) + "\n").encode())
        case "grandchild":
            sock.sendall(f"{escape(order['how'])}\n".encode())
            time.sleep(order["stay_s"])
    return 0


def describe() -> dict[str, object]:
    """What a fresh process should look like."""
    import torch

    return {
        "env": dict(os.environ),
        "no_new_privs": int(Path("/proc/self/status").read_text().partition("NoNewPrivs:")[2].split()[0]),
        "core_bytes": list(resource.getrlimit(resource.RLIMIT_CORE)),
        "bounded_files": resource.getrlimit(resource.RLIMIT_NOFILE)[1] <= 1 << 16,
        "fds": sorted(path.name for path in Path("/proc/self/fd").iterdir() if is_open(path)),
        "affinity": sorted(os.sched_getaffinity(0)),
        "threads": len(list(Path("/proc/self/task").iterdir())),
        "torch_threads": torch.get_num_threads(),
        "session": os.getsid(0) == os.getpid(),
        "sigint": signal.getsignal(signal.SIGINT) is signal.default_int_handler,
        "sigterm": signal.getsignal(signal.SIGTERM) == signal.SIG_DFL,
        "sigchld": signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL,
        "blocked": len(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
        "arguments": sys.argv[1:],
        "log_handlers": len(logging.getLogger().handlers),
        "cwd": str(Path.cwd()),
        "umask": os.umask(0o022),
        "warm_imports": all(name in sys.modules for name in ("torch", "torch._dynamo", "torch.optim", "numpy")),
        "cgroup": Path("/proc/self/cgroup").read_text(),
    }


def is_open(descriptor: Path) -> bool:
    """Not the one that listed the folder."""
    with contextlib.suppress(FileNotFoundError):
        return not str(descriptor.readlink()).startswith("/proc/")
    return False


def escape(how: str) -> int:
    """A grandchild that outlives its parent; with its own session unless it is a plain one."""
    if how == "forked":
        pid = os.fork()
        if pid == 0:
            os.setsid()
            time.sleep(60)
            os._exit(0)
        return pid
    child = [sys.executable, "-c", "import time; time.sleep(60)"]
    return subprocess.Popen(child, start_new_session=how == "session").pid
