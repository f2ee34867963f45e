"""Real trainer processes with a runner's end of a few lines."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from railbus_runner import trainer
from railbus_runner.frames import Commit, Deadline, Ended, Events, Frame, Refused, Save, Saving, Stop, Verified, Verify
from railbus_runner.trainer import num_threads
from railbus_shared import clock, files
from railbus_shared.contracts.artifacts import CheckpointMeta, Column
from railbus_shared.contracts.devices import DeviceInfo
from railbus_shared.contracts.events import Event
from railbus_shared.contracts.jobs import ErrorBody
from railbus_shared.contracts.model import JsonMap
from railbus_shared.layout import Layout
from trainers import TRACE, Array, Renewal, RunnerEnd, WarmHost, final_bits, metas, plan, usual, write_dataset

pytestmark = pytest.mark.timeout(120)  # each trainer imports torch, which takes seconds on a busy machine

CODE = """
import logging, os, random, signal, sys, time
import numpy as np
import torch
from pydantic import Field
from railbus_runner.context import TrainContext
from railbus_shared.contracts.model import Contract

class Params(Contract):
    epochs: int = Field(default=3, ge=1)
    lr: float = Field(default=0.05, gt=0)
    kill_at: int = -1
    pause_s: float = 0.0
    shuffle: bool = True

def train(ctx: TrainContext) -> None:
    p = ctx.params_as(Params)
    model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Dropout(0.5), torch.nn.Linear(16, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=p.lr)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.9)
    train = ctx.stream("train", batch_size=8, shuffle=p.shuffle, track=True)
    own = np.random.default_rng(1)
    ctx.track(model=model, optimizer=optimizer, scheduler=scheduler, own=own)
    ctx.resume()
    for epoch in train.epochs(p.epochs):
        for batch in train:
            ctx.extras["drawn"] = ctx.extras.get("drawn", 0.0) + own.random()
            noise = random.random() + np.random.normal()
            loss = torch.nn.functional.cross_entropy(model(batch["x"] * (1 + 0.01 * noise)), batch["y"])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            ctx.step(loss=loss)
            time.sleep(p.pause_s)
            if ctx.global_step == p.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
        with torch.no_grad():
            rights = [model(b["x"]).argmax(1) == b["y"] for b in ctx.stream("test", batch_size=5, shuffle=False)]
        ctx.log(accuracy=torch.cat(rights).float().mean())

def nothing(ctx): ...

def broken(ctx):
    ctx.step(loss=1.0)
    raise RuntimeError("it broke\\nin two lines")

def deep(ctx):
    try:
        deep(ctx)
    except RecursionError as exc:
        raise ValueError("x" * 5000) from exc

def leaves(ctx):
    sys.exit(0)

def leaves_with_a_code(ctx):
    sys.exit(42)

def exhausts(ctx):
    torch.empty(1 << 60, dtype=torch.uint8)

def catches(ctx):
    ctx.track(model=torch.nn.Linear(1, 1))
    while True:
        try:
            ctx.step()
            time.sleep(0.01)
        except Exception:
            pass

def polite(ctx):
    ctx.track(model=torch.nn.Linear(1, 1))
    while not ctx.stopping:
        ctx.step()
        time.sleep(0.01)

def steps(ctx):
    for _ in range(20):
        ctx.step()
        time.sleep(0.05)

def untidy(ctx):
    ctx.track(model=torch.nn.Linear(1, 1))
    ctx.resume()
    ctx.track(late=torch.nn.Linear(1, 1))

def begins(ctx):
    model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Dropout(0.5), torch.nn.Linear(16, 3))
    try:
        ctx.load("m/checkpoint-000001")
    except ValueError as exc:
        ctx.event("refused", why=str(exc))
    ctx.track(model=model)
    ctx.load("m/checkpoint-000001", only=["0.*"])
    path = ctx.params["folder"] + "/first.pt"
    torch.save(model[0].state_dict(), path)
    other = torch.nn.Linear(4, 16)
    done = ctx.load_foreign(path, into=other)
    ctx.event("compared", same=torch.equal(other.weight, model[0].weight), loaded=list(done.loaded))

def talks(ctx):
    ctx.event("sample_seen", size=3)
    ctx.log_text("sample", "to be")
    logging.getLogger("mine").info("a line")
    try:
        ctx.event("Not A Name")
    except ValueError as exc:
        ctx.event("refused", why=str(exc))
    if os.fork() == 0:
        logging.getLogger("mine").warning("of a child")
        ctx.event("of_a_child")
        os._exit(0)
    os.wait()
    ctx.event("threads_counted", torch=torch.get_num_threads(), env=os.environ["OMP_NUM_THREADS"],
              trace=os.environ["TRACEPARENT"],
              cuda=os.environ["CUDA_VISIBLE_DEVICES"], device=str(ctx.device), seed=torch.initial_seed(),
              rank=ctx.rank, world=ctx.world_size, job=ctx.job, params=dict(ctx.params),
              splits=list(ctx.dataset.schema.splits))
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """100 samples of three clouds in four dimensions, and the code of `CODE` as module `rb_loop`."""
    generator = np.random.default_rng(0)
    labels: Array = generator.integers(0, 3, 100)
    features: Array = (generator.normal(size=(100, 4)) + labels[:, None]).astype(np.float32)
    described = {"x": Column(dtype="float32", shape=(4,)), "y": Column(dtype="int64", shape=(), num_classes=3)}
    write_dataset(tmp_path, {"x": features, "y": labels}, described=described, splits={"train": 84, "test": 16})
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "rb_loop.py").write_text(CODE)
    return tmp_path


@pytest.fixture(scope="module", autouse=True)
def forks(warm: WarmHost) -> Iterator[None]:
    WARM.append(warm)
    yield
    WARM.remove(warm)


WARM: list[WarmHost] = []


def start(root: Path, function: str, *, on_frame: Any = None, **options: Any) -> RunnerEnd:
    return RunnerEnd(WARM[0], plan(root, f"rb_loop:{function}", code=root / "code", **options), on_frame=on_frame)


def run(root: Path, function: str, **options: Any) -> RunnerEnd:
    end = start(root, function, **options)
    end.run()
    return end


# --- the usual life --------------------------------------------------------------------------------------------------


def test_a_job_trains_to_its_end_and_leaves_a_checkpoint_and_a_schema(root: Path) -> None:
    end = run(root, "train")
    assert end.exit_code == 0
    assert end.ended.outcome == "succeeded"
    (meta,) = metas(root)
    assert (meta.step, meta.reason, meta.precision, meta.parent) == (33, "end", "float32", None)
    assert (meta.samples_seen, meta.devices, meta.entrypoint) == (252, ("h-cpu0",), "rb_loop:train")
    assert meta.metrics == end.ended.metrics
    assert set(meta.metrics) == {"loss", "accuracy"}
    assert meta.model_schema_sha256 == files.sha256_file(Layout(root).model_schema("m"))
    asked = plan(root, "rb_loop:train", code=root / "code").spec
    assert (meta.spec_sha256, meta.params, meta.policy) == (asked.digest, asked.params, asked.checkpoint)
    assert [frame.f for frame in end.frames] == ["verify", "commit", "ended"]
    assert sorted(end.ahead[0].shards) == [0, 1], "told before the first was asked for"


def test_its_events_are_valid_numbered_without_gaps_and_tell_the_first_step_and_the_last_loss(root: Path) -> None:
    end = run(root, "train")
    events = [Event.parse(event) for event in end.events]
    assert [event.number for event in events] == list(range(1, len(events) + 1))
    assert {(event.source, event.job, event.attempt, event.producer) for event in events} == {
        ("trainer", "j-1", 1, "trainer-1")
    }
    assert [event.step for event in events if event.type == "job.first_step"] == [1]
    assert [event.step for event in events if event.type == "train.metrics" and "loss" in event.data][-1] == 33
    assert len(end.curve("accuracy")) >= 1


def test_the_loss_is_the_golden_one(root: Path) -> None:
    """A change of this number changes what every user's seed means; the order of the data has its own such test."""
    end = run(root, "train", params={"shuffle": False})
    assert end.ended.metrics["loss"] == pytest.approx(GOLDEN, rel=1e-4)


GOLDEN = 0.160943


def test_the_context_says_what_the_plan_says_and_a_forked_child_says_nothing(root: Path) -> None:
    end = run(root, "talks", params={"a": [1, {"b": None}]})
    assert end.ended.outcome == "succeeded"
    (seen,) = end.of_type("app.threads_counted")
    data = seen["data"]
    assert isinstance(data, dict)
    count = len(os.sched_getaffinity(0))
    assert (data["torch"], data["env"], data["cuda"], data["device"]) == (count, str(count), "", "cpu")
    assert [data["trace"], *(event["trace"] for event in end.events)] == [TRACE] * (len(end.events) + 1)
    assert (data["seed"], data["rank"], data["world"], data["job"]) == (7, 0, 1, "j-1")
    assert (data["params"], data["splits"]) == ({"a": [1, {"b": None}]}, ["train", "test"])
    assert [event["data"] for event in end.of_type("train.text")] == [{"name": "sample", "text": "to be"}]
    assert [event["data"] for event in end.of_type("app.sample_seen")] == [{"size": 3}]
    assert len(end.of_type("app.refused")) == 1
    (line,) = end.of_type("log.line")
    assert line["data"] == {"logger": "mine", "message": "a line", "fields": {}}
    assert [event["number"] for event in end.events] == list(range(1, len(end.events) + 1))


def test_nothing_tracked_means_no_checkpoint(root: Path) -> None:
    end = run(root, "nothing")
    assert end.ended == Ended(outcome="succeeded")
    assert not Layout(root).models.exists()


# --- checkpoints and resuming ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kill_at", [1, 11, 17])
def test_killed_and_resumed_a_job_ends_with_the_same_bits(root: Path, kill_at: int) -> None:
    """At the first step, at the end of an epoch, and within one."""
    expected, metrics = whole_run(root)
    killed = run(root, "train", params={"kill_at": kill_at}, checkpoint={"every_steps": 1, "keep_last": 2})
    assert killed.exit_code == -signal.SIGKILL
    resumed = run(root, "train", attempt=2, recorded=killed.recorded)
    assert [event["step"] for event in resumed.of_type("checkpoint.resumed")] == [kill_at]
    assert metas(root)[-1].step == 33
    assert (final_bits(root), resumed.ended.metrics) == (expected, metrics)


def whole_run(root: Path) -> tuple[bytes, JsonMap]:
    """What an undisturbed job of the same seed ends with."""
    end = run(root, "train", job="j-whole")
    return final_bits(root), end.ended.metrics


class Once:
    """Sends an order when the trainer has told its first events, and answers as usual."""

    def __init__(self, *orders: Frame) -> None:
        self._orders = orders

    def __call__(self, _end: RunnerEnd, frame: Frame) -> Sequence[Frame]:
        orders, self._orders = (self._orders, ()) if isinstance(frame, Events) else ((), self._orders)
        return (*usual(frame), *orders)


def test_stopped_within_an_epoch_and_resumed_a_job_ends_with_the_same_bits(root: Path) -> None:
    expected, metrics = whole_run(root)
    stopped = run(root, "train", params={"pause_s": 0.3}, on_frame=Once(Stop(reason="preempted")))
    assert (stopped.exit_code, stopped.ended.outcome) == (0, "stopped")
    assert metas(root)[-1].reason == "stop"
    assert 0 < metas(root)[-1].step < 33
    resumed = run(root, "train", attempt=2, recorded=stopped.recorded)
    assert (final_bits(root), resumed.ended.metrics) == (expected, metrics)
    assert metas(root)[-1].parent == metas(root)[-2].number
    assert linked_to_its_parent(root, metas(root)[-1])


def linked_to_its_parent(root: Path, meta: CheckpointMeta) -> bool:
    """Whether a meta holds the hash of its parent's, as that lies on disk."""
    parent = Layout(root).checkpoint_meta("m", meta.parent or 0)
    return meta.parent_sha256 == files.sha256_file(parent)


def test_the_policy_says_when_and_how_many_are_kept(root: Path) -> None:
    end = run(root, "train", checkpoint={"every_steps": 5, "keep_last": 3})
    commits = [frame.meta for frame in end.frames if isinstance(frame, Commit)]
    assert [meta.step for meta in commits] == [5, 10, 15, 20, 25, 30, 33]
    assert [(meta.number, meta.step, meta.parent) for meta in metas(root)] == [(5, 25, 4), (6, 30, 5), (7, 33, 6)]
    assert len(end.of_type("checkpoint.removed")) == 4
    assert all(linked_to_its_parent(root, meta) for meta in metas(root)[1:])
    timed = run(root, "train", job="j-2", params={"epochs": 1, "pause_s": 0.05}, checkpoint={"every_s": 0.1})
    assert len([frame for frame in timed.frames if isinstance(frame, Commit)]) >= 3


def test_a_checkpoint_that_is_asked_for_is_begun_at_the_next_step_and_that_is_told(root: Path) -> None:
    end = run(root, "train", params={"pause_s": 0.1}, on_frame=Once(Save(number=3)))
    requested, last = (frame.meta for frame in end.frames if isinstance(frame, Commit))
    assert (requested.reason, last.reason) == ("request", "end")
    assert [frame for frame in end.frames if isinstance(frame, Saving)] == [Saving(number=3, step=requested.step)]


def test_who_asks_a_trainer_that_tracks_nothing_is_told_so(root: Path) -> None:
    end = run(root, "steps", on_frame=Once(Save(number=1)))
    (told,) = [frame for frame in end.frames if isinstance(frame, Saving)]
    assert told.error is not None
    assert (told.error.code, "nothing is tracked" in told.error.message) == ("CONFLICT", True)


def test_a_refused_commit_ends_the_trainer_and_leaves_nothing_of_the_checkpoint(root: Path) -> None:
    refused = Refused(number=1, error=ErrorBody(code="STALE_LEASE_EPOCH", message="stale"))
    end = run(root, "train", on_frame=lambda _end, f: [refused] if isinstance(f, Commit) else None)
    assert (end.exit_code, end.ended.outcome) == (1, "failed")
    assert end.ended.error is not None
    assert end.ended.error.code == "STALE_LEASE_EPOCH"
    assert list(Layout(root).checkpoints("m").glob("*.pt")) == []
    assert list(Layout(root).checkpoints("m").glob(".checkpoint*")) == []


def test_a_checkpoint_that_was_recorded_when_the_trainer_died_is_completed_and_resumed_from(root: Path) -> None:
    def die(end: RunnerEnd, frame: Frame) -> Sequence[Frame] | None:
        if isinstance(frame, Commit) and frame.meta.step == 6:
            end.kill()
            return []
        return None

    killed = run(root, "train", checkpoint={"every_steps": 3}, on_frame=die)
    assert [meta.step for meta in metas(root)] == [3]
    resumed = run(root, "train", attempt=2, recorded=killed.recorded)
    assert len(resumed.of_type("checkpoint.completed")) == 1
    assert [event["step"] for event in resumed.of_type("checkpoint.resumed")] == [6]


def test_the_same_checkpoint_unrecorded_is_swept_and_the_older_one_counts(root: Path) -> None:
    def die(end: RunnerEnd, frame: Frame) -> Sequence[Frame] | None:
        if isinstance(frame, Commit) and frame.meta.step == 6:
            end.kill()
            return []
        return None

    run(root, "train", checkpoint={"every_steps": 3}, on_frame=die)
    resumed = run(root, "train", attempt=2)
    assert len(resumed.of_type("checkpoint.swept")) == 1
    assert [event["step"] for event in resumed.of_type("checkpoint.resumed")] == [3]


def test_a_damaged_newest_checkpoint_is_told_and_the_older_one_taken(root: Path) -> None:
    killed = run(root, "train", params={"kill_at": 9}, checkpoint={"every_steps": 4})
    os.truncate(Layout(root).checkpoints("m") / "checkpoint-000002.pt", 1000)
    resumed = run(root, "train", attempt=2, recorded=killed.recorded)
    (rejected,) = resumed.of_type("checkpoint.rejected")
    assert "1000 bytes" in str(rejected["data"])
    assert [event["step"] for event in resumed.of_type("checkpoint.resumed")] == [4]
    assert resumed.ended.outcome == "succeeded"


def test_a_recorded_checkpoint_that_is_gone_is_told(root: Path) -> None:
    killed = run(root, "train", params={"kill_at": 9}, checkpoint={"every_steps": 4})
    for path in Layout(root).checkpoints("m").glob("checkpoint-*"):
        path.unlink()
    begun = run(root, "train", attempt=2, recorded=killed.recorded)
    assert "not there" in str(begun.of_type("checkpoint.rejected")[0]["data"])
    assert begun.of_type("checkpoint.resumed") == []
    assert (metas(root)[-1].step, metas(root)[-1].number) == (33, 3)


def test_a_job_may_begin_from_a_named_checkpoint_of_another(root: Path) -> None:
    run(root, "train", job="j-old", params={"epochs": 1})
    end = run(root, "train", resume_from="checkpoint-000001")
    (resumed,) = end.of_type("checkpoint.resumed")
    assert isinstance(resumed["data"], dict)
    assert (resumed["step"], resumed["data"]["from_job"]) == (11, "j-old")
    assert metas(root)[-1].parent == 1
    assert linked_to_its_parent(root, metas(root)[-1])
    absent = run(root, "train", job="j-3", resume_from="checkpoint-000099")
    assert absent.ended.error is not None
    assert absent.ended.error.code == "CHECKPOINT_NOT_FOUND"


def test_a_job_may_begin_from_weights_of_another_model_and_of_a_file(root: Path) -> None:
    run(root, "train", job="j-old", params={"epochs": 1})
    end = run(root, "begins", model="n", params={"folder": str(root)})
    assert end.ended.outcome == "succeeded", end.ended.error
    (refused,) = end.of_type("app.refused")
    assert "into=model" in str(refused["data"])
    first, second = [event["data"] for event in end.of_type("checkpoint.loaded")]
    assert isinstance(first, dict)
    assert isinstance(second, dict)
    assert (first["checkpoint"], first["from_job"], first["loaded"]) == ("checkpoint-000001", "j-old", 2)
    assert (Path(str(second["path"])).name, second["loaded"]) == ("first.pt", 2)
    assert [event["data"] for event in end.of_type("app.compared")] == [{"same": True, "loaded": ["weight", "bias"]}]


def test_another_architecture_under_the_same_model_name_is_refused(root: Path) -> None:
    run(root, "polite", on_frame=Once(Stop(reason="preempted")))
    end = run(root, "train", job="j-2")
    assert end.ended.error is not None
    assert end.ended.error.code == "CONFLICT"
    assert "parameter" in end.ended.error.message


# --- orders and losses -----------------------------------------------------------------------------------------------


def test_code_that_catches_every_exception_is_stopped_all_the_same(root: Path) -> None:
    end = run(root, "catches", on_frame=Once(Stop(reason="cancelled")))
    assert end.ended.outcome == "stopped"
    assert [meta.reason for meta in metas(root)] == ["stop"]


def test_code_that_returns_when_it_sees_the_stop_has_stopped(root: Path) -> None:
    end = run(root, "polite", on_frame=Once(Stop(reason="shutdown")))
    assert end.ended.outcome == "stopped"
    assert [meta.reason for meta in metas(root)] == ["stop"]


def test_when_the_runner_is_gone_the_trainer_ends_at_once(root: Path) -> None:
    def leave(end: RunnerEnd, frame: Frame) -> Sequence[Frame] | None:
        if isinstance(frame, Events):
            end.hang_up()
            return []
        return None

    end = run(root, "catches", on_frame=leave)
    assert end.exit_code == trainer.EXIT_RUNNER_GONE
    assert metas(root) == []


def test_past_its_deadline_a_trainer_takes_no_step_until_there_is_a_later_one(root: Path) -> None:
    def pause(end: RunnerEnd, frame: Frame) -> Sequence[Frame] | None:
        if isinstance(frame, Events) and not renewal.is_over:
            renewal.lapse()
            time.sleep(0.5)
            return [Deadline(boottime_s=clock.boottime_s() + 60)]
        return None

    end = start(root, "train", params={"pause_s": 0.5, "epochs": 1}, deadline_s=0.0, on_frame=pause)
    time.sleep(1.5)  # in which it may take no step
    assert end.is_silent()
    with Renewal(end) as renewal:
        end.run()
    assert end.ended.outcome == "succeeded"
    waits = end.of_type("job.lease_awaited")
    assert len(waits) == 1
    assert [event["step"] for event in end.of_type("train.metrics")][-1] == 11


# --- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "code", "message"),
    [
        ("broken", "ENTRYPOINT_FAILED", "RuntimeError: it broke"),
        ("deep", "ENTRYPOINT_FAILED", "ValueError: xxx"),
        ("leaves", "ENTRYPOINT_FAILED", "the entrypoint called sys.exit(0)"),
        ("leaves_with_a_code", "ENTRYPOINT_FAILED", "the entrypoint called sys.exit(42)"),
        ("exhausts", "OUT_OF_MEMORY", "the host ran out of memory"),
        ("untidy", "ENTRYPOINT_FAILED", "ValueError: track(late) after resume()"),
        ("nobody", "UNKNOWN_ENTRYPOINT", "field 'entrypoint' has value 'rb_loop:nobody'"),
    ],
)
def test_a_failure_says_what_and_where(root: Path, function: str, code: str, message: str) -> None:
    end = run(root, function)
    assert (end.exit_code, end.ended.outcome) == (42 if function == "leaves_with_a_code" else 1, "failed")
    error = end.ended.error
    assert error is not None
    assert error.code == code
    assert error.message.startswith(message)
    text = error.details.get("traceback", "")
    assert isinstance(text, str)
    assert len(text) <= 8192
    if code != "UNKNOWN_ENTRYPOINT":
        assert "rb_loop.py" in text or text.startswith("…")
        assert "railbus_runner/trainer.py" not in text


@pytest.mark.parametrize(
    ("params", "message", "hint"),
    [
        ({"lr": "big"}, "params: field 'lr' has value 'big'", "without quotes"),
        ({"epochs": 0}, "params: field 'epochs' has value 0", ""),
        ({"epoch": 3}, "params: field 'epoch' has value 3", "did you mean 'epochs'?"),
    ],
)
def test_bad_params_are_named_with_value_and_remedy(root: Path, params: JsonMap, message: str, hint: str) -> None:
    error = run(root, "train", params=params).ended.error
    assert error is not None
    assert error.code == "BAD_PARAMS"
    assert error.message.startswith(message)
    assert hint in error.hint


def test_a_damaged_shard_fails_the_job_with_what_the_dataloader_said(root: Path) -> None:
    said = ErrorBody(code="SHARD_CORRUPT", message="shard 'x' does not match", hint="import it again")
    end = run(
        root, "train", on_frame=lambda _e, f: [Verified(shards=f.shards, error=said)] if isinstance(f, Verify) else None
    )
    assert end.ended.error == said


def test_the_thread_count_follows_the_leased_cores() -> None:
    def slot(*cores: int) -> DeviceInfo:
        return DeviceInfo(id="h-c", host="h", kind="cpu", name="c", index=0, cores=cores, memory_bytes=1)

    usable = sorted(os.sched_getaffinity(0))
    assert num_threads([slot(usable[0])]) == 1
    assert num_threads([slot(*usable), slot(usable[0], 9999)]) == len(usable)
    assert num_threads([slot()]) == len(usable)
    assert num_threads([]) == len(usable)


GPU = """
import sys
from railbus_runner.trainer import take_devices
from railbus_shared.contracts.devices import DeviceInfo
from railbus_shared.errors import BadSetting
try:
    take_devices([DeviceInfo(id="h-g", host="h", kind="gpu", name="g", uuid="GPU-absent", index=0, memory_bytes=1)])
except BadSetting as exc:
    sys.exit(0 if "can use none" in str(exc) else 1)
sys.exit(2)
"""


def test_a_leased_gpu_that_torch_cannot_use_is_refused_clearly() -> None:
    assert subprocess.run([sys.executable, "-c", GPU], check=False).returncode == 0
