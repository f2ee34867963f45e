"""What an entrypoint is given: one `TrainContext`, its whole world.

    def train(ctx: TrainContext) -> None:
        params = ctx.params_as(Params)
        model = build(params).to(ctx.device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=params.lr)
        train = ctx.stream("train", batch_size=params.batch_size)
        ctx.track(model=model, optimizer=optimizer)
        ctx.resume()
        for epoch in train.epochs(params.epochs):
            for batch in train:
                loss = loss_of(model, batch)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                ctx.step(loss=loss)
            ctx.log(accuracy=evaluate(model, ctx.stream("test", batch_size=256, shuffle=False)))

Checkpoints, resuming, metrics, stopping and leases are taken care of in `ctx.step` and `ctx.resume`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Final, TypeVar, cast

import msgpack
import torch
from pydantic import JsonValue

from railbus_runner.channel import TrainerChannel
from railbus_runner.checkpointing.saver import Reason
from railbus_runner.checkpointing.tracked import Tracked
from railbus_runner.checkpointing.weights import LoadedWeights, Selection, WeightLoader
from railbus_runner.frames import Plan
from railbus_runner.pipeline import Transform
from railbus_runner.progress import Progress
from railbus_runner.reading import Ranges, Shuffle
from railbus_runner.recorder import Recorder
from railbus_runner.shard_use import ShardUse
from railbus_runner.stream import ShardStream
from railbus_shared.catalogue import may_be_told_by_trainers
from railbus_shared.contracts.model import Contract
from railbus_shared.data.index import DatasetIndex
from railbus_shared.data.order import Window
from railbus_shared.data.shard_paths import ShardPaths
from railbus_shared.errors import BadParams, MessageTooLarge, WireError, shorten
from railbus_shared.plain_values import plain

P = TypeVar("P", bound=Contract)

MAX_EVENT_BYTES: Final = 64 << 10
_EVENT: Final = re.compile(r"[a-z][a-z0-9_]*(\.[a-z][a-z0-9_]*)*\Z")


class TrainContext:
    """The job as its entrypoint sees it; made by the trainer, used from its main thread."""

    def __init__(
        self,
        plan: Plan,
        *,
        devices: tuple[torch.device, ...],
        channel: TrainerChannel,
        recorder: Recorder,
        progress: Progress,
        tracked: Tracked,
    ) -> None:
        self._plan = plan
        self._devices = devices
        self._channel = channel
        self._recorder = recorder
        self._progress = progress
        self._tracked = tracked
        opened = plan.stream
        self._index = DatasetIndex.read_exactly(
            Path(opened.schema_path), Path(opened.index_path), sha256=opened.index_sha256
        )
        self._shard_paths = ShardPaths(self._index.shard_map, Path(opened.shards_path), is_cached=opened.is_cached)
        self._use = ShardUse(channel, verified=opened.verified)
        self._weights = WeightLoader(plan, recorder=recorder)

    # --- the job -----------------------------------------------------------------------------------------------------

    @property
    def job(self) -> str:
        """The job's id."""
        return self._plan.job

    @property
    def params(self) -> Mapping[str, JsonValue]:
        """The job's `params` as they were submitted."""
        return MappingProxyType(self._plan.spec.params)

    def params_as(self, model: type[P]) -> P:
        """The job's `params` as a contract of yours, with its defaults; raises BadParams naming the field.

        class Params(Contract):
            lr: float = Field(default=1e-3, gt=0)
        """
        try:
            return model.parse(self._plan.spec.params)
        except WireError as exc:
            raise BadParams(f"params: {exc.message}", hint=exc.hint, details=exc.details) from exc

    @property
    def seed(self) -> int:
        """The job's seed; Python, NumPy and torch are seeded with it already."""
        return self._plan.spec.seed

    @property
    def device(self) -> torch.device:
        """The first of `devices`."""
        return self._devices[0]

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """The devices that are leased to this process: CUDA devices, or the CPU once."""
        return self._devices

    @property
    def rank(self) -> int:
        """The number of this process among those of the job (`ranks`)."""
        return self._plan.rank

    @property
    def world_size(self) -> int:
        """How many processes train this job together."""
        return self._plan.world_size

    # --- the data ----------------------------------------------------------------------------------------------------

    @property
    def dataset(self) -> DatasetIndex:
        """The job's dataset: columns, splits and labels stand in `dataset.schema`."""
        return self._index

    def stream(  # noqa: PLR0913 - what a stream is made of
        self,
        split: str,
        *,
        batch_size: int,
        shuffle: Shuffle = True,
        window: int | Window = 8,
        ranges: Ranges = (),
        drop_last: bool = False,
        transform: Transform | None = None,
        workers: int = 0,
        track: bool | None = None,
    ) -> ShardStream:
        """Batches of a split as maps of tensors on `device`, ordered by the job's seed and the epoch.

        The first shuffled stream is tracked: checkpoints remember its position, to the batch.

        Args:
            split: its name.
            batch_size: samples of all ranks together.
            shuffle: all samples of the split (`global`, or True), those of a few shards at a time (`window`, for data
                that is fetched from far away), or not at all.
            window: shards that are shuffled together where `shuffle` is `window`.
            ranges: pairs (start, stop) of samples of the split that alone are read.
            drop_last: leave out a last batch that is short.
            transform: called with each batch on the CPU; what it gives is what comes, its tensors on `device`.
            workers: processes that gather and transform, in the same order; `transform` must be importable then.
            track: whether checkpoints remember this stream's position, where the rule above is not what is wanted.
        """
        use = self._use.stream()
        stream = ShardStream(
            self._index,
            self._shard_paths,
            split=split,
            batch_size=batch_size,
            seed=self.seed,
            shuffle=shuffle,
            window=window,
            ranges=ranges,
            drop_last=drop_last,
            rank=self.rank,
            world_size=self.world_size,
            device=self.device,
            transform=transform,
            workers=workers,
            is_fetched=self._plan.stream.is_cached,
            ensure_verified=use.ensure_verified,
            on_batch=self._progress.heed,
            on_ahead=use.on_ahead,
        )
        if track if track is not None else shuffle is not False and not self._tracked.streams:
            self._tracked.add_stream(split, stream)
        return stream

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def track(self, **parts: object) -> None:
        """Name what a checkpoint must hold: anything with `state_dict` and `load_state_dict`, and generators.

        Models are saved under the names they have without DataParallel, DistributedDataParallel and `torch.compile`,
        so a checkpoint loads with and without those. Generators are a `torch.Generator`, `numpy.random.Generator` or
        `random.Random` of yours; the global ones need no tracking. Plain values go into `extras`.

        Names must be new; the network itself is `model`, and is described in `model_schema.json`. Call it before
        `resume`. Raises ValueError for a name that is taken or a late call, TypeError for a part without a state.
        """
        if self._progress.is_resumed:
            raise ValueError(f"track({', '.join(parts)}) after resume(): track everything first, then resume")
        for name, part in parts.items():
            self._tracked.add_part(name, part)

    @property
    def extras(self) -> dict[str, object]:
        """Values of your own that checkpoints hold: numbers, strings, tensors, and lists and maps of these.

        `resume` puts back what was there. Anything else in it raises TypeError, naming its place, once it is saved.
        """
        return self._tracked.extras

    def resume(self) -> bool:
        """Restore everything tracked from the job's newest valid checkpoint, else from the one in `resume_from`.

        Parts, extras, positions of streams, random number generators and `global_step`; True if there was one. Nothing
        is changed before all of it is proven and known to fit. Raises Conflict, naming what differs, if it lacks a
        tracked part or is of another model, CheckpointNotFound or CheckpointCorrupt for `resume_from`.
        """
        return self._progress.resume()

    def load(
        self,
        source: str,
        *,
        into: torch.nn.Module | None = None,
        part: str = "model",
        only: str | Sequence[str] = "*",
        rename: Mapping[str, str] | None = None,
        strict: bool = True,
    ) -> LoadedWeights:
        """Load weights alone from a checkpoint under the root, as a start; `resume` comes after and overrules it.

        The checkpoint is proven by its meta. Nothing is changed before the weights are known to fit; shapes must be the
        same, one floating dtype may become another. It is told as `checkpoint.loaded`.

        Args:
            source: `checkpoint-000123` of the job's model, or `digits-cnn/checkpoint-000123` of another.
            into: the model; by default the one that is tracked as `model`.
            part: the name that the saved model was tracked under.
            only: patterns of names in the model, as `backbone.*`; what matches none stays as it is.
            rename: beginnings of names in the source and what they are here, as `{"encoder.": "backbone."}`.
            strict: whether both sides must have the same names, among those that `only` selects.

        Raises CheckpointNotFound, CheckpointCorrupt, Conflict naming what does not fit, and ValueError for a selection
        of nothing.
        """
        selection = Selection(only=_patterns(only), rename=rename, strict=strict)
        return self._weights.of_checkpoint(source, self._model(into), part=part, selection=selection)

    def load_foreign(
        self,
        path: str | Path,
        *,
        sha256: str | None = None,
        into: torch.nn.Module | None = None,
        key: str = "",
        only: str | Sequence[str] = "*",
        rename: Mapping[str, str] | None = None,
        strict: bool = True,
    ) -> LoadedWeights:
        """Load weights from a `.safetensors` or `.pt` file that railbus did not write; else as `load`.

        Prefer safetensors, which holds no code. A `.pt` must be a zip of `torch.save`, and is read with `weights_only`.

        Args:
            path: any file that this process may read.
            sha256: the hash it must have, before a byte is used; without one, the hash is only told.
            into: the model; by default the one that is tracked as `model`.
            key: where the weights lie in a `.pt`, for instance `state_dict`.
            only: as of `load`.
            rename: as of `load`, for instance `{"module.": ""}`.
            strict: as of `load`.

        Raises CheckpointNotFound, Conflict for another hash, damage, or what does not fit, and ValueError for a `key`
        that is not there or a selection of nothing.
        """
        selection = Selection(only=_patterns(only), rename=rename, strict=strict)
        return self._weights.of_file(Path(path), self._model(into), sha256=sha256, key=key, selection=selection)

    def save(self, reason: Reason = "request") -> None:
        """Write a checkpoint now; it is durable when this returns, unless the disk is full.

        Then the job's `on_full` decides, as for every checkpoint: with `continue` this returns without one. Raises
        ValueError if nothing is tracked.
        """
        self._progress.save(reason)

    # --- progress ----------------------------------------------------------------------------------------------------

    @property
    def global_step(self) -> int:
        """Optimizer steps that ended, those before a resume included."""
        return self._progress.global_step

    @property
    def stopping(self) -> bool:
        """Whether the job is asked to end: return soon, or let the next `step` end it."""
        return self._progress.is_stopping()

    def step(self, **metrics: object) -> None:
        """End one optimizer step: count it, log its metrics, obey orders, write a checkpoint when one is due.

        Metrics are numbers or scalar tensors; they are told at most some twenty times a second, but always the last.
        Where the job is to stop, its checkpoint is written here and the call does not return.
        """
        self._progress.step(metrics)

    def log(self, **metrics: object) -> None:
        """Tell metrics that belong to no single step, for instance those of an evaluation of the model as it is now.

        Where the job keeps the best checkpoints by one of them, this writes a checkpoint if it is among the best.
        """
        self._progress.log(metrics)

    def log_text(self, name: str, text: str) -> None:
        """Tell a text, for instance a sample of what the model writes; cut to 32,768 characters."""
        self._recorder.record("train.text", step=self.global_step, data={"name": name, "text": text})

    def event(self, what: str, **data: object) -> None:
        """Record a fact of your own, in the past tense: `epoch_shuffled` is told as `app.epoch_shuffled`.

        Raises ValueError for a name that is none, MessageTooLarge for data over 64 KiB.
        """
        kind = what if "." in what else f"app.{what}"
        if _EVENT.match(what) is None or len(kind) > 64:
            raise ValueError(f"event() got {shorten(what)}: use words of a-z, 0-9 and '_', joined by dots")
        if not may_be_told_by_trainers(kind):
            area = kind.partition(".")[0]
            raise ValueError(f"event() got {kind!r}: events of {area!r} are told by services; use another first word")
        size = len(cast("bytes", msgpack.packb(plain(data), default=str)))
        if size > MAX_EVENT_BYTES:
            raise MessageTooLarge(size_bytes=size, limit_bytes=MAX_EVENT_BYTES, subject=kind)
        self._recorder.record(kind, step=self.global_step, data=data)

    # --- steps -------------------------------------------------------------------------------------------------------

    def _model(self, given: torch.nn.Module | None) -> torch.nn.Module:
        model = given if given is not None else self._tracked.model
        if model is None:
            raise ValueError("nothing is tracked as 'model': call ctx.track(model=model) before, or say into=model")
        return model


def _patterns(only: str | Sequence[str]) -> tuple[str, ...]:
    return (only,) if isinstance(only, str) else tuple(only)
