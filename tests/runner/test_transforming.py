"""User code on batches: in the consumer's thread, or in processes that keep the order and never hang."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import small_datasets
from railbus_runner.stream import ShardStream
from railbus_shared.data.index import DatasetIndex
from railbus_shared.errors import EntrypointFailed, InvalidField, ShardCorrupt
from railbus_shared.layout import Layout
from until import PATIENCE_S, until

pytestmark = pytest.mark.timeout(120)  # each worker imports torch, which takes seconds on a busy machine

CODE = """
import os
import time
from pathlib import Path

ORDER = Path(__file__).with_name("order")

def doubled(batch):
    time.sleep(0.02 * (int(batch["id"][0]) % 3))
    if 12 in batch["id"].tolist():
        match ORDER.read_text():
            case "raise":
                raise ZeroDivisionError("at twelve")
            case "die":
                while not ORDER.with_name("now").exists():
                    time.sleep(0.01)
                os.kill(os.getpid(), 9)
    return {"x": batch["x"] * 2, "id": batch["id"], "pid": os.getpid()}
"""


class Opened:
    """30 samples in four shards, `train` the first 23, and the module `transforms_for_tests`."""

    def __init__(self, root: Path) -> None:
        self.layout = Layout(root)
        self.index: DatasetIndex = small_datasets.write(self.layout, 30, num_shards=4, test=7)

    def stream(self, **settings: Any) -> ShardStream:
        folder = self.layout.shards("d")
        paths = {number: folder / shard.file for number, shard in enumerate(self.index.file.shards)}
        settings = {"split": "train", "seed": 7, "batch_size": 4, "ensure_verified": lambda _: None, **settings}
        return ShardStream(self.index, paths, **settings)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return Opened(tmp_path_factory.mktemp("opened"))


@dataclass
class Transforms:
    """User code that workers can import too, and what it is to do at sample 12."""

    folder: Path

    def __post_init__(self) -> None:
        (self.folder / "transforms_for_tests.py").write_text(CODE)
        self.order("nothing")

    def order(self, what: str) -> None:
        (self.folder / "order").write_text(what)

    @property
    def doubled(self) -> Any:
        return importlib.import_module("transforms_for_tests").doubled


@pytest.fixture(scope="module")
def transforms(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Transforms]:
    folder = tmp_path_factory.mktemp("code")
    sys.path.insert(0, str(folder))
    yield Transforms(folder)
    sys.path.remove(str(folder))
    del sys.modules["transforms_for_tests"]


class Worked:
    """A stream with two workers, which take seconds to start, and so are one for several tests."""

    def __init__(self, opened: Opened, transforms: Transforms) -> None:
        self.transforms = transforms
        self.refused: set[int] = set()
        self.verified: list[int] = []
        self.stream = opened.stream(transform=transforms.doubled, workers=2, shuffle=False, ensure_verified=self.verify)

    def verify(self, numbers: Sequence[int]) -> None:
        if self.refused & set(numbers):
            raise ShardCorrupt(path=f"shard-{numbers[0]}", expected="a", actual="b")
        self.verified += numbers

    def go_to(self, *, epoch: int, batches_done: int) -> None:
        self.stream.load_state_dict(self.stream.state_dict() | {"epoch": epoch, "batches_done": batches_done})


@pytest.fixture(scope="module")
def worked(opened: Opened, transforms: Transforms) -> Worked:
    return Worked(opened, transforms)


def ids(batches: Any) -> list[list[int]]:
    return [batch["id"].tolist() for batch in batches]


# --- in the consumer's thread ----------------------------------------------------------------------------------------


def test_what_a_transform_gives_is_what_comes(opened: Opened) -> None:
    stream = opened.stream(transform=lambda batch: (batch["id"].tolist(), float(batch["x"].sum())))
    plain = opened.stream()
    for (numbers, total), batch in zip(stream, plain, strict=True):
        assert (numbers, total) == (batch["id"].tolist(), float(batch["x"].sum()))


def test_a_transform_that_fails_leaves_the_position_before_its_batch(opened: Opened) -> None:
    calls: list[int] = []

    def fails(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        calls.append(1)
        if len(calls) == 3:
            raise ZeroDivisionError("the third")
        return batch

    stream = opened.stream(transform=fails)
    with pytest.raises(ZeroDivisionError, match="the third"):
        list(stream)
    assert stream.state_dict()["batches_done"] == 2
    assert ids(stream) == ids(opened.stream())[2:]


# --- in processes ----------------------------------------------------------------------------------------------------


def test_a_shard_that_is_refused_ends_the_batches_where_it_is_needed(worked: Worked) -> None:
    worked.refused = {2}
    found: list[Any] = []
    with pytest.raises(ShardCorrupt):
        found.extend(worked.stream)
    assert ids(found) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    worked.refused = set()
    assert ids(worked.stream) == [[12, 13, 14, 15], [16, 17, 18, 19], [20, 21, 22]]
    assert worked.verified == [0, 1, 2, 3]


def test_workers_keep_the_order_the_epochs_and_the_position(worked: Worked, opened: Opened) -> None:
    worked.go_to(epoch=0, batches_done=0)
    expected = opened.stream(shuffle=False)
    pids = set[int]()
    for epoch, _ in zip(worked.stream.epochs(2), expected.epochs(2), strict=True):
        for at, (batch, held) in enumerate(zip(worked.stream, expected, strict=True)):
            assert torch.equal(batch["x"], held["x"] * 2)
            assert torch.equal(batch["id"], held["id"])
            assert (worked.stream.epoch, worked.stream.state_dict()["batches_done"]) == (epoch, at + 1)
            pids.add(batch["pid"])
    assert len(pids) == 2, "the processes stay from one epoch to the next"
    assert os.getpid() not in pids
    worked.go_to(epoch=1, batches_done=4)
    assert ids(worked.stream) == [[16, 17, 18, 19], [20, 21, 22]]


def test_a_pass_that_is_left_early_is_gone_on_with(worked: Worked) -> None:
    worked.go_to(epoch=0, batches_done=0)
    assert ids(islice(worked.stream, 2)) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert ids(worked.stream)[0] == [8, 9, 10, 11]


def test_a_transform_that_fails_in_a_worker_tells_where(worked: Worked) -> None:
    worked.go_to(epoch=0, batches_done=0)
    worked.transforms.order("raise")
    found: list[Any] = []
    with pytest.raises(ZeroDivisionError, match=r"(?s)transforms_for_tests\.py.*in doubled.*at twelve"):
        found.extend(worked.stream)
    assert ids(found) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert worked.stream.state_dict()["batches_done"] == 3


async def test_a_worker_that_is_killed_is_an_error_and_no_hang(worked: Worked) -> None:
    """Nor does it strike where user code is, though a loader of torch's has left its handler of signals behind."""
    numbers = TensorDataset(torch.arange(2))
    assert len(list(DataLoader(numbers, num_workers=1, multiprocessing_context="fork"))) == 2
    worked.go_to(epoch=0, batches_done=0)
    worked.transforms.order("die")
    batches = iter(worked.stream)
    next(batches)
    (worked.transforms.folder / "now").touch()
    await until(lambda: psutil.STATUS_ZOMBIE in {child.status() for child in psutil.Process().children()})
    with pytest.raises(EntrypointFailed, match="died") as caught:
        list(batches)
    assert caught.value.hint
    assert worked.stream.state_dict()["batches_done"] <= 3


def test_a_transform_that_workers_cannot_import_is_refused_at_once(opened: Opened) -> None:
    with pytest.raises(InvalidField, match="top of a module") as caught:
        opened.stream(transform=lambda batch: batch, workers=1)
    assert caught.value.details["field"] == "transform"


ENDLESS = """
import sys, time
from pathlib import Path
from railbus_runner.stream import ShardStream
from railbus_shared.data.index import DatasetIndex
from railbus_shared.layout import Layout
import transforms_for_tests

if __name__ == "__main__":
    layout = Layout(Path(sys.argv[1]))
    index = DatasetIndex.load(layout.dataset("d"))
    paths = {number: layout.shards("d") / shard.file for number, shard in enumerate(index.file.shards)}
    stream = ShardStream(
        index, paths, split="train", seed=7, batch_size=4, ensure_verified=lambda _: None,
        transform=transforms_for_tests.doubled, workers=1,
    )
    print(next(iter(stream))["pid"], flush=True)
    time.sleep(600)
"""


def test_workers_die_with_the_process_that_made_them(opened: Opened, transforms: Transforms) -> None:
    transforms.order("nothing")
    script = transforms.folder / "endless.py"
    script.write_text(ENDLESS)
    process = subprocess.Popen([sys.executable, str(script), str(opened.layout.root)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout:
        process.stdout.readline()
        workers = psutil.Process(process.pid).children(recursive=True)
        assert workers
        process.send_signal(signal.SIGKILL)
        process.wait()
    psutil.wait_procs(workers, timeout=PATIENCE_S)
    assert not [worker for worker in workers if worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE]
