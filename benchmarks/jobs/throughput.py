"""A plain training loop, for a railbus job and for a script without railbus, and what each call of the context costs.

Shapes: B batch.
"""

# ruff: noqa: N806 - tensors carry the letters of their shape

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass

import torch
from torch.nn import functional

from railbus import TrainContext
from railbus_runner.entrypoints.classifier import Params, build, find_task
from railbus_shared.contracts.artifacts import Column

LR = 1e-3
_CALLS = 20_000


@dataclass(frozen=True)
class Measured:
    """The timed part of a run."""

    steps: int
    wall_s: float
    cpu_s: float
    """Of all threads of the process; what others do on the machine changes it little."""
    threads: int


class Trainer:
    """Model, optimizer and one step of them."""

    def __init__(self, columns: Mapping[str, Column], *, seed: int) -> None:
        torch.manual_seed(seed)
        params = Params()
        self.task = find_task(dict(columns), params)
        self.model = build(self.task, params)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LR)

    def step(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Train on one batch; returns its loss."""
        loss = functional.cross_entropy(self.model(batch[self.task.features]), batch[self.task.label].long())
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss


def run(
    batches: Iterable[Mapping[str, torch.Tensor]], step: Callable[[Mapping[str, torch.Tensor]], object], *, warm_up: int
) -> Measured:
    """Train on all batches; what comes before the clock starts warms up threads, allocator and caches."""
    steps, began, cpu = -warm_up, 0.0, 0.0
    for batch in batches:
        if steps == 0:
            began, cpu = time.perf_counter(), time.process_time()
        step(batch)
        steps += 1
    return Measured(steps, time.perf_counter() - began, time.process_time() - cpu, torch.get_num_threads())


def train(ctx: TrainContext) -> None:
    """The loop as a railbus job."""
    trainer = Trainer(ctx.dataset.schema.columns, seed=ctx.seed)
    stream = ctx.stream("train", batch_size=int(str(ctx.params["batch_size"])), drop_last=True)
    ctx.track(model=trainer.model, optimizer=trainer.optimizer)
    ctx.resume()

    def step(batch: Mapping[str, torch.Tensor]) -> None:
        ctx.step(loss=trainer.step(batch))

    batches = (batch for _ in stream.epochs(int(str(ctx.params["epochs"]))) for batch in stream)
    ctx.event("measured", **asdict(run(batches, step, warm_up=int(str(ctx.params["warm_up"])))))


def costs(ctx: TrainContext) -> None:
    """What the calls cost that a loop makes in each step, in microseconds each."""
    loss_B = torch.ones(2, requires_grad=True).mean()
    stream = ctx.stream("train", batch_size=int(str(ctx.params["batch_size"])), drop_last=True)
    for _ in stream.epochs(2):
        for _ in stream:  # verifies, opens and warms the shards
            pass
    ctx.step(loss=loss_B)
    found = {
        "ctx.step()": _each(ctx.step),
        "ctx.step(loss=tensor)": _each(lambda: ctx.step(loss=loss_B)),
        "ctx.log(accuracy=0.5)": _each(lambda: ctx.log(accuracy=0.5)),
    }
    began, num_batches = time.process_time(), 0
    for _ in stream.epochs(8):
        num_batches += sum(1 for _ in stream)
    found["a batch of ctx.stream"] = 1e6 * (time.process_time() - began) / num_batches
    ctx.event("costs", **{name: round(us, 2) for name, us in found.items()})


def _each(call: Callable[[], None]) -> float:
    began = time.process_time()
    for _ in range(_CALLS):
        call()
    return 1e6 * (time.process_time() - began) / _CALLS
