"""Who may join the bus: one Ed25519 nkey user for each service and one for the human.

A user's secret is its seed in `<folder>/<user>.nk`: mode 0600 in a folder of mode 0700, made once and then kept, so
that clients stay valid over restarts. The server is told the public keys only.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, cast

import nkeys

from railbus_shared import files
from railbus_shared.errors import ConfigError, shorten
from railbus_shared.names import checked_id

_FOLDER_MODE: Final = 0o700
_SEED_MODE: Final = 0o600
_OTHERS: Final = 0o077
BELONGS_TO_OTHERS: Final = (
    "files of services are theirs: as root, or by `docker compose run --rm init railbus keys ...`"
)


@dataclass(frozen=True)
class UserKey:
    """A user of the bus; the secret stays in its file."""

    name: str
    seed_path: Path
    public: str
    """`U…`, what nats.conf names."""


def ensure_keys(folder: Path, users: Sequence[str]) -> dict[str, UserKey]:
    """The keys of `users`, made where they do not exist yet.

    Empty folders in the place of keys give way to them: Docker makes one of each file that is to be mounted and is not
    there. Raises ConfigError for a key file that others can read or that holds no user seed.
    """
    folder.mkdir(mode=_FOLDER_MODE, parents=True, exist_ok=True)
    if _has_folders_only(folder):
        folder.chmod(_FOLDER_MODE)
    _check_private(folder, wanted=_FOLDER_MODE)
    return {name: _ensure_key(folder, name) for name in users}


def _ensure_key(folder: Path, name: str) -> UserKey:
    path = folder / f"{checked_id(name, kind='user')}.nk"
    if path.is_dir():
        _clear(path)
    if not path.exists():
        with contextlib.suppress(FileExistsError):  # made by another one just now
            files.write_new(path, _new_seed(), mode=_SEED_MODE)
    _check_private(path, wanted=_SEED_MODE)
    return UserKey(name, path, _public_key(path))


def _has_folders_only(folder: Path) -> bool:
    """As Docker leaves it, open to all, with no secret in it so far."""
    found = list(folder.iterdir())
    return bool(found) and all(path.is_dir() for path in found)


def _clear(path: Path) -> None:
    try:
        path.rmdir()
    except OSError as exc:
        raise ConfigError(
            f"{str(path)!r} is a folder, and should be a key file: {exc.strerror}",
            hint="remove it to have a key made there",
            details={"path": str(path)},
        ) from exc


def replace_key(folder: Path, name: str) -> UserKey:
    """Another key in the place of the one of a user, in one step."""
    path = folder / f"{checked_id(name, kind='user')}.nk"
    files.write_whole(path, _new_seed(), mode=_SEED_MODE, keep_owner=True)
    return UserKey(name, path, _public_key(path))


def checked_public_key(text: str) -> str:
    """The text, if it is the public key of a user; raises ConfigError."""
    try:
        raw = base64.b32decode(text + "=" * (-len(text) % 8))
    except (binascii.Error, ValueError):
        raw = b""
    is_whole = len(raw) == 35 and binascii.crc_hqx(raw[:-2], 0) == int.from_bytes(raw[-2:], "little")
    if not is_whole or raw[0] != nkeys.PREFIX_BYTE_USER:
        raise ConfigError(
            f"{shorten(text)} is not the public key of a NATS user", hint="it begins with U and has 56 characters"
        )
    return text


def _new_seed() -> bytes:
    seed: bytes = nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER)
    return seed + b"\n"


def _check_private(path: Path, *, wanted: int) -> None:
    try:
        mode = path.stat().st_mode & 0o777
    except OSError as exc:
        raise _unreadable(path, exc) from exc
    if mode & _OTHERS:
        raise ConfigError(
            f"{str(path)!r} holds secrets, and others may use it (mode {mode:04o})",
            hint=f"chmod {wanted:o} {path}",
            details={"path": str(path)},
        )


def _unreadable(path: Path, exc: OSError) -> ConfigError:
    return ConfigError(f"{str(path)!r} cannot be read: {exc.strerror}", hint=BELONGS_TO_OTHERS)


def _public_key(path: Path) -> str:
    """The public key of the seed in a file; nkeys checks no checksum when it decodes, so it is encoded again here."""
    try:
        seed = path.read_bytes().strip()
    except OSError as exc:
        raise _unreadable(path, exc) from exc
    try:
        prefix, raw = nkeys.decode_seed(seed)
        if prefix != nkeys.PREFIX_BYTE_USER or nkeys.encode_seed(raw, prefix) != seed:
            raise nkeys.ErrInvalidSeed
        public = cast("bytes", nkeys.from_seed(seed).public_key)  # its annotation says otherwise
    except (nkeys.NkeysError, binascii.Error, ValueError) as exc:
        raise ConfigError(
            f"key file {str(path)!r} holds no seed of a NATS user",
            hint="restore it, or remove it to have a new one made at the next start",
            details={"path": str(path)},
        ) from exc
    return public.decode()
