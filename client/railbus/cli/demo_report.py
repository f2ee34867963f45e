"""What `railbus demo` has left on disk, checked anew from the files alone, and the panel that shows it."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from railbus.cli.render import size
from railbus_shared.layout import CLOSED_LOG_NAME, LOG_NAME, Layout

if TYPE_CHECKING:
    from rich.console import Console

_LEAST_ACCURACY: Final = 0.95
_MODEL: Final = "digits-cnn"
_DATASET: Final = "digits"


@dataclass(frozen=True)
class Result:
    """Everything that the demo promises, as found on disk."""

    job: str
    state: str
    accuracy: float | None
    checkpoint: str
    sha256: str
    log: str
    num_events: int
    faults: tuple[str, ...]
    tree: tuple[str, ...]
    root: str
    seconds: float

    @property
    def is_good(self) -> bool:
        return self.state == "succeeded" and not self.faults and (self.accuracy or 0.0) > _LEAST_ACCURACY

    def to_map(self) -> dict[str, object]:
        return {"ok": self.is_good, **asdict(self)}


def report(root: Path, *, job: str, record: Mapping[str, object], accuracy: float | None, began_s: float) -> Result:
    """Look at the tree; what is not as it should be is a fault, never an exception."""
    from railbus.checkpoints.catalogue import read_all
    from railbus.checkpoints.proof import fault
    from railbus_shared.log_reader import read_events

    layout = Layout(root)
    faults: list[str] = []
    written = [
        one
        for one in read_all(layout, _MODEL, damaged=lambda _path, exc: faults.append(exc.message))
        if one.meta.job == job
    ]
    faults += [bad.message for one in written if (bad := fault(one))]
    faults += _schema_faults(layout)
    logs = sorted(layout.logs.rglob(CLOSED_LOG_NAME))
    newest = written[-1] if written else None
    faults += [] if newest else ["the job has left no checkpoint"]
    faults += [] if logs else ["there is no closed log"]
    return Result(
        job=job,
        state=str(record.get("state", "unknown")),
        accuracy=accuracy,
        checkpoint=str(newest.path.with_name(newest.meta.files[0].file)) if newest else "",
        sha256=newest.meta.files[0].sha256 if newest else "",
        log=str(logs[-1]) if logs else "",
        num_events=sum(1 for _ in read_events(layout, job=job)),
        faults=tuple(faults),
        tree=tuple(_tree(layout)),
        root=str(root),
        seconds=round(time.monotonic() - began_s, 2),
    )


def _schema_faults(layout: Layout) -> Iterator[str]:
    """Every JSON file of the tree against its published schema."""
    import jsonschema

    from railbus_shared import json_schemas

    pairs = (
        ("datasets/*/schema.json", "dataset"),
        ("datasets/*/index.json", "index"),
        ("models/*/model_schema.json", "model"),
        ("models/*/checkpoints/*.meta.json", "checkpoint"),
    )
    for pattern, name in pairs:
        validator = jsonschema.Draft202012Validator(json_schemas.json_schema(name))
        found = sorted(layout.root.glob(pattern))
        if not found:
            yield f"there is no {pattern}"
        for path in found:
            for error in validator.iter_errors(json.loads(path.read_bytes())):
                yield f"{path}: {error.json_path}: {error.message}"


def _tree(layout: Layout) -> Iterator[str]:
    """The canonical tree: the demo's dataset and model and the newest day of the logs; long folders cut short."""
    yield f"{layout.root}/"
    folders = [layout.dataset(_DATASET), layout.model(_MODEL)]
    folders += [layout.day(day) for day in list(layout.log_days())[-1:]]
    for folder in folders:
        yield f"  {folder.relative_to(layout.root)}/"
        paths = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
        shown = paths if len(paths) <= 8 else [*paths[:2], *paths[-6:]]
        for path in shown:
            yield f"    {path.relative_to(folder)!s:<40}{size(path.stat().st_size):>8}"
        if len(shown) < len(paths):
            yield f"    … and {len(paths) - len(shown)} more"


def show_report(result: Result, *, console: Console) -> None:
    """The panel, and where to look further."""
    accuracy = "unknown" if result.accuracy is None else f"{result.accuracy:.2%}"
    facts = {
        "result": f"{result.state} in {result.seconds:.1f} s",
        "accuracy": f"{accuracy} on the test split",
        "checkpoint": result.checkpoint,
        "sha256": result.sha256,
        "log": result.log,
        "events": f"{result.num_events} of the job",
        "valid": "every JSON file fits its schema, every hash its bytes" if not result.faults else "no",
    }
    lines = [f"{name:<11} {value}" for name, value in facts.items()]
    lines += [f"{'fault':<11} {one}" for one in result.faults]
    body = "\n".join([*lines, "", *result.tree])
    if console.is_terminal:
        from rich.panel import Panel
        from rich.text import Text

        style = "green" if result.is_good else "red"
        console.print(Panel(Text(body), title="railbus demo", border_style=style, expand=False))
    else:
        console.print(body, markup=False)
    console.print("\n".join(further(result)), markup=False)


def _program() -> str:
    """What to type for this program: `make demo` calls it by its path, since no environment is active."""
    called = Path(sys.argv[0])
    if called.name != "railbus" or shutil.which("railbus"):
        return "railbus"
    return os.path.relpath(called) if called.is_absolute() else str(called)


def further(result: Result) -> list[str]:
    """Lines of commands that show more, each with what it shows."""
    railbus = _program()
    option = "" if result.root == "learning" else f" --root {result.root}"
    commands = {
        f"{railbus} checkpoints verify {_MODEL}{option}": "hash every checkpoint",
        f"{railbus} logs {result.job}{option}": "the story again, from the log",
        f"zcat {result.log or LOG_NAME} | head": "the same as JSON lines",
        f"{railbus} up{option}": "start everything, and keep it running",
        f"{railbus} jobs{option}": "then, in another terminal: what was and what is",
        f"{railbus} help nats": "the same by any NATS client",
    }
    return ["", "next:", *(f"  {command}\n      {meaning}" for command, meaning in commands.items())]
