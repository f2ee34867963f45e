"""Checkpoints of one model on a real file system, for tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from railbus_runner.checkpointing import loading
from railbus_runner.checkpointing.image import Image
from railbus_runner.checkpointing.store import CheckpointStore
from railbus_runner.endings import CommitRefused
from railbus_shared.contracts.artifacts import CheckpointFile, CheckpointMeta
from railbus_shared.errors import (
    RailbusError,
    StaleLeaseEpoch,
)
from railbus_shared.layout import Layout

SHA = "0" * 64
TIME = "2026-01-01T00:00:00.000000000Z"


def store(root: Path, *, job: str = "j-1", lease_epoch: int = 1) -> CheckpointStore:
    return CheckpointStore(Layout(root), "m", job=job, lease_epoch=lease_epoch)


def describer(job: str = "j-1", *, step: int = 1) -> Callable[[int, CheckpointFile], CheckpointMeta]:
    def describe(number: int, file: CheckpointFile) -> CheckpointMeta:
        return CheckpointMeta(
            number=number,
            model="m",
            job=job,
            attempt=1,
            lease_epoch=1,
            step=step,
            epoch=0,
            samples_seen=0,
            entrypoint="classifier",
            seed=0,
            dataset="d",
            index_sha256=SHA,
            devices=("h-cpu0",),
            precision="float32",
            libraries={},
            files=(file,),
            created_at=TIME,
        )

    return describe


def agree(_meta: CheckpointMeta) -> None:
    """The runner says yes."""


def refuse(_meta: CheckpointMeta) -> None:
    raise CommitRefused(StaleLeaseEpoch("stale"))


def write(root: Path, step: int, *, job: str = "j-1") -> CheckpointMeta:
    state: dict[str, object] = {"step": step, "w": torch.full((1000,), float(step))}
    return save(store(root, job=job), state, describe=describer(job, step=step), commit=agree)


def save(
    into: CheckpointStore,
    state: dict[str, object],
    *,
    describe: Callable[[int, CheckpointFile], CheckpointMeta],
    commit: Callable[[CheckpointMeta], None],
) -> CheckpointMeta:
    image = Image.of(state)

    def describe_all(number: int, file: CheckpointFile) -> CheckpointMeta:
        return describe(number, file).model_copy(update={"tensors": image.tensors})

    return into.write(image.chunks(), nbytes=image.nbytes, describe=describe_all, commit=commit)


class Rejections:
    """What a store has passed over."""

    def __init__(self) -> None:
        self.errors: dict[int, str] = {}

    def __call__(self, number: int, error: RailbusError) -> None:
        self.errors[number] = error.message


def newest_step(root: Path, *, job: str = "j-1") -> tuple[object, list[int]]:
    rejections = Rejections()
    loaded = loading.newest(store(root, job=job), rejected=rejections)
    return (loaded.read()["step"] if loaded else None), sorted(rejections.errors)


def names(root: Path) -> set[str]:
    """Of all files in the folder but the claims."""
    folder = store(root).folder
    return {path.name for path in folder.iterdir() if not path.name.startswith(".serial-")}


def pair(number: int) -> set[str]:
    return {f"checkpoint-{number:06d}.pt", f"checkpoint-{number:06d}.meta.json"}
