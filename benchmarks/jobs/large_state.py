"""A model of some 94 million parameters with AdamW, its state as a list of tensors, and a buffer that has room for it.

Shapes: B batch, T time.
"""

# ruff: noqa: N803, N806 - tensors carry the letters of their shape

from __future__ import annotations

import ctypes
import itertools
import mmap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import nn

ALIGNMENT: Final = 64
_VOCABULARY: Final = 2048


class Gpt(nn.Module):
    """Layers of a transformer over an embedding, which is its head as well."""

    def __init__(self, *, layers: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(_VOCABULARY, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, width // 64, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(layers)
        )

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(tokens_BT)
        for layer in self.layers:
            hidden = layer(hidden)
        logits: torch.Tensor = hidden @ self.embedding.weight.T
        return logits


@dataclass(frozen=True)
class Training:
    """A model and its optimizer."""

    model: Gpt
    optimizer: torch.optim.AdamW
    tokens: int
    """Of a batch."""

    @classmethod
    def begun(cls, *, tiny: bool) -> Training:
        """After a first step, by which the optimizer has its state."""
        model = Gpt(layers=1, width=128) if tiny else Gpt(layers=13, width=768)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        _step(model, optimizer, tokens=8)
        return cls(model, optimizer, tokens=8 if tiny else 48)

    @property
    def state(self) -> dict[str, object]:
        """It shares memory with what is trained."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def step(self) -> torch.Tensor:
        """Train on one batch of noise; gives its loss."""
        return _step(self.model, self.optimizer, tokens=self.tokens)

    def tensors(self) -> list[torch.Tensor]:
        return list(tensors_of(self.state))

    def change(self) -> None:
        """What an optimizer does to all of the state right after it was saved."""
        for tensor in self.tensors():
            tensor.add_(1)


def _step(model: Gpt, optimizer: torch.optim.Optimizer, *, tokens: int) -> torch.Tensor:
    tokens_BT = torch.randint(0, _VOCABULARY, (1, tokens))
    loss = nn.functional.cross_entropy(model(tokens_BT).flatten(0, 1), tokens_BT.flatten())
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad()
    return loss


def tensors_of(value: object) -> Iterator[torch.Tensor]:
    """Every tensor of a state, in the order of its maps."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from itertools.chain.from_iterable(map(tensors_of, value.values()))
    elif isinstance(value, list | tuple):
        yield from itertools.chain.from_iterable(map(tensors_of, value))


class Buffer:
    """Shared memory that was touched before, page-aligned, with room for copies of tensors one after the other."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        sizes = [-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in tensors]
        self.memory = mmap.mmap(-1, -(-sum(sizes) // mmap.PAGESIZE) * mmap.PAGESIZE)
        whole = torch.frombuffer(self.memory, dtype=torch.uint8).zero_()
        starts = itertools.accumulate(sizes, initial=0)
        self.views = [
            whole[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for tensor, start in zip(tensors, starts, strict=False)
        ]

    def fill(self, tensors: Sequence[torch.Tensor]) -> None:
        """Copy, with one thread and without torch, whose threads that would otherwise change."""
        for view, tensor in zip(self.views, tensors, strict=True):
            ctypes.memmove(view.data_ptr(), tensor.data_ptr(), tensor.nbytes)

    def equals(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Bit by bit."""
        pairs = zip(self.views, tensors, strict=True)
        return all(
            torch.equal(one.view(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)) for one, other in pairs
        )
