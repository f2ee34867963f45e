"""Weights alone, of another checkpoint or of a file from elsewhere."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from checkpoints_for_tests import agree, describer, save, store
from railbus_runner.checkpointing.tracked import Tracked
from railbus_runner.checkpointing.weights import Selection, WeightLoader
from railbus_runner.frames import Events
from railbus_runner.recorder import Recorder
from railbus_shared import files
from railbus_shared.contracts.artifacts import Column
from railbus_shared.errors import CheckpointCorrupt, CheckpointNotFound, Conflict, InvalidName
from railbus_shared.layout import Layout
from trainers import plan, write_dataset


class Net(nn.Module):
    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
        self.head = nn.Linear(8, classes)


class Loading:
    """A loader of weights for job `j-1` of model `m`, and what it tells."""

    def __init__(self, root: Path) -> None:
        column = {"x": Column(dtype="float32", shape=())}
        write_dataset(root, {"x": np.zeros(4, np.float32)}, described=column, splits={"train": 4})
        self.root = root
        self.sent: list[Events] = []
        self.recorder = Recorder.of_plan(plan(root, "classifier"), self.sent.append)
        self.loader = WeightLoader(plan(root, "classifier"), recorder=self.recorder)

    def checkpoint(self, model: nn.Module) -> Path:
        """Write one, and give its data."""
        tracked = Tracked()
        tracked.add_part("model", model)
        meta = save(store(self.root), tracked.state(step=5), describe=describer(step=5), commit=agree)
        return store(self.root).folder / meta.files[0].file

    def from_checkpoint(self, source: str, model: nn.Module, **selection: Any) -> Any:
        return self.loader.of_checkpoint(source, model, part="model", selection=Selection(**selection))

    def from_file(self, path: Path, model: nn.Module, *, key: str = "", sha256: str | None = None, **rest: Any) -> Any:
        return self.loader.of_file(path, model, sha256=sha256, key=key, selection=Selection(**rest))

    def told(self) -> dict[str, Any]:
        """The data of the last event."""
        self.recorder.flush()
        event: Any = self.sent[-1].events[-1]
        assert event["type"] == "checkpoint.loaded"
        return dict(event["data"])


@pytest.fixture
def loading(tmp_path: Path) -> Loading:
    return Loading(tmp_path)


def equal(one: nn.Module, other: nn.Module) -> set[str]:
    """Names of the tensors that are the same in both."""
    there = other.state_dict()
    return {name for name, value in one.state_dict().items() if name in there and torch.equal(value, there[name])}


ALL = set(Net().state_dict())
HEAD = {"head.weight", "head.bias"}
SAME = {"body.1.weight", "body.1.bias", "body.1.running_mean", "body.1.running_var", "body.1.num_batches_tracked"}
"""Alike in every new network."""


def test_a_named_checkpoint_of_another_job_is_loaded_and_told(loading: Loading) -> None:
    there, here = Net(), Net()
    path = loading.checkpoint(there)
    before = here.head.weight.data_ptr()
    loaded = loading.from_checkpoint("m/checkpoint-000001", here)
    assert (set(loaded.loaded), loaded.missing, loaded.unexpected) == (ALL, (), ())
    assert (equal(here, there), here.head.weight.data_ptr()) == (ALL, before)
    assert loading.told() == {
        "model": "m",
        "checkpoint": "checkpoint-000001",
        "from_job": "j-1",
        "step": 5,
        "path": str(path),
        "sha256": files.sha256_file(path),
        "loaded": 9,
        "missing": 0,
        "unexpected": 0,
        "missing_names": [],
        "unexpected_names": [],
    }


def test_only_what_is_selected_is_changed(loading: Loading) -> None:
    there, here = Net(classes=7), Net()
    loading.checkpoint(there)
    loaded = loading.from_checkpoint("checkpoint-000001", here, only=("body.*",))
    assert set(loaded.loaded) == ALL - HEAD
    assert equal(here, there) == ALL - HEAD
    with pytest.raises(ValueError, match=r"selects nothing by only=\('tail.*"):
        loading.from_checkpoint("checkpoint-000001", here, only=("tail.*",))


def test_names_are_translated_by_request(loading: Loading) -> None:
    there, here = Net(), Net()
    other = nn.ModuleDict({"backbone": here.body})
    loading.checkpoint(there)
    loading.from_checkpoint("checkpoint-000001", other, only=("backbone.*",), rename={"body.": "backbone."})
    assert equal(here, there) == ALL - HEAD
    with pytest.raises(ValueError, match=r"no name begins with 'boddy\.'"):
        loading.from_checkpoint("checkpoint-000001", other, rename={"boddy.": "backbone."})


def test_what_does_not_fit_is_named_and_nothing_changes(loading: Loading) -> None:
    there, here = Net(classes=7), Net()
    loading.checkpoint(there)
    with pytest.raises(Conflict, match=r"head\.weight is float32\[7, 8\] there and float32\[3, 8\] here"):
        loading.from_checkpoint("checkpoint-000001", here, strict=False)
    assert equal(here, there) == SAME
    with pytest.raises(Conflict, match=r"2 missing: head\.weight, head\.bias; 9 unexpected: body\.0\.weight"):
        loading.from_checkpoint("checkpoint-000001", nn.ModuleDict({"head": here.head}), rename={"head.": "tail."})


def test_what_is_on_both_sides_is_taken_where_that_is_asked_for(loading: Loading) -> None:
    there, here = Net(), Net()
    path = loading.root / "a.pt"
    state = {name: value for name, value in there.state_dict().items() if name != "head.bias"}
    torch.save({"state_dict": state | {"tail": torch.ones(1)}, "epoch": 3}, path)
    with pytest.raises(Conflict, match=r"1 missing: head\.bias; 1 unexpected: tail"):
        loading.from_file(path, here, key="state_dict")
    loaded = loading.from_file(path, here, key="state_dict", strict=False)
    assert (loaded.missing, loaded.unexpected) == (("head.bias",), ("tail",))
    assert equal(here, there) == ALL - {"head.bias"}
    assert (loading.told()["missing_names"], loading.told()["unexpected_names"]) == (["head.bias"], ["tail"])


@pytest.mark.parametrize("write", [torch.save, save_file])
def test_a_foreign_file_is_loaded_from_any_dtype_with_its_hash(
    loading: Loading, write: Callable[[Any, Path], object]
) -> None:
    there, here = Net().to(torch.bfloat16), Net()
    path = loading.root / "a.bin"
    write({f"module.{name}": value for name, value in there.state_dict().items()}, path)
    sha256 = files.sha256_file(path)
    loaded = loading.from_file(path, here, rename={"module.": ""}, sha256=sha256)
    assert loaded.sha256 == sha256
    assert equal(here, there.float()) == ALL
    with pytest.raises(Conflict, match=f"expected sha256 {'0' * 64}, found sha256 {sha256}"):
        loading.from_file(path, here, sha256="0" * 64)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("checkpoint-000009", CheckpointNotFound, "no such checkpoint.*the newest is checkpoint-000001"),
        ("other/checkpoint-000001", CheckpointNotFound, "the model has no checkpoint"),
        ("../checkpoint-000001", InvalidName, "not a valid name"),
        ("m/../../x", InvalidName, "not a valid name"),
        ("latest", CheckpointNotFound, "no such checkpoint.*MODEL/checkpoint-000123"),
    ],
)
def test_a_source_that_is_none_is_named(loading: Loading, source: str, error: type[Exception], message: str) -> None:
    loading.checkpoint(Net())
    with pytest.raises(error, match=message):
        loading.from_checkpoint(source, Net())


def test_a_damaged_checkpoint_is_not_loaded(loading: Loading) -> None:
    path = loading.checkpoint(Net())
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    here = Net()
    with pytest.raises(CheckpointCorrupt, match="sha256"):
        loading.from_checkpoint("checkpoint-000001", here)


class Bomb:
    """Does something when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch exploded",)


def test_a_foreign_pickle_that_would_do_something_does_nothing(
    loading: Loading, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"w": Bomb()}, loading.root / "mine.pt")
    model = Net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(Exception, match="system"):
        loading.from_file(loading.root / "mine.pt", model)
    assert not (tmp_path / "exploded").exists()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_file_that_cannot_be_read_is_named_with_a_remedy(loading: Loading) -> None:
    with pytest.raises(CheckpointNotFound, match=r"no such file.*on the host that trains"):
        loading.from_file(Path("absent.pt"), Net())
    with pytest.raises(CheckpointNotFound, match=r"Is a directory.*plain file"):
        loading.from_file(loading.root, Net())
    (loading.root / "old.pt").write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(Conflict, match=r"old\.pt.*save files of old formats anew"):
        loading.from_file(loading.root / "old.pt", Net())
    torch.save({"net": {"w": torch.ones(1)}}, loading.root / "a.pt")
    with pytest.raises(ValueError, match=r"holds no map of weights at 'its top': there is .*net.*by key="):
        loading.from_file(loading.root / "a.pt", Net())
    with pytest.raises(ValueError, match=r"has no 'model': there is .*net"):
        loading.from_file(loading.root / "a.pt", Net(), key="model")
    assert Layout(loading.root).models.exists() is False
