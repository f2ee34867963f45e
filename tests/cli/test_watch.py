"""`railbus watch`: what it makes of what it hears, and that every picture fits, whatever there is to show."""

from __future__ import annotations

import io
import itertools

import pytest
from rich.console import Console

from cluster_for_tests import active, device, job
from railbus.cli.watch_screen import Rows, screen
from railbus.cli.watch_state import Curve, Watched
from railbus_shared import clock
from railbus_shared.contracts.requests import DeviceList, DeviceState

NOW_NS = clock.parse_rfc3339("2026-11-26T10:00:00Z")


def metrics(step: int, *, at_s: float = 0.0, name: str = "j-1", epoch: int = 1, **data: object) -> dict[str, object]:
    return {
        "type": "train.metrics",
        "time": clock.rfc3339(NOW_NS + int(at_s * 1e9)),
        "job": name,
        "lease_epoch": epoch,
        "step": step,
        "data": data,
    }


def drawn(state: Watched, *, width: int = 80, height: int = 24) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=width, height=height, force_terminal=False).print(
        screen(state, width=width, height=height, now_ns=NOW_NS)
    )
    return out.getvalue().splitlines()


def test_a_curve_shows_the_whole_run_from_its_greatest_to_its_least() -> None:
    curve = Curve()
    for step in range(10_000):
        curve.take(metrics(step, at_s=step / 20, loss=8.0 - step / 1250, lr=0.1))
    assert curve.sparkline(8) == "█▇▆▅▄▃▂▁"
    assert len(curve.sparkline(20)) == 20
    assert curve.step == 9999
    assert curve.latest == pytest.approx(0.0, abs=0.01)
    assert curve.steps_per_s(now_ns=NOW_NS + 500 * clock.NS_PER_S) == pytest.approx(20, rel=0.01)
    assert curve.steps_per_s(now_ns=NOW_NS + 600 * clock.NS_PER_S) is None


def test_a_curve_is_of_the_loss_or_else_of_the_first_metric_and_bears_what_is_no_number() -> None:
    curve = Curve()
    curve.take(metrics(1, accuracy=0.5))
    curve.take(metrics(2, accuracy=0.6))
    assert (curve.name, curve.latest) == ("accuracy", 0.6)
    curve.take(metrics(3, lr=0.1, loss=2.0))
    curve.take(metrics(4, accuracy=0.7))
    curve.take(metrics(5, loss="NaN"))
    assert (curve.name, str(curve.latest), curve.sparkline(8)) == ("loss", "nan", "")
    curve.take(metrics(6, loss=2.0))
    assert curve.latest == 2.0
    assert curve.sparkline(8) == "▁▁"
    for odd in ({}, {"data": [1]}, {"step": "x", "data": {"loss": None}}, {"time": "never", "step": 7}):
        curve.take(odd)


def test_a_loss_that_is_no_number_any_more_is_shown_as_that() -> None:
    state = Watched(active=[active("j-1", "h-cpu0")])
    state.hear(metrics(1, loss=2.0, lr=0.1))
    assert " 2 " in next(line for line in drawn(state) if line.startswith("j-1"))
    state.hear(metrics(2, loss="NaN", lr=0.1))
    assert " nan " in next(line for line in drawn(state) if line.startswith("j-1"))


def test_the_pace_of_an_attempt_that_goes_on_from_before_is_its_own() -> None:
    curve = Curve()
    for step in range(10):
        curve.take(metrics(step, at_s=step))
    for at in range(5):
        curve.take(metrics(4 + 2 * at, at_s=11 + at, epoch=2))
    assert curve.steps_per_s(now_ns=NOW_NS + 15 * clock.NS_PER_S) == pytest.approx(2)


def test_facts_are_told_and_metrics_and_output_are_not() -> None:
    state = Watched()
    for number in range(300):
        state.hear({"type": "job.output", "job": "j-1", "data": {"line": str(number)}})
        state.hear(metrics(number, name=f"j-{number}", loss=1.0))
    state.hear({"type": "train.text", "job": "j-1", "data": {"name": "sample", "text": "two\nlines"}})
    assert [line.text for _, line in state.lines] == ["j-1  sample: two lines"]
    assert len(state.curves) == 64


def busy(*, jobs: int, devices: int) -> Watched:
    state = Watched(totals={"active": jobs, "queued": jobs, "ended": jobs})
    state.active = [active(f"j-{number}", f"h-gpu{number}") for number in range(1, jobs + 1)]
    state.queued = [job(f"j-{100 + number}", priority=number) for number in range(jobs)]
    state.ended = [
        job(f"j-{200 + number}").changed(state="failed", ended_at=clock.rfc3339(0)) for number in range(jobs)
    ]
    gpus = [
        device(f"h-gpu{number}").changed(utilisation_frac=0.97, temperature_c=61.0, memory_used_bytes=3 << 30)
        for number in range(1, devices + 1)
    ]
    states = [DeviceState(device=one, state="leased", holder=f"j-{one.index}") for one in gpus]
    state.devices = DeviceList(devices=tuple(states), hosts=(), runners=())
    for number, at in itertools.product(range(1, jobs + 1), range(40)):
        state.hear(metrics(at, at_s=at - 40.0, name=f"j-{number}", loss=1 / (1 + at)))
    for number in range(100):
        state.hear({"type": "job.started", "job": f"j-{number}", "time": clock.rfc3339(NOW_NS), "attempt": 2})
    return state


@pytest.mark.parametrize("width", [60, 80, 200])
@pytest.mark.parametrize("height", [16, 24, 50])
@pytest.mark.parametrize(("jobs", "devices"), [(0, 0), (1, 1), (3, 8), (40, 64)])
def test_a_picture_fits_whatever_there_is_to_show(jobs: int, devices: int, width: int, height: int) -> None:
    lines = drawn(busy(jobs=jobs, devices=devices), width=width, height=height)
    assert len(lines) == height
    assert max(map(len, lines)) <= width
    assert "j-99  running, attempt 2" in lines[-1]


def test_at_eighty_columns_all_of_a_job_and_a_device_can_be_read() -> None:
    lines = drawn(busy(jobs=1, devices=1))
    (row,) = [line for line in lines if line.startswith("j-1 ")]
    assert row.split()[:5] == ["j-1", "running", "39", "1.0", "0.025"]
    assert "█" in row
    assert row.split()[-1] == "m"
    (row,) = [line for line in lines if line.startswith("h-gpu1")]
    assert row.split() == ["h-gpu1", "leased", "j-1", "3.2", "GB", "of", "17.2", "GB", "97%", "61°", "device"]
    assert lines[0].startswith("railbus  1 active  1 queued  1 ended ")
    assert lines[0].endswith(" 10:00:00 UTC")


def test_trouble_takes_the_place_of_the_counts_and_fits() -> None:
    state = busy(jobs=1, devices=1)
    state.trouble = "NATS at nats://127.0.0.1:4222 does not answer, and this sentence is far too long for the line"
    (head, *_) = drawn(state)
    assert head.startswith("railbus  NATS at nats://127.0.0.1:4222 does not answer")
    assert head.endswith(("… 10:00:00 UTC", "…  10:00:00 UTC"))
    assert len(head) == 80


def test_jobs_wait_in_the_order_in_which_they_would_go() -> None:
    lines = drawn(busy(jobs=3, devices=0), height=40)
    assert [line.split()[0] for line in lines if " queued " in line and line.startswith("j-")] == [
        "j-102",
        "j-101",
        "j-100",
    ]


@pytest.mark.parametrize(
    ("height", "jobs", "devices", "expected"),
    [(24, 1, 1, Rows(1, 1, 16)), (24, 40, 64, Rows(9, 4, 5)), (16, 40, 64, Rows(2, 3, 5)), (8, 9, 9, Rows(2, 2, 1))],
)
def test_rows_are_shared_out(height: int, jobs: int, devices: int, expected: Rows) -> None:
    assert Rows.of(height, jobs=jobs, devices=devices) == expected


def test_what_tells_jobs_apart_stays_whole_while_names_and_curves_give_way() -> None:
    one = active("j-127ac3-1234", "alpha-gpu0")
    named = one.changed(spec=one.spec.changed(model="a-model-with-a-name-as-long-as-they-come-1.5b"))
    state = Watched(active=[named])
    for step in range(1000):
        state.hear(metrics(step, at_s=step / 20 - 50, name=named.id, loss=1e-5 * (1 + step)))
    for width in (60, 80, 100, 160):
        title, row = drawn(state, width=width)[2:4]
        assert row.startswith("j-127ac3-1234 running")
        assert "999" in row
        assert "0.01" in row
        assert ("a-model" in row) == ("MODEL" in title) == (width > 60)
        assert ("█" in row) == ("CURVE" in title)
    assert "j-127ac3-1234" in drawn(state, width=40)[3]


def test_jobs_that_have_no_room_are_counted() -> None:
    state = Watched(queued=[job(f"j-{n}") for n in range(50)], totals={"active": 0, "queued": 70, "ended": 3})
    shown = drawn(state, height=30)
    (more,) = [line for line in shown if "more" in line]
    assert more.strip() == f"… {73 - sum(line.startswith('j-') for line in shown)} more"
