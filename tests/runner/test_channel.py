"""The trainer's channel and recorder over a real socket pair."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from railbus_runner.channel import TrainerChannel
from railbus_runner.curves import Curves
from railbus_runner.endings import RunnerGone
from railbus_runner.frames import (
    Deadline,
    Ended,
    Events,
    Frame,
    FrameBuffer,
    Ready,
    Save,
    Stop,
    Verified,
    Verify,
    WriterOpened,
    pack,
)
from railbus_runner.moving import Pulse
from railbus_runner.recorder import MAX_TEXT_CHARS, Recorder, RecordingHandler
from railbus_shared import clock
from railbus_shared.contracts.events import Event
from railbus_shared.contracts.jobs import ErrorBody
from railbus_shared.contracts.model import JsonMap
from railbus_shared.errors import BadMessage
from railbus_shared.telemetry import LearningTelemetry

COMMON: JsonMap = {"source": "trainer", "host": "h", "job": "j-1", "attempt": 1, "lease_epoch": 2}


class RunnerEnd:
    """The other end of the pair."""

    def __init__(self) -> None:
        self.sock, theirs = socket.socketpair()
        self.channel = TrainerChannel(theirs)
        self.theirs = theirs
        self._buffer = FrameBuffer()
        self._telemetry = LearningTelemetry("runner", host="h")

    def send(self, *frames: Frame) -> None:
        self.sock.sendall(b"".join(map(pack, frames)))

    def received(self) -> list[Frame]:
        """Everything that lies in the socket now."""
        frames: list[Frame] = []
        try:
            while data := self.sock.recv(1 << 16, socket.MSG_DONTWAIT):
                frames += self._buffer.feed(data)
        except BlockingIOError:
            pass
        return frames

    def events(self) -> list[JsonMap]:
        """Numbered as the runner does it."""
        found = [event for frame in self.received() if isinstance(frame, Events) for event in frame.events]
        return self._telemetry._numbered(found)


@pytest.fixture
def end() -> Iterator[RunnerEnd]:
    end = RunnerEnd()
    yield end
    end.sock.close()
    end.theirs.close()


@pytest.fixture
def recorder(end: RunnerEnd) -> Recorder:
    return Recorder(end.channel.send, producer="t-1", common=COMMON, offer=end.channel.offer)


# --- orders ----------------------------------------------------------------------------------------------------------


def test_a_poll_of_a_silent_channel_returns_at_once_and_changes_nothing(end: RunnerEnd) -> None:
    began = time.monotonic()
    end.channel.poll()
    assert time.monotonic() - began < 5
    assert (end.channel.stop, end.channel.save_requested, end.channel.deadline_boottime_s) == (None, False, 0.0)


def test_orders_are_remembered_and_the_first_stop_and_latest_deadline_count(end: RunnerEnd) -> None:
    end.send(
        Deadline(boottime_s=5.0), Save(), Deadline(boottime_s=3.0), Stop(reason="preempted"), Stop(reason="cancelled")
    )
    end.channel.poll()
    assert end.channel.deadline_boottime_s == 5.0
    assert end.channel.save_requested
    assert end.channel.stop == Stop(reason="preempted")


def test_a_frame_that_comes_in_pieces_is_taken_once_it_is_whole(end: RunnerEnd) -> None:
    data = pack(Deadline(boottime_s=7.0))
    end.sock.sendall(data[:6])
    end.channel.poll()
    assert end.channel.deadline_boottime_s == 0.0
    end.sock.sendall(data[6:])
    end.channel.poll()
    assert end.channel.deadline_boottime_s == 7.0


def test_an_answer_is_found_behind_orders_which_are_obeyed_too(end: RunnerEnd) -> None:
    end.send(Deadline(boottime_s=9.0), Verified(shards=(3,)), Save())
    assert end.channel.ask(Verify(shards=(3,)), Verified) == Verified(shards=(3,))
    assert end.channel.deadline_boottime_s == 9.0
    assert end.received() == [Verify(shards=(3,))]


def test_the_error_of_code_that_met_a_name_that_is_no_unicode_is_told_in_escapes() -> None:
    error = ErrorBody(code="ENTRYPOINT_FAILED", message="ValueError: no file " + os.fsdecode(b"\xff."))
    (frame,) = FrameBuffer().feed(pack(Ended(outcome="failed", error=error)))
    assert isinstance(frame, Ended)
    assert frame.error == error.changed(message="ValueError: no file \\udcff.")


def test_a_frame_that_no_trainer_takes_is_an_error(end: RunnerEnd) -> None:
    end.send(Ready(pid=1, torch="2", seconds=0.1))
    with pytest.raises(BadMessage, match="ready"):
        end.channel.poll()


DOINGS: dict[str, Callable[[TrainerChannel], object]] = {
    "poll": TrainerChannel.poll,
    "ask": lambda channel: channel.ask(Verify(shards=(1,)), Verified),
    "send": lambda channel: channel.send(Verify(shards=(1,))),
    "await_deadline": TrainerChannel.await_deadline,
    "plan": TrainerChannel.plan,
}


@pytest.mark.parametrize("doing", DOINGS)
def test_a_closed_socket_means_that_the_runner_is_gone(end: RunnerEnd, doing: str) -> None:
    end.sock.close()
    with pytest.raises(RunnerGone):
        DOINGS[doing](end.channel)


def test_runner_gone_passes_user_code_that_catches_exceptions(end: RunnerEnd) -> None:
    assert not issubclass(RunnerGone, Exception)


@pytest.mark.parametrize("order", [Deadline(boottime_s=clock.boottime_s() + 3600), Stop(reason="shutdown")])
def test_past_its_deadline_a_trainer_waits_for_a_later_one_or_a_stop(end: RunnerEnd, order: Frame) -> None:
    end.send(Deadline(boottime_s=clock.boottime_s() - 1), Save())
    end.channel.poll()
    timer = threading.Timer(0.3, end.send, (order,))
    began = time.monotonic()
    timer.start()
    end.channel.await_deadline()
    assert time.monotonic() - began >= 0.25
    timer.join()


def test_a_stop_does_not_suffice_where_something_is_to_be_committed(end: RunnerEnd) -> None:
    end.send(Stop(reason="preempted"))
    end.channel.poll()
    timer = threading.Timer(0.3, end.send, (Deadline(boottime_s=clock.boottime_s() + 60),))
    began = time.monotonic()
    timer.start()
    end.channel.await_deadline(stop_suffices=False)
    assert time.monotonic() - began >= 0.25
    timer.join()


# --- events ----------------------------------------------------------------------------------------------------------


def test_events_are_complete_and_numbered_without_gaps(end: RunnerEnd, recorder: Recorder) -> None:
    recorder.record("train.metrics", step=4, data={"loss": torch.tensor(0.5, requires_grad=True), "n": np.int64(3)})
    recorder.record("app.seen", severity="warning")
    recorder.flush()
    events = [Event.parse(event) for event in end.events()]
    assert [(event.id, event.number) for event in events] == [("t-1-1", 1), ("t-1-2", 2)]
    assert events[0].data == {"loss": 0.5, "n": 3}
    assert (events[0].job, events[0].attempt, events[0].lease_epoch, events[0].step) == ("j-1", 1, 2, 4)
    assert (events[1].severity, events[1].step, events[1].data) == ("warning", None, {})


def test_events_wait_for_company_but_no_longer_than_a_fifth_of_a_second(end: RunnerEnd) -> None:
    now_s = 5.0
    recorder = Recorder(end.channel.send, producer="t-1", common=COMMON, offer=end.channel.offer, clock_s=lambda: now_s)
    recorder.record("app.one")
    now_s = 5.19
    recorder.flush_if_due()
    assert end.events() == []
    now_s = 5.21
    recorder.flush_if_due()
    assert [event["type"] for event in end.events()] == ["app.one"]


def test_a_full_batch_goes_at_once(end: RunnerEnd, recorder: Recorder) -> None:
    for _ in range(256):
        recorder.record("app.one")
    assert len(end.events()) == 256


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (math.nan, "NaN"),
        (-math.inf, "-Infinity"),
        (2**70, str(2**70)),
        ("x" * 40_000, "x" * (MAX_TEXT_CHARS - 1) + "…"),
        ("\ud800é", "?é"),
        ({"a": [math.inf, (1, None)]}, {"a": ["Infinity", [1, None]]}),
        (torch.ones(2), "tensor([1., 1.])"),
    ],
)
def test_whatever_is_recorded_can_be_said_on_the_wire(
    end: RunnerEnd, recorder: Recorder, value: object, told: object
) -> None:
    recorder.record("app.one", data={"value": value})
    recorder.flush()
    assert [Event.parse(event).data for event in end.events()] == [{"value": told}]


def test_several_threads_record_without_gaps_and_in_order(end: RunnerEnd, recorder: Recorder) -> None:
    def work() -> None:
        for _ in range(100):
            recorder.record("app.one")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    recorder.flush()
    assert [event["number"] for event in end.events()] == list(range(1, 401))


def test_log_lines_become_events_with_their_traceback(end: RunnerEnd, recorder: Recorder) -> None:
    log = logging.Logger("user.code")
    log.addHandler(RecordingHandler(recorder, step=lambda: 7))
    log.debug("unseen")
    try:
        int("broken")
    except ValueError:
        log.exception("it %s", "broke", extra={"size": 3})
    recorder.flush()
    (event,) = [Event.parse(event) for event in end.events()]
    assert (event.type, event.severity, event.step) == ("log.line", "error", 7)
    assert (event.data["message"], event.data["fields"]) == ("it broke", {"size": 3})
    assert "ValueError: invalid literal" in str(event.data["traceback"])


def test_a_bad_log_call_does_not_end_the_training_that_makes_it(
    end: RunnerEnd, recorder: Recorder, capsys: pytest.CaptureFixture[str]
) -> None:
    log = logging.Logger("user.code")
    log.addHandler(RecordingHandler(recorder))
    log.warning("value %d", "no number")
    log.warning("goes on")
    recorder.flush()
    (event,) = [Event.parse(event) for event in end.events()]
    assert event.data["message"] == "goes on"
    assert "--- Logging error ---" in capsys.readouterr().err


def test_a_process_forked_by_user_code_says_nothing_in_the_trainers_name(end: RunnerEnd, recorder: Recorder) -> None:
    recorder.record("app.before")
    pid = os.fork()
    if pid == 0:
        recorder.detach()
        end.channel.detach()
        recorder.record("app.child")
        recorder.flush()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    recorder.record("app.after")
    recorder.flush()
    assert [(event["number"], event["type"]) for event in end.events()] == [(1, "app.before"), (2, "app.after")]


_SLOW_RUNNER = """
import json, socket, sys
from railbus_runner.frames import Events, FrameBuffer
sock, buffer, found = socket.socket(fileno=int(sys.argv[1])), FrameBuffer(), []
print("ready", flush=True)
while data := sock.recv(1 << 16):
    for frame in buffer.feed(data):
        found += frame.events if isinstance(frame, Events) else [{"type": frame.f, "data": {}}]
print(json.dumps(found))
"""


def test_a_runner_that_stands_still_holds_up_no_step_and_hears_all_later(end: RunnerEnd) -> None:
    recorder = Recorder(end.channel.send, producer="t-1", common=COMMON, offer=end.channel.offer)
    pulse = Pulse(end.channel.offer, every_s=0.0)
    runner = subprocess.Popen(
        [sys.executable, "-c", _SLOW_RUNNER, str(end.sock.fileno())],
        pass_fds=[end.sock.fileno()],
        stdout=subprocess.PIPE,
        text=True,
    )
    end.sock.close()
    assert runner.stdout is not None
    with runner, runner.stdout as out:
        assert out.readline() == "ready\n"
        runner.send_signal(signal.SIGSTOP)
        for step in range(20_000):
            recorder.record("train.metrics", step=step, data={"loss": 0.5})
            recorder.flush_if_due()
            pulse.beat()
            end.channel.poll()
        recorder.record("job.first_step", step=20_000)
        end.channel.send(Verify(shards=(1,)))  # there is room left for what must go
        runner.send_signal(signal.SIGCONT)
        recorder.flush()
        end.theirs.close()
        found = json.loads(out.read())
    steps = [event["step"] for event in found if event["type"] == "train.metrics"]
    lost = sum(event["data"]["types"]["train.metrics"] for event in found if event["type"] == "events.dropped")
    assert len(steps) + lost == 20_000
    assert (steps[0], steps[-1]) == (0, 19_999)
    assert lost > 0
    assert [event["type"] for event in found if event["type"] in {"job.first_step", "verify"}] == [
        "verify", "job.first_step"
    ]  # fmt: skip


# --- metrics ---------------------------------------------------------------------------------------------------------


def test_metrics_are_thinned_to_twenty_a_second_and_the_last_is_always_told(end: RunnerEnd, recorder: Recorder) -> None:
    now = 100.0
    curves = Curves(recorder, clock_s=lambda: now)
    for step in range(1, 1001):  # a step each millisecond
        curves.log(step, {"loss": torch.tensor(float(step))})
        now += 0.001
    curves.log(1000, {"accuracy": 0.5})
    curves.flush()
    recorder.flush()
    events = end.events()
    losses = [event["step"] for event in events if "loss" in event["data"]]  # type: ignore[operator]
    assert 19 <= len(losses) <= 22
    assert (losses[0], losses[-1]) == (1, 1000)
    assert curves.latest == {"loss": 1000.0, "accuracy": 0.5}


def test_a_waiting_metric_keeps_no_graph(recorder: Recorder) -> None:
    curves = Curves(recorder, clock_s=lambda: 1.0)
    curves.log(1, {"loss": 1.0})
    loss = torch.ones(1, requires_grad=True) * 2
    curves.log(2, {"loss": loss})
    ((_, waiting),) = [series.waiting for series in curves._series.values() if series.waiting is not None]
    kept = waiting["loss"]
    assert isinstance(kept, torch.Tensor)
    assert kept.grad_fn is None


@pytest.mark.parametrize("value", ["good", [1.0], torch.ones(2), None, {"a": 1}])
def test_a_metric_that_is_no_number_is_refused_by_name(recorder: Recorder, value: object) -> None:
    with pytest.raises(TypeError, match="metric 'loss'"):
        Curves(recorder).log(1, {"loss": value})


def test_a_writer_whose_socket_the_kernel_has_dropped_counts_as_refused(end: RunnerEnd) -> None:
    end.channel.open_writer()
    end.send(WriterOpened())
    end.channel.poll()
    assert end.channel.writer is None
    assert end.channel.writer_refused is not None
    assert "too many open files" in end.channel.writer_refused.message
