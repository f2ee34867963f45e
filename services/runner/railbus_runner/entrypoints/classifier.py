"""`classifier`: a supervised classifier built from the dataset's columns.

The label is the scalar column with `num_classes`; the features are the first other column with a shape. Features of
shape (channels, height, width) go through a small convolutional net, all others through a perceptron.

Shapes: B batch, C channels, H height, W width, K classes.
"""

# ruff: noqa: N806 - tensors carry the letters of their shape

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional

from railbus_runner.context import TrainContext
from railbus_shared.contracts.artifacts import Column
from railbus_shared.contracts.model import Contract
from railbus_shared.errors import BadParams


class Params(Contract):
    """What a job may set."""

    epochs: int = Field(default=12, ge=1)
    """Passes over the training split."""
    batch_size: int = Field(default=64, ge=1)
    lr: float = Field(default=3e-3, gt=0)
    """Highest learning rate of AdamW; falls to zero along a cosine."""
    weight_decay: float = Field(default=0.01, ge=0)
    hidden: int = Field(default=32, ge=1, le=4096)
    """Channels of the first convolution; an eighth of a perceptron's width."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    features: str | None = None
    """The column of features, where the first one is not meant."""
    label: str | None = None
    """The column of labels, where there are several."""
    train_split: str = "train"
    eval_split: str = "test"
    """The split that accuracy is measured on after each epoch; skipped where the dataset has none of the name."""


@dataclass(frozen=True)
class Task:
    """What is to be learned."""

    features: str
    shape: tuple[int, ...]
    label: str
    num_classes: int


def train(ctx: TrainContext) -> None:
    """Train, and measure accuracy after each epoch."""
    params = ctx.params_as(Params)
    schema = ctx.dataset.schema
    task = find_task(schema.columns, params)
    model = build(task, params).to(ctx.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=params.lr, weight_decay=params.weight_decay)
    num_steps = params.epochs * math.ceil(schema.splits[params.train_split].samples / params.batch_size)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    train = ctx.stream(params.train_split, batch_size=params.batch_size)
    ctx.track(model=model, optimizer=optimizer, scheduler=scheduler)
    ctx.resume()
    for _ in train.epochs(params.epochs):
        model.train()
        for batch in train:
            loss = functional.cross_entropy(model(batch[task.features]), batch[task.label].long())
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            ctx.step(loss=loss)
        if params.eval_split in schema.splits:
            ctx.log(accuracy=accuracy(ctx, model, task, split=params.eval_split))


@torch.no_grad()
def accuracy(ctx: TrainContext, model: nn.Module, task: Task, *, split: str) -> float:
    """The share of a split's samples that the model names right."""
    model.eval()
    num_right, num_samples = 0, 0
    for batch in ctx.stream(split, batch_size=512, shuffle=False):
        labels_B = batch[task.label]
        num_right += int((model(batch[task.features]).argmax(1) == labels_B).sum())
        num_samples += len(labels_B)
    return num_right / num_samples


def find_task(columns: dict[str, Column], params: Params) -> Task:
    """The columns to learn from and for; raises BadParams where the dataset has no such pair."""
    labels = {name: column.num_classes for name, column in columns.items() if column.num_classes and not column.shape}
    label = params.label or next(iter(labels), None)
    if label is None or labels.get(label) is None:
        raise BadParams(
            f"params: field 'label' has value {params.label!r}: the dataset has no such scalar column with num_classes",
            hint=f"columns with num_classes: {', '.join(labels) or 'none; import the dataset with labels'}",
        )
    inputs = {name: column.shape for name, column in columns.items() if column.shape and name != label}
    features = params.features or next(iter(inputs), None)
    if features is None or features not in inputs:
        raise BadParams(
            f"params: field 'features' has value {params.features!r}: the dataset has no such column with a shape",
            hint=f"columns with a shape: {', '.join(inputs) or 'none'}",
        )
    return Task(features=features, shape=tuple(inputs[features]), label=label, num_classes=labels[label] or 0)


def build(task: Task, params: Params) -> nn.Module:
    """A convolutional net for (C, H, W), else a perceptron; both scale their input by a batch norm."""
    if len(task.shape) == 3:
        return _conv_net(task, params)
    num_inputs, width = math.prod(task.shape), 8 * params.hidden
    return nn.Sequential(
        _AsFloat(),
        nn.Flatten(),
        nn.BatchNorm1d(num_inputs),
        nn.Linear(num_inputs, width),
        nn.ReLU(),
        nn.Dropout(params.dropout),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Dropout(params.dropout),
        nn.Linear(width, task.num_classes),
    )


def _conv_net(task: Task, params: Params) -> nn.Module:
    """Stages of two convolutions; each but the last halves height and width, until these are at most 4."""
    channels, height, width = task.shape
    layers: list[nn.Module] = [_AsFloat(), nn.BatchNorm2d(channels)]
    wide = params.hidden
    while True:
        layers += [*_conv(channels, wide), *_conv(wide, wide)]
        channels = wide
        if min(height, width) <= 4 or wide >= 8 * params.hidden:
            break
        layers.append(nn.MaxPool2d(2))
        height, width, wide = height // 2, width // 2, 2 * wide
    head = [nn.AdaptiveAvgPool2d(min(2, height, width)), nn.Flatten(), nn.Dropout(params.dropout)]
    return nn.Sequential(*layers, *head, nn.Linear(channels * min(2, height, width) ** 2, task.num_classes))


def _conv(num_in: int, num_out: int) -> list[nn.Module]:
    return [nn.Conv2d(num_in, num_out, 3, padding=1, bias=False), nn.BatchNorm2d(num_out), nn.ReLU()]


class _AsFloat(nn.Module):
    """Whatever the column's dtype, the net computes in float32."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features.float()
