"""How `railbus watch` looks: one screen of a head, jobs, devices and the last events, made for 80 columns and more."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from rich.console import Group, RenderableType
from rich.text import Text

from railbus.cli.render import STATE_STYLES, ago, duration, shown_state, size
from railbus.cli.story import STYLES
from railbus.cli.texts import one_line
from railbus.cli.watch_state import Curve, Watched
from railbus.cli.watch_table import Column, Yielding, lines, natural_widths, widths
from railbus_shared import clock

if TYPE_CHECKING:
    from railbus_shared.contracts.devices import DeviceInfo
    from railbus_shared.contracts.jobs import JobRecord
    from railbus_shared.contracts.requests import DeviceState

_TIME_OF_DAY: Final = slice(11, 19)
_LEAST_EVENTS: Final = 5
_CURVE: Final = 40
"""How wide a curve is where there is room."""
_JOBS: Final = (
    Column("JOB"),
    Column("STATE"),
    Column("STEP", is_number=True),
    Column("STEP/S", is_number=True),
    Column("VALUE", is_number=True),
    Column("CURVE"),
    Column("FOR"),
    Column("MODEL"),
)
_AT_CURVE: Final = 5
_JOBS_YIELD: Final = (
    Yielding("MODEL", 24),
    Yielding("CURVE", 16),
    Yielding("MODEL", 12),
    Yielding("CURVE", 8),
    Yielding("MODEL", 6),
    Yielding("MODEL", 0),
    Yielding("CURVE", 0),
    Yielding("VALUE", 0),
    Yielding("STEP/S", 0),
    Yielding("JOB", 10),
    Yielding("FOR", 0),
)
_DEVICES: Final = (
    Column("DEVICE"),
    Column("STATE"),
    Column("HOLDER"),
    Column("MEMORY", is_number=True),
    Column("USE", is_number=True),
    Column("WHAT"),
)
_DEVICES_YIELD: Final = (
    Yielding("WHAT", 12),
    Yielding("WHAT", 0),
    Yielding("HOLDER", 12),
    Yielding("MEMORY", 0),
    Yielding("DEVICE", 12),
)
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
        *_jobs(jobs, state, rows=rows.jobs, width=width, now_ns=now_ns),
        Text(),
        *_devices(devices, rows=rows.devices, width=width),
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


def _jobs(jobs: Sequence[JobRecord], state: Watched, *, rows: int, width: int, now_ns: int) -> list[Text]:
    if not jobs:
        return lines(_JOBS[:1], [[Text("none", style="dim")]], {"JOB": 4})
    if len(jobs) > rows > 1:
        shown = _jobs(jobs[: rows - 1], state, rows=rows - 1, width=width, now_ns=now_ns)
        waiting = sum(state.totals.get(name, 0) for name in ("active", "queued", "ended"))
        return [*shown, Text(f"… {max(waiting, len(jobs)) - rows + 1} more", style="dim")]
    cells = [_job(record, state.curves.get(record.id, Curve()), now_ns=now_ns) for record in jobs[:rows]]
    wanted = natural_widths(_JOBS, cells)
    if any(state.curves.get(record.id, Curve()).sparkline(2) for record in jobs[:rows]):
        wanted["CURVE"] = _CURVE
    fitted = widths(wanted, _JOBS_YIELD, room=width)
    for row, record in zip(cells, jobs, strict=False):
        bars = state.curves.get(record.id, Curve()).sparkline(fitted["CURVE"])
        row[_AT_CURVE] = Text(bars, style="cyan")
    return lines(_JOBS, cells, fitted)


def _value(latest: float | None) -> Text:
    """A loss that is no number any more stands out."""
    if latest is None:
        return Text()
    return Text(f"{latest:.4g}", style="" if math.isfinite(latest) else "red")


def _job(record: JobRecord, curve: Curve, *, now_ns: int) -> list[Text]:
    """The cells of a job; its curve is drawn once there is a width for it."""
    shown = shown_state(record)
    rate = curve.steps_per_s(now_ns=now_ns) if record.is_active else None
    step = curve.step if curve.step is not None else (record.checkpoint.step if record.checkpoint else None)
    return [
        Text(record.id),
        Text(shown, style=STATE_STYLES.get(shown, "")),
        Text("" if step is None else f"{step:,}"),
        Text("" if rate is None else f"{rate:.1f}" if rate < 1000 else f"{rate:,.0f}"),
        _value(curve.latest),
        Text(),
        Text(_since(record, now_ns=now_ns), style="dim"),
        Text(record.spec.model),
    ]


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


def _devices(devices: Sequence[DeviceState], *, rows: int, width: int) -> list[Text]:
    if not devices:
        return lines(_DEVICES[:1], [[Text("none", style="dim")]], {"DEVICE": 6})
    cells = [_device(one) for one in devices[:rows]]
    fitted = widths(natural_widths(_DEVICES, cells), _DEVICES_YIELD, room=width)
    return lines(_DEVICES, cells, fitted)


def _device(one: DeviceState) -> list[Text]:
    device = one.device
    used = f"{size(device.memory_used_bytes)} of " if device.kind == "gpu" else ""
    return [
        Text(device.id),
        Text(one.state, style=STATE_STYLES.get(one.state, "")),
        Text(one.holder or ", ".join(one.holders)) if one.holder or one.holders else Text("–", style="dim"),
        Text(f"{used}{size(device.memory_bytes)}"),
        Text(_use(device)),
        Text(device.health_reason or device.name, style="red" if device.health_reason else "dim"),
    ]


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
            (one_line(line.text), STYLES[line.tone]),
            no_wrap=True,
            overflow="ellipsis",
        )
        for time, line in list(state.lines)[-rows:]
    ]
