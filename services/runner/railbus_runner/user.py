"""Whom a runner becomes that root has started: it reads its key first, and nothing of root is left to it after that.

Training code is of that user, and so are the pre-warmed process and writers of checkpoints. They can neither read the
key file, which is root's, nor the runner's memory, where the key is held. Imports nothing that would start a thread.
"""

from __future__ import annotations

import grp
import logging
import os
import pwd
import re
import site
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from railbus_runner import processes
from railbus_shared.bus.access import Access, FileAccess, HeldAccess
from railbus_shared.errors import BadSetting, ConfigError, NotAuthorized, shorten
from railbus_shared.hidden_memory import hide_memory
from railbus_shared.layout import Layout
from railbus_shared.settings import CommonSettings

logger = logging.getLogger(__name__)

_SETTING: Final = "RAILBUS_RUNNER_USER"
_NUMBER: Final = re.compile(r"[0-9]{1,10}")
_LARGEST_ID: Final = (1 << 32) - 2  # the one above means "leave it as it is"


@dataclass(frozen=True)
class User:
    """Whom to become."""

    name: str
    """Empty for one whom only a number names."""
    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str = ""

    def __str__(self) -> str:
        return f"{self.name or 'the user'} (uid {self.uid}, gid {self.gid})"


def opened(common: CommonSettings, *, user: str, groups: Sequence[str]) -> Access:
    """What to show NATS. Where `user` says so, this process is that user's afterwards, and cannot go back.

    Raises BadSetting for a user or group that does not exist or is root, NotAuthorized, and ConfigError where this
    process may not become that user, or the user may read the key, write what root runs, or not write the tree.
    """
    if not user:
        if os.geteuid() == 0:
            logger.warning("training code runs as root, and can read the key of this runner", extra={"set": _SETTING})
        return FileAccess(common)
    wanted = find_user(user, groups)
    if os.geteuid() != 0:
        _need_to_be(wanted)
        logger.warning("training code can read the key of this runner: root did not start it", extra={"set": _SETTING})
        return FileAccess(common)
    held = HeldAccess.read(common)
    become(wanted)
    _check_key(common.nats_key_file, wanted)
    _check_code(wanted)
    _check_tree(common.layout, wanted)
    logger.info("became another user", extra={"uid": wanted.uid, "gid": wanted.gid, "groups": list(wanted.groups)})
    return held


def find_user(text: str, more_groups: Sequence[str] = ()) -> User:
    """The user that `name`, `uid`, or either with `:group`, means; raises BadSetting."""
    who, colon, group = text.partition(":")
    entry = _passwd(who, text)
    uid = entry.pw_uid if entry is not None else int(who)
    if uid == 0:
        raise _bad(text, "root is whom training code must not be")
    if colon:
        gid = _group(group, setting=_SETTING)
    elif entry is not None:
        gid = entry.pw_gid
    else:
        raise _bad(text, "the system knows no such user, so the group must be said as well", hint=f"{uid}:{uid}")
    known = os.getgrouplist(entry.pw_name, gid) if entry is not None else [gid]
    more = [_group(name, setting=f"{_SETTING}_GROUPS") for name in more_groups]
    groups = tuple(dict.fromkeys((*known, *more)))
    return User(entry.pw_name if entry else "", uid, gid, groups, home=entry.pw_dir if entry else "")


def become(user: User) -> None:
    """Be that user from now on, for the whole process; raises ConfigError if it may not."""
    number = processes.death_signal()
    try:
        os.setgroups(user.groups)
        os.setresgid(user.gid, user.gid, user.gid)
        os.setresuid(user.uid, user.uid, user.uid)
    except OSError as exc:
        raise ConfigError(
            f"this process may not become {user}: {exc}", hint="root needs the capabilities SETUID and SETGID for it"
        ) from exc
    hide_memory()
    processes.set_death_signal(number)
    if user.name:
        os.environ.update(HOME=user.home, USER=user.name, LOGNAME=user.name)


def _passwd(who: str, text: str) -> pwd.struct_passwd | None:
    """None for a number that the system does not know."""
    try:
        return pwd.getpwuid(_id(who, text)) if _NUMBER.fullmatch(who) else pwd.getpwnam(who)
    except KeyError as exc:
        if _NUMBER.fullmatch(who):
            return None
        raise _bad(text, "the system knows no such user") from exc


def _group(name: str, *, setting: str) -> int:
    if _NUMBER.fullmatch(name):
        return _id(name, name)
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError as exc:
        raise BadSetting(f"setting {setting} names the group {shorten(name)}, which the system does not know") from exc


def _id(number: str, text: str) -> int:
    if int(number) > _LARGEST_ID:
        raise _bad(text, f"the largest id is {_LARGEST_ID}")
    return int(number)


def _bad(text: str, why: str, *, hint: str = "name, uid, name:group or uid:gid") -> BadSetting:
    return BadSetting(f"setting {_SETTING} has value {shorten(text)}: {why}", hint=hint)


def _need_to_be(user: User) -> None:
    if os.geteuid() != user.uid:
        raise ConfigError(
            f"setting {_SETTING} wants {user}, and this runner was started as uid {os.geteuid()}",
            hint="have root start it, or leave the setting out",
        )


def _check_key(path: Path | None, user: User) -> None:
    if path is not None and os.access(path, os.R_OK):
        raise NotAuthorized(
            f"key file {str(path)!r} can be read by {user}, and so by training code", hint=f"chown 0:0 {path}"
        )


def _check_code(user: User) -> None:
    """Else what training code leaves there is run as root at the next start."""
    files = (getattr(module, "__file__", None) for module in tuple(sys.modules.values()))
    imported = sorted({str(Path(file).parent) for file in files if file})
    places = [sys.executable, str(Path(sys.executable).parent), *sys.path, *imported]
    if site.ENABLE_USER_SITE:
        places.append(site.getusersitepackages())
    for place in places:
        there = Path(place).absolute()
        while not os.path.lexists(there):
            there = there.parent
        if os.access(there, os.W_OK):
            raise ConfigError(
                f"root runs code from {place!r}, and {user} may write {str(there)!r}",
                hint="start it as `python -P -s -m railbus_runner`, with code that is root's",
            )


def _check_tree(layout: Layout, user: User) -> None:
    for folder in (layout.models, layout.state / "runner"):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            is_writable = os.access(folder, os.W_OK | os.X_OK)
        except OSError:
            is_writable = False
        if not is_writable:
            raise ConfigError(
                f"{str(folder)!r} cannot be written by {user}",
                hint=f"the tree must be that user's: chown -R {user.uid}:{user.gid} {layout.root}",
            )
