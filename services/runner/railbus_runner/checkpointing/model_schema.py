"""`model_schema.json`: what a model is, written with its first checkpoint and kept true by every later one."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
from pathlib import Path

import numpy as np
import torch

from railbus_runner.frames import Plan
from railbus_shared import clock, files, wire
from railbus_shared.contracts.artifacts import ModelSchema, Parameter
from railbus_shared.errors import Conflict


def schema_of(model: torch.nn.Module, plan: Plan) -> ModelSchema:
    """The schema of a model that this plan trains."""
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    tensors = {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    return ModelSchema(
        model=plan.spec.model,
        entrypoint=plan.spec.entrypoint,
        params=plan.spec.params,
        dataset=plan.spec.dataset,
        index_sha256=plan.stream.index_sha256,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        parameters={
            name: Parameter(dtype=dtype_name(value.dtype), shape=tuple(value.shape), trainable=name in trainable)
            for name, value in tensors.items()
        },
        libraries=libraries(),
        created_by_job=plan.job,
        created_at=clock.now(),
    )


def write_or_check(path: Path, schema: ModelSchema) -> bool:
    """Write the schema if the model has none yet, and say so; else raise Conflict if the parameters differ."""
    if not path.exists() and _write(path, schema):
        return True
    there = ModelSchema.parse(wire.decode(path.read_bytes(), limit_bytes=64 << 20))
    if difference := first_difference(there, schema):
        raise Conflict(
            f"model {schema.model!r} is another one than its model_schema.json says: {difference}",
            hint="use another model name for the new architecture, or the params that the model was made with",
            details={"model": schema.model, "created_by_job": there.created_by_job},
        )
    return False


def first_difference(there: ModelSchema, here: ModelSchema) -> str:
    """The first parameter that differs, in words; empty if none does. Whether one is trained makes no difference."""
    for name in (*there.parameters, *here.parameters):
        old, new = there.parameters.get(name), here.parameters.get(name)
        if old is None:
            return f"parameter {name!r} is new"
        if new is None:
            return f"parameter {name!r} is missing"
        if (old.dtype, old.shape) != (new.dtype, new.shape):
            return f"parameter {name!r} was {old.dtype}{list(old.shape)} and is {new.dtype}{list(new.shape)}"
    return ""


@functools.cache
def libraries() -> dict[str, str]:
    """Versions of what made a checkpoint."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "railbus": importlib.metadata.version("railbus"),
    }


def precision(model: torch.nn.Module | None) -> str:
    """The dtype of a model's parameters, or `mixed`."""
    dtypes = {dtype_name(parameter.dtype) for parameter in model.parameters()} if model is not None else set()
    return dtypes.pop() if len(dtypes) == 1 else "mixed"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _write(path: Path, schema: ModelSchema) -> bool:
    """False if another job of the model was quicker."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with files.storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    files.write_whole(draft, files.to_json(schema.to_map()))
    try:
        files.publish(draft, path)
    except FileExistsError:
        draft.unlink()
        return False
    return True
