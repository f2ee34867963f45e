"""Columns of variable length in a batch."""

from __future__ import annotations

import pickle

import pytest
import torch

from railbus_runner.packed import Packed

WORDS = [b"to", b"", b"be or", b"not"]


@pytest.fixture
def words() -> Packed:
    values = torch.frombuffer(bytearray(b"".join(WORDS)), dtype=torch.uint8)
    return Packed(values, torch.tensor([0, 2, 2, 7, 10]))


def test_a_sample_is_its_items(words: Packed) -> None:
    assert len(words) == 4
    assert [bytes(words[number].tolist()) for number in range(4)] == WORDS
    assert bytes(words[-1].tolist()) == b"not"
    assert [bytes(item.tolist()) for item in words.to_list()] == WORDS
    assert [bytes(item.tolist()) for item in words] == WORDS
    assert words.lengths.tolist() == [2, 0, 5, 3]


@pytest.mark.parametrize("number", [4, -5])
def test_a_sample_that_is_not_there_is_an_index_error(number: int, words: Packed) -> None:
    with pytest.raises(IndexError, match=f"sample {number} of 4"):
        words[number]


def test_samples_are_views_of_the_same_memory(words: Packed) -> None:
    words[2][0] = ord("B")
    assert words.bytes(2) == b"Be or"


def test_bytes_are_a_sample_as_it_lies_in_memory(words: Packed) -> None:
    assert [words.bytes(number) for number in range(4)] == WORDS
    floats = Packed(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([0, 1, 2]))
    assert floats.bytes(1) == torch.tensor([3.0, 4.0]).numpy().tobytes()


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (None, [[116, 111, 0, 0, 0], [0] * 5, [98, 101, 32, 111, 114], [110, 111, 116, 0, 0]]),
        (2, [[116, 111], [0, 0], [98, 101], [110, 111]]),
        (6, [[116, 111, 0, 0, 0, 0], [0] * 6, [98, 101, 32, 111, 114, 0], [110, 111, 116, 0, 0, 0]]),
        (0, [[], [], [], []]),
    ],
)
def test_padding_fills_to_the_longest_or_to_a_length(
    length: int | None, expected: list[list[int]], words: Packed
) -> None:
    assert words.padded(length=length).tolist() == expected


def test_padding_keeps_the_shape_of_an_item_and_fills_with_what_is_given() -> None:
    pairs = Packed(torch.arange(6, dtype=torch.int16).view(3, 2), torch.tensor([0, 1, 3]))
    assert pairs.padded(-1).tolist() == [[[0, 1], [-1, -1]], [[2, 3], [4, 5]]]
    assert pairs.padded().dtype == torch.int16


def test_nothing_can_be_padded_too() -> None:
    nothing = Packed(torch.empty(0), torch.zeros(1, dtype=torch.int64))
    assert (len(nothing), nothing.padded().shape, nothing.to_list()) == (0, (0, 0), [])


def test_a_nested_tensor_holds_the_same(words: Packed) -> None:
    nested = words.nested()
    assert nested.layout == torch.jagged
    assert [bytes(item.tolist()) for item in nested.unbind()] == WORDS


def test_it_travels_to_a_device_and_to_another_process(words: Packed) -> None:
    assert words.to("meta").values.device.type == "meta"
    copied = pickle.loads(pickle.dumps(words))  # noqa: S301 - our own bytes
    assert copied.bytes(2) == WORDS[2]
