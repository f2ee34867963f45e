"""Names of a model's tensors as they are without wrappers, so that a checkpoint loads with and without them.

DataParallel and DistributedDataParallel put `module.` before every name, `torch.compile` puts `_orig_mod.` before those
of what it compiled. A checkpoint holds neither. An averaged model (`torch.optim.swa_utils`) is no wrapper: it has a
state of its own.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, cast

import torch
from torch.nn.parallel import DataParallel, DistributedDataParallel

COMPILED: Final = "_orig_mod"
PARALLEL: Final = "module."


def unwrapped(module: torch.nn.Module) -> torch.nn.Module:
    """The model inside of wrappers that add nothing to its state."""
    while True:
        inner = dict(module.named_children()).get(COMPILED)
        if inner is None and isinstance(module, DataParallel | DistributedDataParallel):
            inner = module.module
        if inner is None:
            return module
        module = inner


def plain_name(name: str) -> str:
    """A name without what `torch.compile` adds, wherever in it."""
    return ".".join(word for word in name.split(".") if word != COMPILED) if COMPILED in name else name


def plain_state(module: torch.nn.Module) -> dict[str, Any]:
    """The `state_dict` of a model under plain names; it shares memory with the live tensors."""
    state = unwrapped(module).state_dict()
    return renamed(state, plain_name) if any(COMPILED in name for name in state) else state


def without_parallel(state: Mapping[str, Any], own: Iterable[str]) -> Mapping[str, Any]:
    """A state without `module.` before its names, if all have it and the model's own have not."""
    if not state or not all(name.startswith(PARALLEL) for name in state):
        return state
    return state if any(name.startswith(PARALLEL) for name in own) else renamed(state, _without_prefix)


def renamed(state: Mapping[str, Any], rename: Callable[[str], str]) -> dict[str, Any]:
    """A state under other names, with the versions of modules that torch keeps beside it."""
    new: Any = OrderedDict((rename(name), value) for name, value in state.items())
    if (versions := getattr(state, "_metadata", None)) is not None:
        named = {rename(f"{name}.").removesuffix("."): value for name, value in versions.items()}
        new._metadata = named  # noqa: SLF001 - where torch looks for them
    return cast("dict[str, Any]", new)


def _without_prefix(name: str) -> str:
    return name.removeprefix(PARALLEL)
