"""The image of a state: one ordinary `.pt`, whatever the state holds."""

from __future__ import annotations

import gc
import io
import os
import pickle
import tempfile
import weakref
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from railbus_runner.checkpointing.image import MAX_TOLD, Image
from railbus_runner.checkpointing.zip_layout import ALIGNMENT, ZipLayout
from railbus_shared import files, wire
from railbus_shared.metas import MAX_META_BYTES

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu),
]


def written(state: dict[str, object]) -> bytes:
    """The file, which is the same by either way."""
    image = Image.of(state)
    data = b"".join(image.chunks())
    assert len(data) == image.nbytes
    arena = torch.full((image.nbytes + 100,), 7, dtype=torch.uint8)
    image.copy_to(arena)
    assert bytes(arena.numpy()) == data + bytes([7] * 100)
    return data


def loaded(data: bytes, path: Path, **how: Any) -> dict[str, Any]:
    path.write_bytes(data)
    state: dict[str, Any] = torch.load(path, weights_only=True, **how)
    return state


def bits(tensor: torch.Tensor) -> tuple[object, ...]:
    packed = tensor.detach().clone(memory_format=torch.contiguous_format).untyped_storage()
    raw = torch.empty(0, dtype=torch.uint8).set_(packed).numpy().tobytes()
    return tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.requires_grad, type(tensor), raw


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Of any bit pattern that the dtype may have."""
    num_bytes = torch.empty(shape, dtype=dtype).nbytes
    limit = 2 if dtype is torch.bool else 256
    return torch.randint(0, limit, (num_bytes,), dtype=torch.uint8).view(dtype).reshape(shape)


@pytest.mark.parametrize("mmap", [False, True])
def test_every_dtype_and_form_comes_back_with_the_same_bits(tmp_path: Path, mmap: bool) -> None:
    base = torch.arange(60.0).reshape(3, 4, 5)
    state: dict[str, object] = {
        **{str(dtype): random_tensor(dtype, (3, 5)) for dtype in DTYPES},
        **{f"empty {dtype}": torch.empty((2, 0), dtype=dtype) for dtype in DTYPES},
        "scalar": torch.tensor(3),
        "transposed": base.transpose(0, 2),
        "offset": base[1:, 2:, ::2],
        "expanded": torch.ones(1).expand(7),
        "grad": torch.ones(3, requires_grad=True),
        "parameter": torch.nn.Parameter(torch.ones(3)),
        "buffer": torch.nn.Parameter(torch.ones(3), requires_grad=False),
        "last": torch.full((1 << 12,), 0.1),
    }
    back = loaded(written(state), tmp_path / "x.pt", mmap=mmap)
    assert {name: bits(value) for name, value in back.items()} == {
        name: bits(value) for name, value in state.items() if isinstance(value, torch.Tensor)
    }


def with_attribute() -> torch.Tensor:
    tensor = torch.ones(2)
    tensor.note = "kept"  # type: ignore[attr-defined]
    return tensor


ODD: dict[str, Callable[[], object]] = {
    "sparse": lambda: torch.sparse_coo_tensor(torch.tensor([[0, 2, 4]]), torch.tensor([1.5, 2.5, 3.5]), (5,)),
    "blocks": lambda: torch.eye(4).to_sparse_bsr((2, 2)),
    "quantized": lambda: torch.quantize_per_tensor(torch.tensor([0.1, 0.25, 7.0]), 0.1, 3, torch.qint8),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.zeros(3)]),
    "conjugate": lambda: torch.tensor([1 + 2j, 3 - 4j]).conj(),
    "negative": lambda: torch.tensor([1 + 2j]).conj().imag,
    "on no device": lambda: torch.empty(3, device="meta"),
    "with an attribute": with_attribute,
    "storage": lambda: torch.arange(4.0).untyped_storage(),
    "containers": lambda: [Counter("abca"), {1, 2}, (b"x", 1j, 1 << 70), torch.Size([1, 2]), torch.bfloat16],
}


@pytest.mark.filterwarnings("ignore")  # torch warns of half of them, once in each process
@pytest.mark.parametrize("kind", ODD)
def test_what_torch_reduces_in_its_own_way_comes_back_as_from_torch_save(kind: str) -> None:
    state = {"odd": ODD[kind]()}
    theirs = io.BytesIO()
    torch.save(state, theirs)
    expected, back = (
        torch.load(io.BytesIO(data), weights_only=True)["odd"] for data in (theirs.getvalue(), written(state))
    )
    assert type(back) is type(expected)
    if kind == "storage":
        assert bytes(back._untyped_storage) == bytes(expected._untyped_storage)
    else:
        assert (repr(back), getattr(back, "__dict__", {})) == (repr(expected), getattr(expected, "__dict__", {}))
    if isinstance(back, torch.Tensor):
        assert (back.layout, back.is_conj(), back.is_neg()) == (expected.layout, expected.is_conj(), expected.is_neg())
    assert Image.of(state).tensors.keys() == ({"odd"} if kind == "with an attribute" else set())


def test_storages_that_are_shared_are_written_once_and_come_back_tied(tmp_path: Path) -> None:
    first, second = torch.nn.Linear(64, 64, bias=False), torch.nn.Linear(64, 64, bias=False)
    second.weight = first.weight
    model, weight = torch.nn.Sequential(first, second), first.weight.detach()
    hooks: OrderedDict[str, object] = OrderedDict()
    state: dict[str, object] = {"model": model.state_dict(), "row": weight[3], "same": [hooks, hooks]}
    data = written(state)
    assert len(data) < 2 * weight.nbytes
    back = loaded(data, tmp_path / "x.pt")
    back["row"].fill_(5)
    assert torch.equal(back["model"]["1.weight"][3], torch.full((64,), 5.0))
    assert torch.equal(back["model"]["0.weight"], back["model"]["1.weight"])
    assert back["same"][0] is back["same"][1]
    assert back["model"]._metadata == model.state_dict()._metadata  # type: ignore[attr-defined]


class View(NamedTuple):
    """A tensor to be made: which of three storages it views, from where on, how, and whether turned."""

    storage: int
    start: int
    step: int
    rows: int
    is_turned: bool

    def of(self, storages: list[torch.Tensor]) -> torch.Tensor:
        flat = storages[self.storage][self.start :: self.step]
        rows = flat[: len(flat) // self.rows * self.rows].reshape(self.rows, -1)
        return rows.t() if self.is_turned else rows


VIEWS = st.builds(
    View, st.integers(0, 2), st.integers(0, 40), st.integers(1, 3), rows=st.integers(1, 4), is_turned=st.booleans()
)
LEAVES = VIEWS | st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
STATES = st.recursive(
    LEAVES, lambda item: st.lists(item, max_size=4) | st.dictionaries(st.text(max_size=3), item, max_size=4)
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(DTYPES), st.integers(0, 40)), min_size=3, max_size=3),
    st.lists(VIEWS, max_size=4),
    STATES,
)
def test_any_state_comes_back_with_its_containers_bits_and_ties(
    storages: list[tuple[torch.dtype, int]], views: list[View], nested: object
) -> None:
    made = [random_tensor(dtype, (length,)) for dtype, length in storages]

    def filled(value: object) -> object:
        match value:
            case View():
                return value.of(made)
            case dict():
                return {key: filled(item) for key, item in value.items()}
            case list():
                return [filled(item) for item in value]
            case _:
                return value

    tensors = [view.of(made) for view in views]
    state: dict[str, object] = {"nested": filled(nested), "tensors": tensors}
    back = torch.load(io.BytesIO(written(state)), weights_only=True)
    assert forms(back) == forms(state)
    assert ties(back["tensors"]) == ties(tensors)


def forms(value: object) -> object:
    """What can be compared: tensors as their bits."""
    match value:
        case torch.Tensor():
            return bits(value)
        case dict():
            return [(key, forms(item)) for key, item in value.items()]
        case list():
            return [forms(item) for item in value]
        case _:
            return type(value), value


def ties(tensors: list[torch.Tensor]) -> list[int]:
    """For each tensor, the first that has the same storage; those of nothing have none."""
    places = [tensor.untyped_storage().data_ptr() or -number for number, tensor in enumerate(tensors, start=1)]
    return [places.index(place) for place in places]


def test_nothing_of_a_state_lives_on_once_its_image_is_gone() -> None:
    tensor = torch.ones(3)
    gone = weakref.ref(tensor)
    gc.disable()
    try:
        written({"tensor": tensor, "parameter": torch.nn.Parameter(torch.ones(2))})
        del tensor
        assert gone() is None
    finally:
        gc.enable()


def test_it_is_what_torch_save_writes_but_for_the_order_of_the_records() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    moments = {"step": torch.tensor(1.0), "exp_avg": torch.randn(4, 3), "exp_avg_sq": torch.rand(4, 3)}
    optimizer = {"state": {0: moments}, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.99), "params": [0]}]}
    state: dict[str, object] = {"model": model.state_dict(), "optimizer": optimizer, "step": 3, "name": "é"}
    theirs = io.BytesIO()
    torch.save(state, theirs)
    ours = written(state)
    with zipfile.ZipFile(theirs) as there, zipfile.ZipFile(io.BytesIO(ours)) as here:
        names = here.namelist()
        assert names[-3:] == ["archive/data.pkl", "archive/byteorder", "archive/version"]
        assert set(there.namelist()) - set(names) == {
            *("archive/.format_version", "archive/.storage_alignment", "archive/.data/serialization_id")
        }
        assert here.testzip() == "archive/data/0"  # the data have no checksum
        for name in names[-3:]:
            assert here.read(name) == there.read(name)
        for entry in here.infolist()[:-3]:
            start = entry.header_offset + len(entry.FileHeader(zip64=False)) - len(entry.extra)
            assert there.read(entry.filename) in ours[start : start + 128 + entry.file_size]


def test_the_table_says_where_the_elements_of_each_tensor_lie() -> None:
    model = torch.nn.Linear(3, 2)
    base = torch.arange(12, dtype=torch.int16).reshape(3, 4)
    state: dict[str, object] = {
        "parts": {"model": model.state_dict(), "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}}},
        "list": [1, (torch.ones(2, dtype=torch.bfloat16),)],
        "parameter": torch.nn.Parameter(torch.ones(3)),
        "rows": base[1:],
        "columns": base[:, 1:],
        "empty": torch.empty(0, 3),
        "a.b": torch.ones(1),
        "a": {"b": torch.ones(1)},
        "sparse": torch.ones(2).to_sparse(),
    }
    image = Image.of(state)
    data = written(state)
    assert set(image.tensors) == {
        *("parts.model.weight", "parts.model.bias", "parts.optimizer.state.0.step", "list.1.0"),
        *("parameter", "rows", "empty"),
    }
    rows = image.tensors["rows"]
    assert (rows.dtype, rows.shape, rows.bytes) == ("int16", (2, 4), 16)
    assert data[rows.offset : rows.offset + rows.bytes] == bytes(base[1:].numpy().tobytes())
    for name, tensor in (("parts.model.weight", model.weight), ("parameter", torch.ones(3))):
        place = image.tensors[name]
        assert data[place.offset : place.offset + place.bytes] == tensor.detach().numpy().tobytes()


def test_two_dtypes_in_one_storage_are_refused() -> None:
    floats = torch.ones(4)
    with pytest.raises(RuntimeError, match="view the same storage"):
        Image.of({"floats": floats, "ints": floats.view(torch.int32)})


@pytest.mark.parametrize(
    "arena",
    [
        torch.empty(10, dtype=torch.uint8),
        torch.empty(10_000, dtype=torch.int8),
        torch.empty(20_000, dtype=torch.uint8)[::2],
        torch.empty((10, 1000), dtype=torch.uint8),
    ],
)
def test_an_arena_that_does_not_fit_is_refused(arena: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="arena"):
        Image.of({"a": torch.ones(3)}).copy_to(arena)


HUGE = [(1 << 32) - 2, (1 << 32) - 1, 1 << 32, 5 << 31]


@given(sizes=st.lists(st.integers(0, 200) | st.sampled_from(HUGE), max_size=9))
def test_records_of_any_size_are_found_by_another_reader(sizes: list[int]) -> None:
    layout = ZipLayout.of(sizes)
    with tempfile.TemporaryFile() as file:  # mostly holes
        for number, (header, offset) in enumerate(zip(layout.headers, layout.offsets, strict=True)):
            assert offset % ALIGNMENT == 0
            file.seek(offset - len(header))
            file.write(header + bytes([number])[: sizes[number]])
        file.seek(layout.data_end)
        file.write(layout.tail({"data.pkl": b"hello", "version": b"3\n"}))
        with zipfile.ZipFile(file) as archive:
            assert [entry.file_size for entry in archive.infolist()] == [*sizes, 5, 2]
            assert (archive.read("archive/data.pkl"), archive.read("archive/version")) == (b"hello", b"3\n")
            for number, size in enumerate(sizes):
                archive.getinfo(f"archive/data/{number}").CRC = None  # type: ignore[assignment]  # nobody knows it
                with archive.open(f"archive/data/{number}") as record:
                    assert record.read(1) == bytes([number])[:size]


def test_more_records_than_sixteen_bits_count_are_found_by_torch(tmp_path: Path) -> None:
    number = 1 << 16
    layout = ZipLayout.of([0] * number)
    pickled = pickle.dumps({"step": 1}, protocol=2)
    tail = layout.tail({"data.pkl": pickled, "byteorder": b"little", "version": b"3\n"})
    assert loaded(b"".join((*layout.headers, tail)), tmp_path / "x.pt") == {"step": 1}


def test_of_very_many_tensors_no_table_is_made_that_no_meta_could_hold() -> None:
    one = torch.ones(1)
    assert Image.of({str(number): one for number in range(MAX_TOLD + 1)}).tensors == {}
    told = Image.of({"parts": {f"{'name.' * 20}{number}": one for number in range(MAX_TOLD)}}).tensors
    assert len(told) == MAX_TOLD
    meta = files.to_json({"tensors": {name: place.to_map() for name, place in told.items()}})
    assert len(wire.decode(meta, limit_bytes=MAX_META_BYTES)) == 1


def test_tensors_beyond_four_gigabytes_are_found_by_torch(tmp_path: Path) -> None:
    large = 9 << 29
    with (tmp_path / "large").open("wb") as file:
        file.truncate(large)
    hole = torch.from_file(str(tmp_path / "large"), shared=True, size=large, dtype=torch.uint8)
    state: dict[str, object] = {"before": torch.ones(3), "large": hole, "after": torch.arange(5)}
    image = Image.of(state)
    with (tmp_path / "x.pt").open("wb") as file:
        for chunk in image.chunks():
            if len(chunk) == large:
                file.seek(large, os.SEEK_CUR)
            else:
                file.write(chunk)
        assert file.tell() == image.nbytes
    back = torch.load(tmp_path / "x.pt", weights_only=True, mmap=True)
    assert (back["before"].tolist(), back["after"].tolist()) == ([1, 1, 1], [0, 1, 2, 3, 4])
    assert back["large"].shape == (large,)
    assert image.tensors["after"].offset > large
