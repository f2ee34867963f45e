"""Keys of the bus's users: made once, private, and refused where they are not."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import nkeys
import pytest

from railbus.embedded.credentials import ensure_keys
from railbus.embedded.permissions import USERS
from railbus_shared.errors import ConfigError


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_every_user_gets_a_key_of_its_own_that_only_the_owner_can_read(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    keys = ensure_keys(folder, USERS)
    assert set(keys) == set(USERS)
    assert len({key.public for key in keys.values()}) == len(USERS)
    assert _mode(folder) == 0o700
    for key in keys.values():
        assert key.seed_path == folder / f"{key.name}.nk"
        assert _mode(key.seed_path) == 0o600
        assert key.public.startswith("U")
        assert key.seed_path.read_text().startswith("SU")
    assert sorted(path.name for path in folder.iterdir()) == sorted(f"{user}.nk" for user in USERS)


def test_a_seed_signs_for_its_public_key(tmp_path: Path) -> None:
    key = ensure_keys(tmp_path / "keys", ["user"])["user"]
    pair: Any = nkeys.from_seed(key.seed_path.read_bytes().strip())
    assert pair.public_key.decode() == key.public


def test_keys_are_kept_and_a_new_user_is_added(tmp_path: Path) -> None:
    first = ensure_keys(tmp_path / "keys", ["user"])
    second = ensure_keys(tmp_path / "keys", ["user", "runner"])
    assert second["user"] == first["user"]
    assert second["runner"].public != first["user"].public


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644])
def test_a_key_that_others_can_read_is_refused_with_the_remedy(tmp_path: Path, mode: int) -> None:
    path = ensure_keys(tmp_path / "keys", ["user"])["user"].seed_path
    path.chmod(mode)
    with pytest.raises(ConfigError, match=rf"{mode:04o}.*chmod 600 .*user\.nk"):
        ensure_keys(tmp_path / "keys", ["user"])


def test_a_folder_that_others_can_enter_is_refused_with_the_remedy(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    folder.mkdir()
    folder.chmod(0o755)
    with pytest.raises(ConfigError, match="chmod 700"):
        ensure_keys(folder, ["user"])
    assert not list(folder.iterdir())


def _account_seed() -> bytes:
    return bytes(nkeys.encode_seed(bytes(range(32)), nkeys.PREFIX_BYTE_ACCOUNT))


def _flipped_seed() -> bytes:
    seed = bytearray(nkeys.encode_seed(bytes(range(32)), nkeys.PREFIX_BYTE_USER))
    seed[20] = ord("A") if seed[20] != ord("A") else ord("B")
    return bytes(seed)


@pytest.mark.parametrize(
    "content",
    [b"", b"\n", b"garbage", b"\xff\xfe\x00", b"SU" + b"A" * 10, b"SU" + b"A" * 56, _account_seed(), _flipped_seed()],
    ids=["empty", "blank", "word", "binary", "short", "no-checksum", "an-account's", "one-letter-wrong"],
)
def test_a_file_that_holds_no_user_seed_is_refused(tmp_path: Path, content: bytes) -> None:
    path = ensure_keys(tmp_path / "keys", ["user"])["user"].seed_path
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="holds no seed of a NATS user"):
        ensure_keys(tmp_path / "keys", ["user"])
    assert path.read_bytes() == content


def test_a_user_name_may_not_leave_the_folder(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="not a valid name"):
        ensure_keys(tmp_path / "keys", ["../user"])
    assert not (tmp_path / "user.nk").exists()
