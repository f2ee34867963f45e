"""`railbus checkpoints` reads metas and hashes files; damage is found and said."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from commands import railbus
from railbus_shared import files
from railbus_shared.contracts.artifacts import CheckpointMeta
from railbus_shared.layout import Layout, checkpoint_stem


def write_checkpoint(layout: Layout, number: int, *, model: str = "digits-cnn", content: bytes = b"weights") -> Path:
    """A checkpoint whose meta is true; returns the path of its tensors."""
    folder = layout.checkpoints(model)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{checkpoint_stem(number)}.pt"
    path.write_bytes(content)
    meta = CheckpointMeta.parse(
        {
            "number": number,
            "model": model,
            "job": "j-4f09ac-1",
            "attempt": 1,
            "lease_epoch": 1,
            "step": number * 100,
            "epoch": number,
            "samples_seen": number * 6400,
            "entrypoint": "classifier",
            "seed": 0,
            "dataset": "digits",
            "index_sha256": "0" * 64,
            "devices": ["h-cpu0"],
            "precision": "float32",
            "libraries": {"torch": "2.13.0"},
            "metrics": {"accuracy": 0.97},
            "files": [{"file": path.name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}],
            "created_at": "2026-11-23T21:45:35.000000000Z",
        }
    )
    (folder / f"{checkpoint_stem(number)}.meta.json").write_bytes(files.to_json(meta.to_map()))
    return path


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    made = Layout(tmp_path / "learning")
    write_checkpoint(made, 1)
    write_checkpoint(made, 2)
    write_checkpoint(made, 1, model="other")
    return made


def test_all_are_listed_oldest_first(layout: Layout) -> None:
    done = railbus("checkpoints", "--json", cwd=layout.root.parent)
    listed = done.json()
    assert isinstance(listed, list)
    assert [(one["meta"]["model"], one["meta"]["number"]) for one in listed] == [
        ("digits-cnn", 1),
        ("digits-cnn", 2),
        ("other", 1),
    ]
    assert done.err == ""


def test_those_of_one_model_are_listed_as_a_table(layout: Layout) -> None:
    lines = railbus("checkpoints", "digits-cnn", cwd=layout.root.parent).out.splitlines()
    assert lines[0].split()[:3] == ["MODEL", "NUMBER", "STEP"]
    assert [line.split()[1] for line in lines[1:]] == ["1", "2"]


@pytest.mark.parametrize(("number", "step"), [([], 200), (["1"], 100)])
def test_one_is_shown_by_number_or_the_newest(number: list[str], step: int, layout: Layout) -> None:
    shown = railbus("checkpoints", "show", "digits-cnn", *number, "--json", cwd=layout.root.parent).json()
    assert isinstance(shown, dict)
    assert shown["meta"]["step"] == step


def test_what_is_as_its_meta_says_is_valid(layout: Layout) -> None:
    done = railbus("checkpoints", "verify", "digits-cnn", cwd=layout.root.parent)
    assert done.status == 0
    assert done.out.count("valid") == 2


def test_one_flipped_bit_is_found(layout: Layout) -> None:
    path = layout.checkpoints("digits-cnn") / "checkpoint-000002.pt"
    path.write_bytes(b"weighta")
    done = railbus("checkpoints", "verify", "digits-cnn", "--json", cwd=layout.root.parent)
    assert done.status == 6
    results = done.json()
    assert isinstance(results, list)
    assert [result["error"] and result["error"]["code"] for result in results] == [None, "CHECKPOINT_CORRUPT"]


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_file_of_another_length_or_none_at_all_is_found(damage: str, layout: Layout) -> None:
    path = layout.checkpoints("digits-cnn") / "checkpoint-000001.pt"
    path.write_bytes(b"wei") if damage == "cut" else path.unlink()
    done = railbus("checkpoints", "verify", "digits-cnn", "1", cwd=layout.root.parent)
    assert done.status == 6
    assert "damaged" in done.out


@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", b"\xff\x00", b'{"number": "1"}'])
def test_a_meta_that_is_none_is_said_and_hides_no_other(content: bytes, layout: Layout) -> None:
    (layout.checkpoints("digits-cnn") / "checkpoint-000001.meta.json").write_bytes(content)
    done = railbus("checkpoints", "digits-cnn", "--quiet", cwd=layout.root.parent)
    assert done.status == 0
    assert [Path(line).name for line in done.out.splitlines()] == ["checkpoint-000002.meta.json"]
    assert "warning: checkpoint" in done.err


def test_unfinished_files_are_no_checkpoints(layout: Layout) -> None:
    folder = layout.checkpoints("digits-cnn")
    (folder / ".checkpoint-000003.meta.json.tmp").write_bytes(b"{}")
    (folder / "checkpoint-000004.pt").write_bytes(b"no meta")
    assert len(railbus("checkpoints", "digits-cnn", "-q", cwd=layout.root.parent).out.splitlines()) == 2


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["digits-cn"], 3, "did you mean 'digits-cnn'?"),
        (["zzz"], 3, "there are: digits-cnn, other"),
        (["show", "digits-cnn", "7"], 3, "there are: 1, 2"),
        (["../x"], 6, "not a valid name"),
    ],
)
def test_what_does_not_exist_is_answered_with_what_does(
    words: list[str], status: int, said: str, layout: Layout
) -> None:
    done = railbus("checkpoints", *words, cwd=layout.root.parent)
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
    assert railbus("checkpoints", cwd=elsewhere).err == "no checkpoints under learning/models\n"
