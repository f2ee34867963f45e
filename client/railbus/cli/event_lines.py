"""Each event on a line of its own, as it is: not put into words, and nothing left out but what a line cannot hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from railbus.cli.tell import Days
from railbus.cli.texts import one_line

if TYPE_CHECKING:
    from rich.console import Console

_TIME_OF_DAY: Final = slice(11, 23)
_TYPE_WIDTH: Final = 20
_STYLES: Final[Mapping[str, str]] = {"debug": "dim", "warning": "yellow", "error": "red"}


class EventLines:
    """Writes lines: time of day in UTC, type, job or else host, step, data; cut to the width of the terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._days = Days(console)

    def write(self, event: Mapping[str, object]) -> None:
        from rich.text import Text

        time = one_line(str(event.get("time", "")))
        self._days.come_to(time)
        about = one_line(str(event.get("job") or event.get("host") or ""))
        line = Text.assemble(
            (time[_TIME_OF_DAY], "dim"),
            " ",
            (
                f"{one_line(str(event.get('type', 'event'))):<{_TYPE_WIDTH}}",
                _STYLES.get(str(event.get("severity")), "cyan"),
            ),
            " ",
            about,
            "  ",
            said(event),
        )
        self._console.print(line, no_wrap=True, overflow="ellipsis")


def said(event: Mapping[str, object]) -> str:
    """Step and data in one line that is harmless to a terminal."""
    data = event.get("data")
    facts = dict(data) if isinstance(data, dict) else {}
    if event.get("step") is not None:
        facts = {"step": event["step"], **facts}
    return one_line("  ".join(f"{name}={_short(value)}" for name, value in facts.items()))


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_short, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_short(one)}" for name, one in value.items()) + "}"
    return str(value)
