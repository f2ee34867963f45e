"""`model_schema.json`: what a model is, written with its first checkpoint and kept true by every later one."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import orjson
import torch

from railbus_runner.checkpointing.names import plain_name, plain_state
from railbus_runner.frames import Plan
from railbus_shared import clock, files
from railbus_shared.contracts.artifacts import ModelSchema, Parameter
from railbus_shared.errors import CheckpointCorrupt, Conflict, SchemaInvalid, WireError
from railbus_shared.plain_files import opened

_MAX_BYTES: Final = 64 << 20
_SHOWN: Final = 10
_MAX_DETAIL: Final = 2000
"""Characters; details travel with the error."""


def schema_of(model: torch.nn.Module, plan: Plan) -> ModelSchema:
    """The schema of a model that this plan trains, under the names that its checkpoints hold."""
    trainable = {plain_name(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
    tensors = {name: value for name, value in plain_state(model).items() if isinstance(value, torch.Tensor)}
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
    """Write the schema if the model has none yet, and say so; else raise Conflict if the parameters differ.

    The error names every parameter that differs, the first ten and how many there are; its details hold all names.
    Raises SchemaInvalid for a file that is no schema.
    """
    if not path.exists() and _write(path, schema):
        return True
    there = _read(path)
    if different := differences(there, schema):
        raise Conflict(
            f"model {schema.model!r} is another one than its model_schema.json says: {shown(list(different.values()))}",
            hint="use another model name for the new architecture, or the params that the model was made with",
            details={
                "model": schema.model,
                "created_by_job": there.created_by_job,
                "num_different": len(different),
                "different": ", ".join(different)[:_MAX_DETAIL],
            },
        )
    return False


def differences(there: ModelSchema, here: ModelSchema) -> dict[str, str]:
    """Every parameter that differs, in words, by its name; whether one is trained makes no difference.

    Those that there were come first, in the order of the model, then those that are new.
    """
    found: dict[str, str] = {}
    for name in {**there.parameters, **here.parameters}:
        old, new = there.parameters.get(name), here.parameters.get(name)
        if old is None and new is not None:
            found[name] = f"parameter {name!r} is new, {_form(new)}"
        elif new is None and old is not None:
            found[name] = f"parameter {name!r} is missing, it was {_form(old)}"
        elif old is not None and new is not None and (old.dtype, old.shape) != (new.dtype, new.shape):
            found[name] = f"parameter {name!r} was {_form(old)} and is {_form(new)}"
    return found


def shown(sentences: Sequence[str]) -> str:
    """The first ten of them, and how many there are in all if that is more."""
    more = len(sentences) - _SHOWN
    return "; ".join(sentences[:_SHOWN]) + (f"; and {more} more, {len(sentences)} in all" if more > 0 else "")


def _form(parameter: Parameter) -> str:
    return f"{parameter.dtype}{list(parameter.shape)}"


def _read(path: Path) -> ModelSchema:
    """Of any number of parameters: the limits of messages (`wire`) would refuse some 50,000."""
    try:
        with opened(path.parent, path.name) as file:
            return ModelSchema.parse(orjson.loads(file.read(_MAX_BYTES)))
    except (WireError, CheckpointCorrupt, OSError, orjson.JSONDecodeError) as exc:
        raise SchemaInvalid(
            f"{path}: no model schema: {exc}", hint="restore the file, or remove it: the next checkpoint writes it anew"
        ) from exc


@functools.cache
def libraries() -> dict[str, str]:
    """Versions of what made a checkpoint."""
    cuda = {"cuda": torch.version.cuda} if torch.version.cuda else {}
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        **cuda,
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
