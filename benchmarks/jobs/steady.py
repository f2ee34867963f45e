"""A job that trains on and on at a calm pace, with checkpoints, so that its parts can be killed under it."""

from __future__ import annotations

import time

import torch

from railbus import TrainContext

PAUSE_S = 0.01


def train(ctx: TrainContext) -> None:
    """One linear layer over the digits, for as many epochs as asked."""
    model = torch.nn.Linear(64, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    stream = ctx.stream("train", batch_size=64)
    ctx.track(model=model, optimizer=optimizer)
    ctx.resume()
    for _ in stream.epochs(int(str(ctx.params["epochs"]))):
        for batch in stream:
            loss = torch.nn.functional.cross_entropy(model(batch["image"].flatten(1)), batch["label"])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            ctx.step(loss=loss)
            time.sleep(PAUSE_S)
