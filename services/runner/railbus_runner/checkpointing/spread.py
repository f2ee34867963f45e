"""Tensors that are spread over ranks (`DTensor`): taken out of a state, and put back, spread otherwise or not at all.

A place in a state is the keys and indices that lead to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, cast

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

State = Mapping[str, object]
Place = tuple[str | int, ...]
Live = Callable[[Place], torch.Tensor | None]
"""The tensor that is in use at a place, if there is one."""
Target = Callable[[Place, torch.Size, torch.dtype], torch.Tensor]
"""An empty tensor of a shape and dtype for a place."""

_MARK: Final = "railbus.spread"
"""A map with this key stands for a spread tensor where a state is without it."""


def is_spread(state: object) -> bool:
    """Whether any tensor of a state is spread over ranks; the same on all of them."""
    return any(isinstance(value, DTensor) for _, value in _leaves(state))


def take_apart(state: State) -> tuple[dict[str, object], dict[str, torch.Tensor]]:
    """A state with marks for its spread tensors, and those by name."""
    tensors: dict[str, torch.Tensor] = {}

    def marked(place: Place, value: object) -> object:
        if not isinstance(value, DTensor):
            return value
        name = _name(place)
        tensors[name] = value.detach()
        return {_MARK: name, "shape": list(value.shape), "dtype": value.dtype}

    return cast("dict[str, object]", _mapped(state, marked)), tensors


def put_together(common: State, *, target: Target) -> tuple[dict[str, object], dict[str, torch.Tensor]]:
    """A state with an empty tensor for each mark, as `target` gives it, and those tensors by name."""
    tensors: dict[str, torch.Tensor] = {}

    def unmarked(place: Place, value: object) -> object:
        if not _is_mark(value):
            return value
        mark = cast("dict[str, Any]", value)
        tensors[mark[_MARK]] = target(place, torch.Size(mark["shape"]), mark["dtype"])
        return tensors[mark[_MARK]]

    return cast("dict[str, object]", _mapped(common, unmarked)), tensors


def whole(_place: Place, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """An empty tensor that is not spread, on the CPU."""
    return torch.empty(shape, dtype=dtype)


def spread_like(live: Live, state: State) -> dict[str, object]:
    """A state whose tensors are spread as the live ones at their places are; every rank has all of them before."""

    def spread(place: Place, value: object) -> object:
        model = live(place) if isinstance(value, torch.Tensor) else None
        if not isinstance(model, DTensor) or model.shape != cast("torch.Tensor", value).shape:
            return value
        there = cast("torch.Tensor", value).to(model.device)
        return distribute_tensor(there, model.device_mesh, model.placements, src_data_rank=None)

    return cast("dict[str, object]", _mapped(state, spread))


def empty_like(live: Live) -> Target:
    """Targets that are spread, or not, as the live tensors at their places are."""

    def target(place: Place, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        model = live(place)
        if model is None or model.shape != shape:
            return whole(place, shape, dtype)
        return torch.empty_like(model.detach(), dtype=dtype)

    return target


def _is_mark(value: object) -> bool:
    return isinstance(value, dict) and _MARK in value


def _name(place: Place) -> str:
    return ".".join(map(str, place))


def _leaves(value: object, place: Place = ()) -> Iterator[tuple[Place, object]]:
    if isinstance(value, Mapping) and not _is_mark(value):
        for key, item in value.items():
            yield from _leaves(item, (*place, key))
    elif isinstance(value, list | tuple) and not isinstance(value, torch.Size):
        for number, item in enumerate(value):
            yield from _leaves(item, (*place, number))
    else:
        yield place, value


def _mapped(value: object, change: Callable[[Place, object], object], place: Place = ()) -> object:
    """The same containers with other leaves; the types of maps and sequences stay."""
    if isinstance(value, dict) and not _is_mark(value):
        changed = {key: _mapped(item, change, (*place, key)) for key, item in value.items()}
        return type(value)(changed)
    if type(value) in {list, tuple}:
        items = cast("list[object]", value)
        return type(items)(_mapped(item, change, (*place, number)) for number, item in enumerate(items))
    return change(place, value)
