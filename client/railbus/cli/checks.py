"""What `railbus doctor` looks at on the machine itself, whether anything runs or not."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from railbus.cli.render import size

if TYPE_CHECKING:
    from railbus_shared.layout import Layout

Status = Literal["ok", "warn", "fail"]

_LEAST_DISK_BYTES: Final = 1_000_000_000
_GOOD_DISK_BYTES: Final = 20_000_000_000
_TORCH_S: Final = 60.0
_PORTS: Final = {"device_manager": 8701, "dataloader": 8702, "runner": 8703, "telemetry": 8704, "NATS": 4222}
_ASK_TORCH: Final = (
    "import json, torch; print(json.dumps([torch.__version__, torch.cuda.is_available(),"
    " torch.cuda.device_count(), torch.version.cuda]))"
)


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report."""

    name: str
    status: Status
    detail: str
    fix: str = ""


def machine_findings(layout: Layout) -> Iterator[Finding]:
    """Everything that needs no bus."""
    yield _python()
    yield _torch()
    yield _nvml()
    yield _server()
    yield _root(layout.root)
    yield _disk(layout.root)
    yield from _ports(layout)
    yield from _orphans(layout)


def _python() -> Finding:
    version = ".".join(str(part) for part in sys.version_info[:3])
    if sys.version_info < (3, 11):  # noqa: UP036 - the finding is for whoever got around pip's check
        return Finding("python", "fail", f"{version} is too old", "install Python 3.11 or newer")
    return Finding("python", "ok", version)


def _torch() -> Finding:
    """In a process of its own: importing torch takes seconds, and may crash on a broken driver."""
    try:
        metadata.version("torch")
    except metadata.PackageNotFoundError:
        return Finding("torch", "warn", "not installed, so no runner can work here", "pip install 'railbus[runner]'")
    try:
        done = subprocess.run(
            [sys.executable, "-c", _ASK_TORCH], capture_output=True, text=True, timeout=_TORCH_S, check=True
        )
        version, has_cuda, num_gpus, cuda = json.loads(done.stdout)
    except subprocess.CalledProcessError as exc:
        last = exc.stderr.strip().splitlines()[-1:] or ["it says nothing"]
        return Finding("torch", "fail", f"cannot be imported: {last[0]}", "pip install --force-reinstall torch")
    except (subprocess.TimeoutExpired, ValueError) as exc:
        return Finding("torch", "fail", f"does not import properly: {exc}", "pip install --force-reinstall torch")
    return Finding("torch", "ok", f"{version}, {f'CUDA {cuda} with {num_gpus} GPU' if has_cuda else 'CPU only'}")


def _nvml() -> Finding:
    """By the driver's library itself, so that a broken Python package cannot hide a GPU."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return Finding("gpu driver", "ok", "none; jobs run on the CPU")
    count = ctypes.c_uint()
    status = nvml.nvmlInit_v2() or nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
    if status:
        return Finding(
            "gpu driver", "fail", f"NVML answers with error {status}", "look at `nvidia-smi`; restart the driver"
        )
    nvml.nvmlShutdown()
    return Finding("gpu driver", "ok", f"NVML finds {count.value} GPU")


def _server() -> Finding:
    from railbus.embedded.nats_server import find_server
    from railbus_shared.errors import ServerNotFound

    try:
        binary = find_server()
    except ServerNotFound as exc:
        return Finding("nats-server", "fail", exc.message, exc.hint)
    shown = subprocess.run([str(binary), "--version"], capture_output=True, text=True, timeout=10, check=False)
    return Finding("nats-server", "ok", f"{shown.stdout.strip().removeprefix('nats-server: ')}, {binary}")


def _root(root: Path) -> Finding:
    place = _nearest(root)
    if not os.access(place, os.W_OK | os.X_OK):
        return Finding(
            "root", "fail", f"{root.absolute()} cannot be written", f"chown {os.getuid()} {place}, or use --root"
        )
    return Finding("root", "ok", f"{root.absolute()}{'' if root.exists() else ' (will be made)'}")


def _disk(root: Path) -> Finding:
    free = shutil.disk_usage(_nearest(root)).free
    detail = f"{size(free)} free"
    if free < _LEAST_DISK_BYTES:
        return Finding("disk", "fail", detail, "free some space, or give another --root")
    if free < _GOOD_DISK_BYTES:
        return Finding("disk", "warn", f"{detail}: little for datasets and checkpoints", "free some space soon")
    return Finding("disk", "ok", detail)


def _nearest(path: Path) -> Path:
    """The path itself, or the nearest folder above that exists."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.is_dir())


def _ports(layout: Layout) -> Iterator[Finding]:
    if _is_up(layout):
        return  # ours; the services' findings tell more
    taken = {name: port for name, port in _PORTS.items() if not _is_free(port)}
    for name, port in taken.items():
        option = f"--nats-port {port + 1}" if name == "NATS" else "--http-port-base 0"
        yield Finding(f"port {port}", "warn", f"{name}'s usual port is taken", f"railbus up {option}")
    if not taken:
        yield Finding("ports", "ok", f"{', '.join(map(str, sorted(_PORTS.values())))} are free")


def _is_up(layout: Layout) -> bool:
    from railbus.embedded.run_files import read_bus
    from railbus_shared.errors import BadSetting

    try:
        return read_bus(layout.root) is not None
    except BadSetting:
        return False  # told by the findings about the bus


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _orphans(layout: Layout) -> Iterator[Finding]:
    """A server that was started for a root and outlived its `railbus up`."""
    import psutil

    if _is_up(layout):
        return
    ours = str(layout.state.absolute())
    for process in psutil.process_iter(["name", "cmdline"]):
        command = process.info["cmdline"] or []
        if process.info["name"] == "nats-server" and any(word.startswith(ours) for word in command):
            yield Finding(
                "orphan", "warn", f"a nats-server of this root still runs: {process.pid}", f"kill {process.pid}"
            )
