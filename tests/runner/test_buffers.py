"""Memory is used again when nobody holds it, and never before."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch.utils.dlpack import from_dlpack

from railbus_runner.buffers import Ring
from railbus_shared.contracts.artifacts import Column
from until import PATIENCE_S

ROWS = 64
COLUMN = Column(dtype="int32", shape=(1024,))
"""64 rows are 256 KiB."""


@pytest.fixture
def ring() -> Ring:
    return Ring(COLUMN)


def pointer(ring: Ring, rows: int = ROWS) -> int:
    return ring.take(rows)[0].data_ptr()


def test_what_nobody_holds_is_used_again(ring: Ring) -> None:
    assert pointer(ring) == pointer(ring) == pointer(ring)


def test_a_consumer_of_one_batch_makes_two_buffers(ring: Ring) -> None:
    batch, seen = ring.take(ROWS), set[int]()
    for _ in range(20):
        batch = ring.take(ROWS)
        seen.add(batch[0].data_ptr())
    assert len(seen) == 2


HOLDS: dict[str, Callable[[torch.Tensor], object]] = {
    "the tensor": lambda tensor: tensor,
    "a row": lambda tensor: tensor[3],
    "a narrow part": lambda tensor: tensor.narrow(1, 5, 7),
    "a transposed view": lambda tensor: tensor.T,
    "an expanded view": lambda tensor: tensor[:1].expand(9, -1),
    "another dtype": lambda tensor: tensor.view(torch.uint8),
    "an array": lambda tensor: tensor.numpy(),
    "a part of an array": lambda tensor: tensor.numpy()[1:, ::2],
    "an array of an array": lambda tensor: np.asarray(memoryview(tensor.numpy().data))[0],
    "the storage": lambda tensor: tensor.untyped_storage(),
    "a detached alias": lambda tensor: tensor.detach(),
    "an alias that needs a gradient": lambda tensor: tensor.view(torch.float32).requires_grad_(),
    "dlpack in numpy": np.from_dlpack,
    "dlpack in torch": from_dlpack,
    "a capsule": torch._C._to_dlpack,
    "a list of rows": list,
    "a chunk": lambda tensor: tensor.chunk(5)[2],
    "a nested tensor": lambda tensor: torch.nested.nested_tensor_from_jagged(tensor, torch.tensor([0, 3, ROWS])),
    "a parameter": lambda tensor: torch.nn.Parameter(tensor.view(torch.float32)),
    "a closure": lambda tensor: lambda: tensor,
}


@pytest.mark.parametrize("hold", HOLDS.values(), ids=HOLDS)
def test_what_is_held_in_whatever_form_is_not_used_again(hold: Callable[[torch.Tensor], object], ring: Ring) -> None:
    tensor, array = ring.take(ROWS)
    array[:] = 7
    del array
    first = tensor.data_ptr()
    held = hold(tensor)
    del tensor
    others = [pointer(ring) for _ in range(20)]
    assert first not in others
    del held
    assert first in {tensor.data_ptr() for tensor, _ in [ring.take(ROWS) for _ in range(8)]}


def test_what_autograd_has_saved_is_not_used_again(ring: Ring) -> None:
    tensor, array = ring.take(ROWS)
    array.view(np.float32)[:] = 2.0
    weight = torch.ones(1024, requires_grad=True)
    loss = (tensor.view(torch.float32) * weight).sum()
    del tensor, array
    for _ in range(20):
        ring.take(ROWS)[1][:] = 0
    loss.backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    assert set(weight.grad.tolist()) == {2.0 * ROWS}


def test_what_another_thread_holds_is_not_used_again(ring: Ring) -> None:
    done = threading.Event()
    kept: list[torch.Tensor] = [ring.take(ROWS)[0]]
    first = kept[0].data_ptr()
    holder = threading.Thread(target=lambda _tensor: done.wait(PATIENCE_S), args=(kept.pop(),))
    holder.start()
    assert first not in [pointer(ring) for _ in range(5)]
    done.set()
    holder.join()


def test_what_is_moved_out_into_shared_memory_frees_its_buffer(ring: Ring) -> None:
    tensor = ring.take(ROWS)[0]
    first = tensor.data_ptr()
    tensor.share_memory_()  # type: ignore[no-untyped-call]
    assert tensor.data_ptr() != first
    assert first == pointer(ring)


def test_many_held_batches_are_all_different_and_the_ring_forgets_the_oldest(ring: Ring) -> None:
    held = [ring.take(ROWS)[0] for _ in range(50)]
    assert len({tensor.data_ptr() for tensor in held}) == 50
    kept = {tensor.data_ptr() for tensor in held[-8:]}
    del held
    assert pointer(ring) in kept


def test_buffers_that_were_held_once_are_not_kept_for_ever(ring: Ring) -> None:
    held = [ring.take(ROWS)[0] for _ in range(8)]
    del held
    now = [ring.take(ROWS)[0] for _ in range(2)]
    assert len(ring._buffers) == len(now) == 2


def test_a_shorter_batch_lies_in_the_same_buffer(ring: Ring) -> None:
    whole = pointer(ring)
    tensor, array = ring.take(40)
    assert (tensor.shape, array.shape, tensor.data_ptr()) == ((40, 1024), (40, 1024), whole)
    assert whole != pointer(ring)


def test_a_longer_batch_gets_a_larger_buffer_in_place_of_the_smaller(ring: Ring) -> None:
    pointer(ring, 40)
    tensor, _ = ring.take(ROWS)
    assert tensor.shape == (ROWS, 1024)
    assert len(ring._buffers) == 1


@pytest.mark.parametrize("rows", [32, 33, 63, 64])
def test_large_buffers_begin_on_a_page(rows: int, ring: Ring) -> None:
    assert pointer(ring, rows) % 4096 == 0


def made(lengths: Sequence[int]) -> tuple[int, int]:
    """How many buffers a ring makes for batches of these lengths, and how many bytes it has at most at a time."""
    ring = Ring(Column(dtype="uint8", shape=(), variable_length=True))
    batch, seen, largest = ring.take(lengths[0]), set[tuple[int, int]](), 0
    for length in lengths:
        batch = ring.take(length)
        assert len(batch[0]) == length
        seen |= {(id(buffer), len(buffer)) for buffer in ring._buffers}
        largest = max(largest, sum(len(buffer) for buffer in ring._buffers))
    return len(seen), largest


def test_lengths_that_scatter_take_two_batches_and_little_more() -> None:
    lengths = np.random.default_rng(7).normal(1 << 20, 1 << 13, 2000).astype(int).tolist()
    num_buffers, largest = made(lengths)
    assert largest < 2.06 * max(lengths)
    assert num_buffers < 20


def test_lengths_that_rise_take_few_buffers_each_larger_by_more() -> None:
    lengths = [int((1 << 18) * 1.01**number) for number in range(200)]
    num_buffers, largest = made(lengths)
    assert num_buffers < 60
    assert largest < 2.5 * max(lengths)


def test_small_batches_have_memory_of_their_own() -> None:
    small = Ring(Column(dtype="int64", shape=()))
    held = [small.take(4)[0] for _ in range(20)]
    assert len({tensor.data_ptr() for tensor in held}) == 20
