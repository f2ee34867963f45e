"""Batches on their way to a device: copied on a CUDA stream of their own, one batch ahead of the consumer.

Three waits make it safe, and none of them is the consumer's. The consumer's stream waits for the end of the copy before
it may read. The device memory belongs to the copying stream, so the consumer's is recorded with it: it is used again
only after what the consumer had queued when it let go. The pinned memory is torch's: its cache gives it out again
only after the copy that read it has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, TypeVar

import torch

from railbus_runner.packed import Packed
from railbus_shared.errors import RailbusError

T = TypeVar("T")


class Staging(Protocol):
    """The way of a batch to its device."""

    def staged(self, batches: Iterable[T]) -> Iterator[T]:
        """The same batches on the device."""
        ...


class Here:
    """No way at all: the device is the CPU."""

    def staged(self, batches: Iterable[T]) -> Iterator[T]:
        return iter(batches)


class ToCuda:
    """Copies ahead to one CUDA device. Touches CUDA when it is first used, never before."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copying: torch.cuda.Stream | None = None

    def staged(self, batches: Iterable[T]) -> Iterator[T]:
        for batch, ended in one_ahead(self._copied(batch) for batch in batches):
            self._hand_over(batch, ended)
            yield batch

    def _hand_over(self, batch: object, ended: torch.cuda.Event) -> None:
        """Let the consumer's stream read a batch once its copy has ended, and use its memory until it is let go."""
        consuming = torch.cuda.current_stream(self._device)
        consuming.wait_event(ended)

        def record(tensor: torch.Tensor) -> torch.Tensor:
            tensor.record_stream(consuming)
            return tensor

        map_tensors(batch, record)

    def _copied(self, batch: T) -> tuple[T, torch.cuda.Event]:
        """The batch on the device once the event has passed."""
        if self._copying is None:
            self._copying = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._copying):
            copied = map_tensors(batch, self._copy)
            ended = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ended.record(self._copying)
        return copied, ended

    def _copy(self, tensor: torch.Tensor) -> torch.Tensor:
        pinned = tensor if tensor.is_pinned() or tensor.is_cuda else tensor.pin_memory()
        return pinned.to(self._device, non_blocking=True)


def one_ahead(items: Iterable[T]) -> Iterator[T]:
    """The same items, each given after the next one was begun; an error of ours comes when its item is due."""
    source = iter(items)
    begun = _begun(source)
    while begun is not None:
        due, begun = begun, None if isinstance(begun, RailbusError) else _begun(source)
        if isinstance(due, RailbusError):
            raise due
        yield due[0]


def _begun(source: Iterator[T]) -> tuple[T] | RailbusError | None:
    """The next item, or the error in its place; None at the end."""
    try:
        return (next(source),)
    except StopIteration:
        return None
    except RailbusError as exc:
        return exc


def map_tensors(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The same value with each tensor of its maps, lists, tuples and `Packed` columns changed; others stay."""
    match value:
        case torch.Tensor():
            changed: Any = change(value)
        case Packed():
            changed = Packed(change(value.values), change(value.offsets))
        case dict():
            changed = {name: map_tensors(item, change) for name, item in value.items()}
        case list() | tuple():
            items = [map_tensors(item, change) for item in value]
            make = getattr(value, "_make", type(value))  # a named tuple takes its items one by one
            changed = make(items)
        case _:
            changed = value
    return changed
