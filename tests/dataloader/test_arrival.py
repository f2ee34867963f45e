"""A file on its way in: flushed while more of it comes, and lost if a flush fails."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from railbus_dataloader.arrival import FLUSH_BYTES, Arrival, Intake
from railbus_dataloader.sources import WantedFile
from railbus_shared.bus.chunks import CHUNK_BYTES, Chunk
from until import until

WITHOUT_FLUSH = Path("/dev/null")
"""Takes bytes, and refuses to be flushed."""
DATA = memoryview(bytes(FLUSH_BYTES + CHUNK_BYTES))
WANTED = WantedFile("d", "0" * 64, "shard", hashlib.sha256(DATA).hexdigest(), len(DATA))


def chunks(start: int, end: int) -> list[Chunk]:
    return [Chunk(at, DATA[at : min(at + CHUNK_BYTES, end)]) for at in range(start, end, CHUNK_BYTES)]


def opened(path: Path) -> Arrival:
    arrival = Arrival(WANTED, path)
    arrival.open()
    return arrival


async def test_a_file_that_was_flushed_on_its_way_is_whole(tmp_path: Path) -> None:
    arrival = opened(tmp_path / "got")
    intake = Intake(arrival)
    await intake.take(chunks(0, FLUSH_BYTES // CHUNK_BYTES * CHUNK_BYTES))
    await intake.take(chunks(arrival.position, len(DATA)))
    arrival.flush()
    assert arrival.check("there").size == len(DATA)
    arrival.close()
    arrival.flush()  # one that comes late does nothing


async def test_a_flush_that_fails_ends_the_file_at_its_next_chunk() -> None:
    arrival = opened(WITHOUT_FLUSH)
    intake = Intake(arrival)
    await intake.take(chunks(0, len(DATA)))

    async def has_failed() -> bool:
        try:
            await intake.take([])
        except OSError:
            return True
        return False

    await until(has_failed)
    arrival.close()


def test_a_file_whose_last_flush_failed_is_not_vouched_for() -> None:
    arrival = opened(WITHOUT_FLUSH)
    arrival.take(chunks(0, len(DATA)))
    arrival.flush()
    with pytest.raises(OSError, match="Invalid argument"):
        arrival.check("there")
    arrival.close()
