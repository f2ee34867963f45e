"""How `railbus watch` looks: one screen of a head, jobs, devices and the last events, made for 80 columns and more."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from railbus.cli.render import STATE_STYLES, ago, duration, shown_state, size
from railbus.cli.story import STYLES, visible
from railbus.cli.watch_state import Curve, Watched
from railbus_shared import clock

if TYPE_CHECKING:
    from railbus_shared.contracts.devices import DeviceInfo
    from railbus_shared.contracts.jobs import JobRecord
    from railbus_shared.contracts.requests import DeviceState

_TIME_OF_DAY: Final = slice(11, 19)
_LEAST_EVENTS: Final = 5
_CURVE: Final = range(8, 41)
"""How wide a curve may be."""
_FIXED: Final = 61
"""What the other columns of jobs take."""
_HEADS: Final = 6
"""Rows for the head, the titles and the lines between them."""


@dataclass(frozen=True)
class Rows:
    """How many rows each part gets."""

    jobs: int
    devices: int
    events: int

    @classmethod
    def of(cls, height: int, *, jobs: int, devices: int) -> Rows:
        """Events take what is left; where little is left, devices give way first, down to two, then jobs."""
        room = max(height - _HEADS - _LEAST_EVENTS, 4)
        for_jobs = min(jobs, max(room - min(devices, 4), 2))
        for_devices = min(devices, max(room - for_jobs, 2))
        return cls(for_jobs, for_devices, max(height - _HEADS - for_jobs - for_devices, 1))


def screen(state: Watched, *, width: int, height: int, now_ns: int) -> RenderableType:
    """The whole picture, of that size."""
    jobs = [*state.active, *_in_order(state.queued), *state.ended]
    devices = _busy_first(state.devices.devices if state.devices else ())
    rows = Rows.of(height, jobs=max(len(jobs), 1), devices=max(len(devices), 1))
    return Group(
        _head(state, width=width, now_ns=now_ns),
        Text(),
        _jobs(jobs, state, rows=rows.jobs, width=width, now_ns=now_ns),
        Text(),
        _devices(devices, rows=rows.devices),
        Text(),
        *_events(state, rows=rows.events),
    )


def _head(state: Watched, *, width: int, now_ns: int) -> Text:
    time = f"{clock.rfc3339(now_ns)[_TIME_OF_DAY]} UTC"
    counted = "  ".join(f"{count} {state}" for state, count in state.totals.items())
    left = Text.assemble(("railbus", "bold"), "  ", (state.trouble, "red") if state.trouble else counted)
    left.truncate(max(width - len(time) - 2, 8), overflow="ellipsis")
    left.pad_right(max(width - left.cell_len - len(time), 1))
    return Text.assemble(left, (time, "dim"))


def _table(*titles: str) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold dim")
    for title in titles:
        name = title.strip()
        table.add_column(name, justify="right" if title.startswith(" ") else "left", no_wrap=True, overflow="ellipsis")
    return table


def _jobs(jobs: Sequence[JobRecord], state: Watched, *, rows: int, width: int, now_ns: int) -> Table:
    table = _table("JOB", "STATE", "   STEP", " STEP/S", " VALUE", "CURVE", "FOR", "MODEL")
    curve_width = min(max(width - _FIXED, _CURVE.start), _CURVE.stop - 1)
    for record in jobs[:rows]:
        curve = state.curves.get(record.id, Curve())
        shown = shown_state(record)
        rate = curve.steps_per_s(now_ns=now_ns) if record.is_active else None
        step = curve.step if curve.step is not None else (record.checkpoint.step if record.checkpoint else None)
        table.add_row(
            record.id,
            Text(shown, style=STATE_STYLES.get(shown, "")),
            "" if step is None else f"{step:,}",
            "" if rate is None else f"{rate:.1f}" if rate < 1000 else f"{rate:,.0f}",
            "" if curve.latest is None else f"{curve.latest:.4g}",
            Text(curve.sparkline(curve_width), style="cyan"),
            Text(_since(record, now_ns=now_ns), style="dim"),
            record.spec.model,
        )
    if not jobs:
        table.add_row(Text("none", style="dim"))
    return table


def _since(record: JobRecord, *, now_ns: int) -> str:
    """How long it runs or waits, or how long ago it ended."""
    if record.is_final:
        return ago(record.ended_at or record.changed_at, now_ns=now_ns)
    began = record.started_at if record.is_active and record.started_at else record.submitted_at
    return duration(max(0, round((now_ns - clock.parse_rfc3339(began)) / clock.NS_PER_S)))


def _in_order(queued: Iterable[JobRecord]) -> list[JobRecord]:
    """As they would go, as far as priority and age tell."""
    return sorted(queued, key=lambda record: (-record.priority, record.sequence))


def _busy_first(devices: Iterable[DeviceState]) -> list[DeviceState]:
    return sorted(devices, key=lambda one: (one.state == "free", one.device.id))


def _devices(devices: Sequence[DeviceState], *, rows: int) -> Table:
    table = _table("DEVICE", "STATE", "HOLDER", " MEMORY", " USE", "WHAT")
    for one in devices[:rows]:
        device = one.device
        used = f"{size(device.memory_used_bytes)} of " if device.kind == "gpu" else ""
        table.add_row(
            device.id,
            Text(one.state, style=STATE_STYLES.get(one.state, "")),
            one.holder or ", ".join(one.holders) or Text("–", style="dim"),
            f"{used}{size(device.memory_bytes)}",
            _use(device),
            Text(device.health_reason or device.name, style="red" if device.health_reason else "dim"),
        )
    if not devices:
        table.add_row(Text("none", style="dim"))
    return table


def _use(device: DeviceInfo) -> str:
    use = "" if device.utilisation_frac is None else f"{device.utilisation_frac:.0%}"
    return use if device.temperature_c is None else f"{use} {device.temperature_c:.0f}°"


def _events(state: Watched, *, rows: int) -> list[Text]:
    """The newest at the bottom; each one line, cut to the width."""
    return [
        Text.assemble(
            (time[_TIME_OF_DAY], "dim"),
            " ",
            (line.symbol, STYLES[line.tone] or "cyan"),
            " ",
            ("".join(map(visible, line.text)), STYLES[line.tone]),
            no_wrap=True,
            overflow="ellipsis",
        )
        for time, line in list(state.lines)[-rows:]
    ]
