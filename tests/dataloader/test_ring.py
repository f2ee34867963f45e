"""The memory of the chunks that are under way to another host."""

from __future__ import annotations

import pytest

from railbus_dataloader.serving import Ring
from railbus_shared.bus.chunks import CHUNK_BYTES


@pytest.mark.parametrize("window", [1 << 19, CHUNK_BYTES, CHUNK_BYTES + 1, 4 * CHUNK_BYTES, 16 << 20])
@pytest.mark.parametrize("start", [0, 7, CHUNK_BYTES + 1])
def test_a_chunks_memory_is_used_again_only_once_the_receiver_has_it(window: int, start: int) -> None:
    ring, size = Ring(start, window_bytes=window), start + 3 * window + 5
    whole = ring.chunks(start, min(size - start, window))
    assert sum(map(len, whole)) == min(size - start, window)
    for offset in range(start, size, CHUNK_BYTES):
        end = min(offset + CHUNK_BYTES, size)
        [place] = ring.chunks(offset, end - offset)
        place[:] = offset.to_bytes(8, "little") * (len(place) // 8) + bytes(len(place) % 8)
        has = max(start, end - window)  # the least that the receiver has if it has granted this chunk
        for before in range(start, offset, CHUNK_BYTES):
            if before + CHUNK_BYTES > has:
                [held] = ring.chunks(before, min(CHUNK_BYTES, size - before))
                assert held[:8] == before.to_bytes(8, "little"), f"{before} was overwritten by {offset}"
