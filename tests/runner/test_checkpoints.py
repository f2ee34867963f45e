"""Checkpoints on a real file system: whole or not at all, proven before they are read."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
from collections import Counter
from collections.abc import Callable, Iterator
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
    save,
    store,
    write,
)
from railbus_runner.checkpointing import loading, serials
from railbus_runner.checkpointing.model_schema import differences, dtype_name, write_or_check
from railbus_runner.checkpointing.store import CheckpointStore
from railbus_runner.endings import CommitRefused, RunnerGone
from railbus_shared import files
from railbus_shared.contracts.artifacts import CheckpointFile, CheckpointMeta, ModelSchema, Parameter
from railbus_shared.contracts.jobs import CheckpointRef
from railbus_shared.errors import (
    CheckpointCorrupt,
    Conflict,
    SchemaInvalid,
    StorageFull,
)
from railbus_shared.layout import Layout
from until import PATIENCE_S

# --- writing ---------------------------------------------------------------------------------------------------------


def test_a_checkpoint_comes_back_as_it_was_and_its_meta_states_the_bytes(tmp_path: Path) -> None:
    meta = write(tmp_path, 3)
    data = (store(tmp_path).folder / meta.files[0].file).read_bytes()
    assert (meta.number, meta.files[0].bytes) == (1, len(data))
    assert meta.files[0].sha256 == files.sha256_file(store(tmp_path).folder / "checkpoint-000001.pt")
    loaded = loading.newest(store(tmp_path), rejected=Rejections())
    assert loaded is not None
    assert loaded.meta == meta
    assert torch.equal(loaded.read()["w"], torch.full((1000,), 3.0))  # type: ignore[arg-type]
    assert names(tmp_path) == pair(1)


def test_when_the_runner_is_asked_the_data_is_there_and_the_meta_is_not(tmp_path: Path) -> None:
    seen: list[set[str]] = []
    save(store(tmp_path), {"a": 1}, describe=describer(), commit=lambda _meta: seen.append(names(tmp_path)))
    assert seen == [{"checkpoint-000001.pt", ".checkpoint-000001.meta.json.tmp"}]


def test_a_refused_commit_leaves_nothing_and_its_number_is_not_used_again(tmp_path: Path) -> None:
    write(tmp_path, 1)
    with pytest.raises(CommitRefused):
        save(store(tmp_path), {"a": 1}, describe=describer(), commit=refuse)
    assert names(tmp_path) == pair(1)
    assert write(tmp_path, 2).number == 3


def gone(_meta: CheckpointMeta) -> None:
    raise RunnerGone


def test_when_the_runner_dies_unanswered_all_is_left_for_the_next_attempt(tmp_path: Path) -> None:
    with pytest.raises(RunnerGone):
        save(store(tmp_path), {"a": 1}, describe=describer(), commit=gone)
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
    taken = [numbers.get(timeout=PATIENCE_S) for _ in range(200)]
    for worker in workers:
        worker.join()
    assert [number for number, count in Counter(taken).items() if count > 1] == []
    assert [path.name for path in tmp_path.iterdir()] == [f".serial-{max(taken):06d}"]


def test_numbers_go_on_after_the_highest_checkpoint_where_the_claims_are_gone(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-000041.meta.json").touch()
    (tmp_path / "checkpoint-1234567.pt").touch()
    assert serials.claim(tmp_path, job="j-1", lease_epoch=1) == 1234568


# --- killed at every step --------------------------------------------------------------------------------------------


def die(*_args: object, **_named: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def write_half(descriptor: int, data: memoryview, offset: int) -> int:
    os.pwritev(descriptor, [data[:4096]], offset)
    die()
    raise AssertionError


def publish_and_die(draft: Path, final: Path, *, real: Callable[[Path, Path], None] = files.publish) -> None:
    real(draft, final)
    die()


def die_at(name: str, *, real: Callable[..., None] = Path.unlink) -> Callable[..., None]:
    """In the place of Path.unlink, for the file of this name."""

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if path.name == name and path.exists():
            die()
        real(path, missing_ok=missing_ok)

    return unlink


STEPS: dict[str, tuple[object, str, object]] = {
    "while the data is written": (os, "pwrite", write_half),
    "after the data has its name": (files, "publish", publish_and_die),
    "before the runner is asked": (CheckpointStore, "_publish", die),
    "after the runner has said yes": (CheckpointStore, "_publish", die),
    "between the halves of the last rename": (Path, "unlink", die_at(".checkpoint-000002.meta.json.tmp")),
}


def killed(work: Callable[[], object], where: object, name: str, by: object) -> None:
    """Do something in a process of its own that kills itself on the way, where this is put in its place."""

    def child() -> None:
        setattr(where, name, by)
        work()

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(timeout=60)
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("moment", STEPS)
def test_killed_at_any_moment_a_write_counts_whole_or_not_at_all(tmp_path: Path, moment: str) -> None:
    write(tmp_path, 1)
    killed(lambda: write(tmp_path, 2), *STEPS[moment])
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

    save(store(tmp_path, job="j-1"), {"step": 1}, describe=describer(), commit=sweep_beside)
    assert newest_step(tmp_path) == (1, [])


def test_what_a_later_attempt_is_writing_is_not_swept_by_a_stale_one(tmp_path: Path) -> None:
    def sweep_beside(_meta: CheckpointMeta) -> None:
        assert store(tmp_path, lease_epoch=1).sweep() == []

    save(store(tmp_path, lease_epoch=2), {"step": 1}, describe=describer(), commit=sweep_beside)


def test_a_checkpoint_that_a_successor_has_completed_is_written(tmp_path: Path) -> None:
    def complete(meta: CheckpointMeta) -> None:
        assert store(tmp_path, lease_epoch=2).complete(ref(meta))
        assert store(tmp_path, lease_epoch=2).sweep() == []

    meta = save(store(tmp_path), {"step": 1}, describe=describer(), commit=complete)
    assert not store(tmp_path, lease_epoch=2).complete(ref(meta))
    assert names(tmp_path) == pair(1)
    assert newest_step(tmp_path) == (1, [])


def test_a_writer_whose_draft_a_successor_has_swept_ends_as_if_refused(tmp_path: Path) -> None:
    def sweep(_meta: CheckpointMeta | None = None) -> None:
        assert store(tmp_path, lease_epoch=2).sweep() == [number]

    def slowly() -> Iterator[memoryview]:
        yield memoryview(b"data")
        sweep()

    number = 1
    with pytest.raises(CommitRefused, match="swept"):
        save(store(tmp_path), {"step": 1}, describe=describer(), commit=sweep)
    number = 2
    with pytest.raises(CommitRefused, match="swept"):
        store(tmp_path).write(slowly(), nbytes=4, describe=describer(), commit=agree)
    assert names(tmp_path) == set()


def ref(meta: CheckpointMeta) -> CheckpointRef:
    return CheckpointRef(number=meta.number, step=meta.step, sha256=meta.files[0].sha256)


def test_a_draft_that_is_not_what_the_record_names_is_not_completed(tmp_path: Path) -> None:
    with pytest.raises(RunnerGone):
        save(store(tmp_path), {"a": 1}, describe=describer(), commit=gone)
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
    removed = store(tmp_path).retain(lambda metas: [meta.number for meta in metas[keep:]])
    assert sorted([*removed, *kept]) == [1, 2, 4, 6]
    assert names(tmp_path) == set().union(*(pair(number) for number in [*kept, 3, 5]))
    assert write(tmp_path, 7).number == 7


def test_the_newest_stays_whatever_is_chosen(tmp_path: Path) -> None:
    write(tmp_path, 1)
    write(tmp_path, 2)
    assert store(tmp_path).retain(lambda metas: [meta.number for meta in metas]) == [1]
    assert names(tmp_path) == pair(2)


def write_folder(root: Path, step: int, *, commit: Callable[[CheckpointMeta], None] = agree) -> CheckpointMeta:
    """A checkpoint whose data is a folder, as those of several ranks are."""
    folder = store(root).folder

    def produce(number: int) -> tuple[CheckpointFile, ...]:
        shard = folder / f"checkpoint-{number:06d}.dcp" / "0.distcp"
        shard.parent.mkdir()
        shard.write_bytes(b"shard")
        return (CheckpointFile(file=f"{shard.parent.name}/{shard.name}", bytes=5, sha256=files.sha256_file(shard)),)

    def describe(number: int, written: tuple[CheckpointFile, ...]) -> CheckpointMeta:
        return describer(step=step)(number, written[0]).model_copy(update={"format": "dcp", "files": written})

    return store(root).write_files(produce, describe=describe, commit=commit)


def test_a_folder_is_removed_swept_and_refused_as_a_file_is(tmp_path: Path) -> None:
    write_folder(tmp_path, 1)
    with pytest.raises(CommitRefused):
        write_folder(tmp_path, 2, commit=refuse)
    with pytest.raises(RunnerGone):
        write_folder(tmp_path, 3, commit=gone)
    (store(tmp_path).folder / ".checkpoint-000003.dcp.tmp").mkdir()
    assert names(tmp_path) > {"checkpoint-000001.dcp", "checkpoint-000003.dcp"}
    assert store(tmp_path, lease_epoch=2).sweep() == [3]
    write(tmp_path, 4)
    assert store(tmp_path).retain(lambda _metas: [1]) == [1]
    assert names(tmp_path) == pair(4)


def test_a_meta_that_names_the_data_of_another_checkpoint_removes_nothing_of_it(tmp_path: Path) -> None:
    write(tmp_path, 1)
    theirs = write(tmp_path, 2).files

    def describe(number: int, file: CheckpointFile) -> CheckpointMeta:
        return describer()(number, file).model_copy(update={"files": theirs})

    save(store(tmp_path), {"step": 3}, describe=describe, commit=agree)
    write(tmp_path, 4)
    store(tmp_path).retain(lambda _metas: [3])
    assert names(tmp_path) == pair(1) | pair(2) | {"checkpoint-000003.pt"} | pair(4)


def test_what_is_left_of_one_that_was_half_removed_is_swept(tmp_path: Path) -> None:
    write(tmp_path, 1)
    write(tmp_path, 2)
    killed(lambda: store(tmp_path).retain(lambda _metas: [1]), Path, "unlink", die_at("checkpoint-000001.pt"))
    assert names(tmp_path) == pair(2) | {"checkpoint-000001.pt"}
    assert store(tmp_path, lease_epoch=2).sweep() == [1]
    assert names(tmp_path) == pair(2)
    assert write(tmp_path, 3).number == 3


def test_a_full_disk_fails_the_write_whole_and_touches_nothing_older(tmp_path: Path) -> None:
    write(tmp_path, 1)
    before = {path.name: path.read_bytes() for path in store(tmp_path).folder.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        big: dict[str, object] = {"w": [torch.ones(100_000) for _ in range(20)]}
        with pytest.raises(StorageFull, match="no space left"):
            save(store(tmp_path), big, describe=describer(), commit=agree)
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


def test_a_model_of_very_many_parameters_is_known_again(tmp_path: Path) -> None:
    described = schema({f"expert{n}": ("float32", (n,)) for n in range(50_001)})
    assert [write_or_check(Layout(tmp_path).model_schema("m"), described) for _ in range(2)] == [True, False]


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
