"""What differs between two checkpoints: their metas, which tensors there are, and by how much the numbers changed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BufferedReader
from typing import Final

import numpy as np

from railbus.checkpoints.catalogue import Checkpoint
from railbus.checkpoints.dtypes import ITEM_BYTES, Array, Bytes, numbers
from railbus.checkpoints.one_file import as_one_file
from railbus.checkpoints.proof import Report, silent, verified
from railbus.checkpoints.tensors import Tensor, contents, read
from railbus_shared.errors import InvalidField

_CHUNK_ELEMENTS: Final = 1 << 17
"""As float64 they and their difference stay in the processor's cache."""
_OF_THE_BYTES: Final = frozenset({"tensors", "files"})
"""Fields of a meta that tell where bytes lie; the tensors are compared themselves."""


@dataclass(frozen=True)
class Change:
    """How the numbers of a tensor changed; both checkpoints have it, in the same shape."""

    name: str
    form: str
    """Dtype and shape; both dtypes where they differ."""
    max_abs: float
    """The largest absolute difference of two elements, as far as both are finite."""
    relative: float | None
    """Euclidean norm of the difference over that of the tensor in the first; None where that is zero."""
    num_elements: int
    num_different: int
    """Elements whose bits differ, or whose numbers do where the dtypes differ."""
    num_not_finite: int
    """Of those, elements that are NaN or infinite in either; they count for no norm."""

    @property
    def order(self) -> tuple[float, float, str]:
        """Largest change first; from nothing to something is larger than any ratio."""
        return (-(math.inf if self.relative is None else self.relative), -self.max_abs, self.name)

    def to_map(self) -> dict[str, object]:
        return {
            "tensor": self.name,
            "form": self.form,
            "max_abs": self.max_abs,
            "relative": self.relative,
            "num_elements": self.num_elements,
            "num_different": self.num_different,
            "num_not_finite": self.num_not_finite,
        }


@dataclass(frozen=True)
class Comparison:
    """The second checkpoint as it differs from the first."""

    meta: Mapping[str, tuple[object, object]]
    """Fields whose values differ, metrics, libraries and parameters one by one; None where there is none."""
    removed: tuple[Tensor, ...]
    added: tuple[Tensor, ...]
    reshaped: tuple[tuple[Tensor, Tensor], ...]
    """Tensors of another shape, in the first and in the second."""
    changed: tuple[Change, ...]
    """The largest change first."""
    num_same: int
    """Tensors that are equal bit by bit."""
    others: tuple[str, ...]
    """Names of tensors that were not compared, because they are not dense."""

    @property
    def is_same(self) -> bool:
        """Whether the tensors are, whatever the metas say."""
        return not (self.removed or self.added or self.reshaped or self.changed or self.others)

    def to_map(self) -> dict[str, object]:
        return {
            "same": self.is_same,
            "meta": {name: {"a": old, "b": new} for name, (old, new) in self.meta.items()},
            "removed": [{"tensor": one.name, "form": one.form} for one in self.removed],
            "added": [{"tensor": one.name, "form": one.form} for one in self.added],
            "reshaped": [{"tensor": a.name, "a": a.form, "b": b.form} for a, b in self.reshaped],
            "changed": [one.to_map() for one in self.changed],
            "num_same": self.num_same,
            "not_compared": list(self.others),
        }


def compare(first: Checkpoint, second: Checkpoint, *, part: str | None = None, report: Report = silent) -> Comparison:
    """Compare two checkpoints, both verified before, or only the tensors of one part of them.

    Never more than some megabytes are in memory, but for sharded ones, which are put together before.

    Raises CheckpointCorrupt, NotSupported, and InvalidField for a part that neither has.
    """
    with (
        as_one_file(first) as whole_a,
        as_one_file(second) as whole_b,
        verified(whole_a, report=report) as file_a,
        verified(whole_b, report=report) as file_b,
    ):
        a, b = contents(whole_a, file_a), contents(whole_b, file_b)
        if part is not None:
            a, b = a.part(part), b.part(part)
            if not (a.names or b.names):
                raise InvalidField(field="part", value=part, problem="neither checkpoint has tensors of it")
        both = [(tensor, b.tensors[name]) for name, tensor in a.tensors.items() if name in b.tensors]
        comparable = [(old, new) for old, new in both if old.shape == new.shape]
        total, done = sum(old.num_bytes for old, _ in comparable), 0
        changes = []
        for old, new in comparable:
            changes.append(_change(file_a, old, file_b, new))
            done += old.num_bytes
            report("compare", done, total)
    changed = sorted((one for one in changes if one.num_different or "→" in one.form), key=lambda one: one.order)
    return Comparison(
        meta=dict(meta_differences(first, second)),
        removed=tuple(tensor for name, tensor in a.tensors.items() if name not in b.tensors),
        added=tuple(tensor for name, tensor in b.tensors.items() if name not in a.tensors),
        reshaped=tuple((old, new) for old, new in both if old.shape != new.shape),
        changed=tuple(changed),
        num_same=len(changes) - len(changed),
        others=tuple(sorted({*a.others, *b.others})),
    )


def meta_differences(first: Checkpoint, second: Checkpoint) -> Iterator[tuple[str, tuple[object, object]]]:
    """Fields in which two metas differ, the values of maps one by one, in the order of the contract."""
    a, b = first.meta.to_map(), second.meta.to_map()
    for field in {**a, **b}:
        old, new = a.get(field), b.get(field)
        if field in _OF_THE_BYTES or old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            for key in {**old, **new}:
                if old.get(key) != new.get(key):
                    yield f"{field}.{key}", (old.get(key), new.get(key))
        else:
            yield field, (old, new)


def _change(file_a: BufferedReader, old: Tensor, file_b: BufferedReader, new: Tensor) -> Change:
    sums = _Sums()
    pieces_a = read(file_a, old, chunk_bytes=_CHUNK_ELEMENTS * ITEM_BYTES[old.dtype])
    pieces_b = read(file_b, new, chunk_bytes=_CHUNK_ELEMENTS * ITEM_BYTES[new.dtype])
    for raw_a, raw_b in _in_step(pieces_a, old, pieces_b, new):
        if old.dtype == new.dtype and np.array_equal(raw_a, raw_b):
            sums.add_equal(raw_a, old.dtype)
        else:
            sums.add(raw_a, old.dtype, raw_b, new.dtype)
    return Change(
        name=old.name,
        form=old.form if old.dtype == new.dtype else f"{old.dtype} → {new.form}",
        max_abs=sums.max_abs,
        relative=sums.relative,
        num_elements=old.num_elements,
        num_different=sums.num_different,
        num_not_finite=sums.num_not_finite,
    )


def _in_step(
    pieces_a: Iterator[Bytes], old: Tensor, pieces_b: Iterator[Bytes], new: Tensor
) -> Iterator[tuple[Bytes, Bytes]]:
    """Pieces of as many elements of both; one that is not contiguous comes whole, and is cut here."""
    left_a, left_b = np.empty(0, np.uint8), np.empty(0, np.uint8)
    size_a, size_b = ITEM_BYTES[old.dtype], ITEM_BYTES[new.dtype]
    for _ in range(-(-old.num_elements // _CHUNK_ELEMENTS)):
        left_a = left_a if left_a.size else next(pieces_a)
        left_b = left_b if left_b.size else next(pieces_b)
        count = min(_CHUNK_ELEMENTS, left_a.size // size_a, left_b.size // size_b)
        yield left_a[: count * size_a], left_b[: count * size_b]
        left_a, left_b = left_a[count * size_a :], left_b[count * size_b :]


class _Sums:
    """Of one tensor, piece by piece."""

    def __init__(self) -> None:
        self.max_abs = 0.0
        self.num_different = 0
        self.num_not_finite = 0
        self._squares = 0.0
        self._squares_before = 0.0

    @property
    def relative(self) -> float | None:
        if self._squares == 0:
            return 0.0
        return math.sqrt(self._squares / self._squares_before) if self._squares_before else None

    def add_equal(self, raw: Bytes, dtype: str) -> None:
        before = numbers(raw, dtype)
        self._squares_before += _squares(before)

    def add(self, raw_a: Bytes, dtype_a: str, raw_b: Bytes, dtype_b: str) -> None:
        a, b = numbers(raw_a, dtype_a), numbers(raw_b, dtype_b)
        if dtype_a == dtype_b:
            differs = _differing_bits(raw_a, raw_b, ITEM_BYTES[dtype_a])
        else:
            differs = ~((a == b) | (np.isnan(a) & np.isnan(b)))
        self.num_different += int(np.count_nonzero(differs))
        self._squares_before += _squares(a)
        with np.errstate(invalid="ignore"):
            change = b - a
        if not np.isfinite(change.sum()):
            finite = np.isfinite(change)
            self.num_not_finite += int(np.count_nonzero(differs & ~finite))
            change = change[finite]
        self.max_abs = max(self.max_abs, _largest(change))
        self._squares += _squares(change)


def _differing_bits(raw_a: Bytes, raw_b: Bytes, size: int) -> Array:
    """Which elements differ, bool (n,)."""
    words = f"u{min(size, 8)}"
    differs: Array = np.not_equal(raw_a.view(words), raw_b.view(words))
    return np.logical_or(differs[::2], differs[1::2]) if size > 8 else differs


def _largest(change: Array) -> float:
    """The largest magnitude; 0 of nothing."""
    if not change.size:
        return 0.0
    return float(np.abs(change).max() if np.iscomplexobj(change) else max(change.max(), -change.min()))


def _squares(values: Array) -> float:
    """The sum of the squares of the magnitudes of those that are finite."""
    total = _sum_of_squares(values)
    return total if np.isfinite(total) else _sum_of_squares(values[np.isfinite(values)])


def _sum_of_squares(values: Array) -> float:
    """By one thread: those of a BLAS wait for each other where the machine is busy, and take longer than the sum."""
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.einsum("i,i->", values.conj(), values).real)
