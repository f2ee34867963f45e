"""Real trainers on a full disk, told to stop in time or too late, ended by SIGTERM, and with evaluations to keep."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from railbus_runner.frames import Commit, Events, Frame, Paused, Save, Saving, Stop
from railbus_shared import clock
from railbus_shared.contracts.artifacts import CheckpointMeta, Column
from railbus_shared.contracts.model import JsonMap
from railbus_shared.layout import Layout, checkpoint_stem
from trainers import RunnerEnd, WarmHost, plan, usual, write_dataset

pytestmark = pytest.mark.timeout(120)  # each trainer imports torch, which takes seconds on a busy machine

CODE = """
import multiprocessing, os, signal, time
import torch

def walk(ctx):
    model = torch.nn.Linear(256, 1024)
    ctx.track(model=model)
    ctx.resume()
    while ctx.global_step < ctx.params["steps"]:
        time.sleep(ctx.params.get("pause_s", 0.02))
        ctx.step(number=ctx.global_step)
        if os.path.exists(ctx.params.get("hold", "")):
            ctx._progress._saver.settle()
            ctx.event("held")
            ctx._progress._recorder.flush()
            while os.path.exists(ctx.params["hold"]):
                time.sleep(0.005)

def handle(ctx):
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
    worker.start()
    worker.terminate()
    worker.join()
    ctx.event("worker_ended", code=worker.exitcode)
    heard = []
    signal.signal(signal.SIGTERM, lambda *_: heard.append(ctx.event("reminded")))
    ctx.track(model=torch.nn.Linear(2, 2))
    ctx.event("ready")
    while not heard:
        ctx.step()
        time.sleep(0.05)

def deaf(ctx):
    ctx.event("ready")
    while True:
        ctx.event("alive")
        ctx.log(alive=1)
        time.sleep(0.05)

def evaluate(ctx):
    torch.manual_seed(1)
    model = torch.nn.Linear(4, 3)
    train = ctx.stream("train", batch_size=8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ctx.track(model=model, optimizer=optimizer)
    ctx.resume()
    for epoch in train.epochs(len(ctx.params["values"])):
        for batch in train:
            ctx.log(value=-1.0)  # within a step: of no state that can be kept
            loss = (model(batch["x"]) + torch.rand(3)).pow(2).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            ctx.step(loss=loss)
        torch.rand(7)
        ctx.log(value=ctx.params["values"][epoch])
        if epoch == ctx.params.get("kill_at"):
            os.kill(os.getpid(), signal.SIGKILL)
"""
WARM: list[WarmHost] = []


@pytest.fixture(scope="module", autouse=True)
def forks(warm: WarmHost) -> Iterator[None]:
    WARM.append(warm)
    yield
    WARM.remove(warm)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    features = np.random.default_rng(0).normal(size=(32, 4)).astype(np.float32)
    described = {"x": Column(dtype="float32", shape=(4,))}
    write_dataset(tmp_path, {"x": features}, described=described, splits={"train": 32})
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "rb_keep.py").write_text(CODE)
    return tmp_path


def run(root: Path, function: str, *, on_frame: Any = None, **options: Any) -> RunnerEnd:
    end = RunnerEnd(WARM[0], plan(root, f"rb_keep:{function}", code=root / "code", **options), on_frame=on_frame)
    end.run()
    return end


def metas(root: Path) -> list[CheckpointMeta]:
    folder = Layout(root).checkpoints("m")
    return [CheckpointMeta.model_validate_json(path.read_bytes()) for path in sorted(folder.glob("*.meta.json"))]


def data(event: JsonMap) -> dict[str, Any]:
    told = event["data"]
    assert isinstance(told, dict)
    return told


# --- a full disk -----------------------------------------------------------------------------------------------------


class Disk:
    """A disk of 4 MiB for the models, which is filled when the first checkpoint is on it."""

    def __init__(self, root: Path) -> None:
        self.folder = Layout(root).models
        self.filler = self.folder / "filler"
        self.orders: dict[str, Sequence[Frame]] = {}
        """What the trainer is told when it tells an event of this type."""
        self.cleared_by = ""
        """The event at which there is room again."""
        self.filled_by = ""
        """The mode in which a checkpoint must have been written before; else it is filled while the first one is."""
        self.hold = root / "hold"
        """While it is there, the trainer takes no step: what is written meanwhile would take the room to be filled."""
        self.is_over: Callable[[Frame], bool] = lambda _frame: False
        """At which frame the trainer is told to stop."""

    def __call__(self, _end: RunnerEnd, frame: Frame) -> Sequence[Frame] | None:
        orders: list[Frame] = []
        if isinstance(frame, Commit) and not self.filled_by and frame.meta.number == 1:
            self.fill()
        if isinstance(frame, Events):
            for event in frame.events:
                kind = str(event["type"])
                orders += self.orders.pop(kind, ())
                if kind == self.cleared_by:
                    self.filler.unlink(missing_ok=True)
                if kind == "checkpoint.written" and data(event)["mode"] == self.filled_by:
                    self.filled_by = "nobody any more"
                    self.hold.touch()
                if kind == "app.held":
                    self.fill()
                    self.hold.unlink()
        if self.is_over(frame):
            orders.append(Stop(reason="preempted", deadline_boottime_s=clock.boottime_s() + 1.5))
        return (*usual(frame), *orders) if orders else None

    def fill(self) -> None:
        """Leave half of what a checkpoint takes."""
        room = os.statvfs(self.folder)
        self.filler.write_bytes(bytes(room.f_bavail * room.f_frsize - (1 << 19)))

    def names(self) -> set[str]:
        return {path.name for path in self.folder.rglob("*") if path.is_file() and ".serial-" not in path.name}


@pytest.fixture
def disk(root: Path) -> Iterator[Disk]:
    made = Disk(root)
    made.folder.mkdir()
    mount = ["/bin/mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(made.folder)]
    done = subprocess.run(mount, capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot mount: {done.stderr.decode().strip()}")
    yield made
    subprocess.run(["/bin/umount", str(made.folder)], check=True)


WHOLE = {"model_schema.json", "filler", "checkpoint-000001.pt", "checkpoint-000001.meta.json"}


@pytest.mark.root
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_without_room_training_goes_on_and_saves_again_when_there_is_some(root: Path, disk: Disk, mode: str) -> None:
    disk.cleared_by, disk.filled_by = "checkpoint.failed", mode
    told: list[str] = []

    def is_saved_again(frame: Frame) -> bool:
        told.extend(str(event["type"]) for event in (frame.events if isinstance(frame, Events) else ()))
        return "checkpoint.failed" in told and "checkpoint.written" in told[told.index("checkpoint.failed") :]

    disk.is_over = is_saved_again
    policy = {"every_steps": 1, "keep_last": 1, "mode": mode}
    params = {"steps": 100_000, "hold": str(disk.hold)}
    end = run(root, "walk", params=params, checkpoint=policy, on_frame=disk)
    assert end.ended.outcome == "stopped"
    (failed,) = end.of_type("checkpoint.failed")
    assert (data(failed)["error"]["code"], data(failed)["on_full"]) == ("STORAGE_FULL", "continue")
    written = [int(str(event["step"])) for event in end.of_type("checkpoint.written")]
    assert min(written) < int(str(failed["step"])) < max(written)
    assert failed["step"] not in written, "steps were taken meanwhile"
    assert disk.names() == {"model_schema.json", *(file.file for file in metas(root)[-1].files), _meta_of(root)}


def _meta_of(root: Path) -> str:
    return f"checkpoint-{metas(root)[-1].number:06d}.meta.json"


@pytest.mark.root
def test_without_room_a_job_that_wants_to_pauses_and_goes_on_from_the_very_step(root: Path, disk: Disk) -> None:
    disk.cleared_by = "checkpoint.paused"
    end = run(
        root,
        "walk",
        params={"steps": 4},
        checkpoint={"every_steps": 1, "keep_last": 1, "on_full": "pause"},
        on_frame=disk,
    )
    assert end.ended.outcome == "succeeded"
    assert [event["step"] for event in end.of_type("checkpoint.paused")] == [2]
    assert [event["step"] for event in end.of_type("checkpoint.written")] == [1, 2, 3, 4]
    assert len(end.of_type("checkpoint.failed")) == 1
    (paused,) = [frame for frame in end.frames if isinstance(frame, Paused)]
    assert paused.reason.startswith("paused for storage: no space left")
    kinds = [str(event["type"]) for event in end.events]
    between = kinds[
        kinds.index("checkpoint.paused") : kinds.index("checkpoint.written", kinds.index("checkpoint.paused"))
    ]
    assert "train.metrics" not in between


@pytest.mark.root
def test_a_paused_job_hears_that_it_is_to_stop_and_leaves_what_was_there(root: Path, disk: Disk) -> None:
    disk.orders["checkpoint.paused"] = [Stop(reason="preempted", deadline_boottime_s=clock.boottime_s() + 2.0)]
    end = run(
        root,
        "walk",
        params={"steps": 4},
        checkpoint={"every_steps": 1, "keep_last": 1, "on_full": "pause"},
        on_frame=disk,
    )
    assert (end.ended.outcome, [meta.step for meta in metas(root)]) == ("stopped", [1])
    assert disk.names() == WHOLE


@pytest.mark.root
@pytest.mark.parametrize("policy", [{"every_steps": 1, "on_full": "fail"}, {"every_steps": 1}])
def test_a_job_that_finds_no_room_for_its_last_checkpoint_fails_and_leaves_no_litter(
    root: Path, disk: Disk, policy: dict[str, object]
) -> None:
    end = run(root, "walk", params={"steps": 3}, checkpoint=policy, stop_grace_s=1.5, on_frame=disk)
    assert end.ended.error is not None
    assert (end.ended.outcome, end.ended.error.code) == ("failed", "STORAGE_FULL")
    assert len(end.of_type("checkpoint.failed")) == 1
    assert (disk.names(), [meta.step for meta in metas(root)]) == (WHOLE, [1])


@pytest.mark.root
def test_who_asks_for_a_checkpoint_without_room_is_told_so(root: Path, disk: Disk) -> None:
    disk.orders |= {"job.first_step": [Save(number=1)], "checkpoint.written": [Save(number=2)]}
    disk.is_over = lambda frame: isinstance(frame, Saving) and frame.error is not None
    end = run(root, "walk", params={"steps": 100_000}, on_frame=disk)
    told = [(frame.number, frame.error and frame.error.code) for frame in end.frames if isinstance(frame, Saving)]
    assert told[:3] == [(1, None), (2, None), (2, "STORAGE_FULL")]


@pytest.mark.root
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_job_whose_folder_cannot_be_written_to_any_more_fails_and_leaves_what_was_there(
    root: Path, disk: Disk, mode: str
) -> None:
    """Not to train on for days without a checkpoint."""
    closed: list[int] = []

    def close(_end: RunnerEnd, frame: Frame) -> Sequence[Frame] | None:
        told = frame.events if isinstance(frame, Events) else ()
        written = [data(event)["mode"] for event in told if event["type"] == "checkpoint.written"]
        if mode in written and not closed:
            while subprocess.run(["/bin/mount", "-o", "remount,ro", disk.folder], check=False).returncode:
                time.sleep(0.01)  # while the next one is being written
            closed.append(max(meta.number for meta in metas(root)))
        return None

    policy = {"every_steps": 2, "keep_last": 1, "mode": mode}
    end = run(root, "walk", params={"steps": 100_000, "pause_s": 0.1}, checkpoint=policy, on_frame=close)
    assert end.ended.error is not None
    assert (end.ended.outcome, end.ended.error.code) == ("failed", "BAD_SETTING")
    assert str(disk.folder) in end.ended.error.message
    (last,) = metas(root)
    assert last.number == closed[0]
    assert disk.names() == {"model_schema.json", last.files[0].file, _meta_of(root)}


# --- told to stop ----------------------------------------------------------------------------------------------------


def test_a_last_checkpoint_that_could_not_be_durable_in_time_is_not_begun_and_that_is_said(root: Path) -> None:
    begun: list[CheckpointMeta] = []

    def answer(_end: RunnerEnd, frame: Frame) -> Sequence[Frame]:
        if isinstance(frame, Commit):
            begun.append(frame.meta)
            time.sleep(0.5)  # so that it is known how long one takes
        elif begun and isinstance(frame, Events):
            return [Stop(reason="preempted", deadline_boottime_s=clock.boottime_s() + 0.4)]
        return usual(frame)

    end = run(root, "walk", params={"steps": 100_000}, checkpoint={"every_steps": 30}, on_frame=answer)
    assert end.ended.outcome == "stopped"
    (skipped,) = end.of_type("checkpoint.skipped")
    assert (data(skipped)["why"], data(skipped)["relies_on"]) == ("too_late", checkpoint_stem(metas(root)[-1].number))
    assert metas(root)[-1].step < int(str(skipped["step"]))
    assert data(skipped)["expected_s"] > 0.5 > data(skipped)["left_s"]


class Signals:
    """Sends SIGTERM with the events of these types as they come, once at a time."""

    def __init__(self, *kinds: str) -> None:
        self._kinds = list(kinds)

    def __call__(self, end: RunnerEnd, frame: Frame) -> Sequence[Frame]:
        kinds = [event["type"] for event in frame.events] if isinstance(frame, Events) else []
        if self._kinds and self._kinds[0] in kinds:
            self._kinds.pop(0)
            end.signal(signal.SIGTERM)
        return usual(frame)


def test_a_trainer_that_gets_sigterm_stops_at_the_next_step_with_a_checkpoint(root: Path) -> None:
    end = run(root, "walk", params={"steps": 100_000}, on_frame=Signals("train.metrics"))
    assert (end.exit_code, end.ended.outcome) == (0, "stopped")
    assert [meta.reason for meta in metas(root)] == ["stop"]


def test_code_that_takes_no_steps_is_ended_by_a_second_sigterm(root: Path) -> None:
    end = run(root, "deaf", on_frame=Signals("app.ready", *["app.alive"] * 50))
    assert end.exit_code == -signal.SIGTERM


def test_user_code_keeps_its_own_handler_and_its_workers_end_by_sigterm(root: Path) -> None:
    end = run(root, "handle", on_frame=Signals("app.ready"))
    assert end.ended.outcome == "succeeded"
    assert [data(event)["code"] for event in end.of_type("app.worker_ended")] == [-signal.SIGTERM]
    assert len(end.of_type("app.reminded")) == 1


# --- evaluations -----------------------------------------------------------------------------------------------------

BEST: dict[str, object] = {"every_steps": 3, "keep_last": 1, "keep_best": 2, "metric": "value"}
VALUES = [5.0, 3.0, 9.0, 4.0, 2.0, 6.0]


def test_the_states_whose_evaluations_were_the_best_are_kept_with_them_and_no_other_has_an_older_one(
    root: Path,
) -> None:
    seen: list[CheckpointMeta] = []

    def note(_end: RunnerEnd, frame: Frame) -> Sequence[Frame]:
        if isinstance(frame, Commit):
            seen.append(frame.meta)
        return usual(frame)

    run(root, "evaluate", params={"values": VALUES}, checkpoint=BEST, on_frame=note)
    told = [(meta.step, meta.metrics.get("value")) for meta in seen]
    assert told == [
        (3, None), (4, 5.0), (6, None), (8, 3.0), (9, None), (12, None), (15, None), (16, 4.0), (18, None), (20, 2.0),
        (21, None), (24, None),
    ]  # fmt: skip
    assert [(meta.step, meta.metrics.get("value")) for meta in metas(root)] == [(8, 3.0), (20, 2.0), (24, None)]
    assert all("loss" in meta.metrics for meta in seen)


def test_a_job_goes_on_from_an_evaluated_state_as_if_it_had_never_stopped(root: Path) -> None:
    """Although the evaluation draws random numbers, and is run again."""
    params = {"values": [5.0, 4.0, 3.0]}
    run(root, "evaluate", job="j-whole", params=params, checkpoint={**BEST, "every_steps": None})
    expected = _weights(root)
    killed = run(root, "evaluate", params={**params, "kill_at": 1}, checkpoint={**BEST, "every_steps": None})
    assert killed.exit_code == -signal.SIGKILL
    resumed = run(root, "evaluate", attempt=2, params=params, recorded=killed.recorded, checkpoint=BEST)
    assert [event["step"] for event in resumed.of_type("checkpoint.resumed")] == [8]
    assert torch.equal(_weights(root), expected)


def _weights(root: Path) -> torch.Tensor:
    state = torch.load(Layout(root).checkpoints("m") / metas(root)[-1].files[0].file, weights_only=True)
    weights = state["parts"]["model"]["weight"]
    assert isinstance(weights, torch.Tensor)
    return weights
