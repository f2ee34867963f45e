"""`railbus logs`, `events` and `decode`, from real files and real bytes."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from commands import Done, railbus_here
from railbus_shared import clock, wire
from railbus_shared.layout import CLOSED_LOG_NAME, LOG_NAME, Layout


def line(number: int, kind: str, *, job: str, ago_s: float = 0.0, **data: object) -> bytes:
    event = {
        "v": 1,
        "id": f"p-{number}",
        "type": kind,
        "time": clock.rfc3339(clock.now_ns() - int(ago_s * 1e9)),
        "producer": "p",
        "number": number,
        "severity": "info",
        "source": "test",
        "host": "h",
        "job": job,
        "data": data,
    }
    return json.dumps(event, separators=(",", ":")).encode() + b"\n"


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    """Yesterday is closed; today is open."""
    made = Layout(tmp_path / "learning")
    today = datetime.now(UTC).date()
    yesterday = datetime.fromtimestamp(time.time() - 86_400, UTC).date()
    for day in (yesterday, today):
        made.day(day).mkdir(parents=True)
    old = line(1, "job.queued", job="j-aaa-1", ago_s=86_400) + line(2, "job.succeeded", job="j-aaa-1", ago_s=86_399)
    (made.day(yesterday) / CLOSED_LOG_NAME).write_bytes(gzip.compress(old))
    new = line(3, "job.queued", job="j-aab-2", ago_s=10) + line(4, "job.failed", job="j-aab-2", cause="host_oom")
    (made.day(today) / LOG_NAME).write_bytes(new)
    return made


def railbus(*words: str, cwd: Path, stdin: bytes = b"") -> Done:
    """Where no bus runs, which need not be waited for."""
    return railbus_here(*words, cwd=cwd, stdin=stdin, env={"RAILBUS_CONNECT_TIMEOUT_S": "0.1"})


def numbers(out: str) -> list[int]:
    return [json.loads(one)["number"] for one in out.splitlines()]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["events"], [1, 2, 3, 4]),
        (["events", "--since", "1h"], [3, 4]),
        (["events", "--until", "1h"], [1, 2]),
        (["logs", "--json", "--since", "99999999999d", "--until", "1h"], [1, 2]),
        (["logs", "--json", "--since", "2d", "--until", "1h"], [1, 2]),
        (["events", "--type", "job.queued"], [1, 3]),
        (["logs", "--json"], [1, 2, 3, 4]),
        (["logs", "--json", "-n", "1"], [4]),
        (["logs", "--json", "--grep", "HOST_oom"], [4]),
        (["logs", "--json", "-n", "1", "--grep", "queued"], [3]),
        (["logs", "--json", "--type", "job.f", "--type", "job.s"], [2, 4]),
    ],
)
def test_events_are_chosen_from_the_files(words: list[str], expected: list[int], layout: Layout) -> None:
    done = railbus(*words, cwd=layout.root.parent)
    assert (done.status, numbers(done.out)) == (0, expected), done.err


def test_damage_is_said_and_what_can_be_read_is_shown(layout: Layout) -> None:
    (closed,) = layout.logs.rglob(CLOSED_LOG_NAME)
    damaged = bytearray(gzip.compress(line(7, "job.queued", job="j-aac-3")))
    damaged[-6] ^= 1
    closed.write_bytes(closed.read_bytes() + damaged + gzip.compress(line(8, "job.queued", job="j-aad-4")))
    plain = layout.day(datetime.now(UTC).date()) / LOG_NAME
    plain.write_bytes(plain.read_bytes() + b"noise\n" * 30 + b'{"torn')
    done = railbus("events", cwd=layout.root.parent)
    assert done.status == 0
    assert set(numbers(done.out)) >= {1, 2, 8, 3, 4}
    said = done.err.splitlines()
    assert len(said) == 11
    assert said[0].startswith("warning: closed log is torn or damaged in ")
    assert said[-1] == "warning: 21 more lines or members cannot be read"


def test_a_reader_that_has_enough_is_no_error(layout: Layout) -> None:
    plain = layout.day(datetime.now(UTC).date()) / LOG_NAME
    plain.write_bytes(b"".join(line(n, "job.queued", job=f"j-{n}") for n in range(5000)))
    command = [sys.executable, "-m", "railbus.cli.main", "logs", "-n", "5000"]
    pipeline = ["/bin/sh", "-c", '"$@" | head -n 1', "sh", *command]
    shell = subprocess.run(pipeline, cwd=layout.root.parent, capture_output=True, check=True)
    assert shell.stdout.count(b"queued") == 1
    assert shell.stderr == b""


@pytest.mark.parametrize(("job", "expected"), [("j-aaa-1", [1, 2]), ("j-aab", [3, 4]), ("@last", [3, 4])])
def test_a_job_is_found_without_a_bus(job: str, expected: list[int], layout: Layout) -> None:
    done = railbus("logs", job, "--json", cwd=layout.root.parent)
    assert numbers(done.out) == expected, done.err


def test_the_timeline_of_a_job_is_told_without_a_bus(layout: Layout) -> None:
    plain = layout.day(datetime.now(UTC).date()) / LOG_NAME
    odd = json.loads(line(5, "app.odd", job="j-aab-2")) | {"time": "never"}
    plain.write_bytes(plain.read_bytes() + json.dumps(odd, separators=(",", ":")).encode() + b"\n")
    done = railbus("job", "@last", cwd=layout.root.parent)
    assert done.status == 0, done.err
    assert [one[8:].strip() for one in done.out.splitlines()] == ["queued", "failed: host_oom", "app.odd"]
    assert done.err.startswith("job j-aab-2 without its record: ")
    assert railbus("job", "@last", "--json", cwd=layout.root.parent).status == 5


@pytest.mark.parametrize(("job", "status", "said"), [("j-a", 6, "2 jobs begin so"), ("j-aaa-2", 3, "did you mean")])
def test_a_job_that_is_not_clear_is_asked_back(job: str, status: int, said: str, layout: Layout) -> None:
    done = railbus("logs", job, cwd=layout.root.parent)
    assert (done.status, said in done.err) == (status, True), done.err


def test_a_job_that_is_nowhere_is_said_to_be_so_with_the_nearest_and_why_only_the_files_were_looked_at(
    layout: Layout,
) -> None:
    done = railbus("logs", "J-AAB-3", cwd=layout.root.parent)
    assert (done.status, done.out) == (3, ""), done.err
    said, hint = done.err.splitlines()
    assert said.startswith(
        "error[JOB_NOT_FOUND]: job has value 'J-AAB-3': there is no such job, not in the log files of 'learning' "
        "and the bus cannot be asked: "
    )
    assert hint == "hint: did you mean 'j-aab-2' or 'j-aaa-1'?"


def test_the_newest_so_many_are_lines_however_many_metrics_make_one(layout: Layout) -> None:
    plain = layout.day(datetime.now(UTC).date()) / LOG_NAME
    metrics = [line(n, "train.metrics", job="j-aab-2", ago_s=5 - n * 0.001, loss=0.5) for n in range(50)]
    plain.write_bytes(plain.read_bytes() + b"".join(metrics))
    lines = railbus("logs", "-n", "3", cwd=layout.root.parent).out.splitlines()
    assert [one.split("  ", 1)[1] for one in lines] == [
        "j-aab-2  queued",
        "j-aab-2  failed: host_oom",
        "j-aab-2  loss 0.5",
    ]


def test_the_story_is_told_in_words(layout: Layout) -> None:
    lines = railbus("logs", cwd=layout.root.parent).out.splitlines()
    assert [one.split("  ", 1)[1] for one in lines] == [
        "j-aaa-1  queued",
        "j-aaa-1  succeeded",
        "j-aab-2  queued",
        "j-aab-2  failed: host_oom",
    ]


@pytest.mark.parametrize(
    "words",
    [
        ["--since", "yesterday"],
        ["--until", "2h", "-f"],
        ["--grep", "("],
        ["--since", "2026-13-01"],
        ["--since", "1h", "--until", "2h"],
    ],
)
def test_what_cannot_be_meant_is_wrong_usage(words: list[str], layout: Layout) -> None:
    done = railbus("logs", *words, cwd=layout.root.parent)
    assert done.status == 2
    assert words[0] in done.err


def test_decode_makes_a_json_line_of_an_event(tmp_path: Path) -> None:
    event = {"v": 1, "type": "app.done", "data": {"x": 1.5}}
    done = railbus("decode", cwd=tmp_path, stdin=wire.encode(event))
    assert done.json() == event


def test_decode_takes_a_batch_apart(tmp_path: Path) -> None:
    batch = {"v": 1, "common": {"job": "j-1"}, "events": [{"number": 1}, {"number": 2}]}
    done = railbus("decode", cwd=tmp_path, stdin=wire.encode(batch))
    assert [json.loads(one) for one in done.out.splitlines()] == [
        {"job": "j-1", "number": 1},
        {"job": "j-1", "number": 2},
    ]


@pytest.mark.parametrize("noise", [b"", b"\xc1", b"hello", b"{", b"\x81\xc1"])
def test_decode_refuses_noise_in_one_line(noise: bytes, tmp_path: Path) -> None:
    done = railbus("decode", cwd=tmp_path, stdin=noise)
    assert done.status == 6
    assert done.err.startswith("error[BAD_MESSAGE]: ")
