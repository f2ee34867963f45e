"""Whether a saved state fits what is live, and which live tensors its values can be read into.

Nothing live is changed here.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol, cast

import torch

from railbus_runner.checkpointing.filling import Placement
from railbus_runner.checkpointing.model_schema import dtype_name
from railbus_runner.checkpointing.names import plain_name, renamed, unwrapped, without_parallel
from railbus_runner.checkpointing.unpickling import is_dense

MAX_NAMED: Final = 10
_OF_PARAMETER: Final = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "grad_avg"}
"""State of an optimizer that has the shape of its parameter."""
_OF_SCHEDULERS: Final = {"initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum"}


class Values(Protocol):
    """A file that tensors of a state get their values from."""

    def place(self, saved: torch.Tensor, target: torch.Tensor) -> Placement | None: ...


@dataclass(frozen=True)
class Difference:
    """In what a saved state differs from what is live: names, and for `other` what is where."""

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    other: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.other)

    def __str__(self) -> str:
        told = (("missing", self.missing), ("unexpected", self.unexpected), ("of another kind", self.other))
        return "; ".join(f"{len(names)} {what}: {_some(names)}" for what, names in told if names)


# --- models ----------------------------------------------------------------------------------------------------------


def model_difference(module: torch.nn.Module, saved: Mapping[str, Any], *, may_cast: bool = False) -> Difference:
    """Differences in names, shapes and dtypes; `saved` has the module's own names (`for_model`).

    Names are not compared where the module loads states in a way of its own, which may translate them.
    `may_cast` lets one floating dtype be loaded into another.
    """
    live = unwrapped(module).state_dict()
    other: list[str] = []
    for name in live.keys() & saved.keys():
        there, here = saved[name], live[name]
        if isinstance(there, torch.Tensor) and isinstance(here, torch.Tensor) and not torch.nn.parameter.is_lazy(here):
            is_cast = may_cast and there.is_floating_point() and here.is_floating_point()
            if there.shape != here.shape or (there.dtype != here.dtype and not is_cast):
                other.append(f"{plain_name(name)} is {_kind(there)} there and {_kind(here)} here")
    if not _loads_as_usual(unwrapped(module)):
        return Difference(other=tuple(sorted(other)))
    return Difference(
        missing=tuple(plain_name(name) for name in live if name not in saved),
        unexpected=tuple(plain_name(name) for name in saved if name not in live),
        other=tuple(sorted(other)),
    )


def for_model(module: torch.nn.Module, saved: Mapping[str, Any]) -> dict[str, Any]:
    """A saved state under the names that the tensors of a module have now."""
    own = {plain_name(name): name for name in unwrapped(module).state_dict()}
    prefixes = {plain_name(prefix): prefix for prefix, _ in unwrapped(module).named_modules()}

    def name_now(name: str) -> str:
        plain = plain_name(name)
        module_name = plain.removesuffix(".")
        if plain.endswith("."):  # the name of a module
            return f"{prefixes.get(module_name, module_name)}."
        return own.get(plain, plain)

    saved = without_parallel(saved, own)
    return renamed(saved, name_now)


def place_model(module: torch.nn.Module, saved: dict[str, Any], values: Values) -> Iterator[Placement]:
    """Put the live tensors into a saved state where its values can be read straight into them, and say which."""
    inner = unwrapped(module)
    if _loads_as_usual(inner):
        yield from _place_map(saved, inner.state_dict(), values)


# --- optimizers ------------------------------------------------------------------------------------------------------


def optimizer_difference(optimizer: torch.optim.Optimizer, saved: object) -> Difference:
    """Differences in groups, their parameters and options; none is looked for where it loads states in its own way."""
    if not is_usual(optimizer):
        return Difference()
    if not isinstance(saved, dict) or not {"state", "param_groups"} <= saved.keys():
        return Difference(other=("the state is not one of an optimizer",))
    there, here = saved["param_groups"], optimizer.param_groups
    if len(there) != len(here):
        return Difference(other=(f"{len(there)} parameter groups there and {len(here)} here",))
    other = [
        difference
        for number, pair in enumerate(zip(there, here, strict=True))
        if (difference := _group_difference(f"group {number}", *pair))
    ]
    return Difference(other=tuple(other or _state_differences(optimizer, saved)))


def place_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any], values: Values) -> Iterator[Placement]:
    """As `place_model`; state that an optimizer on a GPU does not have yet gets its memory there."""
    if not is_usual(optimizer):
        return
    for number, parameter in _numbered(optimizer, saved):
        if (state := saved["state"].get(number)) is None:
            continue
        yield from _place_map(state, optimizer.state.get(parameter, {}), values)
        if parameter.device.type != "cpu":
            yield from _place_map(state, _on_device(state, parameter), values)


def is_usual(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it takes up states as torch's own optimizers do."""
    own = cast("Callable[..., object]", type(optimizer).load_state_dict)
    has_hooks = bool(getattr(optimizer, "_optimizer_load_state_dict_pre_hooks", None))
    return own is torch.optim.Optimizer.load_state_dict and not has_hooks


def _group_difference(where: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    if len(there["params"]) != len(here["params"]):
        return f"{where} has {len(there['params'])} parameters there and {len(here['params'])} here"
    if "param_names" in there and "param_names" in here and there["param_names"] != here["param_names"]:
        return f"{where} has other parameters there, or in another order"
    gone = sorted(map(str, there.keys() - here.keys() - _OF_SCHEDULERS))
    new = sorted(map(str, here.keys() - there.keys() - _OF_SCHEDULERS))
    if gone and new:  # one alone is what another version of torch makes
        return f"{where} is of another optimizer: with {_some(gone)} there, with {_some(new)} here"
    return ""


def _state_differences(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> Iterator[str]:
    for number, parameter in _numbered(optimizer, saved):
        for key, value in saved["state"].get(number, {}).items():
            if key in _OF_PARAMETER and isinstance(value, torch.Tensor) and value.shape != parameter.shape:
                yield f"{key} of parameter {number} is {_kind(value)} there, and the parameter {_kind(parameter)} here"


def _numbered(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> Iterator[tuple[int, torch.Tensor]]:
    """The live parameters by the numbers that a saved state gives them."""
    numbers = itertools.chain.from_iterable(group["params"] for group in saved["param_groups"])
    return zip(numbers, itertools.chain.from_iterable(group["params"] for group in optimizer.param_groups), strict=True)


def _on_device(state: Mapping[str, Any], parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """Memory beside a parameter for its state; the count of steps stays on the CPU, as torch has it."""
    return {
        key: torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=parameter.device)
        for key, value in state.items()
        if key != "step" and is_dense(value) and value.device.type == "cpu" and value.dim() > 0
    }


# --- both ------------------------------------------------------------------------------------------------------------


def _place_map(saved: dict[Any, Any], live: Mapping[Any, Any], values: Values) -> Iterator[Placement]:
    for key, there in saved.items():
        here = live.get(key)
        if not is_dense(there) or not is_dense(here) or (there.dtype, there.shape) != (here.dtype, here.shape):
            continue
        if here.is_meta or here.is_conj() or here.is_neg():
            continue
        if (placement := values.place(there, here)) is not None:
            saved[key] = here.detach()
            yield placement


def _loads_as_usual(module: torch.nn.Module) -> bool:
    """Whether a model takes up states by copying each tensor to the one of the same name, and does nothing else."""
    if type(module).load_state_dict is not torch.nn.Module.load_state_dict:
        return False
    return not any(
        part._load_state_dict_pre_hooks  # noqa: SLF001 - torch has no other way to ask
        or not type(part)._load_from_state_dict.__module__.startswith("torch.")  # noqa: SLF001
        for part in module.modules()
    )


def _kind(tensor: torch.Tensor) -> str:
    return f"{dtype_name(tensor.dtype)}{list(tensor.shape)}"


def _some(names: tuple[str, ...] | list[str]) -> str:
    shown = ", ".join(names[:MAX_NAMED])
    return shown if len(names) <= MAX_NAMED else f"{shown} and {len(names) - MAX_NAMED} more"
