"""Keeps what a process holds in memory, its key among it, from other processes of the same user."""

from __future__ import annotations

import ctypes
from typing import Final

_PR_SET_DUMPABLE: Final = 4
_LIBC: Final = ctypes.CDLL(None, use_errno=True)


def hide_memory() -> None:
    """Leave this process's memory, descriptors and environment in `/proc` to root, and write no core dump of it.

    Processes of the same user may then neither trace it nor take its descriptors. It ends with an exec, and with a
    change of user where `fs.suid_dumpable` is 1; a fork inherits it.
    """
    if _LIBC.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_DUMPABLE)")
