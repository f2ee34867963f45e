"""Writing and reading a dataset: the bytes come back, the same input gives the same files, a crash leaves nothing."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import small_datasets
from railbus_shared.contracts.artifacts import Column, DatasetSchema, Split
from railbus_shared.data.container import ALIGN_BYTES
from railbus_shared.data.dtypes import PADDING
from railbus_shared.data.index import ITEM_BYTES, DatasetIndex
from railbus_shared.data.readers import numpy_dtype, open_shard, page_aligned_empty
from railbus_shared.data.writer import Chunk, write_dataset
from railbus_shared.errors import (
    Conflict,
    InvalidField,
    RailbusError,
    SchemaInvalid,
    ShardCorrupt,
    StorageFull,
)
from railbus_shared.layout import Layout
from until import PATIENCE_S


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file under a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# --- what comes back -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("samples", "num_shards"), [(1, 1), (2, 2), (30, 1), (30, 3), (31, 4), (1000, 7)])
def test_what_was_written_is_read_back(samples: int, num_shards: int, layout: Layout) -> None:
    index = small_datasets.write(layout, samples, num_shards=num_shards)
    found = small_datasets.read(layout, index)
    for name, expected in small_datasets.arrays(samples).items():
        assert found[name].dtype == expected.dtype
        assert np.array_equal(found[name], expected)
    assert DatasetIndex.load(layout.dataset("d")) == index


@pytest.mark.parametrize("dtype", sorted(ITEM_BYTES))
@pytest.mark.parametrize("shape", [(), (3,), (2, 1, 5)])
def test_every_dtype_comes_back_bit_by_bit(dtype: str, shape: tuple[int, ...], layout: Layout) -> None:
    column = Column.parse({"dtype": dtype, "shape": list(shape)})
    schema = DatasetSchema(name="d", columns={"a": column}, splits={"all": Split(first=0, samples=11)})
    bits = np.random.default_rng(1).integers(
        0, 2 if dtype == "bool" else 256, (11, *shape, ITEM_BYTES[dtype]), np.uint8
    )
    expected = bits.view(numpy_dtype(column))[..., 0]
    index = write_dataset(layout, schema, [{"a": expected}])
    found = small_datasets.read(layout, index)["a"]
    assert (found.dtype, found.shape) == (numpy_dtype(column), (11, *shape))
    assert found.tobytes() == expected.tobytes()


def test_a_shard_is_a_safetensors_file_with_aligned_columns(layout: Layout) -> None:
    index = small_datasets.write(layout, 31)
    loaded = load_file(layout.shards("d") / "shard-00000.data")
    for name, expected in small_datasets.arrays(31).items():
        assert np.array_equal(loaded[name], expected)
        assert index.file.shards[0].columns[name].offset % ALIGN_BYTES == 0
    assert all(name in index.schema.columns or name.startswith(PADDING) for name in loaded)


def test_a_reader_outlives_the_name_of_its_file(layout: Layout) -> None:
    index = small_datasets.write(layout, 5)
    path = layout.shards("d") / "shard-00000.data"
    reader = open_shard(path, index, 0)
    path.unlink()
    assert small_datasets.read_shard(reader, index, 0)["id"].tolist() == [0, 1, 2, 3, 4]


def test_the_index_holds_the_hash_and_size_of_each_file(layout: Layout) -> None:
    index = small_datasets.write(layout, 100, num_shards=3)
    for shard in index.file.shards:
        data = (layout.shards("d") / shard.file).read_bytes()
        assert (shard.bytes, shard.sha256) == (len(data), hashlib.sha256(data).hexdigest())


@pytest.mark.parametrize("damage", ["short", "gone", "a folder"])
def test_a_shard_that_is_not_the_indexed_file_is_not_opened(damage: str, layout: Layout) -> None:
    index = small_datasets.write(layout, 5)
    path = layout.shards("d") / "shard-00000.data"
    data = path.read_bytes()
    path.unlink()
    if damage == "short":
        path.write_bytes(data[:-1])
    elif damage == "a folder":
        path.mkdir()
    with pytest.raises(ShardCorrupt, match=rf"shard-00000\.data.*expected {len(data)} bytes"):
        open_shard(path, index, 0)


@pytest.mark.parametrize("shape", [(1,), (32, 8, 8), (0, 3), (4096,)])
def test_aligned_arrays_begin_on_a_page_and_can_be_written(shape: tuple[int, ...]) -> None:
    array = page_aligned_empty(shape, np.dtype("float32"))
    assert (array.shape, array.dtype.name, array.ctypes.data % os.sysconf("SC_PAGESIZE")) == (shape, "float32", 0)
    array[...] = 7
    assert (array == 7).all()


def test_aligned_arrays_are_not_shared_with_a_forked_process() -> None:
    code = """
import os, numpy as np
from railbus_shared.data.readers import page_aligned_empty
array = page_aligned_empty((8,), np.dtype("int64"))
array[:] = 0
if (pid := os.fork()) == 0:
    array[:] = 1
    os._exit(0)
os.waitpid(pid, 0)
print(array.sum())
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "0\n"


# --- the same input, the same bytes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 7, 30, 100])
def test_the_same_samples_give_the_same_files_however_they_are_cut(chunk: int, tmp_path: Path) -> None:
    held = small_datasets.arrays(100)
    pieces = [{name: array[at : at + chunk] for name, array in held.items()} for at in range(0, 100, chunk)]
    one, other = Layout(tmp_path / "one"), Layout(tmp_path / "other")
    expected = write_dataset(one, small_datasets.schema(100), [held], shard_bytes=1000)
    found = write_dataset(other, small_datasets.schema(100), iter(pieces), shard_bytes=1000)
    assert found.sha256 == expected.sha256
    assert tree(other.datasets) == tree(one.datasets)


def test_arrays_of_any_layout_in_memory_give_the_same_files(tmp_path: Path) -> None:
    held = small_datasets.arrays(20)
    odd = {name: np.asfortranarray(array) for name, array in held.items()} | {"id": np.repeat(held["id"], 2)[::2]}
    one, other = Layout(tmp_path / "one"), Layout(tmp_path / "other")
    expected = write_dataset(one, small_datasets.schema(20), [held])
    assert write_dataset(other, small_datasets.schema(20), [odd]).sha256 == expected.sha256


def test_writing_the_same_again_changes_nothing(layout: Layout) -> None:
    first = small_datasets.write(layout, 30, num_shards=2)
    before = {path: path.stat() for path in layout.datasets.rglob("*")}
    assert small_datasets.write(layout, 30, num_shards=2) == first
    assert {path: path.stat().st_ino for path in layout.datasets.rglob("*")} == {
        path: status.st_ino for path, status in before.items()
    }


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "schema"])
def test_writing_the_same_again_repairs_what_is_damaged(damage: str, layout: Layout) -> None:
    small_datasets.write(layout, 30, num_shards=2)
    before = tree(layout.datasets)
    path = layout.schema("d") if damage == "schema" else layout.shards("d") / "shard-00001.data"
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:100])
    else:
        small_datasets.flip(path)
    small_datasets.write(layout, 30, num_shards=2)
    assert tree(layout.datasets) == before


def test_other_content_under_the_same_name_is_a_conflict(layout: Layout) -> None:
    small_datasets.write(layout, 30)
    before = tree(layout.datasets)
    held = small_datasets.arrays(30)
    held["id"][7] = -1
    with pytest.raises(Conflict, match="'d' exists with other content"):
        write_dataset(layout, small_datasets.schema(30), [held])
    with pytest.raises(Conflict):
        small_datasets.write(layout, 31)
    assert tree(layout.datasets) == before


def test_another_schema_is_a_conflict_before_any_sample_is_asked_for(layout: Layout) -> None:
    small_datasets.write(layout, 30)

    def asked() -> Iterator[Chunk]:
        pytest.fail("a chunk was asked for")
        yield {}

    with pytest.raises(Conflict):
        write_dataset(layout, small_datasets.schema(31), asked())


# --- what is refused -------------------------------------------------------------------------------------------------


def bad_chunks() -> Iterator[tuple[str, Chunk]]:
    held = small_datasets.arrays(5)
    yield "columns", {name: array for name, array in held.items() if name != "id"}
    yield "columns", held | {"extra": held["id"]}
    yield "columns.x", held | {"x": held["x"].astype(np.float64)}
    yield "columns.x", held | {"x": held["x"].astype(">f4")}
    yield "columns.x", held | {"x": held["x"].reshape(5, 6)}
    yield "columns.x", held | {"x": np.array(1.0, dtype=np.float32)}
    yield "columns.id", held | {"id": held["id"][:, None]}
    yield "columns", held | {"id": held["id"][:4]}


@pytest.mark.parametrize(("field", "chunk"), list(bad_chunks()), ids=[str(n) for n, _ in enumerate(bad_chunks())])
def test_a_chunk_that_does_not_fit_is_refused_and_leaves_nothing(field: str, chunk: Chunk, layout: Layout) -> None:
    with pytest.raises(InvalidField) as caught:
        write_dataset(layout, small_datasets.schema(5), [small_datasets.arrays(5), chunk])
    assert caught.value.details["field"] == field
    assert list(layout.datasets.iterdir()) == []


@pytest.mark.parametrize("wrong", [-1, 3])
def test_a_label_that_is_no_class_is_refused(wrong: int, layout: Layout) -> None:
    column = Column(dtype="int64", shape=(), num_classes=3)
    schema = DatasetSchema(name="d", columns={"y": column}, splits={"all": Split(first=0, samples=4)})
    with pytest.raises(InvalidField, match=rf"'columns\.y' has value {wrong}: the schema says classes 0 to 2"):
        write_dataset(layout, schema, [{"y": np.array([0, 2, wrong, 1])}])


@pytest.mark.parametrize(
    ("edit", "error"),
    [
        ({"splits": {"train": {"first": 0, "samples": 6}}}, InvalidField),
        ({"columns": {"id": {"dtype": "int64", "shape": [0]}}}, SchemaInvalid),
    ],
)
def test_a_schema_that_the_samples_cannot_fill_is_refused(
    edit: dict[str, object], error: type[RailbusError], layout: Layout
) -> None:
    schema = DatasetSchema.parse(small_datasets.schema(5).to_map() | edit)
    with pytest.raises(error):
        write_dataset(layout, schema, [small_datasets.arrays(5)])
    assert not layout.dataset("d").exists()


def test_no_samples_are_no_dataset(layout: Layout) -> None:
    with pytest.raises(InvalidField, match="at least one sample"):
        write_dataset(layout, small_datasets.schema(5), [])


# --- crashes ---------------------------------------------------------------------------------------------------------

WRITER = """
import sys
from pathlib import Path
import small_datasets
from railbus_shared.data.writer import write_dataset
from railbus_shared.layout import Layout

def chunks():
    held = small_datasets.arrays(40_000)
    for at in range(0, 40_000, 100):
        yield {name: array[at : at + 100] for name, array in held.items()}
        if at == 20_000:
            print("halfway", flush=True)
            sys.stdin.readline()

print(write_dataset(Layout(Path(sys.argv[1])), small_datasets.schema(40_000), chunks(), shard_bytes=100_000).sha256)
"""

KILLED_AT_EVERY_STEP = """
import itertools, os, signal, sys
from pathlib import Path
import small_datasets
from railbus_shared.data.index import DatasetIndex
from railbus_shared.layout import Layout

STEPS = {"open", "os.link", "os.rename", "os.remove", "os.mkdir", "os.rmdir"}

def write_and_die(layout, at):
    seen = itertools.count()
    def hook(event, args):
        if event in STEPS and next(seen) == at:
            os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    small_datasets.write(layout, 60, num_shards=5)

for step in itertools.count():
    layout = Layout(Path(sys.argv[1]) / str(step))
    if (pid := os.fork()) == 0:
        write_and_die(layout, step)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    if layout.index("d").exists():
        DatasetIndex.load(layout.dataset("d")).check_files(layout.shards("d"))
    small_datasets.write(layout, 60, num_shards=5)
    if status == 0:
        print(step)
        break
"""


def python(code: str, root: Path, *, stdin: int = subprocess.DEVNULL) -> subprocess.Popen[str]:
    """A process that runs a script of ours."""
    environment = os.environ | {"PYTHONPATH": str(Path(small_datasets.__file__).parent)}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-c", code, str(root)], stdin=stdin, stdout=pipe, stderr=pipe, text=True, env=environment
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files that the writer process makes when nobody stops it."""
    layout = Layout(tmp_path_factory.mktemp("whole"))
    write_dataset(layout, small_datasets.schema(40_000), [small_datasets.arrays(40_000)], shard_bytes=100_000)
    return tree(layout.datasets)


def test_a_writer_killed_while_it_spools_leaves_no_dataset_and_the_next_cleans_up(
    whole: dict[str, bytes], layout: Layout
) -> None:
    with python(WRITER, layout.root, stdin=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "halfway\n"
        process.kill()
    assert not layout.index("d").exists()
    assert (layout.dataset("d") / ".import").is_dir()
    write_dataset(layout, small_datasets.schema(40_000), [small_datasets.arrays(40_000)], shard_bytes=100_000)
    assert tree(layout.datasets) == whole


@pytest.mark.timeout(180)  # a process and its flushes for each of some thirty steps
def test_a_writer_killed_at_any_step_leaves_all_or_nothing_and_the_next_completes(tmp_path: Path) -> None:
    with python(KILLED_AT_EVERY_STEP, tmp_path) as process:
        out, err = process.communicate(timeout=170)
    assert process.returncode == 0, err
    num_steps = int(out)
    assert num_steps > 20
    trees = [tree(tmp_path / str(step) / "datasets") for step in range(num_steps + 1)]
    assert len(trees[-1]) == 7
    assert all(found == trees[-1] for found in trees)


def test_two_writers_at_once_wait_for_each_other_and_both_succeed(whole: dict[str, bytes], layout: Layout) -> None:
    with python(WRITER, layout.root, stdin=subprocess.PIPE) as one:
        assert one.stdout is not None
        assert one.stdout.readline() == "halfway\n"
        with python(WRITER, layout.root) as other:
            assert other.stdout is not None
            assert select.select([other.stdout], [], [], 2.0)[0] == []
            outs = [one.communicate("\n", timeout=PATIENCE_S)[0], other.communicate(timeout=PATIENCE_S)[0]]
    assert [one.returncode, other.returncode] == [0, 0]
    assert [out.split()[-1] for out in outs] == [hashlib.sha256(whole["d/index.json"]).hexdigest()] * 2
    assert tree(layout.datasets) == whole


def test_a_full_disk_fails_the_write_whole(layout: Layout) -> None:
    limit = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
"""
    with python(limit + WRITER, layout.root) as process:
        _, err = process.communicate(timeout=PATIENCE_S)
    assert StorageFull.__name__ in err
    assert list(layout.datasets.iterdir()) == []


def test_an_interrupt_leaves_nothing(layout: Layout) -> None:
    def chunks() -> Iterator[Chunk]:
        yield small_datasets.arrays(5)
        raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        write_dataset(layout, small_datasets.schema(5), chunks())
    assert list(layout.datasets.iterdir()) == []


def test_schema_and_index_are_json_for_people(layout: Layout) -> None:
    small_datasets.write(layout, 5)
    for path in (layout.schema("d"), layout.index("d")):
        text = path.read_text()
        assert text.endswith("}\n")
        assert json.loads(text)["format_version"] == 1
