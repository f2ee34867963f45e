"""`BatchStream`: goes through epochs of batches and knows its place; what the batches are, its parts decide.

The state counts batches: one taken after the k-th batch of an epoch goes on with batch k+1; one taken after the last
batch goes on with that epoch's end, so that what follows an epoch in the caller's loop runs again.

A stream is a torch IterableDataset too. Inside `DataLoader(stream, batch_size=None)` each worker makes every n-th
batch, so the loader gives the same sequence; a worker's copy tells its own state, as StatefulDataLoader expects.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, Self

import torch.utils.data

from railbus_shared.data.order import worker_batches
from railbus_shared.errors import InvalidField


class Batched(Protocol):
    """What is read, cut into global batches."""

    @property
    def batch_size(self) -> int:
        """Samples of all ranks together."""
        ...

    @property
    def num_samples(self) -> int: ...

    @property
    def num_batches(self) -> int: ...

    def identity(self) -> dict[str, Any]:
        """What a position belongs to, in plain values."""
        ...

    def check_identity(self, state: Mapping[str, Any]) -> None:
        """Raises InvalidField, naming both values, if a position belongs to something else."""
        ...


class Maker(Protocol):
    """What makes the batches of one rank."""

    def batches(self, epoch: int, numbers: range, *, epochs: int) -> Iterator[Any]:
        """Batches of an epoch by their numbers; `epochs` is how many are known to be wanted."""
        ...

    def copied(self) -> Self:
        """For another process."""
        ...


class BatchStream(torch.utils.data.IterableDataset[Any]):
    """Batches of one epoch after the other; iterating gives what is left of the current one.

    Inside `epochs` the stream goes to the next epoch with it; otherwise a pass after a complete one is the next epoch.
    """

    def __init__(self, reading: Batched, pipeline: Maker, *, on_batch: Callable[[], None]) -> None:
        """A stream at the beginning of epoch 0; `on_batch` is called before each batch."""
        self._reading = reading
        self._num_batches = reading.num_batches
        self._pipeline = pipeline
        self._on_batch: Callable[[], None] | None = on_batch
        self._process = os.getpid()
        self._epochs = 0  # how many the caller has said it wants, while `epochs` drives the stream
        self._batches_done = 0
        self._is_spent = False  # an epoch has ended, and `epochs` will not go on to the next
        self.epoch = 0

    @property
    def samples_seen(self) -> int:
        """By all ranks together, over all epochs."""
        size, samples = self._reading.batch_size, self._reading.num_samples
        per_epoch = min(self._num_batches * size, samples)
        return self.epoch * per_epoch + min(self._batches_done * size, samples)

    def epochs(self, count: int) -> Iterator[int]:
        """Numbers of the epochs up to `count`, from the current one on; the stream moves on with them.

        After a resume the first may have few batches left, or none.
        """
        self._epochs, self._is_spent = count, False
        try:
            while self.epoch < count:
                yield self.epoch
                self._advance()
        finally:
            self._epochs = 0

    def __len__(self) -> int:
        """Batches that iterating would give now."""
        return self._num_batches - (0 if self._is_spent else self._batches_done)

    def __iter__(self) -> Iterator[Any]:
        """What is left of the current epoch: a `Batch`, or what `transform` makes of it, on the stream's device.

        A tensor is the caller's to keep. With several ranks the last batch may be empty on some of them.
        """
        if self._process != os.getpid():
            self._become_copy()
        if self._is_spent:
            self._advance()
        worker, num_workers = _worker()
        numbers = worker_batches(self._batches_done, self._num_batches, worker=worker, num_workers=num_workers)
        batches = self._pipeline.batches(self.epoch, numbers, epochs=self._epochs)
        for number in numbers:
            if self._on_batch is not None:
                self._on_batch()
            batch = next(batches)
            # What a worker has yet to do begins `worker` batches behind this, as at its start.
            self._batches_done = min(number - worker + num_workers, self._num_batches)
            yield batch
            del batch  # or the memory of a batch that the caller has let go of would not be free for the next
        self._is_spent = not self._epochs

    def _advance(self) -> None:
        self.epoch += 1
        self._batches_done = 0
        self._is_spent = False

    def state_dict(self) -> dict[str, Any]:
        """The position and what it belongs to; plain values."""
        return {
            **self._reading.identity(),
            "epoch": self.epoch,
            "batches_done": self._batches_done,
            "samples_seen": self.samples_seen,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a position; raises InvalidField if it is none, or belongs to another dataset, split, seed or batch."""
        self._reading.check_identity(state)
        epoch = _count(state, "epoch")
        self._batches_done = _count(state, "batches_done", limit=self._num_batches)
        self.epoch, self._is_spent = epoch, False

    def __getstate__(self) -> dict[str, Any]:
        """A copy for another process, where no `epochs` drives it: each pass after a whole one is the next epoch."""
        return {**self.__dict__, "_pipeline": self._pipeline.copied(), "_on_batch": None, "_epochs": 0}

    def _become_copy(self) -> None:
        """A process that was forked must not speak in its parent's name."""
        self.__dict__.update(self.__getstate__(), _process=os.getpid())


def _worker() -> tuple[int, int]:
    """Which worker of a DataLoader this process is, and of how many."""
    worker = torch.utils.data.get_worker_info()
    return (0, 1) if worker is None else (worker.id, worker.num_workers)


def _count(state: Mapping[str, Any], name: str, *, limit: int | None = None) -> int:
    """A number of a state; raises InvalidField if it is none from 0 to `limit`."""
    value = state.get(name)
    if type(value) is not int or value < 0 or (limit is not None and value > limit):
        raise InvalidField(
            field=f"stream.{name}",
            value=value,
            problem="not a whole number from 0" + ("" if limit is None else f" to {limit}"),
            hint="the state is damaged: resume from an older checkpoint",
        )
    return value
