"""Loggers that people use, writing the same events to a file: the sink alone, no bus, nothing synced.

    python -m benchmarks.peers.loggers NAME EVENTS FOLDER

NAME is `queue_listener` (the standard library: QueueHandler, QueueListener, a handler that rotates by size and
compresses with gzip) or `structlog` (structlog with orjson, a plain file). Prints the seconds from the first event to
the moment when all are in the file. Knows nothing of railbus, and runs without it.
"""

from __future__ import annotations

import gzip
import json
import logging
import logging.handlers
import math
import os
import queue
import shutil
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

_ROTATE_BYTES = 32 << 20


def metrics(number: int) -> dict[str, float]:
    """Five metrics, as a training loop tells them: mostly noise, so that they compress no better than real ones."""
    noise, other = math.sin(number * 12.9898) * 43758.5453 % 1, math.sin(number * 78.233) * 43758.5453 % 1
    return {
        "loss": 2.3 * math.exp(-number / 50_000) + 0.1 * noise,
        "lr": 0.001,
        "samples_per_s": 1200 + 50 * other,
        "step_s": 0.012 + 0.001 * other,
        "grad_norm": 0.5 + noise,
    }


def events(count: int) -> Iterator[dict[str, Any]]:
    """What `benchmarks.event_load` sends, as an application has it in hand."""
    for number in range(1, count + 1):
        yield {
            "id": f"peer-{number}", "type": "train.metrics", "producer": "peer", "number": number, "severity": "info",
            "source": "trainer", "host": "bench", "job": "j-4f09ac-17", "attempt": 1, "lease_epoch": 1, "step": number,
            "data": metrics(number),
        }  # fmt: skip


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        told = datetime.fromtimestamp(record.created, tz=UTC).isoformat()
        return json.dumps({"time": told, **record.__dict__["event"]})


def _compress(source: str, target: str) -> None:
    with Path(source).open("rb") as plain, gzip.open(target, "wb", compresslevel=6) as closed:
        shutil.copyfileobj(plain, closed)
    Path(source).unlink()


def queue_listener(made: list[dict[str, Any]], folder: Path) -> float:
    """As the cookbook of `logging` has it."""
    handler = logging.handlers.RotatingFileHandler(folder / "log.jsonl", maxBytes=_ROTATE_BYTES, backupCount=1000)
    handler.setFormatter(_JsonLines())
    handler.namer = lambda name: f"{name}.gz"
    handler.rotator = _compress
    waiting: queue.Queue[Any] = queue.Queue(-1)
    listener = logging.handlers.QueueListener(waiting, handler)
    logger = logging.getLogger("bench")
    logger.propagate = False
    logger.setLevel("INFO")
    logger.addHandler(logging.handlers.QueueHandler(waiting))
    began = time.perf_counter()
    listener.start()
    for one in made:
        logger.info("metrics", extra={"event": one})
    listener.stop()
    handler.doRollover()
    return time.perf_counter() - began


def structlog(made: list[dict[str, Any]], folder: Path) -> float:
    """As structlog's page on performance has it."""
    import orjson
    import structlog as library

    with (folder / "log.jsonl").open("wb") as file:
        library.configure(
            cache_logger_on_first_use=True,
            wrapper_class=library.make_filtering_bound_logger(logging.INFO),
            processors=[
                library.processors.add_log_level,
                library.processors.TimeStamper(fmt="iso", utc=True),
                library.processors.JSONRenderer(serializer=orjson.dumps),
            ],
            logger_factory=library.BytesLoggerFactory(file=file),
        )
        log = library.get_logger()
        began = time.perf_counter()
        for one in made:
            log.info("metrics", **one)
        file.flush()
    return time.perf_counter() - began


def main() -> None:
    name, count, folder = sys.argv[1:4]
    made = list(events(int(count)))
    seconds = {"queue_listener": queue_listener, "structlog": structlog}[name](made, Path(folder))
    size = sum(entry.stat().st_size for entry in os.scandir(folder))
    print(json.dumps({"seconds": seconds, "bytes": size}), flush=True)


if __name__ == "__main__":
    main()
