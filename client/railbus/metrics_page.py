"""The page of metrics, made from the calls in the sources that declare them."""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_SERVICES: Final = ("device_manager", "dataloader", "runner", "telemetry")
_KINDS: Final = {"counter": "counter", "gauge": "gauge", "histogram": "histogram", "reading": "gauge"}
"""Methods of `Metrics`, and the type that each declares."""
_UNITS: Final = ("seconds", "bytes", "ratio", "celsius", "info")
OF_EVERY_PROCESS: Final = {
    "process_cpu_seconds_total": ("counter", "CPU time of the process, of user and system together."),
    "process_resident_memory_bytes": ("gauge", "Memory of the process that is in RAM."),
    "process_virtual_memory_bytes": ("gauge", "Addresses that the process has taken."),
    "process_start_time_seconds": ("gauge", "When the process began, in seconds since 1970."),
    "process_open_fds": ("gauge", "File descriptors that are open."),
    "process_max_fds": ("gauge", "File descriptors that may be open."),
}
"""What `prometheus_client` says of a process, under names that every program uses."""


@dataclass(frozen=True)
class Declared:
    """One metric, as a source declares it."""

    name: str
    """As Prometheus has it, but for the suffixes of a histogram's series."""
    kind: str
    labels: tuple[str, ...]
    meaning: str
    service: str
    """Empty for a metric that every service has."""

    @property
    def unit(self) -> str:
        """Empty for what is counted."""
        words = self.name.removesuffix("_total").split("_")
        return next((unit for unit in _UNITS if words[-1] == unit), "")


@functools.cache
def declared() -> tuple[Declared, ...]:
    """Every metric, those of all services first; each by its service, in the order of its sources."""
    return tuple(one for service in ("", *_SERVICES) for one in _of_package(service))


def _of_package(service: str) -> Iterator[Declared]:
    package = importlib.util.find_spec(f"railbus_{service or 'shared'}")
    folders = (package.submodule_search_locations or []) if package is not None else []
    for path in sorted(path for folder in folders for path in Path(folder).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _KINDS:
                words = [str(one.value) for one in node.args if isinstance(one, ast.Constant)]
                if len(words) >= 2 and len(words) == len(node.args):
                    yield _declared(node.func.attr, words, service)


def _declared(method: str, words: list[str], service: str) -> Declared:
    name, meaning, *labels = words
    suffix = "_total" if method == "counter" else ""
    return Declared(f"railbus_{name}{suffix}", _KINDS[method], tuple(labels), meaning, service)


def page() -> str:
    """The page, without the note that it is made."""
    parts = [
        "# Metrics\n",
        "`/metrics` of each service, for Prometheus. Base units; `_total` only grows, until the process begins anew.\n"
        "A histogram has the series `_bucket`, `_sum` and `_count`. No label has more values than a host has devices\n"
        "or running jobs, or than a list has words; a job that has ended is in none.\n\n"
        "What is true of the whole cluster only the placer shows, which is one device_manager at a time: `sum` over\n"
        "all of them is right, and while none places there is nothing. What is true of a host, its services show.\n"
        "[telemetry.md](telemetry.md#prometheus-and-grafana) tells how to look at them.\n",
    ]
    for service in ("", *_SERVICES):
        parts.append(f"## {service or 'Every service'}\n")
        parts.append("| metric | type | labels | unit | meaning |\n| --- | --- | --- | --- | --- |")
        parts += [_row(one) for one in declared() if one.service == service]
        if not service:
            parts += [_row(Declared(name, kind, (), text, "")) for name, (kind, text) in OF_EVERY_PROCESS.items()]
        parts.append("")
    return "\n".join(parts)


def _row(one: Declared) -> str:
    labels = ", ".join(f"`{label}`" for label in one.labels)
    return f"| `{one.name}` | {one.kind} | {labels} | {one.unit} | {one.meaning.replace('|', chr(92) + '|')} |"
