"""A run of TensorBoard from a few events, the same whenever it is written; `fixtures/tensorboard/` was made by it.

.venv/bin/python tests/interop/write_run.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

from railbus.tensorboard import RunFile
from railbus_shared import clock


def _event(number: int, kind: str, *, epoch: int, step: int, data: dict[str, object]) -> dict[str, object]:
    return {
        "type": kind,
        "time": clock.rfc3339(1_700_000_000 * clock.NS_PER_S + number * clock.NS_PER_S),
        "producer": f"trainer-{epoch}",
        "number": number,
        "job": "j-1",
        "lease_epoch": epoch,
        "step": step,
        "data": data,
    }


EVENTS = (
    _event(1, "train.metrics", epoch=1, step=1, data={"loss": 2.5, "lr": 0.5}),
    _event(2, "train.metrics", epoch=1, step=200, data={"loss": 2.0, "lr": 0.25}),
    _event(3, "train.text", epoch=1, step=200, data={"name": "sample", "text": "a **bold** word, 字"}),
    _event(4, "train.metrics", epoch=1, step=300, data={"loss": "NaN"}),
    _event(5, "train.metrics", epoch=2, step=201, data={"loss": 1.5, "accuracy": 1}),
)
"""The second attempt goes on behind step 200, so step 300 of the first one counts no more."""


def write_run(folder: Path) -> Path:
    """The path of the run's file."""
    file = RunFile(folder)
    with file.begun():
        for event in EVENTS:
            file.write(event)
        file.publish()
    return file.path


if __name__ == "__main__":
    print(write_run(Path(sys.argv[1])))
