"""Which commit a source file belongs to, read from the repository's files; no git is run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

_COMMIT: Final = re.compile(r"[0-9a-f]{40}(?:[0-9a-f]{24})?\Z")


def git_commit(source: Path) -> str | None:
    """The commit that is checked out around a file; None where none is, or where it cannot be told."""
    for folder in source.resolve().parents:
        git = folder / ".git"
        if git.is_dir():
            return _commit_of(_text(git / "HEAD"), git)
        if git.is_file():  # a worktree or submodule: `gitdir: <path>`
            place = (folder / _text(git).removeprefix("gitdir:").strip()).resolve()
            common = (place / (_text(place / "commondir") or ".")).resolve()
            return _commit_of(_text(place / "HEAD"), common)
    return None


def _commit_of(head: str, git: Path) -> str | None:
    ref = head.removeprefix("ref: ")
    if ref != head:
        head = _text(git / ref) or _packed(_text(git / "packed-refs"), ref)
    return head if _COMMIT.match(head) else None


def _packed(packed_refs: str, ref: str) -> str:
    for line in packed_refs.splitlines():
        commit, _, name = line.partition(" ")
        if name == ref:
            return commit
    return ""


def _text(path: Path) -> str:
    """Empty where there is no such file, or none that may be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
