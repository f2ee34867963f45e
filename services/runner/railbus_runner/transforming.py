"""`transform=` in worker processes: they gather and transform, the consumer gets the results in the same order.

The processes are those of torch's DataLoader, which passes tensors in shared memory, keeps the order, raises here what
was raised there with its traceback, and notices a worker that was killed. They are spawned, not forked, because a
trainer has threads and may have touched CUDA; so `transform` must be a name that they can import. They die with the
process that made them. What is to be gathered is decided here, where shards are verified first.
"""

from __future__ import annotations

import atexit
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

import torch.utils.data
from torch.utils.data._utils import signal_handling

from railbus_runner.gathering import Batch, Gatherer
from railbus_runner.places import Part
from railbus_runner.processes import die_with_parent
from railbus_runner.shards import OpenShards
from railbus_shared.data.index import DatasetIndex
from railbus_shared.errors import EntrypointFailed, InvalidField

AHEAD: Final = 2
"""Batches that each worker makes before they are asked for."""
_LOST: Final = "DataLoader worker (pid"
"""What torch says of a worker that was killed, and of nothing else."""
_RAISED: Final = "Caught "
"""How torch begins what was raised in a worker."""


class Wanted(NamedTuple):
    """What a worker is to do."""

    part: Part
    keep: frozenset[int] | None
    """The shards that may stay open; all if None."""


@dataclass
class _Feed:
    """What is wanted, to be iterated once and then set anew."""

    wanted: Iterable[Wanted] = ()

    def __iter__(self) -> Iterator[Wanted]:
        return iter(self.wanted)


class Gathers(Protocol):
    """Gathers batches in a worker; picklable as long as it has gathered none."""

    def gather(self, wanted: Wanted) -> Batch: ...


class GathersOne:
    """`Gathers` from one dataset, whose shards are verified where they are decided on."""

    def __init__(self, index: DatasetIndex, paths: Mapping[int, Path]) -> None:
        self._index, self._paths = index, paths

    def gather(self, wanted: Wanted) -> Batch:
        if wanted.keep is not None:
            self._shards.let_go(self._shards.numbers - wanted.keep)
        return self._gatherer.gather(wanted.part)

    @cached_property
    def _shards(self) -> OpenShards:
        return OpenShards(self._index, self._paths, ensure_verified=lambda _: None)

    @cached_property
    def _gatherer(self) -> Gatherer:
        return Gatherer(self._index.about.columns, self._shards)


class _Made(torch.utils.data.Dataset[Any]):
    """In a worker: what is wanted, gathered and transformed."""

    def __init__(self, gathers: Gathers, transform: Callable[[Batch], Any] | None) -> None:
        self._gathers, self._transform = gathers, transform

    def __getitem__(self, wanted: Wanted) -> Any:
        batch = self._gathers.gather(wanted)
        return batch if self._transform is None else self._transform(batch)


class Workers:
    """Processes that make batches; started with the first that is asked for, ended with this object."""

    def __init__(self, gathers: Gathers, *, transform: Callable[[Batch], Any] | None, count: int) -> None:
        """Raises InvalidField for a transform that other processes cannot import."""
        _check_importable(transform)
        self._made = _Made(gathers, transform)
        self._count = count
        self._feed = _Feed()
        self._loader: torch.utils.data.DataLoader[Any] | None = None
        self._error: Exception | None = None

    def batches(self, wanted: Iterable[Wanted]) -> Iterator[Any]:
        """A result for each; what `wanted` raises comes when its batch is due.

        Raises EntrypointFailed if a worker dies, and what `transform` raises.
        """
        self._error = None
        self._feed.wanted = self._until_error(wanted)
        results = self._results()
        while True:
            try:
                result = next(results)
            except StopIteration:
                break
            except (RuntimeError, EOFError, OSError) as exc:
                if not _is_loss(exc):
                    raise
                self._loader = None
                results._shutdown_workers()  # type: ignore[attr-defined] # noqa: SLF001 - a traceback may hold it long
                raise _loss(exc) from exc
            yield result
        if self._error is not None:
            raise self._error

    def _results(self) -> Iterator[Any]:
        """What the workers will make of the feed.

        Torch has a handler of SIGCHLD raise wherever the main thread happens to be, in the midst of user code. So none
        is left behind, and one that user code has brought with a loader of its own is not to look at our workers: a
        dead one is found where its batch is waited for, within five seconds.
        """
        if self._loader is None:
            self._loader = self._started()
        handler = signal.getsignal(signal.SIGCHLD)
        results = iter(self._loader)
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, handler)
        if results._worker_pids_set:  # type: ignore[attr-defined] # noqa: SLF001 - torch has no other switch
            signal_handling._remove_worker_pids(id(results))  # type: ignore[attr-defined] # noqa: SLF001
            results._worker_pids_set = False  # type: ignore[attr-defined] # noqa: SLF001
        return results

    def _until_error(self, wanted: Iterable[Wanted]) -> Iterator[Wanted]:
        try:
            yield from wanted
        except Exception as exc:  # noqa: BLE001 - told when its batch is due
            self._error = exc

    def _started(self) -> torch.utils.data.DataLoader[Any]:
        return torch.utils.data.DataLoader(
            self._made,
            sampler=self._feed,
            batch_size=None,
            num_workers=self._count,
            prefetch_factor=AHEAD,
            persistent_workers=True,
            multiprocessing_context="spawn",
            worker_init_fn=_Beginning(os.getpid()),
        )


@dataclass(frozen=True)
class _Beginning:
    """What a worker does first."""

    parent: int

    def __call__(self, _number: int) -> None:
        die_with_parent(self.parent)
        atexit.register(os._exit, 0)  # taking an interpreter apart that has torch takes seconds, and gives nothing


def _is_loss(exc: Exception) -> bool:
    """Whether a worker died: torch says so, or the tensors that it had announced could not be fetched from it."""
    return _LOST in str(exc) if isinstance(exc, RuntimeError) else not str(exc).startswith(_RAISED)


def _loss(exc: Exception) -> EntrypointFailed:
    return EntrypointFailed(
        f"field 'workers': a worker process of the stream died: {(str(exc) or repr(exc)).strip()}",
        hint="use fewer workers or smaller batches if memory ran out, or run the transform without workers",
    )


def _check_importable(transform: Callable[..., object] | None) -> None:
    try:
        pickle.dumps(transform)
    except (pickle.PicklingError, AttributeError, TypeError) as exc:
        raise InvalidField(
            field="transform",
            value=repr(transform),
            problem=f"worker processes cannot import it: {exc}",
            hint="define it at the top of a module, or leave out 'workers'",
        ) from exc
