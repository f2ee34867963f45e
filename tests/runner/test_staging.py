"""Batches on their way to a device: one ahead, errors in their turn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch

from railbus_runner.packed import Packed
from railbus_runner.staging import map_tensors, one_ahead
from railbus_shared.errors import ShardCorrupt

DAMAGED = ShardCorrupt(path="shard-00000.data", expected="a", actual="b")


def counted(made: list[int], *, upto: int, error: Exception | None = None) -> Iterator[int]:
    for number in range(upto):
        made.append(number)
        yield number
    if error is not None:
        raise error


def test_each_item_comes_after_the_next_was_begun() -> None:
    made: list[int] = []
    for number in one_ahead(counted(made, upto=5)):
        assert made == list(range(min(number + 2, 5)))
    assert made == list(range(5))


def test_of_nothing_comes_nothing() -> None:
    assert list(one_ahead([])) == []


def test_an_error_of_ours_comes_when_its_item_is_due() -> None:
    ahead = one_ahead(counted([], upto=2, error=DAMAGED))
    assert [next(ahead), next(ahead)] == [0, 1]
    with pytest.raises(ShardCorrupt):
        next(ahead)


def test_another_error_comes_at_once() -> None:
    ahead = one_ahead(counted([], upto=1, error=RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        next(ahead)


class Pair(NamedTuple):
    x: torch.Tensor
    y: object


def test_every_tensor_of_a_value_is_changed_and_nothing_else() -> None:
    one = torch.ones(1)
    value = {"a": one, "b": [one, "text"], "c": (one, Pair(one, 3)), "d": Packed(one, one), "e": None}
    found = map_tensors(value, lambda tensor: tensor + 1)
    assert (found["a"], found["b"], found["e"]) == (torch.tensor(2.0), [torch.tensor(2.0), "text"], None)
    assert found["c"] == (torch.tensor(2.0), Pair(torch.tensor(2.0), 3))
    assert (found["d"].values, found["d"].offsets) == (torch.tensor(2.0), torch.tensor(2.0))
