"""`causal_lm`: a small GPT that learns to continue sequences of a `tokens` column.

The vocabulary is the column's `labels` (or `num_classes`); a sample is one sequence, its tokens but the last are the
input, its tokens but the first the target. Pre-norm blocks, causal attention, tied embeddings.

Shapes: B batch, T time, D width, H heads, V vocabulary.
"""

# ruff: noqa: N803, N806 - tensors carry the letters of their shape

from __future__ import annotations

import itertools
import math

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

    layers: int = Field(default=4, ge=1)
    heads: int = Field(default=4, ge=1)
    width: int = Field(default=128, ge=1)
    """A multiple of `heads`."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    batch_size: int = Field(default=16, ge=1)
    steps: int = Field(default=500, ge=1)
    """Optimizer steps."""
    lr: float = Field(default=3e-3, gt=0)
    """Highest learning rate of AdamW, reached after `warmup` steps; falls to a tenth along a cosine."""
    warmup: int = Field(default=50, ge=0)
    weight_decay: float = Field(default=0.1, ge=0)
    eval_every: int = Field(default=100, ge=1)
    """Steps between measurements on the evaluation split."""
    eval_batches: int = Field(default=20, ge=1)
    """Most batches of one measurement."""
    sample_chars: int = Field(default=400, ge=0, le=10_000)
    """Tokens of the sample that is told at the end."""
    tokens: str = "tokens"
    """The column of sequences."""
    train_split: str = "train"
    eval_split: str = "validation"
    """Skipped where the dataset has none of the name."""


def train(ctx: TrainContext) -> None:
    """Train for `steps`, measure now and then, and tell a sample at the end."""
    params = ctx.params_as(Params)
    column = tokens_column(ctx, params)
    model = Gpt(vocabulary_size(column), column.shape[0] - 1, params).to(ctx.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=params.lr, betas=(0.9, 0.95), weight_decay=params.weight_decay)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_frac(step, params))
    is_enough = ctx.dataset.schema.splits[params.train_split].samples >= params.batch_size
    train = ctx.stream(params.train_split, batch_size=params.batch_size, drop_last=is_enough)
    ctx.track(model=model, optimizer=optimizer, scheduler=scheduler)
    ctx.resume()
    model.train()
    for _ in train.epochs(params.steps):
        for batch in itertools.islice(train, params.steps - ctx.global_step):
            loss = model.loss(batch[params.tokens].long())
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            ctx.step(loss=loss)
            if ctx.global_step % params.eval_every == 0 or ctx.global_step == params.steps:
                evaluate(ctx, model, params)
        if ctx.global_step >= params.steps:
            break
    if params.sample_chars:
        ctx.log_text("sample", sample(model, column.labels, num_tokens=params.sample_chars, seed=ctx.seed))


@torch.no_grad()
def evaluate(ctx: TrainContext, model: Gpt, params: Params) -> None:
    """Log the mean loss over the first batches of the evaluation split."""
    if params.eval_split not in ctx.dataset.schema.splits:
        return
    model.eval()
    batches = ctx.stream(params.eval_split, batch_size=params.batch_size, shuffle=False)
    losses = [model.loss(batch[params.tokens].long()) for batch in itertools.islice(batches, params.eval_batches)]
    model.train()
    ctx.log(validation_loss=torch.stack(losses).mean())


@torch.no_grad()
def sample(model: Gpt, labels: tuple[str, ...], *, num_tokens: int, seed: int) -> str:
    """A text that the model writes by itself, drawn with a generator of its own."""
    model.eval()
    device = model.embedding.weight.device
    generator = torch.Generator(device=device).manual_seed(seed)
    tokens_T = torch.zeros(1, dtype=torch.long, device=device)
    for _ in range(num_tokens):
        logits_V = model(tokens_T[None, -model.context :])[0, -1]
        drawn = torch.multinomial(functional.softmax(logits_V / 0.8, dim=-1), 1, generator=generator)
        tokens_T = torch.cat([tokens_T, drawn])
    numbers: list[int] = tokens_T[1:].tolist()
    return "".join(labels[number] for number in numbers) if labels else " ".join(map(str, numbers))


def tokens_column(ctx: TrainContext, params: Params) -> Column:
    """The column of sequences; raises BadParams where the dataset has none that fits, or `heads` does not."""
    column = ctx.dataset.schema.columns.get(params.tokens)
    if column is None or len(column.shape) != 1 or column.shape[0] < 2 or not vocabulary_size(column):
        raise BadParams(
            f"params: field 'tokens' has value {params.tokens!r}: the dataset has no such column of sequences",
            hint="it needs a shape of one length, at least 2, and labels or num_classes for the vocabulary",
        )
    if params.width % params.heads:
        raise BadParams(
            f"params: field 'width' has value {params.width}: not a multiple of heads, which is {params.heads}",
            hint=f"use {params.width // params.heads * params.heads + params.heads}",
        )
    return column


def vocabulary_size(column: Column) -> int:
    return column.num_classes or len(column.labels)


def lr_frac(step: int, params: Params) -> float:
    """The learning rate after so many steps, as a share of the highest."""
    if step < params.warmup:
        return (step + 1) / params.warmup
    done_frac = min(1.0, (step - params.warmup) / max(1, params.steps - params.warmup))
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done_frac))


class Gpt(nn.Module):
    """Logits of the next token at every place of a sequence of at most `context` tokens."""

    def __init__(self, vocabulary: int, context: int, params: Params) -> None:
        super().__init__()
        self.context = context
        self.embedding = nn.Embedding(vocabulary, params.width)
        self.position = nn.Embedding(context, params.width)
        self.blocks = nn.ModuleList(Block(params) for _ in range(params.layers))
        self.norm = nn.LayerNorm(params.width)
        self.apply(_initialise)

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        places_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        x_BTD = self.embedding(tokens_BT) + self.position(places_T)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return functional.linear(self.norm(x_BTD), self.embedding.weight)

    def loss(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """Mean cross entropy, in nats per token, of each next token of sequences of `context + 1`."""
        logits_BTV = self(tokens_BT[:, :-1])
        return functional.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT[:, 1:].flatten())


class Block(nn.Module):
    """Attention and a perceptron, each on a normed copy that is added back."""

    def __init__(self, params: Params) -> None:
        super().__init__()
        width = params.width
        self.heads = params.heads
        self.dropout = params.dropout
        self.norm_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(params.dropout)
        )

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        x_BTD = x_BTD + self._attend(self.norm_attention(x_BTD))
        mixed_BTD: torch.Tensor = x_BTD + self.mlp(self.norm_mlp(x_BTD))
        return mixed_BTD

    def _attend(self, x_BTD: torch.Tensor) -> torch.Tensor:
        batch, time, width = x_BTD.shape
        qkv = self.qkv(x_BTD).view(batch, time, 3, self.heads, width // self.heads)
        queries, keys, values = qkv.permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        seen = functional.scaled_dot_product_attention(queries, keys, values, dropout_p=dropout, is_causal=True)
        out: torch.Tensor = self.out(seen.transpose(1, 2).reshape(batch, time, width))
        return out


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
