"""What an import needs of memory and disk, and what it leaves behind when it is killed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from importers_for_tests import samples
from railbus.importers.scratch import scratch_folder
from railbus.importing import import_dataset
from railbus_shared.layout import Layout

_HOLD = """
import sys
from pathlib import Path
from railbus.importers.scratch import scratch_folder
from railbus_shared.layout import Layout
with scratch_folder(Layout(Path(sys.argv[1]))) as folder:
    (folder / "rows").write_bytes(bytes(1000))
    print(folder, flush=True)
    sys.stdin.read()
"""
_IMPORT = """
import resource, signal, sys
from pathlib import Path
from railbus.importers.source import Options
from railbus.importing import import_dataset
from railbus_shared.errors import StorageFull
from railbus_shared.layout import Layout
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
source, limit, settings = sys.argv[1], int(sys.argv[2]), eval(sys.argv[3])
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    import_dataset(Layout(Path("learning")), source, name="d", **settings)
except StorageFull as exc:
    print(exc)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.fixture
def held(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Another process that holds a scratch folder."""
    words = [sys.executable, "-c", _HOLD, str(tmp_path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process, Path(process.stdout.readline().strip())
        process.kill()


def test_what_a_killed_import_left_is_removed_by_the_next(
    held: tuple[subprocess.Popen[str], Path], tmp_path: Path
) -> None:
    process, folder = held
    process.kill()
    process.wait()
    assert (folder / "rows").is_file()
    with scratch_folder(Layout(tmp_path)) as mine:
        assert [path.name for path in folder.parent.iterdir()] == [mine.name]
    assert list(folder.parent.iterdir()) == []


def test_what_a_running_import_needs_is_left_alone(held: tuple[subprocess.Popen[str], Path], tmp_path: Path) -> None:
    with scratch_folder(Layout(tmp_path)):
        assert (held[1] / "rows").is_file()
    assert (held[1] / "rows").is_file()


def run(tmp_path: Path, source: str, *, limit: int = 0, settings: str = "{}") -> list[str]:
    words = [sys.executable, "-c", _IMPORT, source, str(limit), settings]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_rows_that_do_not_fit_on_the_disk_are_told_and_leave_nothing(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("x\n" + "1\n" * 20_000)
    said, _ = run(tmp_path, "t.csv", limit=100_000)
    assert said.startswith("no space left to write")
    assert not list((tmp_path / "learning").rglob("*.data"))
    assert not list((tmp_path / "learning/.railbus/imports/scratch").iterdir())


@pytest.mark.parametrize("settings", ["{'options': Options(tokenizer='byte')}", "{}"], ids=["byte", "char"])
def test_memory_does_not_grow_with_the_file(settings: str, tmp_path: Path) -> None:
    """48 MB of text in less than half of that; what is mapped of it counts too."""
    line = b"The quick brown fox jumps over the lazy dog.\n"
    with (tmp_path / "t.txt").open("wb") as file:
        file.write(line * (48_000_000 // len(line)))
    (grown,) = run(tmp_path, "t.txt", settings=settings)
    assert int(grown) < 40_000


def test_a_source_that_is_read_twice_gives_what_it_gave_before(tmp_path: Path) -> None:
    """Rows are gathered from disk in a mixed order: short and long, of fixed and variable length."""
    lengths = [(number * 37) % 500 for number in range(300)]
    rows = [f'{{"id": {number}, "t": "{"x" * length}", "v": {list(range(length % 7))}}}' for number, length in
            enumerate(lengths)]  # fmt: skip
    (tmp_path / "t.jsonl").write_text("\n".join(rows))
    layout = Layout(tmp_path / "learning")
    found = samples(layout, import_dataset(layout, str(tmp_path / "t.jsonl")))
    assert sorted(found["id"]) == list(range(300))
    assert found["t"] == ["x" * lengths[number] for number in found["id"]]
    assert found["v"] == [np.arange(lengths[number] % 7).tolist() for number in found["id"]]
