"""The state of every random number generator of a trainer, as tensors and plain containers."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import numpy as np
import torch

_RngState = dict[str, Any]  # read back from a checkpoint that was hashed: its form is the one written here


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch; CUDA's generators follow once they are used."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class Generators(NamedTuple):
    """The state of all generators at one moment, as they give it themselves; taken in some ten microseconds."""

    python: tuple[Any, ...]
    numpy: Any
    torch: torch.Tensor
    cuda: list[torch.Tensor]

    @classmethod
    def now(cls) -> Generators:
        """Of Python's, NumPy's global, torch's and, where CUDA is used, every device's generator."""
        return cls(
            random.getstate(),
            np.random.get_state(legacy=False),
            torch.get_rng_state(),
            torch.cuda.get_rng_state_all() if _is_cuda_used() else [],
        )


def rng_state(generators: Generators | None = None) -> dict[str, object]:
    """The state of every generator, now or at an earlier moment, as tensors and plain containers."""
    taken = generators or Generators.now()
    version, internal, gauss = taken.python
    numpy_state = taken.numpy
    return {
        "python": {"version": version, "internal": torch.tensor(internal), "gauss": gauss},
        "numpy": {
            "key": torch.from_numpy(numpy_state["state"]["key"].astype(np.int64)),
            "pos": int(numpy_state["state"]["pos"]),
            "has_gauss": int(numpy_state["has_gauss"]),
            "gauss": float(numpy_state["gauss"]),
        },
        "torch": taken.torch,
        "cuda": taken.cuda,
    }


def set_rng_state(saved: Mapping[str, object]) -> str:
    """Continue where `rng_state` was taken, and say in words which generators could not be; empty if all were.

    CUDA's generators are those of numbered devices: with another number of GPUs than then they stay as seeded.
    """
    state = cast("_RngState", saved)
    python, numpy_state = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["internal"].tolist()), python["gauss"]))
    np.random.set_state(
        {
            "bit_generator": "MT19937",
            "state": {"key": numpy_state["key"].numpy().astype(np.uint32), "pos": numpy_state["pos"]},
            "has_gauss": numpy_state["has_gauss"],
            "gauss": numpy_state["gauss"],
        }
    )
    torch.set_rng_state(state["torch"])
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if len(state["cuda"]) != here:
        return f"those of CUDA are as seeded: {len(state['cuda'])} GPUs then, {here} now"
    if here:
        torch.cuda.set_rng_state_all(state["cuda"])
    return ""


def _is_cuda_used() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
