"""Checkpoints on a real file system: whole or not at all, proven before they are read."""

from __future__ import annotations

import multiprocessing
import resource
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints_for_tests import (
    SHA,
    TIME,
    Rejections,
    agree,
    describer,
    names,
    newest_step,
    pair,
    refuse,
    store,
    write,
)
from railbus_runner.checkpointing import loading, serials
from railbus_runner.checkpointing.model_schema import differences, dtype_name, write_or_check
from railbus_runner.endings import CommitRefused, RunnerGone
from railbus_shared import files
from railbus_shared.contracts.artifacts import CheckpointMeta, ModelSchema, Parameter
from railbus_shared.contracts.jobs import CheckpointRef
from railbus_shared.errors import (
    CheckpointCorrupt,
    Conflict,
    SchemaInvalid,
    StorageFull,
)
from railbus_shared.layout import Layout

# --- writing ---------------------------------------------------------------------------------------------------------


def test_a_checkpoint_comes_back_as_it_was_and_its_meta_states_the_bytes(tmp_path: Path) -> None:
    meta = write(tmp_path, 3)
    data = (store(tmp_path).folder / meta.files[0].file).read_bytes()
    assert (meta.number, meta.files[0].bytes) == (1, len(data))
    assert meta.files[0].sha256 == files.sha256_file(store(tmp_path).folder / "checkpoint-000001.pt")
    loaded = loading.newest(store(tmp_path), rejected=Rejections())
    assert loaded is not None
    assert loaded.meta == meta
    assert torch.equal(loaded.state["w"], torch.full((1000,), 3.0))  # type: ignore[arg-type]
    assert names(tmp_path) == pair(1)


def test_when_the_runner_is_asked_the_data_is_there_and_the_meta_is_not(tmp_path: Path) -> None:
    seen: list[set[str]] = []
    store(tmp_path).write({"a": 1}, describe=describer(), commit=lambda _meta: seen.append(names(tmp_path)))
    assert seen == [{"checkpoint-000001.pt", ".checkpoint-000001.meta.json.tmp"}]


def test_a_refused_commit_leaves_nothing_and_its_number_is_not_used_again(tmp_path: Path) -> None:
    write(tmp_path, 1)
    with pytest.raises(CommitRefused):
        store(tmp_path).write({"a": 1}, describe=describer(), commit=refuse)
    assert names(tmp_path) == pair(1)
    assert write(tmp_path, 2).number == 3


def test_when_the_runner_dies_unanswered_all_is_left_for_the_next_attempt(tmp_path: Path) -> None:
    def die(_meta: CheckpointMeta) -> None:
        raise RunnerGone

    with pytest.raises(RunnerGone):
        store(tmp_path).write({"a": 1}, describe=describer(), commit=die)
    assert names(tmp_path) == {"checkpoint-000001.pt", ".checkpoint-000001.meta.json.tmp"}
    assert newest_step(tmp_path) == (None, [])


def _claim_many(folder: Path, job: str, numbers: Any) -> None:
    for _ in range(50):
        number = serials.claim(folder, job=job, lease_epoch=1)
        numbers.put(number)
        serials.release(folder, number)


def test_four_processes_never_take_the_same_number(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    numbers = context.Queue()
    workers = [context.Process(target=_claim_many, args=(tmp_path, f"j-{n}", numbers)) for n in range(4)]
    for worker in workers:
        worker.start()
    taken = [numbers.get(timeout=30) for _ in range(200)]
    for worker in workers:
        worker.join()
    assert [number for number, count in Counter(taken).items() if count > 1] == []
    assert [path.name for path in tmp_path.iterdir()] == [f".serial-{max(taken):06d}"]


def test_numbers_go_on_after_the_highest_checkpoint_where_the_claims_are_gone(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-000041.meta.json").touch()
    (tmp_path / "checkpoint-1234567.pt").touch()
    assert serials.claim(tmp_path, job="j-1", lease_epoch=1) == 1234568


# --- killed at every step --------------------------------------------------------------------------------------------

STEPS = {
    "while the data is written": ("torch.save", "before"),
    "after the data has its name": ("files.publish", "after"),
    "before the runner is asked": ("commit", "before"),
    "after the runner has said yes": ("commit", "after"),
    "between the halves of the last rename": ("Path.unlink", "before second"),
}
KILLED = """
import os, signal, sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
import checkpoints_for_tests as t
from railbus_shared import files
root, what, when = Path(sys.argv[2]), sys.argv[3], sys.argv[4]

def die(*_a, **_k):
    os.kill(os.getpid(), signal.SIGKILL)

def after(call):
    def both(*a, **k):
        call(*a, **k)
        die()
    return both

commit = t.agree
if what == "torch.save":
    real = torch.save
    def half(state, file):
        real(state, file)
        file.flush()
        os.ftruncate(file.fileno(), 300)
        die()
    torch.save = half
elif what == "files.publish":
    files.publish = after(files.publish)
elif what == "commit":
    commit = die if when == "before" else after(t.agree)
else:
    real_unlink, calls = Path.unlink, []
    def unlink(self, missing_ok=False):
        calls.append(self.name)
        if self.name == ".checkpoint-000002.meta.json.tmp" and self.exists():
            die()
        real_unlink(self, missing_ok=missing_ok)
    Path.unlink = unlink
t.store(root).write({"step": 2}, describe=t.describer(step=2), commit=commit)
"""


@pytest.mark.timeout(120)  # many children, each killed at another step
@pytest.mark.parametrize("moment", STEPS)
def test_killed_at_any_moment_a_write_counts_whole_or_not_at_all(tmp_path: Path, moment: str) -> None:
    write(tmp_path, 1)
    what, when = STEPS[moment]
    here = str(Path(__file__).parents[1])
    killed = subprocess.run([sys.executable, "-c", KILLED, here, str(tmp_path), what, when], check=False)
    assert killed.returncode == -signal.SIGKILL
    finished = moment == "between the halves of the last rename"
    assert newest_step(tmp_path) == (2 if finished else 1, [])
    recorded = finished or moment == "after the runner has said yes"
    successor = store(tmp_path, lease_epoch=2)
    if recorded:
        sha256 = files.sha256_file(successor.folder / "checkpoint-000002.pt")
        assert successor.complete(CheckpointRef(number=2, step=2, sha256=sha256)) is not finished
    assert successor.sweep() == ([] if recorded else [2])
    assert names(tmp_path) == pair(1) | (pair(2) if recorded else set())
    assert newest_step(tmp_path) == (2 if recorded else 1, [])
    assert write(tmp_path, 3).number == 3


def test_what_another_job_is_writing_is_not_swept(tmp_path: Path) -> None:
    def sweep_beside(_meta: CheckpointMeta) -> None:
        assert store(tmp_path, job="j-2").sweep() == []

    store(tmp_path, job="j-1").write({"step": 1}, describe=describer(), commit=sweep_beside)
    assert newest_step(tmp_path) == (1, [])


def test_what_a_later_attempt_is_writing_is_not_swept_by_a_stale_one(tmp_path: Path) -> None:
    def sweep_beside(_meta: CheckpointMeta) -> None:
        assert store(tmp_path, lease_epoch=1).sweep() == []

    store(tmp_path, lease_epoch=2).write({"step": 1}, describe=describer(), commit=sweep_beside)


def test_a_draft_that_is_not_what_the_record_names_is_not_completed(tmp_path: Path) -> None:
    def die(_meta: CheckpointMeta) -> None:
        raise RunnerGone

    with pytest.raises(RunnerGone):
        store(tmp_path).write({"a": 1}, describe=describer(), commit=die)
    with pytest.raises(CheckpointCorrupt):
        store(tmp_path).complete(CheckpointRef(number=1, step=1, sha256=SHA))
    assert newest_step(tmp_path) == (None, [])


# --- retention and full disks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("keep", "kept"), [(1, [6]), (2, [4, 6]), (9, [1, 2, 4, 6])])
def test_retention_keeps_the_newest_of_the_job_and_touches_no_other_job(
    tmp_path: Path, keep: int, kept: list[int]
) -> None:
    for number, job in enumerate(["j-1", "j-1", "j-2", "j-1", "j-2", "j-1"], start=1):
        assert write(tmp_path, number, job=job).number == number
    removed = store(tmp_path).retain(keep)
    assert sorted([*removed, *kept]) == [1, 2, 4, 6]
    assert names(tmp_path) == set().union(*(pair(number) for number in [*kept, 3, 5]))
    assert write(tmp_path, 7).number == 7


def test_a_full_disk_fails_the_write_whole_and_touches_nothing_older(tmp_path: Path) -> None:
    write(tmp_path, 1)
    before = {path.name: path.read_bytes() for path in store(tmp_path).folder.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        big: dict[str, object] = {"w": [torch.ones(100_000) for _ in range(20)]}
        with pytest.raises(StorageFull, match="no space left"):
            store(tmp_path).write(big, describe=describer(), commit=agree)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    after = {path.name: path.read_bytes() for path in store(tmp_path).folder.iterdir()}
    assert {name for name in after if name not in before} <= {".serial-000002"}
    assert all(after[name] == data for name, data in before.items() if name in after)
    assert names(tmp_path) == pair(1)
    assert newest_step(tmp_path) == (1, [])


# --- the model's schema ----------------------------------------------------------------------------------------------


def schema(parameters: dict[str, tuple[str, tuple[int, ...]]]) -> ModelSchema:
    return ModelSchema(
        model="m",
        entrypoint="classifier",
        dataset="d",
        index_sha256=SHA,
        num_parameters=1,
        parameters={name: Parameter(dtype=dtype, shape=shape) for name, (dtype, shape) in parameters.items()},
        libraries={},
        created_by_job="j-1",
        created_at=TIME,
    )


BASE = {"a": ("float32", (2, 3)), "b": ("float32", (3,))}


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (BASE, []),
        ({"a": ("float32", (2, 4)), "b": ("float32", (3,))}, ["parameter 'a' was float32[2, 3] and is float32[2, 4]"]),
        ({"a": ("bfloat16", (2, 3))}, ["parameter 'a' was float32[2, 3] and is bfloat16[2, 3]",
                                       "parameter 'b' is missing, it was float32[3]"]),
        (BASE | {"c": ("float32", ())}, ["parameter 'c' is new, float32[]"]),
    ],
)  # fmt: skip
def test_every_difference_between_two_models_is_named(
    tmp_path: Path, other: dict[str, tuple[str, tuple[int, ...]]], said: list[str]
) -> None:
    assert list(differences(schema(BASE), schema(other)).values()) == said
    path = Layout(tmp_path).model_schema("m")
    assert write_or_check(path, schema(BASE))
    before = path.read_bytes()
    if said:
        with pytest.raises(Conflict) as caught:
            write_or_check(path, schema(other))
        assert all(one in caught.value.message for one in said)
        assert "another model name" in caught.value.hint
    else:
        assert not write_or_check(path, schema(other))
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == ["model_schema.json"]


def test_of_many_differences_ten_are_told_and_all_are_counted_and_named(tmp_path: Path) -> None:
    path = Layout(tmp_path).model_schema("m")
    write_or_check(path, schema({f"layer{n}": ("float32", (n,)) for n in range(12)}))
    with pytest.raises(Conflict) as caught:
        write_or_check(path, schema({f"layer{n}": ("float32", (n, 1)) for n in range(12)}))
    assert caught.value.message.count("parameter '") == 10
    assert "and 2 more, 12 in all" in caught.value.message
    assert caught.value.details["num_different"] == 12
    assert str(caught.value.details["different"]).endswith("layer10, layer11")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"model": "m"}'])
def test_a_model_schema_that_is_none_is_told_with_its_path(tmp_path: Path, content: bytes) -> None:
    path = Layout(tmp_path).model_schema("m")
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with pytest.raises(SchemaInvalid, match=r"model_schema\.json: no model schema.*remove it"):
        write_or_check(path, schema(BASE))


def test_dtypes_are_named_as_contracts_name_them() -> None:
    assert [dtype_name(dtype) for dtype in (torch.float32, torch.bfloat16, torch.int64)] == [
        "float32",
        "bfloat16",
        "int64",
    ]
