"""Serial numbers of a model's checkpoints: each taken once, by exclusive creation, and never again.

A number is claimed by creating the hidden file `.serial-000123`, which holds `<job> <lease_epoch>` of whoever writes
under it; by that, what a killed attempt left can be told from what another job is writing. The next number is one more
than the highest claim or checkpoint. The highest claim is never removed, so a number is not used again even where its
checkpoint never came to be, or has gone; an empty claim is done with. The folder is locked while numbers are looked up
or dropped.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

from railbus_shared import files

_CLAIM: Final = re.compile(r"\.serial-(\d{6,})\Z")
_USED: Final = re.compile(r"(?:\.serial-|\.?checkpoint-)(\d{6,})")


def claim(folder: Path, *, job: str, lease_epoch: int) -> int:
    """Take the next number; raises StorageFull."""
    with _locked(folder):
        number = max(_numbers(folder, _USED), default=0) + 1
        while not _create(claim_path(folder, number), f"{job} {lease_epoch}"):
            number += 1  # where the file system does not lock, exclusive creation alone decides
        for older in _claims(folder):
            if older < number and not _read(claim_path(folder, older)):
                claim_path(folder, older).unlink(missing_ok=True)
        return number


def release(folder: Path, number: int) -> None:
    """Drop the claim on a number that is done with; the highest one stays, empty, until a higher one is taken."""
    with _locked(folder):
        if number < max(_claims(folder), default=0):
            claim_path(folder, number).unlink(missing_ok=True)
        elif claim_path(folder, number).exists():
            os.truncate(claim_path(folder, number), 0)


def claim_again(folder: Path, number: int, *, job: str, lease_epoch: int) -> None:
    """Claim a number whose checkpoint is about to be removed; raises StorageFull."""
    path = claim_path(folder, number)
    with _locked(folder), files.storage_errors(path), path.open("wb") as file:
        _write(file, f"{job} {lease_epoch}")


def claims_of(folder: Path, *, job: str, lease_epoch: int) -> list[int]:
    """Numbers that attempts of this job have claimed, with this lease epoch or an earlier one."""
    numbers: list[int] = []
    for number in _claims(folder):
        owner, _, epoch = _read(claim_path(folder, number)).partition(" ")
        if owner == job and epoch.isdecimal() and int(epoch) <= lease_epoch:
            numbers.append(number)
    return numbers


def claim_path(folder: Path, number: int) -> Path:
    return folder / f".serial-{number:06d}"


def _create(path: Path, text: str) -> bool:
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o644)
    except FileExistsError:
        return False
    with files.storage_errors(path), os.fdopen(descriptor, "wb") as file:
        try:
            _write(file, text)
        except BaseException:
            path.unlink()  # nothing is written under the number; on a full disk there would be one for every try
            raise
    return True


def _write(file: BinaryIO, text: str) -> None:
    """Durable before what is claimed: of a claim that a power cut empties, nobody would sweep the litter."""
    file.write(text.encode())
    file.flush()
    os.fsync(file.fileno())


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except FileNotFoundError:  # dropped since the folder was listed
        return ""


def _claims(folder: Path) -> list[int]:
    return _numbers(folder, _CLAIM)


def _numbers(folder: Path, pattern: re.Pattern[str]) -> list[int]:
    return sorted(int(match[1]) for name in os.listdir(folder) if (match := pattern.match(name)))  # noqa: PTH208 - bare names


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
