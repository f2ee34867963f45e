"""How many bytes lie in a folder, looked at without pause while something goes on."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path


def bytes_below(folder: Path) -> int:
    """Of the files that were there from the first to the last moment of the look, so at once."""
    before, after = _files_below(folder), _files_below(folder)
    return sum(size for file, size in after.items() if file in before)


def _files_below(folder: Path) -> dict[tuple[str, int], int]:
    """Bytes by path and inode."""
    found: dict[tuple[str, int], int] = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(parent, name)  # noqa: PTH118 - as quick as can be
            with contextlib.suppress(FileNotFoundError):
                status = os.stat(path)  # noqa: PTH116
                found[path, status.st_ino] = status.st_size
    return found


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
