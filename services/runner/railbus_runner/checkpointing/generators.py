"""Random number generators that an entrypoint made itself, as parts of a checkpoint."""

from __future__ import annotations

import random
from typing import Any, Protocol

import numpy as np
import torch

_Plain = dict[str, Any]


class GeneratorPart(Protocol):
    """A generator that can say and take back where it is."""

    def state_dict(self) -> _Plain: ...

    def load_state_dict(self, state_dict: _Plain, /) -> None: ...


def part_of(generator: object) -> GeneratorPart | None:
    """The part that a generator of torch, NumPy or Python is tracked as; None for anything else."""
    match generator:
        case torch.Generator():
            return TorchGenerator(generator)
        case np.random.Generator():
            return NumpyGenerator(generator)
        case random.Random():
            return PythonGenerator(generator)
        case _:
            return None


class TorchGenerator:
    """A `torch.Generator`, of the CPU or of a GPU."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator

    def state_dict(self) -> _Plain:
        """Uint8 (n,), on the CPU whatever the generator's device is."""
        return {"torch": self._generator.get_state()}

    def load_state_dict(self, state_dict: _Plain, /) -> None:
        """Raises RuntimeError for a state of another kind of device."""
        self._generator.set_state(state_dict["torch"])


class NumpyGenerator:
    """A `numpy.random.Generator`, whatever its bit generator."""

    def __init__(self, generator: np.random.Generator) -> None:
        self._generator = generator

    def state_dict(self) -> _Plain:
        """The state of the bit generator, its arrays as tensors."""
        return _to_tensors(dict(self._generator.bit_generator.state))

    def load_state_dict(self, state_dict: _Plain, /) -> None:
        """Raises ValueError for a state of another bit generator."""
        self._generator.bit_generator.state = _to_arrays(state_dict)


class PythonGenerator:
    """A `random.Random`."""

    def __init__(self, generator: random.Random) -> None:
        self._generator = generator

    def state_dict(self) -> _Plain:
        """Its state, as `getstate` gives it."""
        version, internal, gauss = self._generator.getstate()
        return {"version": version, "internal": torch.tensor(internal), "gauss": gauss}

    def load_state_dict(self, state_dict: _Plain, /) -> None:
        """Go on from a state."""
        internal = tuple(state_dict["internal"].tolist())
        self._generator.setstate((state_dict["version"], internal, state_dict["gauss"]))


def _to_tensors(state: _Plain) -> _Plain:
    return {key: _to_tensors(value) if isinstance(value, dict) else _to_tensor(value) for key, value in state.items()}


def _to_tensor(value: object) -> object:
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    return value.item() if isinstance(value, np.generic) else value


def _to_arrays(state: _Plain) -> _Plain:
    return {key: _to_arrays(value) if isinstance(value, dict) else _to_array(value) for key, value in state.items()}


def _to_array(value: object) -> object:
    return value.numpy() if isinstance(value, torch.Tensor) else value
