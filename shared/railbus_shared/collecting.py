"""Garbage is not looked for while what is there to stay is being made.

Many new objects set off a collection of all objects of the process. Beside torch one takes 40 ms and finds nothing.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """No collection inside, of any thread; for what takes milliseconds and makes no cycles."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
