"""A trainer's output as lines, whatever the chunks it comes in."""

from __future__ import annotations

import asyncio
import os

import pytest

from railbus_runner.output import LineSplitter, read_output
from until import PATIENCE_S, until

CASES = [
    (b"", []),
    (b"one\n", ["one"]),
    (b"one\ntwo", ["one", "two"]),
    (b"one\r\ntwo\r\n", ["one", "two"]),
    (b"\n\n", ["", ""]),
    (b"10%\r20%\r100%\nnext\n", ["100%", "next"]),
    (b"10%\r20%\r", ["20%"]),
    (b"caf\xc3\xa9\n", ["café"]),
    (b"bad\xff\xfe\n", ["bad��"]),
    (b"abcdefgh\n", ["abcdefgh"]),
    (b"abcdefghi\n", ["abcdefgh", "i"]),
    (b"x" * 20, ["x" * 8, "x" * 8, "x" * 4]),
    ("abcdefgé!\n".encode(), ["abcdefg", "é!"]),
    ("abcde€€\n".encode(), ["abcde€", "€"]),
    ("abcdef😀\n".encode(), ["abcdef", "😀"]),
    (b"\xff" * 9 + b"\n", ["�" * 8, "�"]),
    (b"0123\r0123\r0123\r0123\r01\n", ["01"]),
]


@pytest.mark.parametrize("chunk_bytes", [1, 2, 3, 5, 1000])
@pytest.mark.parametrize(("written", "lines"), CASES)
def test_lines_do_not_depend_on_how_they_were_cut(written: bytes, lines: list[str], chunk_bytes: int) -> None:
    splitter = LineSplitter(max_line_bytes=8)
    read: list[str] = []
    for start in range(0, len(written), chunk_bytes):
        read += splitter.feed(written[start : start + chunk_bytes])
    assert read + splitter.finish() == lines
    assert splitter.finish() == []


def test_a_line_without_end_is_not_kept_in_memory() -> None:
    splitter = LineSplitter(max_line_bytes=8)
    pieces = splitter.feed(b"x" * 1_000_003)
    assert (len(pieces), len(splitter.finish()[0])) == (125_000, 3)


async def test_a_pipe_is_read_to_its_end_and_closed() -> None:
    read, write = os.pipe()
    seen: list[tuple[str, list[str]]] = []
    reading = asyncio.create_task(read_output(read, "stdout", lambda name, lines: seen.append((name, lines))))
    os.write(write, b"first\nsec")
    await until(lambda: bool(seen))
    assert seen == [("stdout", ["first"])]
    os.write(write, b"ond\nlast")
    os.close(write)
    async with asyncio.timeout(PATIENCE_S):
        await reading
    assert seen[1:] == [("stdout", ["second"]), ("stdout", ["last"])]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(read)


async def test_a_reader_that_is_cancelled_gives_the_incomplete_line() -> None:
    read, write = os.pipe()
    seen: list[str] = []
    reading = asyncio.create_task(read_output(read, "stderr", lambda _, lines: seen.extend(lines)))
    os.write(write, b"Traceback\nKeyErr")
    await until(lambda: bool(seen))
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    os.close(write)
    assert seen == ["Traceback", "KeyErr"]


async def test_a_reader_that_is_cancelled_gives_what_the_pipe_holds() -> None:
    read, write = os.pipe()
    seen: list[str] = []
    reading = asyncio.create_task(read_output(read, "stderr", lambda _, lines: seen.extend(lines)))
    os.write(write, b"step 1\n")
    await until(lambda: bool(seen))
    os.write(write, b"last words\nKeyErr")
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    os.close(write)
    assert seen == ["step 1", "last words", "KeyErr"]


async def test_a_flood_leaves_the_loop_its_turns() -> None:
    read, write = os.pipe()
    count = 0

    def counted(_: str, lines: list[str]) -> None:
        nonlocal count
        count += len(lines)

    def flood() -> None:
        with os.fdopen(write, "wb") as pipe:
            pipe.writelines([b"x" * 99 + b"\n"] * 100_000)

    reading = asyncio.create_task(read_output(read, "stdout", counted))
    writing = asyncio.create_task(asyncio.to_thread(flood))
    turns = 0
    while not reading.done():
        turns += 1
        await asyncio.sleep(0)
    await writing
    assert count == 100_000
    assert turns > 10
