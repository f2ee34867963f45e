"""How many bytes lie in a folder, looked at without pause while something goes on."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path


def bytes_below(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.stat(os.path.join(parent, name)).st_size  # noqa: PTH116, PTH118 - as quick as can be
    return total


@contextlib.contextmanager
def watched(folder: Path, *, every_s: float = 0.0005) -> Iterator[list[int]]:
    """Bytes of the files in a folder, looked at all the time by a thread of its own."""
    seen: list[int] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(every_s):
            seen.append(bytes_below(folder))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()
