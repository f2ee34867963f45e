"""`railbus checkpoints` reads metas and hashes files; damage is found and said."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from commands import railbus, railbus_here
from railbus_shared.layout import Layout
from small_checkpoints import write_checkpoint


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    made = Layout(tmp_path / "learning")
    write_checkpoint(made, 1)
    write_checkpoint(made, 2)
    write_checkpoint(made, 1, model="other")
    return made


def test_all_are_listed_oldest_first(layout: Layout) -> None:
    done = railbus_here("checkpoints", "--json", cwd=layout.root.parent)
    listed = done.json()
    assert isinstance(listed, list)
    assert [(one["meta"]["model"], one["meta"]["number"]) for one in listed] == [
        ("digits-cnn", 1),
        ("digits-cnn", 2),
        ("other", 1),
    ]
    assert done.err == ""


def test_those_of_one_model_are_listed_as_a_table(layout: Layout) -> None:
    lines = railbus_here("checkpoints", "digits-cnn", cwd=layout.root.parent).out.splitlines()
    assert lines[0].split()[:3] == ["MODEL", "NUMBER", "STEP"]
    assert [line.split()[1] for line in lines[1:]] == ["1", "2"]


@pytest.mark.parametrize(("number", "step"), [([], 200), (["1"], 100)])
def test_one_is_shown_by_number_or_the_newest(number: list[str], step: int, layout: Layout) -> None:
    shown = railbus_here("checkpoints", "show", "digits-cnn", *number, "--json", cwd=layout.root.parent).json()
    assert isinstance(shown, dict)
    assert shown["meta"]["step"] == step


def test_what_is_as_its_meta_says_is_valid(layout: Layout) -> None:
    done = railbus_here("checkpoints", "verify", "digits-cnn", cwd=layout.root.parent)
    assert done.status == 0
    assert done.out.count("valid") == 2


def test_one_flipped_bit_is_found(layout: Layout) -> None:
    path = layout.checkpoints("digits-cnn") / "checkpoint-000002.pt"
    path.write_bytes(b"weighta")
    done = railbus_here("checkpoints", "verify", "digits-cnn", "--json", cwd=layout.root.parent)
    assert done.status == 6
    found = done.json()
    assert isinstance(found, dict)
    codes = [result["error"] and result["error"]["code"] for result in found["checkpoints"]]
    assert codes == [None, "CHECKPOINT_CORRUPT"]


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_file_of_another_length_or_none_at_all_is_found(damage: str, layout: Layout) -> None:
    path = layout.checkpoints("digits-cnn") / "checkpoint-000001.pt"
    path.write_bytes(b"wei") if damage == "cut" else path.unlink()
    done = railbus_here("checkpoints", "verify", "digits-cnn", "1", cwd=layout.root.parent)
    assert done.status == 6
    assert "damaged" in done.out


def elsewhere(path: Path) -> Path:
    """Where the meta lies that was there."""
    return path.parent.parent / "m.json"


NO_METAS: dict[str, Callable[[Path], object]] = {
    "half a map": lambda path: path.write_bytes(b"{"),
    "a list": lambda path: path.write_bytes(b"[]"),
    "an empty map": lambda path: path.write_bytes(b"{}"),
    "noise": lambda path: path.write_bytes(b"\xff\x00"),
    "another type": lambda path: path.write_bytes(b'{"number": "1"}'),
    "nested deeply": lambda path: path.write_bytes(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "huge": lambda path: path.write_bytes(b" " * (17 << 20)),
    "of another number": lambda path: path.write_bytes(path.with_name("checkpoint-000002.meta.json").read_bytes()),
    "of another model": lambda path: path.write_bytes(elsewhere(path).read_bytes().replace(b"digits-cnn", b"other")),
    "a folder": lambda path: path.mkdir(),
    "a pipe": os.mkfifo,
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link that leads away": lambda path: path.symlink_to(elsewhere(path)),
}  # fmt: skip


@pytest.mark.parametrize("kind", NO_METAS)
def test_a_meta_that_is_none_is_said_and_hides_no_other(kind: str, layout: Layout) -> None:
    path = layout.checkpoints("digits-cnn") / "checkpoint-000001.meta.json"
    path.rename(elsewhere(path))
    NO_METAS[kind](path)
    done = railbus_here("checkpoints", "digits-cnn", "--quiet", cwd=layout.root.parent)
    assert done.status == 0
    assert [Path(line).name for line in done.out.splitlines()] == ["checkpoint-000002.meta.json"]
    assert "warning: checkpoint" in done.err
    for words in (["verify", "digits-cnn"], ["show", "digits-cnn", "1"]):
        done = railbus_here("checkpoints", *words, cwd=layout.root.parent)
        assert done.status == 6
        assert "does not match its meta: expected" in done.out + done.err


def test_tensors_that_are_a_link_out_of_the_tree_are_refused(layout: Layout) -> None:
    path = layout.checkpoints("digits-cnn") / "checkpoint-000002.pt"
    outside = path.rename(layout.root.parent / "secret")
    path.symlink_to(outside)
    for words in (
        ["verify", "digits-cnn"],
        ["export", "digits-cnn", "--safetensors", "out"],
        ["diff", "digits-cnn", "1", "2"],
    ):
        done = railbus_here("checkpoints", *words, cwd=layout.root.parent)
        assert done.status == 6
        assert "a link to" in done.out + done.err
    assert not (layout.root.parent / "out").exists()


def test_unfinished_files_are_no_checkpoints_but_are_told_when_verifying(layout: Layout) -> None:
    folder = layout.checkpoints("digits-cnn")
    (folder / ".checkpoint-000003.meta.json.tmp").write_bytes(b"{}")
    (folder / "checkpoint-000004.pt").write_bytes(b"no meta")
    (folder / ".serial-000004").write_bytes(b"j-4f09ac-2 3")
    (folder / ".serial-000005").write_bytes(b"")
    assert len(railbus_here("checkpoints", "digits-cnn", "-q", cwd=layout.root.parent).out.splitlines()) == 2
    done = railbus_here("checkpoints", "verify", "digits-cnn", "--json", cwd=layout.root.parent)
    assert done.status == 0, "it may be in use at this moment"
    found = done.json()
    assert isinstance(found, dict)
    told = [(Path(one["path"]).name, one["kind"], one["bytes"], one["job"]) for one in found["leftovers"]]
    assert told == [
        (".checkpoint-000003.meta.json.tmp", "draft", 2, None),
        (".serial-000004", "claim", 12, "j-4f09ac-2"),
        ("checkpoint-000004.pt", "tensors without a meta", 7, "j-4f09ac-2"),
    ]
    shown = railbus_here("checkpoints", "verify", cwd=layout.root.parent).out
    assert re.search(r"^checkpoint-000004\.pt +tensors without a meta +7 ", shown, re.MULTILINE)


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["digits-cn"], 3, "did you mean 'digits-cnn'?"),
        (["zzz"], 3, "there are: digits-cnn, other"),
        (["show", "digits-cnn", "7"], 3, "there are: 1, 2"),
        (["verify", "digits-cnn", "7"], 3, "there are: 1, 2"),
        (["diff", "digits-cnn", "1", "7"], 3, "there are: 1, 2"),
        (["diff", "digits-cnn", "1", "2", "1"], 6, "these are 3, not two"),
        (["diff", "digits-cnn", "1"], 6, "no parent to be compared with"),
        (["show", "nowhere/checkpoint-000001.pt"], 3, "no checkpoint-000001.meta.json beside it"),
        (["show", "nowhere/weights.pt"], 3, "not the name of a checkpoint"),
        (["show", "..", "1"], 6, "not a valid name"),
        (["../x"], 6, "not a valid name"),
    ],
)
def test_what_does_not_exist_is_answered_with_what_does(
    words: list[str], status: int, said: str, layout: Layout
) -> None:
    done = railbus_here("checkpoints", *words, cwd=layout.root.parent)
    assert (done.status, said in done.err) == (status, True), done.err


def test_the_root_may_stand_before_and_after_the_command(layout: Layout, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    root = str(layout.root)
    for words in (
        ["--root", root, "checkpoints"],
        ["checkpoints", "list", "--root", root],
        ["checkpoints", "--root", root],
    ):
        assert len(railbus(*words, "-q", cwd=elsewhere).out.splitlines()) == 3, words
    assert len(railbus("checkpoints", "-q", cwd=elsewhere, env={"RAILBUS_ROOT": root}).out.splitlines()) == 3
    assert f"root '{elsewhere}/learning' (the default) does not exist" in railbus("checkpoints", cwd=elsewhere).err
