"""States of checkpoints: proven before they are read, and what they may hold."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints_for_tests import (
    Rejections,
    agree,
    describer,
    newest_step,
    save,
    store,
    write,
)
from railbus_runner.checkpointing import loading
from railbus_runner.checkpointing.tracked import Tracked
from railbus_shared import files
from railbus_shared.errors import (
    CheckpointCorrupt,
    CheckpointNotFound,
    Conflict,
)

# --- what a state may hold -------------------------------------------------------------------------------------------


class Odd:
    """A part with whatever state."""

    def __init__(self, state: object) -> None:
        self.state = state

    def state_dict(self) -> object:
        return self.state

    def load_state_dict(self, state: object) -> None:
        self.state = state


@pytest.mark.parametrize("value", [object(), len, {"deep": [1, {2: lambda: 0}]}, torch.ones(2).numpy(), Path("x")])
def test_a_part_whose_state_could_not_be_loaded_safely_is_refused_with_its_place(value: object) -> None:
    tracked = Tracked()
    tracked.add_part("odd", Odd(value))
    with pytest.raises(TypeError, match=r"state\.parts\.odd.*cannot be loaded safely"):
        tracked.state(step=1)


def test_every_generator_goes_on_where_it_was(tmp_path: Path) -> None:
    import random

    import numpy as np

    def draw() -> list[object]:
        return [random.random(), random.gauss(0, 1), np.random.normal(), torch.rand(1).item()]

    draw()
    tracked = Tracked()
    tracked.add_part("model", torch.nn.Linear(2, 2))
    save(store(tmp_path), tracked.state(step=5), describe=describer(step=5), commit=agree)
    expected = draw() + draw()
    loaded = loading.newest(store(tmp_path), rejected=Rejections())
    assert loaded is not None
    with loaded:
        assert tracked.restore(loaded.state, values=loaded.file) == 5
    assert tracked.restore_generators(loaded.state) == ""
    assert draw() + draw() == expected


def test_a_checkpoint_without_a_tracked_part_is_refused_by_name() -> None:
    tracked = Tracked()
    tracked.add_part("model", torch.nn.Linear(2, 2))
    state = tracked.state(step=1)
    tracked.add_part("optimizer", torch.optim.SGD(torch.nn.Linear(2, 2).parameters()))
    with pytest.raises(Conflict, match="no state of optimizer, only of model"):
        tracked.restore(state)


@pytest.mark.parametrize("part", [3, None, "model"])
def test_what_has_no_state_cannot_be_tracked(part: object) -> None:
    with pytest.raises(TypeError, match="state_dict"):
        Tracked().add_part("model", part)


# --- damage ----------------------------------------------------------------------------------------------------------


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def _edit_meta(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    meta = json.loads(path.read_text())
    change(meta)
    path.write_text(json.dumps(meta))


DAMAGE: dict[str, Callable[[Path, Path], object]] = {
    "a flipped bit": lambda data, _meta: _flip(data),
    "cut short": lambda data, _meta: os.truncate(data, 100),
    "a byte too many": lambda data, _meta: data.write_bytes(data.read_bytes() + b"x"),
    "no data": lambda data, _meta: data.unlink(),
    "an empty meta": lambda _data, meta: meta.write_bytes(b""),
    "half a meta": lambda _data, meta: meta.write_bytes(meta.read_bytes()[:100]),
    "a meta without hash": lambda _data, meta: _edit_meta(meta, lambda m: m["files"][0].pop("sha256")),
    "a meta with an empty hash": lambda _data, meta: _edit_meta(meta, lambda m: m["files"][0].update(sha256="")),
    "a meta of another step": lambda _data, meta: _edit_meta(meta, lambda m: m.update(step=3)),
    "a meta of another number": lambda _data, meta: _edit_meta(meta, lambda m: m.update(number=1)),
    "a meta of another model": lambda _data, meta: _edit_meta(meta, lambda m: m.update(model="n")),
    "a path in the meta": lambda _data, meta: _edit_meta(meta, lambda m: m["files"][0].update(file="../x.pt")),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_is_passed_over_for_the_next_older_and_said(tmp_path: Path, damage: str) -> None:
    write(tmp_path, 1)
    write(tmp_path, 2)
    folder = store(tmp_path).folder
    DAMAGE[damage](folder / "checkpoint-000002.pt", folder / "checkpoint-000002.meta.json")
    assert newest_step(tmp_path) == (1, [2])


def test_whichever_bit_flips_what_is_read_is_what_was_saved_or_the_older_one(tmp_path: Path) -> None:
    """Of the data every flip is told; of the meta those that change what it is read for, which no hash proves."""
    folder = store(tmp_path).folder
    saved = [write(tmp_path, 41), write(tmp_path, 42)]
    for path in (folder / "checkpoint-000002.pt", folder / "checkpoint-000002.meta.json"):
        whole = path.read_bytes()
        is_meta = path.suffix == ".json"
        for place in range(len(whole)) if is_meta else [*range(0, len(whole), 97), len(whole) - 1]:
            path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place % 7)]) + whole[place + 1 :])
            rejections = Rejections()
            loaded = loading.newest(store(tmp_path), rejected=rejections)
            assert loaded is not None, "neither of the two was read"
            stated, state = loaded.meta, loaded.read()
            loaded.file.close()
            assert (stated.number, stated.step) in [(meta.number, meta.step) for meta in saved]
            assert stated.files == saved[stated.number - 1].files
            assert state["step"] == stated.step
            assert torch.equal(state["w"], torch.full((1000,), float(stated.step)))  # type: ignore[arg-type]
            assert is_meta or (stated.number, list(rejections.errors)) == (1, [2])
        path.write_bytes(whole)
    assert newest_step(tmp_path) == (42, [])


class Bomb:
    """Pickles to a call."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch exploded",)


def test_nothing_is_unpickled_that_the_hash_does_not_prove_or_weights_only_forbids(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, 1)
    write(tmp_path, 2)
    data, meta = (store(tmp_path).folder / name for name in ("checkpoint-000002.pt", "checkpoint-000002.meta.json"))
    torch.save({"step": Bomb()}, data)
    assert newest_step(tmp_path) == (1, [2])
    file = {"file": data.name, "bytes": data.stat().st_size, "sha256": files.sha256_file(data)}
    _edit_meta(meta, lambda m: m.update(files=[file]))
    assert newest_step(tmp_path) == (1, [2])
    data.write_bytes(pickle.dumps(Bomb()))
    file = {"file": data.name, "bytes": data.stat().st_size, "sha256": files.sha256_file(data)}
    _edit_meta(meta, lambda m: m.update(files=[file]))
    assert newest_step(tmp_path) == (1, [2])
    assert not (tmp_path / "exploded").exists()


def test_a_job_reads_only_its_own_but_any_may_be_named(tmp_path: Path) -> None:
    write(tmp_path, 1, job="j-1")
    write(tmp_path, 2, job="j-2")
    assert newest_step(tmp_path, job="j-1") == (1, [])
    assert loading.named(store(tmp_path, job="j-1"), "checkpoint-000002").read()["step"] == 2
    with pytest.raises(CheckpointNotFound, match="checkpoint-000007"):
        loading.named(store(tmp_path), "checkpoint-000007")
    _flip(store(tmp_path).folder / "checkpoint-000002.pt")
    with pytest.raises(CheckpointCorrupt):
        loading.named(store(tmp_path), "checkpoint-000002")
