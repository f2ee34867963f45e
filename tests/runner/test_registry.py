"""Names of entrypoints and their functions, in real folders."""

from __future__ import annotations

import importlib
import logging
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from railbus_runner.entrypoints import registry
from railbus_runner.provenance import git_commit
from railbus_shared.errors import InvalidName, UnknownEntrypoint


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder of user code; what was imported from it is forgotten afterwards."""
    path, modules = list(sys.path), set(sys.modules)
    code = tmp_path / "code"
    code.mkdir()
    yield code
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        del sys.modules[name]
    importlib.invalidate_caches()


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_a_function_of_an_allowed_folder_is_found_and_its_folder_comes_first_on_the_path(folder: Path) -> None:
    write(folder, "rb_mine/loops.py", "from rb_mine.inner import answer\ndef train(ctx):\n    return answer\n")
    write(folder, "rb_mine/inner.py", "answer = 42\n")
    found = registry.resolve("rb_mine.loops:train", [folder])
    assert found(None) == 42  # type: ignore[arg-type]
    assert sys.path[0] == str(folder)


def test_nothing_is_put_on_the_path_for_a_built_in_or_a_refused_name(folder: Path) -> None:
    before = list(sys.path)
    with pytest.raises(UnknownEntrypoint):
        registry.resolve("rb_nowhere:train", [folder])
    assert sys.path == before


@pytest.mark.parametrize(
    "name",
    [
        "os:system",
        "subprocess:run",
        "json:loads",
        "rb_absent.module:train",
        "rb_mine:absent",
        "rb_mine:NUMBER",
        "nobody",
    ],
)
def test_what_no_allowed_folder_holds_is_refused(folder: Path, name: str) -> None:
    write(folder, "rb_mine.py", "NUMBER = 3\ndef train(ctx): ...\n")
    with pytest.raises(UnknownEntrypoint, match="field 'entrypoint'"):
        registry.resolve(name, [folder])


@pytest.mark.parametrize("name", ["../evil:train", "a.b", "a:b:c", "", "a:b ", "a/b:c", "classifier\n"])
def test_what_is_no_name_is_refused_before_any_path_is_built(folder: Path, name: str) -> None:
    with pytest.raises(InvalidName):
        registry.resolve(name, [folder])


def test_the_refusal_says_what_there_is_and_what_was_meant(folder: Path) -> None:
    write(folder, "rb_mine.py", "def train(ctx): ...\n")
    with pytest.raises(UnknownEntrypoint) as caught:
        registry.resolve("rb_mine:trian", [folder])
    assert caught.value.hint == "did you mean 'rb_mine:train'? known: causal_lm, classifier, rb_mine:train"


def test_a_link_that_leads_out_of_the_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    outside = write(tmp_path, "outside.py", "def train(ctx): ...\n")
    (folder / "rb_linked.py").symlink_to(outside)
    with pytest.raises(UnknownEntrypoint):
        registry.resolve("rb_linked:train", [folder])
    assert "rb_linked:train" not in registry.available([folder])


def test_a_file_named_like_a_module_that_is_loaded_already_is_refused_with_the_remedy(folder: Path) -> None:
    write(folder, "json.py", "def train(ctx): ...\n")
    with pytest.raises(UnknownEntrypoint, match="module 'json' is") as caught:
        registry.resolve("json:train", [folder])
    assert "rename" in caught.value.hint


def test_the_list_holds_functions_of_one_argument_and_imports_nothing(folder: Path) -> None:
    write(
        folder,
        "rb_listed.py",
        "raise SystemExit('imported')\n"
        "def train(ctx): ...\n"
        "def only(ctx, /): ...\n"
        "def none(): ...\n"
        "def two(a, b): ...\n"
        "def many(*a): ...\n"
        "def keyword(a, *, b): ...\n"
        "def optional(a=1): ...\n"
        "def _private(ctx): ...\n"
        "async def coroutine(ctx): ...\n"
        "class Class:\n    def method(self): ...\n",
    )
    write(folder, "rb_pkg/__init__.py", "def begin(ctx): ...\n")
    write(folder, ".hidden/rb_h.py", "def train(ctx): ...\n")
    write(folder, "not-a-name.py", "def train(ctx): ...\n")
    write(folder, "env/pyvenv.cfg", "")
    write(folder, "env/lib/rb_lib.py", "def train(ctx): ...\n")
    assert registry.available([folder]) == [
        "causal_lm", "classifier", "rb_listed:train", "rb_listed:only", "rb_pkg:begin",
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["def broken(:\n", "x = '\\0'\0", "\ud800".encode("utf-8", "surrogatepass")])
def test_a_broken_file_is_skipped_and_said(folder: Path, text: str | bytes, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "rb_broken.py").write_bytes(text if isinstance(text, bytes) else text.encode())
    write(folder, "rb_whole.py", "x = '\\d'\ndef train(ctx): ...\n")  # an escape that Python warns of
    with caplog.at_level(logging.WARNING):
        assert registry.available([folder]) == ["causal_lm", "classifier", "rb_whole:train"]
    assert len(caplog.records) == 1


def test_the_list_is_capped(folder: Path) -> None:
    write(folder, "rb_many.py", "".join(f"def f{n}(ctx): ...\n" for n in range(1500)))
    assert len(registry.available([folder])) == 1000


@pytest.mark.parametrize("name", sorted(registry.BUILTIN))
def test_every_built_in_resolves(name: str) -> None:
    assert callable(registry.resolve(name, []))


def test_the_commit_of_a_source_is_what_git_says(tmp_path: Path) -> None:
    source = write(tmp_path, "repo/pkg/mine.py", "")
    assert git_commit(source) is None

    def git(*words: str) -> str:
        program = shutil.which("git")
        assert program is not None
        options = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        return subprocess.run(
            [program, "-C", str(tmp_path / "repo"), *options, *words], check=True, capture_output=True, text=True
        ).stdout.strip()

    git("init", "-q")
    assert git_commit(source) is None  # no commit yet
    git("add", ".")
    git("commit", "-qm", "one")
    assert git_commit(source) == git("rev-parse", "HEAD")
    git("pack-refs", "--all")
    assert git_commit(source) == git("rev-parse", "HEAD")
    git("worktree", "add", "-q", "../tree")
    assert git_commit(tmp_path / "tree/pkg/mine.py") == git("rev-parse", "HEAD")
    git("checkout", "-q", "--detach")
    assert git_commit(source) == git("rev-parse", "HEAD")
