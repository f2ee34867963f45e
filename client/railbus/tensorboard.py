"""A job as a run of TensorBoard: metrics become curves, texts become texts; what an attempt did over again replaces it.

A run is one file in a folder of its own. Whenever it is written, it is written from all events of the job, so that
doing it twice is no trouble: the same events give the same bytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, Final

from railbus import tfevents
from railbus_shared import clock, files, wire
from railbus_shared.errors import InvalidField

Event = Mapping[str, object]

TYPES: Final = ("train.metrics", "train.text")
"""What a run is made of; other events change nothing."""
_NAME: Final = "events.out.tfevents.0000000000.railbus"


class Records:
    """Events of one job as records of a run, in the order in which they come.

    Attributes:
        points: how many values were told.
        tags: the metrics that were told.
    """

    def __init__(self) -> None:
        self.points = 0
        self.tags: set[str] = set()
        self._seen: set[tuple[object, object]] = set()
        self._lease_epoch = 0
        self._last_step = -1

    def of(self, event: Event) -> bytes:
        """Nothing for an event that is of no use here, was seen before, or is of an attempt that was replaced."""
        key, epoch = (event.get("producer"), event.get("number")), event.get("lease_epoch")
        lease_epoch = epoch if isinstance(epoch, int) else 0
        if event.get("type") not in TYPES or key in self._seen or lease_epoch < self._lease_epoch:
            return b""
        step, wall_s = _step(event), _wall_s(event)
        before = b"" if self._seen else tfevents.file_version(wall_s)
        self._seen.add(key)
        if lease_epoch > self._lease_epoch and step <= self._last_step:
            before += tfevents.restart(wall_s, step=step)
            self._last_step = step
        self._lease_epoch, self._last_step = lease_epoch, max(step, self._last_step)
        return before + self._told(event, step, wall_s)

    def _told(self, event: Event, step: int, wall_s: float) -> bytes:
        data = event.get("data")
        facts = data if isinstance(data, dict) else {}
        if event.get("type") == "train.text":
            tag, value = str(facts.get("name", "text")), str(facts.get("text", ""))
            return tfevents.text(wall_s, step=step, tag=tag, value=value)
        values = {name: float(value) for name, value in facts.items() if _is_number(value)}
        self.points += len(values)
        self.tags |= values.keys()
        return tfevents.scalars(wall_s, step=step, values=values) if values else b""


class RunFile:
    """The file of a run: the history appears whole, and what comes then is appended."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / _NAME
        self.records = Records()
        self._draft = files.temporary_path(self.path)
        self._file: BinaryIO | None = None

    def write(self, event: Event) -> None:
        """Add what the event tells, if that is of use here; shown once it is flushed."""
        assert self._file is not None  # noqa: S101 - `begun` has opened it
        if record := self.records.of(event):
            self._file.write(record)

    def publish(self) -> None:
        """Show what was written until now under the file's name; later events are shown with each `flush`."""
        self.flush()
        self._draft.replace(self.path)

    def flush(self) -> None:
        assert self._file is not None  # noqa: S101
        self._file.flush()

    @contextlib.contextmanager
    def begun(self) -> Iterator[None]:
        """Open the file until the block ends; without `publish` nothing is left of it.

        Raises InvalidField for a folder that cannot be made or written, StorageFull.
        """
        with files.storage_errors(self.path):
            self._file = self._opened()
            try:
                with self._file:
                    yield
            finally:
                self._draft.unlink(missing_ok=True)

    def _opened(self) -> BinaryIO:
        try:
            self._draft.parent.mkdir(parents=True, exist_ok=True)
            return self._draft.open("wb")
        except (PermissionError, NotADirectoryError, FileExistsError) as exc:
            folder, problem = str(self._draft.parent), f"it cannot be written: {exc.strerror}"
            raise InvalidField(field="--to", value=folder, problem=problem, hint="name another folder") from exc


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) or value in wire.NOT_FINITE


def _step(event: Event) -> int:
    step = event.get("step")
    return step if isinstance(step, int) and step >= 0 else 0


def _wall_s(event: Event) -> float:
    try:
        return clock.parse_rfc3339(str(event.get("time", ""))) / clock.NS_PER_S
    except ValueError:
        return 0.0  # an event of a stranger
