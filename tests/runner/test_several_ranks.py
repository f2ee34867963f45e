"""Jobs of two ranks: real processes that train together over gloo, and go on in as many ranks or in another number."""

from __future__ import annotations

import re
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from commands import railbus_here
from railbus_runner.checkpointing import loading
from railbus_runner.frames import Commit, Events, Frame, Refused, Stop
from railbus_runner.ranks import EXIT_RUNNER_GONE
from railbus_shared.contracts.artifacts import CheckpointMeta, Column
from railbus_shared.contracts.jobs import ErrorBody
from railbus_shared.contracts.model import JsonMap
from railbus_shared.layout import Layout
from trainers import Array, RunnerEnd, WarmHost, plan, usual, write_dataset

pytestmark = pytest.mark.timeout(120)  # importing torch takes seconds on a busy machine

REPO = Path(__file__).parents[2]
STEPS = 20
CODE = """
import logging, os, pathlib, resource, signal, time
import torch
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

def train(ctx):
    p = ctx.params
    torch.manual_seed(ctx.seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Dropout(0.5), torch.nn.Linear(16, 3))
    if p["how"] == "fsdp" and ctx.world_size > 1:
        fully_shard(model)
    wrapped = DistributedDataParallel(model) if p["how"] == "ddp" and ctx.world_size > 1 else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    train = ctx.stream("train", batch_size=8)
    ctx.track(model=wrapped, optimizer=optimizer)
    torch.manual_seed(ctx.seed + ctx.rank)
    if ctx.resume() and "found" in p:
        write_down(ctx, p["found"], model, optimizer)
    for _ in train.epochs(2):
        for batch in train:
            loss = torch.nn.functional.cross_entropy(wrapped(batch["x"]), batch["y"])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            with pathlib.Path(p["seen"] + f"-{ctx.rank}").open("a") as seen:
                seen.writelines(f"{number}\\n" for number in batch["id"].tolist())
            misbehave(ctx, p)
            ctx.step(loss=loss)
    logging.getLogger("mine").info("done")

def calls(ctx):
    model = torch.nn.Linear(1, 1)
    ctx.track(model=DistributedDataParallel(model))
    assert not ctx.resume()
    ctx.step()
    ctx.save()
    ctx.log(loss=ctx.rank)
    while not ctx.stopping:
        time.sleep(0.01)

def beside(ctx):
    model = torch.nn.Linear(30, 30)
    ctx.track(model=DistributedDataParallel(model))
    ctx.resume()
    for _ in range(3):
        saver = ctx._progress._saver
        while ctx.rank == 0 and ctx.global_step and not saver._beside.fits(1):
            ctx._channel.poll()
            saver.heed()
            time.sleep(0.002)
        ctx.step()

def write_down(ctx, path, model, optimizer):
    def whole(value):
        return value.full_tensor() if hasattr(value, "full_tensor") else value
    found = {
        "model": {name: whole(value) for name, value in model.state_dict().items()},
        "optimizer": {
            number: {name: whole(value) for name, value in one.items()}
            for number, one in optimizer.state_dict()["state"].items()
        },
    }
    if ctx.rank == 0:
        torch.save(found, path)

def misbehave(ctx, p):
    what, rank = p.get("what"), p.get("rank", 1)
    if what is None or ctx.global_step + 1 != p["at"] or ctx.rank != rank:
        return
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "kill in the save":
        from railbus_runner.checkpointing import sharded
        sharded._hash_own = lambda *_args, **_options: os.kill(os.getpid(), signal.SIGKILL)
    elif what == "raise":
        raise ValueError("it broke in one rank")
    elif what == "fill the disk":
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, resource.RLIM_INFINITY))
    elif what == "step once more":
        ctx.step()
    elif what == "wait for the order":
        while ctx._channel.stop is None:
            ctx._channel.poll()
            time.sleep(0.01)
"""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 samples of three clouds in four dimensions, and the code of `CODE` as module `rb_ranks`."""
    root = tmp_path_factory.mktemp("ranks")
    generator = np.random.default_rng(0)
    labels: Array = generator.integers(0, 3, 80)
    features: Array = (generator.normal(size=(80, 4)) + labels[:, None]).astype(np.float32)
    images: Array = generator.normal(size=(80, 8, 8)).astype(np.float32)
    described = {
        "image": Column(dtype="float32", shape=(8, 8)),
        "label": Column(dtype="int64", shape=(), num_classes=3),
        "x": Column(dtype="float32", shape=(4,)),
        "y": Column(dtype="int64", shape=(), num_classes=3),
        "id": Column(dtype="int64", shape=()),
    }
    columns = {"image": images, "label": labels, "x": features, "y": labels, "id": np.arange(80)}
    write_dataset(root, columns, described=described, splits={"train": 80})
    (root / "code").mkdir()
    (root / "code" / "rb_ranks.py").write_text(CODE)
    (shown,) = re.findall(r"```python\n(.*?)```", (REPO / "docs" / "ranks.md").read_text(), re.DOTALL)
    (root / "code" / "rb_shown.py").write_text(shown)
    return root


@pytest.fixture
def root(dataset: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dataset, tmp_path / "root"))


def run(
    warm: WarmHost, root: Path, how: str, *, ranks: int = 2, on_frame: Any = None, attempt: int = 1, **params: object
) -> RunnerEnd:
    """One attempt, which writes a checkpoint after every fifth step."""
    one = plan(
        root,
        "rb_ranks:train",
        code=root / "code",
        attempt=attempt,
        ranks=ranks,
        checkpoint={"every_steps": 5, "keep_last": 9},
        params={"how": how, "seen": str(root / f"seen-{attempt}"), **params},
    )
    end = RunnerEnd(warm, one, on_frame=on_frame)
    end.run()
    return end


def folder(root: Path) -> Path:
    return Layout(root).checkpoints("m")


def metas(root: Path) -> list[CheckpointMeta]:
    """Of all checkpoints, oldest first."""
    return [CheckpointMeta.model_validate_json(path.read_bytes()) for path in sorted(folder(root).glob("*.meta.json"))]


def state_of(root: Path, meta: CheckpointMeta) -> dict[str, Any]:
    """What a checkpoint holds, whatever its format."""
    with loading.open_checkpoint(folder(root), meta) as opened:
        return opened.read()


def told(event: JsonMap) -> Any:
    return event["data"]


def seen(root: Path, attempt: int) -> list[int]:
    """The samples that an attempt trained on, in no order."""
    paths = root.glob(f"seen-{attempt}-*")
    return sorted(int(line) for path in paths for line in path.read_text().splitlines())


def assert_same(one: object, other: object, *, at: str = "state") -> None:
    """The same values, to the bit."""
    if isinstance(one, torch.Tensor):
        assert isinstance(other, torch.Tensor), at
        assert one.dtype == other.dtype and torch.equal(one, other), at  # noqa: PT018 - one fact
    elif isinstance(one, dict):
        assert isinstance(other, dict), at
        assert one.keys() == other.keys(), at
        for key, value in cast("dict[Any, object]", one).items():
            assert_same(value, other[key], at=f"{at}.{key}")
    elif isinstance(one, list | tuple):
        assert isinstance(other, list | tuple), at
        assert len(one) == len(other), at
        for number, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, at=f"{at}[{number}]")
    else:
        assert one == other, at


# --- going on --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("how", "kind"), [("ddp", "torch"), ("fsdp", "dcp")])
def test_killed_at_any_rank_a_job_goes_on_as_if_nothing_had_been_in_as_many_ranks_or_in_one(
    dataset: Path, root: Path, tmp_path: Path, warm: WarmHost, how: str, kind: str
) -> None:
    whole = Path(shutil.copytree(dataset, tmp_path / "whole"))
    end = run(warm, whole, how)
    assert (end.exit_code, end.ended.outcome) == (0, "succeeded")
    assert [(meta.step, meta.format, meta.world_size) for meta in metas(whole)] == [
        (step, kind, 2) for step in (5, 10, 15, 20)
    ]
    lines = [told(event)["fields"]["rank"] for event in end.of_type("log.line")]
    assert sorted(lines) == [0, 1]
    assert len(end.of_type("job.first_step")) == 1

    killed = (
        run(warm, root, how, what="kill in the save", at=15)
        if how == "fsdp"
        else run(warm, root, how, what="kill", at=13, rank=0)
    )
    assert killed.exit_code == -signal.SIGKILL
    assert list(folder(root).glob(".checkpoint*")) == []
    assert [meta.step for meta in metas(root)] == [5, 10]
    alone = Path(shutil.copytree(root, tmp_path / "alone"))

    resumed = run(warm, root, how, attempt=2)
    assert [event["step"] for event in resumed.of_type("checkpoint.resumed")] == [10]
    assert_same(state_of(root, metas(root)[-1]), state_of(whole, metas(whole)[-1]))
    assert (resumed.ended.metrics, seen(root, 2)) == (end.ended.metrics, list(range(80)))

    if kind == "dcp":
        assert_consolidated(root, tmp_path / "one.pt")
    found = tmp_path / "found.pt"
    one = run(warm, alone, how, attempt=2, ranks=1, found=str(found))
    assert one.ended.outcome == "succeeded"
    parts = cast("Any", state_of(alone, metas(alone)[1])["parts"])
    expected = {"model": dict(parts["model"]), "optimizer": parts["optimizer"]["state"]}
    assert_same(torch.load(found, weights_only=True), expected)
    assert seen(alone, 2) == list(range(80))
    assert (metas(alone)[-1].format, metas(alone)[-1].step, metas(alone)[-1].world_size) == ("torch", STEPS, 1)


def assert_consolidated(root: Path, target: Path) -> None:
    """The newest checkpoint becomes one file that any program of torch reads, and is not written twice."""
    words = ("checkpoints", "consolidate", "m", "--pt", str(target), "--root", str(root))
    done = railbus_here(*words, cwd=root)
    assert (done.status, "consolidated m 5 into" in done.out) == (0, True), done
    assert_same(torch.load(target, weights_only=True, mmap=True), state_of(root, metas(root)[-1]))
    assert railbus_here(*words, cwd=root).status != 0
    assert [path.name for path in target.parent.glob(".one*")] == []
    assert_looked_at(root, torch.load(target, weights_only=True)["parts"]["model"])


def assert_looked_at(root: Path, model: dict[str, torch.Tensor]) -> None:
    """What is spread is verified, followed, compared and exported like any other."""
    assert railbus_here("checkpoints", "verify", "--root", str(root), cwd=root).status == 0
    done = railbus_here("checkpoints", "diff", "m", "--part", "model", "--json", "--root", str(root), cwd=root)
    found = cast("Any", done.json())
    assert {change["tensor"] for change in found["changed"]} == {f"parts.model.{name}" for name in model}
    words = ("checkpoints", "export", "m", "--safetensors", "weights", "--root", str(root))
    assert railbus_here(*words, cwd=root).status == 0
    assert_same(load_file(root / "weights"), dict(model))
    assert list(root.glob(".railbus-*")) == []


def test_a_job_of_one_process_goes_on_in_two_ranks_spread_or_not(root: Path, tmp_path: Path, warm: WarmHost) -> None:
    killed = run(warm, root, "ddp", ranks=1, what="kill", at=7, rank=0)
    assert killed.exit_code == -signal.SIGKILL
    parts = cast("Any", state_of(root, metas(root)[0])["parts"])
    expected = {"model": dict(parts["model"]), "optimizer": parts["optimizer"]["state"]}
    for how, kind in (("ddp", "torch"), ("fsdp", "dcp")):
        two = Path(shutil.copytree(root, tmp_path / how))
        end = run(warm, two, how, attempt=2, found=str(tmp_path / f"{how}.pt"))
        assert end.ended.outcome == "succeeded", end.ended
        assert_same(torch.load(tmp_path / f"{how}.pt", weights_only=True), expected)
        assert (metas(two)[-1].format, metas(two)[-1].step, metas(two)[-1].samples_seen) == (kind, STEPS, 160)
        assert len(seen(two, 2)) == 160 - 40


def test_the_example_of_the_docs_trains_in_two_ranks(root: Path, warm: WarmHost) -> None:
    end = RunnerEnd(warm, plan(root, "rb_shown:train", code=root / "code", ranks=2))
    assert (end.run(), end.ended.outcome) == (0, "succeeded"), end.ended
    assert [(meta.step, meta.format, meta.world_size) for meta in metas(root)] == [(5 * (80 // 32), "torch", 2)]


# --- what goes wrong -------------------------------------------------------------------------------------------------


def test_killed_in_the_middle_of_a_spread_save_an_older_one_is_used_the_newest_that_all_ranks_find_whole(
    root: Path, warm: WarmHost
) -> None:
    killed = run(warm, root, "fsdp", what="kill in the save", at=15, rank=0)
    assert killed.exit_code == -signal.SIGKILL
    assert [path.name for path in folder(root).glob(".checkpoint*")] == [".checkpoint-000003.dcp.tmp"]
    (part,) = folder(root).glob("checkpoint-000002.dcp/__1_*")  # rank 0 wrote the rest, and may hash this one too
    part.write_bytes(part.read_bytes()[:-1] + b"!")
    resumed = run(warm, root, "fsdp", attempt=2)
    assert [told(event)["checkpoint"] for event in resumed.of_type("checkpoint.swept")] == ["checkpoint-000003"]
    (rejected,) = resumed.of_type("checkpoint.rejected")
    assert f"{part.parent.name}/{part.name}" in told(rejected)["error"]["message"]
    assert [event["step"] for event in resumed.of_type("checkpoint.resumed")] == [5]
    assert [(meta.number, meta.step) for meta in metas(root)] == [(1, 5), (2, 10), (4, 10), (5, 15), (6, 20)]
    assert list(folder(root).glob(".checkpoint*")) == []


def test_a_refused_commit_ends_all_ranks_and_leaves_nothing(root: Path, warm: WarmHost) -> None:
    refused = Refused(number=1, error=ErrorBody(code="STALE_LEASE_EPOCH", message="stale"))
    end = run(warm, root, "fsdp", on_frame=lambda _end, f: [refused] if isinstance(f, Commit) else None)
    assert (end.exit_code, end.ended.outcome) == (1, "failed")
    assert end.ended.error is not None
    assert end.ended.error.code == "STALE_LEASE_EPOCH"
    assert [path.name for path in folder(root).iterdir()] == [".serial-000001"]


@pytest.mark.parametrize(
    ("what", "code", "message", "details"),
    [
        ("raise", "ENTRYPOINT_FAILED", "ValueError: it broke in one rank", {"rank": 1}),
        (
            "step once more",
            "CONFLICT",
            "rank 1 calls ctx.step at step 21, but rank 0 returns at 20",
            {},
        ),
        ("fill the disk", "STORAGE_FULL", "no space left", {}),
    ],
)
def test_what_goes_wrong_in_one_rank_ends_the_job_with_its_reason(
    root: Path, warm: WarmHost, what: str, code: str, message: str, details: dict[str, object]
) -> None:
    how = "fsdp" if what == "fill the disk" else "ddp"
    end = run(warm, root, how, what=what, at=20 if what == "step once more" else 7)
    assert (end.exit_code, end.ended.outcome) == (1, "failed")
    assert end.ended.error is not None
    assert (end.ended.error.code, message in end.ended.error.message) == (code, True), end.ended.error
    assert details.items() <= end.ended.error.details.items()
    assert list(folder(root).glob(".checkpoint*")) == []


class StopAtFirst:
    """Sends a Stop when the trainer has told its first events, and answers as usual."""

    def __init__(self) -> None:
        self._orders: tuple[Frame, ...] = (Stop(reason="preempted"),)

    def __call__(self, _end: RunnerEnd, frame: Frame) -> Sequence[Frame]:
        orders, self._orders = (self._orders, ()) if isinstance(frame, Events) else ((), self._orders)
        return (*usual(frame), *orders)


def test_an_order_to_stop_is_obeyed_by_all_ranks_at_the_same_step(root: Path, warm: WarmHost) -> None:
    end = run(warm, root, "ddp", on_frame=StopAtFirst(), what="wait for the order", at=2, rank=0)
    assert (end.exit_code, end.ended.outcome) == (0, "stopped")
    (meta,) = metas(root)
    assert (meta.reason, meta.step in {1, 2}) == ("stop", True)  # it may have come while the first step ended
    assert len(seen(root, 1)) == 8 * meta.step


def test_rank_0_decides_in_every_call_that_all_make(root: Path, warm: WarmHost) -> None:
    def stop_after_both(end: RunnerEnd, frame: Frame) -> Sequence[Frame]:
        commits = sum(isinstance(one, Commit) for one in end.frames)
        return [*usual(frame), *([Stop(reason="preempted")] if isinstance(frame, Commit) and commits == 2 else [])]

    policy = {"keep_best": 1, "metric": "loss", "keep_last": 5}
    one = plan(root, "rb_ranks:calls", code=root / "code", ranks=2, checkpoint=policy)
    end = RunnerEnd(warm, one, on_frame=stop_after_both)
    assert (end.run(), end.ended.outcome) == (0, "stopped"), end.ended
    committed = [frame.meta for frame in end.frames if isinstance(frame, Commit)]
    assert [(meta.step, meta.reason) for meta in committed] == [(1, "request"), (1, "policy")]
    assert committed[-1].metrics == {"loss": 0}


def test_a_process_beside_the_ranks_writes_what_they_have_alike(root: Path, warm: WarmHost) -> None:
    policy = {"mode": "async", "every_steps": 1, "keep_last": 5}
    one = plan(root, "rb_ranks:beside", code=root / "code", ranks=2, checkpoint=policy)
    end = RunnerEnd(warm, one)
    assert (end.run(), end.ended.outcome) == (0, "succeeded"), end.ended
    assert [told(event)["mode"] for event in end.of_type("checkpoint.written")] == ["sync", "async", "async"]
    assert [(meta.step, len(state_of(root, meta)["ranks"])) for meta in metas(root)] == [(1, 2), (2, 2), (3, 2)]


def test_when_the_runner_is_gone_no_rank_is_left(root: Path, warm: WarmHost) -> None:
    def hang_up(end: RunnerEnd, frame: Frame) -> None:
        if isinstance(frame, Commit):
            end.hang_up()

    end = run(warm, root, "ddp", on_frame=hang_up)
    assert end.exit_code == EXIT_RUNNER_GONE
    assert metas(root) == []
