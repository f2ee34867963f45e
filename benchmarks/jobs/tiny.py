"""The smallest job that trains: one linear layer, one step."""

from __future__ import annotations

import torch

from railbus import TrainContext


def train(ctx: TrainContext) -> None:
    """One step on one batch."""
    model = torch.nn.Linear(64, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = next(iter(ctx.stream("train", batch_size=64)))
    loss = torch.nn.functional.cross_entropy(model(batch["image"].flatten(1)), batch["label"])
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    ctx.step(loss=loss)
