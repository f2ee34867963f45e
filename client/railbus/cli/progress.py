"""Progress on stderr: what is done, how much of it, how fast, and the time that is left; only on a terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final

from railbus.cli.render import is_plain

if TYPE_CHECKING:
    from rich.progress import Task

Report = Callable[[str, int, int | None], None]
_STEPS: Final = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


@contextlib.contextmanager
def progress() -> Iterator[Report]:
    """Give a function that is told of progress: the stage, how much is done, and of how much."""
    if is_plain(sys.stderr):
        yield lambda _stage, _done, _total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn("{task.description:<9}"),
        BarColumn(bar_width=None),
        TaskProgressColumn(),
        _rate_column(),
        TimeRemainingColumn(compact=True),
        console=Console(stderr=True),
        transient=True,
        expand=True,
    )
    with bar:
        yield _reporting(bar)


def _reporting(bar: Any) -> Report:
    """One bar at a time: a new stage takes the place of the one before."""
    tasks: dict[str, Any] = {}

    def report(stage: str, done: int, total: int | None) -> None:
        if stage not in tasks:
            for task in tasks.values():
                bar.remove_task(task)
            tasks.clear()
            tasks[stage] = bar.add_task(stage, total=total)
        bar.update(tasks[stage], completed=done, total=total)

    return report


def _rate_column() -> Any:
    from rich.progress import ProgressColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        """How much a second, of whatever is counted."""

        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text(f"{short(speed) if speed else '-':>6}/s", style="progress.data.speed")

    return Rate()


def short(value: float) -> str:
    """A number in at most five characters: `12.3M`."""
    for size, unit in _STEPS:
        if value >= size:
            return f"{value / size:.1f}{unit}"
    return f"{value:.0f}"
