"""A model of your own: one function that is given a `TrainContext`.

Put the folder of this file on the runner's list (`railbus up --entrypoints examples/own_model`), and jobs may name
`my_model:train`. railbus looks at the data, writes the checkpoints, goes on after a crash and stops when told to.
"""

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional

from railbus import TrainContext
from railbus_shared.contracts.model import Contract


class Params(Contract):
    """What a job may set in `params`; anything else is refused with the field's name."""

    epochs: int = Field(default=5, ge=1)
    lr: float = Field(default=0.1, gt=0)


def train(ctx: TrainContext) -> None:
    params = ctx.params_as(Params)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).to(ctx.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=params.lr, momentum=0.9)
    train = ctx.stream("train", batch_size=32)  # maps of tensors, one for each column of the dataset
    ctx.track(model=model, optimizer=optimizer)  # what a checkpoint holds
    ctx.resume()  # goes on from the job's newest valid checkpoint, if it has one
    for _ in train.epochs(params.epochs):
        for batch in train:
            loss = functional.cross_entropy(model(batch["image"]), batch["label"])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            ctx.step(loss=loss)  # counts, tells the loss, writes checkpoints, obeys orders
        ctx.log(accuracy=accuracy(ctx, model))


@torch.no_grad()
def accuracy(ctx: TrainContext, model: nn.Module) -> float:
    batches = ctx.stream("test", batch_size=512, shuffle=False)
    right = [model(batch["image"]).argmax(1) == batch["label"] for batch in batches]
    return float(torch.cat(right).float().mean())
