"""A job as a run of TensorBoard: byte for byte as TensorBoard has read it, and as `railbus export` writes it."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from commands import Done, railbus_here
from interop.write_run import EVENTS, write_run
from railbus import tfevents
from railbus.tensorboard import Records
from railbus_shared import clock
from railbus_shared.layout import LOG_NAME, Layout

FIXTURE = Path(__file__).parents[1] / "interop/fixtures/tensorboard"
MASK_DELTA = 0xA282EAD8


def crc32c(data: bytes) -> int:
    """Bit by bit, as it is defined; without the mask."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def unmasked(value: int) -> int:
    rotated = (value - MASK_DELTA) & 0xFFFFFFFF
    return (rotated >> 17 | rotated << 15) & 0xFFFFFFFF


def records(data: bytes) -> Iterator[bytes]:
    """What stands in each record, whose checks are right."""
    while data:
        (length,), (of_length,) = struct.unpack("<Q", data[:8]), struct.unpack("<I", data[8:12])
        body, (of_body,) = data[12 : 12 + length], struct.unpack("<I", data[12 + length : 16 + length])
        assert (unmasked(of_length), unmasked(of_body)) == (crc32c(data[:8]), crc32c(body))
        yield body
        data = data[16 + length :]


def metrics(number: int, step: int, *, lease_epoch: int = 1, producer: str = "t", **data: object) -> dict[str, object]:
    return {
        "type": "train.metrics",
        "time": clock.rfc3339(int(number * 1e9)),
        "producer": producer,
        "number": number,
        "job": "j-1",
        "lease_epoch": lease_epoch,
        "step": step,
        "data": data,
    }


def test_the_check_is_crc_32c() -> None:
    assert crc32c(b"123456789") == 0xE3069283  # the check value that every catalogue of CRCs gives
    for data in (b"", b"\0" * 32, b"123456789", bytes(range(256))):
        assert unmasked(tfevents.masked_crc32c(data)) == crc32c(data)


def test_a_run_is_the_bytes_that_tensorboard_has_read(tmp_path: Path) -> None:
    written = write_run(tmp_path)
    assert written.read_bytes() == (FIXTURE / written.name).read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == [written.name]


def test_every_record_is_whole_and_the_first_tells_the_version(tmp_path: Path) -> None:
    found = list(records(write_run(tmp_path).read_bytes()))
    assert found[0].endswith(b"\x1a\x0dbrain.Event:2")
    assert len(found) == 1 + len(EVENTS) + 1  # the version, and where the second attempt went on from


def test_an_event_that_comes_twice_or_late_from_a_replaced_attempt_is_told_once_or_not_at_all() -> None:
    told = Records()
    assert told.of(metrics(1, 1, loss=1.0))
    assert told.of(metrics(1, 1, loss=1.0)) == b""
    assert told.of(metrics(1, 2, lease_epoch=2, producer="u", loss=0.5))
    assert told.of(metrics(2, 2, loss=0.9)) == b""
    assert told.of({"type": "job.succeeded", "producer": "r", "number": 1}) == b""
    assert (told.points, told.tags) == (2, {"loss"})


@pytest.mark.parametrize(
    ("value", "packed"),
    [
        (0.5, 0.5),
        (3, 3.0),
        ("Infinity", math.inf),
        ("-Infinity", -math.inf),
        (1e300, math.inf),
        (-1e300, -math.inf),
        (True, 1.0),
    ],
)
def test_a_value_is_a_float_of_32_bits(value: object, packed: float) -> None:
    *_, last = records(Records().of(metrics(1, 1, loss=value)))
    assert struct.unpack("<f", last[-4:]) == (packed,)


def test_nan_is_a_value_and_what_is_no_number_is_none() -> None:
    *_, last = records(Records().of(metrics(1, 1, loss="NaN", name="x", more=None, list=[1])))
    assert math.isnan(struct.unpack("<f", last[-4:])[0])
    assert b"name" not in last
    assert list(records(Records().of(metrics(1, 1, name="x"))))[1:] == []


def test_steps_beyond_seven_bits_are_written_whole() -> None:
    *_, last = records(Records().of(metrics(1, 300_000, loss=1.0)))
    assert last[9:13] == b"\x10\xe0\xa7\x12"


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    made = Layout(tmp_path / "learning")
    day = made.day(datetime.fromtimestamp(100, UTC).date())
    day.mkdir(parents=True)
    queued = {"type": "job.queued", "job": "j-1", "time": clock.rfc3339(0), "producer": "d", "number": 1, "data": {}}
    lines = [queued, *(metrics(number, number, loss=1 / number) for number in range(1, 51))]
    (day / LOG_NAME).write_text("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines))
    return made


def export(layout: Layout, *words: str) -> Done:
    env = {"RAILBUS_CONNECT_TIMEOUT_S": "0.1"}
    return railbus_here("export", "tensorboard", *words, cwd=layout.root.parent, env=env)


def test_a_run_is_written_from_the_files_and_again_over_the_first(layout: Layout) -> None:
    done = export(layout, "@last")
    assert (done.status, done.err) == (0, "50 points of loss\n")
    written = layout.root.parent / done.out.strip()
    assert written.parent == layout.root.parent / "runs/j-1"
    before = written.read_bytes()
    assert export(layout, "j-1", "--json").json() == {
        "job": "j-1",
        "path": done.out.strip(),
        "points": 50,
        "metrics": ["loss"],
    }
    assert written.read_bytes() == before
    assert [path.name for path in written.parent.iterdir()] == [written.name]


def test_a_folder_that_cannot_be_written_is_named_with_the_remedy(layout: Layout) -> None:
    (layout.root.parent / "runs").write_text("a file")
    done = export(layout, "j-1")
    assert (done.status, "--to" in done.err) == (6, True), done.err
