"""A file that is hashed while it is written, and appears whole or not at all."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import BinaryIO

from railbus_shared import files

Block = bytes | memoryview


class HashedFile:
    """A file that grows at its end only, so that its hash is known when it is whole."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self.size = 0

    def write(self, data: Block) -> int:
        self._file.write(data)
        self._digest.update(data)  # of blocks that are still in the processor's cache; without the interpreter's lock
        self.size += len(data)
        return len(data)

    def fill(self, end: int) -> None:
        """Zeros up to a place."""
        self.write(bytes(end - self.size))

    def write_all(self, blocks: Generator[Block]) -> None:
        with closing(blocks):  # else, after an error, what they are read from stays open for as long as its traceback
            for block in blocks:
                self.write(block)

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()


@contextmanager
def new_file(path: Path) -> Iterator[HashedFile]:
    """A file that takes its name at the end of the block, durably; raises FileExistsError, StorageFull."""
    with files.temporary(path) as file:
        yield HashedFile(file)
    files.publish(files.temporary_path(path), path)
