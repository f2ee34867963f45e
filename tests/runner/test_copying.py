"""Copies by several threads: whole, and in order as far as is said."""

from __future__ import annotations

import numpy as np
import pytest

from railbus_runner.checkpointing import copying
from railbus_runner.checkpointing.copying import Piece, copy, pieces_of


def given(sizes: list[int]) -> tuple[np.ndarray, list[np.ndarray], list[Piece]]:
    """A target, sources of random bytes, and what is to be copied: one source after the other."""
    random = np.random.default_rng(0)
    target = np.zeros(sum(sizes), dtype=np.uint8)
    sources = [random.integers(1, 256, size, dtype=np.uint8) for size in sizes]
    pieces: list[Piece] = []
    start = target.ctypes.data
    for source in sources:
        pieces += pieces_of(start, source.ctypes.data, len(source))
        start += len(source)
    return target, sources, pieces


@pytest.mark.parametrize("bytes_per_thread", [1, 1 << 40])
def test_whatever_is_said_to_be_copied_is_and_in_the_end_all(
    monkeypatch: pytest.MonkeyPatch, bytes_per_thread: int
) -> None:
    monkeypatch.setattr(copying, "_BYTES_PER_THREAD", bytes_per_thread)
    monkeypatch.setattr(copying, "PIECE_BYTES", 1000)
    target, sources, pieces = given([3, 70_000, 0, 1, 999, 1000, 1001, 50_000])
    expected = np.concatenate(sources)
    said: list[int] = []

    def check(address: int) -> None:
        said.append(address - target.ctypes.data)
        assert np.array_equal(target[: said[-1]], expected[: said[-1]])

    for _ in range(50):
        target[:] = 0
        copy(pieces, on_copied=check)
        assert np.array_equal(target, expected)
    assert max(said) > 0


def test_an_error_of_the_listener_ends_the_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "PIECE_BYTES", 10)
    target, _, pieces = given([100_000])

    def fail(_address: int) -> None:
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        copy(pieces, on_copied=fail)
    assert not target[-10:].any(), "nothing more is copied"


def test_nothing_is_copied_of_nothing() -> None:
    copy([], on_copied=lambda _address: pytest.fail("nothing was copied"))
