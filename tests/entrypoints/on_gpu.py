"""Entrypoints of the tests on a real GPU: they train on the device of their lease and tell what they see of it."""

from __future__ import annotations

import os
import time
from typing import Any

import torch


def train(ctx: Any) -> None:
    """Train until the epochs are over, with some memory of the device held all the while."""
    _tell(ctx)
    model = torch.nn.Linear(64, 10).to(ctx.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    stream = ctx.stream("train", batch_size=100)
    ctx.track(model=model, optimizer=optimizer)
    ctx.resume()
    held = torch.ones(int(ctx.params.get("mib", 64)) << 20, dtype=torch.uint8, device=ctx.device)
    for _ in stream.epochs(int(ctx.params.get("epochs", 2))):
        for batch in stream:
            loss = torch.nn.functional.cross_entropy(model(batch["image"].flatten(1).float()), batch["label"])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            time.sleep(float(ctx.params.get("pause_s", 0)))
            ctx.step(loss=loss)
    ctx.event("held", bytes=held.numel())


def greedy(ctx: Any) -> None:
    """Take less than the fraction of the memory, then more than it."""
    fraction, total = float(ctx.params["fraction"]), torch.cuda.get_device_properties(ctx.device).total_memory
    below = torch.empty(int(total * fraction * 0.8), dtype=torch.uint8, device=ctx.device)
    try:
        torch.empty(int(total * fraction * 0.4), dtype=torch.uint8, device=ctx.device)
    except torch.OutOfMemoryError:
        ctx.event("capped", bytes=below.numel())


def _tell(ctx: Any) -> None:
    seen = {"device": str(ctx.device), "visible": os.environ["CUDA_VISIBLE_DEVICES"], "pid": os.getpid()}
    if ctx.device.type == "cuda":
        seen["count"] = torch.cuda.device_count()
        seen["uuid"] = str(torch.cuda.get_device_properties(ctx.device).uuid)
    ctx.event("looked", **seen)
