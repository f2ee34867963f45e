"""An entrypoint that reads all of a dataset once, a window of shards at a time, and tells what came in which order."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

BATCH = 256


class Digest:
    """Of batches with the columns `id` and `x`, in their order."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()
        self.ids: list[torch.Tensor] = []

    def take(self, batch: dict[str, torch.Tensor]) -> None:
        self.ids.append(batch["id"].clone())
        self._sha256.update(batch["id"].numpy().tobytes())
        self._sha256.update(batch["x"][:, ::1024].numpy().tobytes())

    def told(self) -> dict[str, object]:
        ids = torch.cat(self.ids)
        return {"samples": len(ids), "distinct": len(set(ids.tolist())), "sha256": self._sha256.hexdigest()}


def train(ctx: Any) -> None:
    model = torch.nn.Linear(2, 1)
    ctx.track(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    ctx.resume()
    digest = Digest()
    stream = ctx.stream("train", batch_size=BATCH, shuffle="window", window=int(ctx.params["window"]))
    for _ in stream.epochs(1):
        for batch in stream:
            digest.take(batch)
            ctx.step()
    ctx.event("read", **digest.told())
