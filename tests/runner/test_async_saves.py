"""Checkpoints that a writer process writes while the trainer goes on: real trainers, real writers, a runner's end of a
few lines."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fail_points
from railbus_runner import processes
from railbus_runner.channel import TrainerChannel
from railbus_runner.checkpointing.arena import make_arena, with_growth
from railbus_runner.checkpointing.async_saves import AsyncSaves, Lost
from railbus_runner.checkpointing.image import Image
from railbus_runner.frames import (
    ArenaMade,
    AwaitsWriter,
    Commit,
    Committed,
    Deadline,
    Frame,
    OpenWriter,
    Refused,
    Stop,
    Write,
    WriterLost,
    WriterRefused,
    pack,
)
from railbus_shared import clock
from railbus_shared.contracts.artifacts import CheckpointMeta, Column
from railbus_shared.contracts.events import Event
from railbus_shared.contracts.jobs import ErrorBody
from railbus_shared.contracts.model import JsonMap
from railbus_shared.layout import Layout
from trainers import Renewal, RunnerEnd, WarmHost, plan, write_dataset

pytestmark = pytest.mark.timeout(40)  # the pre-warmed process imports torch, which takes seconds on a busy machine

CODE = """
import os, signal, time
import torch

def ready(ctx):
    progress = ctx._progress
    while not progress._saver._beside.fits(1):
        ctx._channel.poll()
        progress._keeper.heed(ctx.global_step, progress._metrics)
        time.sleep(0.002)

def train(ctx):
    steps, waits = int(ctx.params["steps"]), ctx.params.get("waits", "always")
    model = torch.nn.Linear(300, 300)
    ctx.track(model=model)
    ctx.resume()
    while ctx.global_step < steps:
        with torch.no_grad():
            model.weight.fill_(ctx.global_step + 1)
        if ctx.global_step and waits == "always" or ctx.global_step == 1 and waits == "once":
            ready(ctx)
            if "pid_file" in ctx.params:
                os.kill(int(open(ctx.params["pid_file"]).read()), signal.SIGSTOP)
        ctx.step(loss=1.0)
        with torch.no_grad():
            model.weight.fill_(-1)  # the very next moment
        time.sleep(float(ctx.params.get("pause_s", 0)))
    with torch.no_grad():
        model.weight.fill_(ctx.global_step)

def fails(ctx):
    train(ctx)
    raise RuntimeError("no luck today")

def saves(ctx):
    model = torch.nn.Linear(300, 300)
    ctx.track(model=model)
    ctx.step()
    ready(ctx)
    ctx.step()
    ctx.save()
    ctx.event("saved", there=sorted(os.listdir(ctx.params["folder"])))
"""


@pytest.fixture(scope="module")
def points(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where fail points are armed."""
    return tmp_path_factory.mktemp("points")


@pytest.fixture(scope="module")
def warm(points: Path) -> Iterator[WarmHost]:
    env = {fail_points.FOLDER: str(points), "PYTHONPATH": fail_points.HERE}
    host = WarmHost(target=fail_points.TARGET, env=env)
    yield host
    host.close()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_dataset(
        tmp_path,
        {"x": np.zeros((4, 1), dtype=np.float32)},
        described={"x": Column(dtype="float32", shape=(1,))},
        splits={"train": 4},
    )
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "rb_beside.py").write_text(CODE)
    return tmp_path


OnFrame = Callable[[RunnerEnd, Frame], Sequence[Frame] | None]


def start(
    warm: WarmHost, root: Path, function: str = "train", *, on_frame: OnFrame | None = None, **options: Any
) -> RunnerEnd:
    options = {"params": {"steps": 4}, "checkpoint": {"mode": "async", "every_steps": 2}, **options}
    return RunnerEnd(warm, plan(root, f"rb_beside:{function}", code=root / "code", **options), on_frame=on_frame)


def run(warm: WarmHost, root: Path, function: str = "train", **options: Any) -> RunnerEnd:
    end = start(warm, root, function, **options)
    end.run()
    return end


def metas(root: Path) -> list[CheckpointMeta]:
    """Of all checkpoints, oldest first."""
    folder = Layout(root).checkpoints("m")
    return [CheckpointMeta.model_validate_json(path.read_bytes()) for path in sorted(folder.glob("*.meta.json"))]


def litter(root: Path) -> list[str]:
    return [path.name for path in Layout(root).checkpoints("m").iterdir() if path.name.startswith(".checkpoint")]


def saved_value(root: Path, meta: CheckpointMeta) -> set[float]:
    """What the weights of a checkpoint are, all of which are the number of their step."""
    state = torch.load(Layout(root).checkpoints("m") / meta.files[0].file, weights_only=True)
    return set(state["parts"]["model"]["weight"].unique().tolist())


def data_of(end: RunnerEnd, kind: str) -> list[JsonMap]:
    found = [event["data"] for event in end.of_type(kind)]
    assert all(isinstance(data, dict) for data in found)
    return found  # type: ignore[return-value]


def test_a_writer_writes_the_values_of_the_step_though_they_change_the_next_moment(warm: WarmHost, root: Path) -> None:
    """Also those of CPU tensors: pytorch #144657."""
    end = run(warm, root, params={"steps": 6})
    assert end.ended.outcome == "succeeded"
    assert [(meta.step, saved_value(root, meta)) for meta in metas(root)] == [(2, {2.0}), (4, {4.0}), (6, {6.0})]
    written = end.of_type("checkpoint.written")
    assert [(event["source"], event["step"]) for event in written] == [("writer", 2), ("writer", 4), ("writer", 6)]
    for data in data_of(end, "checkpoint.written"):
        assert (data["mode"], data["reason"], data["why"]) == ("async", "policy", "")
        stall_s, seconds = data["stall_s"], data["seconds"]
        assert isinstance(stall_s, float)
        assert isinstance(seconds, float)
        assert 0 <= stall_s <= seconds
    assert len(end.writers) == 1
    assert processes.process_info(end.writers[0]) is None
    events = [Event.parse(event) for event in end.events]
    for producer in {event.producer for event in events}:
        numbers = [event.number for event in events if event.producer == producer]
        assert numbers == list(range(1, len(numbers) + 1))
    assert [meta.parent for meta in metas(root)] == [None, 1, 2]


def test_a_small_state_is_written_by_the_trainer_itself_unless_asked_otherwise(warm: WarmHost, root: Path) -> None:
    end = run(warm, root, params={"steps": 4, "waits": "never"}, checkpoint={"every_steps": 2})
    assert end.writers == []
    assert [data["mode"] for data in data_of(end, "checkpoint.written")] == ["sync", "sync"]
    assert [data["why"] for data in data_of(end, "checkpoint.written")] == ["", ""]


def test_what_is_asked_for_by_the_entrypoint_is_durable_when_the_call_returns(warm: WarmHost, root: Path) -> None:
    folder = Layout(root).checkpoints("m")
    params = {"folder": str(folder)}
    end = run(warm, root, "saves", params=params, checkpoint={"mode": "async", "every_steps": 100})
    (saved,) = data_of(end, "app.saved")
    there = saved["there"]
    assert isinstance(there, list)
    assert "checkpoint-000001.meta.json" in there
    assert data_of(end, "checkpoint.written")[0]["mode"] == "async"


def test_the_next_one_waits_for_the_one_before_and_says_so(warm: WarmHost, root: Path) -> None:
    seen: list[Frame] = []

    def hold_the_first(end: RunnerEnd, frame: Frame) -> Sequence[Frame] | None:
        if end.committed is not None or not isinstance(frame, Commit | AwaitsWriter):
            return None
        seen.append(frame)
        commits = [frame for frame in seen if isinstance(frame, Commit)]
        if commits and len(seen) > 1:  # it has been ordered, and waited for
            time.sleep(held_s)
            end.committed = end.recorded
            end.send_writer(Committed(number=commits[0].meta.number))
        return []

    held_s = 0.5  # far longer than it takes a busy machine to find out that there is nothing to wait for
    end = run(warm, root, params={"steps": 4, "waits": "once"}, on_frame=hold_the_first)
    waited_s = [float(str(data["waited_s"])) for data in data_of(end, "checkpoint.written")]
    assert len(waited_s) == 2
    assert waited_s[0] < held_s <= waited_s[1]
    assert [meta.step for meta in metas(root)] == [2, 4]
    waits = [frame.is_waiting for frame in end.frames if isinstance(frame, AwaitsWriter)]
    assert waits == [True, False] * (len(waits) // 2)


def test_or_it_is_skipped_and_that_is_said(warm: WarmHost, root: Path) -> None:
    held: list[Commit] = []

    def hold_the_first(end: RunnerEnd, frame: Frame) -> Sequence[Frame] | None:
        if isinstance(frame, Commit) and not held:
            held.append(frame)
            return []
        if held and end.of_type("checkpoint.skipped") and end.committed is None:
            end.committed = end.recorded
            end.send_writer(Committed(number=held[0].meta.number))
        return None

    policy = {"mode": "async", "every_steps": 2, "when_busy": "skip"}
    end = run(
        warm, root, params={"steps": 5, "pause_s": 0.15, "waits": "once"}, checkpoint=policy, on_frame=hold_the_first
    )
    assert [event["step"] for event in end.of_type("checkpoint.skipped")] == [4]
    assert data_of(end, "checkpoint.skipped")[0]["why"] == "busy"
    assert [(meta.step, meta.reason) for meta in metas(root)] == [(2, "policy"), (5, "end")]


RECORDED = ("committed", "published", "retained")
"""Points that come after the job record names the checkpoint."""


@pytest.mark.parametrize("point", fail_points.STEPS)
def test_killed_at_any_step_a_writer_costs_a_checkpoint_or_nothing_and_another_takes_its_place(
    warm: WarmHost, root: Path, points: Path, point: str
) -> None:
    def arm(end: RunnerEnd, frame: Frame) -> Sequence[Frame] | None:
        if isinstance(frame, OpenWriter) and not end.writers:
            fail_points.arm(points, point)
        return None

    end = run(warm, root, params={"steps": 6}, on_frame=arm)
    assert not (points / point).exists()
    assert end.ended.outcome == "succeeded"
    assert len([frame for frame in end.frames if isinstance(frame, WriterLost)]) == 1
    assert len(end.writers) == 2
    assert litter(root) == []
    assert [saved_value(root, meta) for meta in metas(root)] == [{meta.step} for meta in metas(root)]
    failed = [event["step"] for event in end.of_type("checkpoint.failed")]
    if point in RECORDED:
        assert failed == []
        assert len(end.of_type("checkpoint.completed")) == (point == "committed")
        assert [(meta.step, meta.parent) for meta in metas(root)] == [(2, None), (4, 1), (6, 2)]
    else:
        assert failed == [2]
        assert len(end.of_type("checkpoint.swept")) == (point != "claimed")
        assert end.of_type("checkpoint.written")[0]["step"] == 3, "it saves again at once"


def test_what_a_lost_writer_had_not_committed_is_written_again_though_the_record_names_a_later_damaged_one(
    warm: WarmHost, root: Path, points: Path
) -> None:
    first = run(warm, root)
    assert first.committed is not None
    damaged = Layout(root).checkpoints("m") / metas(root)[-1].files[0].file
    damaged.write_bytes(b"x" + damaged.read_bytes()[1:])

    def arm(end: RunnerEnd, frame: Frame) -> Sequence[Frame] | None:
        if isinstance(frame, OpenWriter) and not end.writers:
            end.committed = first.committed
            fail_points.arm(points, "claimed")
        return None

    resumed = run(warm, root, params={"steps": 6}, attempt=2, recorded=first.committed, on_frame=arm)
    assert [event["step"] for event in resumed.of_type("checkpoint.resumed")] == [2]
    assert [event["step"] for event in resumed.of_type("checkpoint.failed")] == [4]
    assert [event["step"] for event in resumed.of_type("checkpoint.written")] == [5, 6]


def test_a_copy_that_fails_leaves_neither_trainer_nor_writer_waiting_for_the_other() -> None:
    class Failing(Image):
        def copy_to(self, arena: torch.Tensor, *, on_copied: Callable[[int], None] = lambda _: None) -> None:
            del on_copied
            super().copy_to(arena)
            raise RuntimeError("CUDA error")

    image = Failing.of({"a": torch.ones(3)})
    assert isinstance(image, Failing)
    (runner, ours), (writer, theirs) = socket.socketpair(), socket.socketpair()
    channel = TrainerChannel(ours)
    with runner, ours, writer, theirs.dup():
        saves = AsyncSaves(channel)
        saves.prepare(image.nbytes)
        channel.writer = theirs
        arena = make_arena(with_growth(image.nbytes), is_wanted=lambda: True)
        assert arena is not None
        socket.send_fds(writer, [pack(ArenaMade(nbytes=arena.nbytes))], [arena.descriptor])
        arena.close()
        while not saves.fits(image.nbytes):
            assert saves.heed() is None
        order = Write(nbytes=image.nbytes, step=1, fields={}, began_s=0.0, waited_s=0.0)
        with pytest.raises(RuntimeError, match="CUDA"):
            saves.order(order, image)
        assert not saves.is_busy
        assert saves.wait() is None
        while writer.recv(1 << 16):
            pass


def test_a_writer_that_is_found_gone_when_it_is_asked_for_more_memory_is_lost_and_nothing_more() -> None:
    (runner, ours), (writer, theirs) = socket.socketpair(), socket.socketpair()
    channel = TrainerChannel(ours)
    with runner, ours, theirs:
        saves = AsyncSaves(channel)
        saves.prepare(1000)
        channel.writer = theirs
        arena = make_arena(with_growth(1000), is_wanted=lambda: True)
        assert arena is not None
        with writer:
            socket.send_fds(writer, [pack(ArenaMade(nbytes=arena.nbytes))], [arena.descriptor])
            while not saves.fits(1000):
                assert saves.heed() is None
        assert os.fstat(arena.descriptor).st_blocks > 0
        saves.prepare(arena.nbytes + 1)
        assert not saves.fits(1)
        assert os.fstat(arena.descriptor).st_blocks == 0, "its memory is free, though it is open here still"
        arena.close()
        assert saves.heed() == Lost(None)
        saves.prepare(1000)
        assert not saves.fits(1)


@pytest.mark.parametrize("point", fail_points.STEPS)
def test_killed_at_any_step_of_its_writer_a_trainer_loses_nothing(
    warm: WarmHost, root: Path, points: Path, point: str
) -> None:
    """Nothing of what was copied; the writer finishes it."""

    def arm(end: RunnerEnd, frame: Frame) -> Sequence[Frame] | None:
        if isinstance(frame, OpenWriter):
            fail_points.arm(points, point, pids=[end.pid])
        return None

    killed = run(warm, root, params={"steps": 50, "pause_s": 0.05}, on_frame=arm)
    assert killed.exit_code == -signal.SIGKILL
    written = [event["step"] for event in killed.of_type("checkpoint.written")]
    assert written == [2] or (point, written) == ("claimed", [])  # when a number is claimed, the copy may not be whole
    resumed = run(warm, root, attempt=2, recorded=killed.committed)
    assert [event["step"] for event in resumed.of_type("checkpoint.resumed")] == written
    assert resumed.of_type("checkpoint.swept") == []
    assert litter(root) == []
    assert resumed.ended.outcome == "succeeded"


@pytest.mark.parametrize("mode", ["async", "sync"])
@pytest.mark.parametrize("point", fail_points.STEPS)
def test_killed_together_at_any_step_they_leave_a_checkpoint_or_litter_that_is_swept(
    warm: WarmHost, root: Path, points: Path, point: str, mode: str
) -> None:
    """As when their runner dies; and so does a trainer that writes by itself."""

    def arm(end: RunnerEnd, frame: Frame) -> Sequence[Frame] | None:
        if isinstance(frame, OpenWriter):
            fail_points.arm(points, point, pids=[end.pid, 0])
        return None

    if mode == "sync":
        fail_points.arm(points, point)
    policy = {"mode": mode, "every_steps": 2}
    params = {"steps": 50, "pause_s": 0.05, "waits": "always" if mode == "async" else "never"}
    killed = run(warm, root, params=params, checkpoint=policy, on_frame=arm)
    assert killed.exit_code == -signal.SIGKILL
    resumed = run(warm, root, params={**params, "steps": 2}, checkpoint=policy, attempt=2, recorded=killed.committed)
    assert (killed.committed is not None) == (point in RECORDED)
    assert [event["step"] for event in resumed.of_type("checkpoint.resumed")] == [2] * (point in RECORDED)
    assert len(resumed.of_type("checkpoint.completed")) == (point == "committed")
    assert len(resumed.of_type("checkpoint.swept")) == (point not in (*RECORDED, "claimed"))
    assert litter(root) == []
    assert [(meta.step, saved_value(root, meta)) for meta in metas(root)] == [(2, {2.0})]


@pytest.mark.parametrize("mode", ["async", "sync"])
def test_of_two_trainers_of_one_job_the_stale_one_adds_nothing_and_takes_nothing(
    warm: WarmHost, root: Path, mode: str
) -> None:
    """Its successor runs from begin to end while it waits for the answer to its commit."""
    options: dict[str, Any] = {
        "params": {"steps": 6, "waits": "always" if mode == "async" else "never"},
        "checkpoint": {"mode": mode, "every_steps": 2, "keep_last": 9},
    }
    later: list[RunnerEnd] = []

    def overtake(end: RunnerEnd, frame: Frame) -> Sequence[Frame] | None:
        if not isinstance(frame, Commit) or frame.meta.step < 4:
            return None
        later.append(run(warm, root, attempt=2, recorded=end.committed, **options))
        return [Refused(number=frame.meta.number, error=ErrorBody(code="STALE_LEASE_EPOCH", message="stale"))]

    stale = run(warm, root, on_frame=overtake, **options)
    (successor,) = later
    assert stale.ended.error is not None
    assert (stale.ended.outcome, stale.ended.error.code) == ("failed", "STALE_LEASE_EPOCH")
    assert successor.ended.outcome == "succeeded"
    assert [event["step"] for event in successor.of_type("checkpoint.resumed")] == [2]
    assert [(meta.step, meta.attempt) for meta in metas(root)] == [(2, 1), (4, 2), (6, 2)]
    assert [saved_value(root, meta) for meta in metas(root)] == [{2.0}, {4.0}, {6.0}]
    assert litter(root) == []
    assert len(list(Layout(root).checkpoints("m").glob("*.pt"))) == 3


@pytest.mark.parametrize("point", ["meta_drafted", "published"])
def test_a_trainer_that_was_stopped_past_the_lease_neither_commits_nor_removes_before_a_later_one(
    warm: WarmHost, root: Path, points: Path, point: str
) -> None:
    """It is stopped while it writes its second checkpoint, of which each replaces the one before."""
    armed, seen = threading.Event(), list[tuple[list[int], list[int]]]()

    def arm(end: RunnerEnd, frame: Frame) -> Sequence[Frame] | None:
        if (
            isinstance(frame, Commit)
            and not armed.is_set()
            and frame.meta.step == (2 if point == "meta_drafted" else 4)
        ):
            fail_points.arm(points, point, signal.SIGSTOP)
            armed.set()
        return None

    policy = {"mode": "sync", "every_steps": 2, "keep_last": 1}
    options: dict[str, Any] = {"params": {"steps": 6, "waits": "never"}, "checkpoint": policy, "deadline_s": 2.0}
    end = RunnerEnd(warm, plan(root, "rb_beside:train", code=root / "code", **options), on_frame=arm)

    def hold() -> None:
        while not armed.is_set() or (points / point).exists():
            end.send(Deadline(boottime_s=clock.boottime_s() + 2))
            time.sleep(0.1)
        time.sleep(2.2)
        os.kill(end.pid, signal.SIGCONT)
        time.sleep(0.5)  # in which it may do neither
        asked = [frame.meta.step for frame in end.frames if isinstance(frame, Commit)]
        seen.append((asked, [meta.step for meta in metas(root)]))
        end.send(Deadline(boottime_s=clock.boottime_s() + 60))

    with ThreadPoolExecutor(1) as pool:
        holding = pool.submit(hold)
        end.run()
        holding.result()
    assert seen == [([2], [2]) if point == "meta_drafted" else ([2, 4], [2, 4])]
    assert end.ended.outcome == "succeeded"
    assert [meta.step for meta in metas(root)] == [6]


def test_where_no_writer_can_be_had_the_trainer_writes_and_says_why(warm: WarmHost, root: Path) -> None:
    error = ErrorBody(code="TRAINER_LOST", message="the system refused the fork")

    def refuse(end: RunnerEnd, frame: Frame) -> Sequence[Frame] | None:
        if isinstance(frame, OpenWriter):
            return [WriterRefused(error=error)]
        if any(data["why"] == error.message for data in data_of(end, "checkpoint.written")):
            end.send(Stop(reason="cancelled"))
        return None

    end = run(warm, root, params={"steps": 10_000, "waits": "never", "pause_s": 0.02}, on_frame=refuse)
    assert end.ended.outcome == "stopped"
    assert all(data["mode"] == "sync" for data in data_of(end, "checkpoint.written"))


def test_a_refused_commit_of_the_writer_ends_the_trainer_and_leaves_nothing(warm: WarmHost, root: Path) -> None:
    refused = Refused(number=1, error=ErrorBody(code="STALE_LEASE_EPOCH", message="stale"))
    end = run(warm, root, on_frame=lambda _end, frame: [refused] if isinstance(frame, Commit) else None)
    assert (end.exit_code, end.ended.outcome) == (1, "failed")
    assert end.ended.error is not None
    assert end.ended.error.code == "STALE_LEASE_EPOCH"
    assert litter(root) == []
    assert list(Layout(root).checkpoints("m").glob("*.pt")) == []


def test_a_writer_that_was_stopped_past_the_lease_commits_only_within_a_later_one(warm: WarmHost, root: Path) -> None:
    def heed(end: RunnerEnd, frame: Frame) -> Sequence[Frame] | None:
        if isinstance(frame, OpenWriter):
            end.open_writer()
            (root / "writer.pid").write_text(str(end.writers[0]))  # by which the entrypoint stops it
            return []
        if isinstance(frame, AwaitsWriter) and frame.is_waiting:
            renewal.lapse()
            os.kill(end.writers[0], signal.SIGCONT)
            time.sleep(0.5)  # in which it may not commit
            assert end.is_writer_silent()
            end.send_writer(Deadline(boottime_s=clock.boottime_s() + 60))
        return None

    params = {"steps": 2, "pid_file": str(root / "writer.pid")}
    end = start(warm, root, params=params, deadline_s=Renewal.LIVES_S, on_frame=heed)
    with Renewal(end) as renewal:
        end.run()
    assert end.ended.outcome == "succeeded"
    assert [meta.step for meta in metas(root)] == [2]


def test_a_failing_entrypoint_waits_for_what_is_being_written(warm: WarmHost, root: Path) -> None:
    end = run(warm, root, "fails", params={"steps": 2})
    assert end.ended.outcome == "failed"
    assert [meta.step for meta in metas(root)] == [2]
    assert end.frames[-1] == end.ended
