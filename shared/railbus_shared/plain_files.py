"""Files of a checkpoint, opened: plain files in their folder, and nothing else, whatever lies in their place."""

from __future__ import annotations

import os
import stat
from io import BufferedReader
from pathlib import Path

from railbus_shared.errors import CheckpointCorrupt


def opened(folder: Path, name: str) -> BufferedReader:
    """A plain file of a folder, or of one in it, open for reading; nothing waits for a pipe.

    Links are followed as long as they stay in the folder. Raises FileNotFoundError, and CheckpointCorrupt for what is
    no plain file, cannot be read, or leads out of the folder.
    """
    path = folder / name
    try:
        real = Path(os.path.realpath(path, strict=True))  # `Path.resolve` meets a circle with another error
        if not real.is_relative_to(folder.resolve()):
            raise CheckpointCorrupt(path=str(path), expected="a file of its folder", actual=f"a link to {str(real)!r}")
        fd = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as exc:
        raise CheckpointCorrupt(path=str(path), expected="a file", actual=exc.strerror or str(exc)) from exc
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise CheckpointCorrupt(path=str(path), expected="a plain file", actual="something else")
    return os.fdopen(fd, "rb")
