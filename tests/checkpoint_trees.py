"""A small tree with a real dataset and real checkpoints of a model, each linked to the one before; no training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from railbus_runner.checkpointing.model_schema import dtype_name
from railbus_shared import files
from railbus_shared.contracts.artifacts import CheckpointMeta, Column, ModelSchema, Parameter
from railbus_shared.contracts.jobs import CheckpointPolicy, JobSpec
from railbus_shared.layout import Layout, checkpoint_stem
from trainers import write_dataset

MODEL = "digits-cnn"
TIME = "2026-11-23T21:45:35.000000000Z"


class Net(torch.nn.Module):
    """Tied weights, two dtypes, a buffer, a tensor without elements, and one that is not contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(12, 8)
        self.head = torch.nn.Linear(8, 12, bias=True, dtype=torch.float32)
        self.head.weight = self.embed.weight
        self.conv = torch.nn.Conv2d(3, 4, 3)
        self.conv.weight.data = self.conv.weight.data.contiguous(memory_format=torch.channels_last)
        self.small = torch.nn.Parameter(torch.arange(6, dtype=torch.bfloat16))
        self.register_buffer("count", torch.tensor(7))
        self.register_buffer("none", torch.empty(0, 5))


def state_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int) -> dict[str, object]:
    """As a trainer's checkpoint holds it."""
    return {
        "format": 1,
        "step": step,
        "parts": {"model": model.state_dict(), "optimizer": optimizer.state_dict()},
        "streams": {"train": {"epoch": 0, "samples_seen": step * 8}},
        "rng": {"torch": torch.get_rng_state(), "cuda": []},
    }


def spec_of(**fields: object) -> JobSpec:
    return JobSpec.parse({"model": MODEL, "dataset": "d", "entrypoint": "classifier", "params": {"lr": 0.1}, **fields})


class Tree:
    """Writes checkpoints whose metas are true."""

    def __init__(self, root: Path) -> None:
        self.layout = Layout(root)
        self.states: dict[int, dict[str, object]] = {}
        """What was saved, as it was then."""
        x = np.arange(40, dtype=np.float32).reshape(20, 2)
        write_dataset(root, {"x": x}, described={"x": Column(dtype="float32", shape=(2,))}, splits={"train": 20})
        torch.manual_seed(0)
        self.model = Net()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.folder = self.layout.checkpoints(MODEL)
        self.folder.mkdir(parents=True)
        self._write_schema()

    def _write_schema(self) -> None:
        tensors = self.model.state_dict()
        schema = ModelSchema(
            model=MODEL,
            entrypoint="classifier",
            dataset="d",
            index_sha256=files.sha256_file(self.layout.index("d")),
            num_parameters=sum(one.numel() for one in self.model.parameters()),
            parameters={
                name: Parameter(dtype=dtype_name(one.dtype), shape=tuple(one.shape)) for name, one in tensors.items()
            },
            libraries={"torch": "2.13.0"},
            created_by_job="j-1",
            created_at=TIME,
        )
        files.write_new(self.layout.model_schema(MODEL), files.to_json(schema.to_map()))

    def step(self) -> None:
        """One step of the optimizer, on made-up gradients."""
        for parameter in self.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        self.optimizer.step()

    def write(
        self, number: int, *, job: str = "j-1", parent: int | None = None, has_table: bool = True, **fields: object
    ) -> Path:
        """A checkpoint of the model as it is; returns the path of its `.pt`."""
        path = self.folder / f"{checkpoint_stem(number)}.pt"
        state = state_of(self.model, self.optimizer, number * 10)
        torch.save(state, path)
        self.states[number] = torch.load(path, weights_only=True)
        tensors = table(path, state) if has_table else {}
        write_meta(self.layout, path, number, job=job, parent=parent, tensors=tensors, **fields)
        return path


def write_meta(
    layout: Layout, path: Path, number: int, *, job: str = "j-1", parent: int | None = None, **fields: object
) -> Path:
    """The meta of a `.pt` as it lies there."""
    there = layout.checkpoint_meta(MODEL, parent) if parent is not None else None
    meta = {
        "number": number,
        "model": MODEL,
        "job": job,
        "attempt": 1,
        "lease_epoch": 1,
        "step": number * 10,
        "epoch": 0,
        "samples_seen": number * 80,
        "entrypoint": "classifier",
        "seed": 0,
        "dataset": "d",
        "index_sha256": files.sha256_file(layout.index("d")),
        "devices": ["h-cpu0"],
        "precision": "mixed",
        "libraries": {"python": "3.11.9", "torch": "2.13.0"},
        "metrics": {"loss": round(1 / number, 3), "accuracy": 0.9 + number / 100},
        "files": [{"file": path.name, "bytes": path.stat().st_size, "sha256": files.sha256_file(path)}],
        "spec_sha256": spec_of().digest,
        "params": {"lr": 0.1},
        "policy": CheckpointPolicy(keep_last=2, keep_best=1, metric="loss").to_map(),
        "model_schema_sha256": files.sha256_file(layout.model_schema(MODEL)),
        "parent": parent,
        "parent_sha256": files.sha256_if_any(there) if there is not None else None,
        "created_at": TIME,
        **fields,
    }
    parsed = CheckpointMeta.parse(meta)
    target = layout.checkpoint_meta(MODEL, number)
    target.write_bytes(files.to_json(parsed.to_map()))
    return target


def table(path: Path, state: Mapping[str, object]) -> dict[str, dict[str, Any]]:
    """Where the dense, contiguous tensors of a `.pt` lie, as the writer tells; storages are numbered as they come."""
    reader = torch._C.PyTorchFileReader(str(path))
    keys: dict[int, int] = {}
    found: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors_of(state):
        key = keys.setdefault(tensor.untyped_storage()._cdata, len(keys))
        if tensor.is_contiguous():
            offset: int = reader.get_record_offset(f"data/{key}")  # type: ignore[attr-defined]
            offset += int(tensor.storage_offset()) * tensor.element_size()
            place = {"dtype": dtype_name(tensor.dtype), "shape": list(tensor.shape), "offset": offset}
            found[name] = {**place, "bytes": tensor.nbytes}
    return found


def tensors_of(value: object, at: str = "") -> list[tuple[str, torch.Tensor]]:
    """Every tensor of a state by its name."""
    if isinstance(value, torch.Tensor):
        return [(at, value)]
    items: Sequence[tuple[object, object]] = ()
    if isinstance(value, Mapping):
        items = list(value.items())
    elif isinstance(value, list | tuple):
        items = list(enumerate(value))
    return [one for key, item in items for one in tensors_of(item, f"{at}.{key}" if at else str(key))]
