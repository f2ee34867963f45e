"""The arena: memory in which a trainer leaves a copy of its state, for its writer to write down while training goes on.

It is a file in memory that both map. All of its pages are there before the first copy is made into it, or that copy
would pay for them: the kernel takes about twenty times as long to find a fresh page as to fill one. There is one arena
for one trainer, so a save in the background costs one copy of the state beyond the live one, and never more.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Callable
from typing import Final

from railbus_runner.checkpointing.headroom import spare_bytes
from railbus_shared.errors import NotSupported

_MADV_DONTFORK: Final = 10
_MADV_HUGEPAGE: Final = 14
_MADV_POPULATE_WRITE: Final = 23  # since Linux 5.14
_PIECE_BYTES: Final = 16 << 20
_MIN_GROWTH_BYTES: Final = 1 << 20
_LIBC: Final = ctypes.CDLL(None, use_errno=True)  # which lets go of the interpreter, as `mmap.madvise` does not
_LIBC.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def with_growth(nbytes: int) -> int:
    """The size of an arena for a state of so many bytes: what is pickled in it grows with counters and lists."""
    wanted = nbytes + max(_MIN_GROWTH_BYTES, nbytes // 64)
    return -(-wanted // mmap.PAGESIZE) * mmap.PAGESIZE


class Arena:
    """One process's map of it; the memory is free once nobody has it open any more, or after `free`."""

    def __init__(self, descriptor: int, nbytes: int) -> None:
        """Takes over the descriptor; `nbytes` are those of the file. Raises OSError where it cannot be mapped."""
        self.descriptor = descriptor
        self.nbytes = nbytes
        self.memory = mmap.mmap(descriptor, nbytes)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        _LIBC.madvise(self._address, nbytes, _MADV_DONTFORK)  # a loader's worker needs no map of it
        _LIBC.madvise(self._address, nbytes, _MADV_HUGEPAGE)  # refused where such files have none; then without

    @property
    def address(self) -> int:
        """Where it begins in this process."""
        return self._address

    def populate(self, *, goes_on: Callable[[], bool]) -> bool:
        """Have every page there and mapped, piece by piece; False if it was told not to go on before the end.

        Other threads of this process run meanwhile. Raises OSError (ENOMEM) where there is no memory.
        """
        for offset in range(0, self.nbytes, _PIECE_BYTES):
            if not goes_on():
                return False
            _populate(self._address + offset, min(_PIECE_BYTES, self.nbytes - offset))
        return True

    def free(self) -> None:
        """Give the memory back, whoever has it open still, as forks of a trainer have; nobody may touch it any more."""
        os.ftruncate(self.descriptor, 0)

    def close(self) -> None:
        """Let go of the descriptor; the map goes with the last who uses it."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def make_arena(nbytes: int, *, is_wanted: Callable[[], bool]) -> Arena | None:
    """A new arena with all of its pages; None once it is not wanted any more.

    Raises NotSupported where there is no memory to spare: nobody is to be killed for it.
    """
    try:
        descriptor = os.memfd_create("railbus-arena", os.MFD_CLOEXEC)
    except OSError as exc:
        raise NotSupported(f"no arena: {exc}") from exc
    try:
        os.ftruncate(descriptor, nbytes)
        arena = Arena(descriptor, nbytes)
        if arena.populate(goes_on=lambda: is_wanted() and _is_room()):
            return arena
    except OSError as exc:
        os.close(descriptor)
        raise NotSupported(f"no arena of {nbytes} bytes: {exc}") from exc
    arena.close()
    if is_wanted():
        raise NotSupported(f"no memory to spare for an arena of {nbytes} bytes")
    return None


def _is_room() -> bool:
    return spare_bytes() > _PIECE_BYTES


def _populate(address: int, nbytes: int) -> None:
    if _LIBC.madvise(address, nbytes, _MADV_POPULATE_WRITE) == 0:
        return
    if (code := ctypes.get_errno()) != errno.EINVAL:
        raise OSError(code, os.strerror(code))
    ctypes.memset(address, 0, nbytes)  # an older kernel; nobody has written into it yet
