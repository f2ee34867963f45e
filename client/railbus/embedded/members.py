"""Who has a key: every service and `user` always, and those who were added, with a role each, in `people.json`.

Of a person the public key is what counts; the seed may be given away and removed. A change writes the new seed first,
then `people.json`, and what the server reads last, each file whole; so whatever is killed in between, the same command
again completes it, and no key that is not listed is ever let in.
"""

from __future__ import annotations

import contextlib
import difflib
import fcntl
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, get_args

from railbus.embedded.credentials import UserKey, checked_public_key, ensure_keys, replace_key
from railbus.embedded.permissions import HUMAN, OPERATOR, USERS, Policy, Role, policy
from railbus_shared import files
from railbus_shared.errors import ConfigError, Conflict, InvalidName, NotFound, shorten
from railbus_shared.layout import Layout
from railbus_shared.names import checked_id
from railbus_shared.subjects import DEFAULT_PREFIX

_ROLES: Final[tuple[Role, ...]] = get_args(Role)
_EACH_THEIR_OWN: Final = "each needs one of their own: `railbus keys rotate NAME`, or another --public"


@dataclass(frozen=True)
class Place:
    """Where keys, the list of people and the server's configuration lie."""

    keys: Path
    people: Path
    config: Path

    @classmethod
    def of_deployment(cls, folder: Path) -> Place:
        return cls(folder / "keys", folder / "people.json", folder / "nats.conf")

    @classmethod
    def of_root(cls, root: Path) -> Place:
        """Of `railbus up`."""
        state = Layout(root).state
        return cls(state / "keys", state / "people.json", state / "nats" / "nats.conf")

    def seed(self, name: str) -> Path:
        return self.keys / f"{name}.nk"


@dataclass(frozen=True)
class Member:
    """One who may join the bus."""

    name: str
    role: str
    """Of a person; `service` for those, and `operator`."""
    public: str
    has_seed: bool
    """Whether the secret lies here as well."""


@dataclass(frozen=True)
class _Listed:
    role: Role
    public: str


def ensure_members(place: Place, prefix: str = DEFAULT_PREFIX) -> tuple[dict[str, UserKey], Policy]:
    """Keys of all, made where a service or `user` has none, and what they may do.

    Raises ConfigError, also for a key that two have: nats-server would refuse its whole configuration for it.
    """
    listed = _read(place)
    keys = ensure_keys(place.keys, USERS)
    keys |= {name: UserKey(name, place.seed(name), one.public) for name, one in listed.items()}
    if twice := _shared(keys):
        raise ConfigError(f"{' and '.join(map(repr, twice))} have the same key", hint=_EACH_THEIR_OWN)
    return keys, policy(prefix, {HUMAN: "user", **{name: one.role for name, one in listed.items()}})


def all_members(place: Place) -> list[Member]:
    """Services first; raises NotFound where no keys have been made yet, ConfigError."""
    _need_keys(place)
    keys, granted = ensure_members(place)
    listed = _read(place)
    roles = {**dict.fromkeys(granted.services, "service"), **dict.fromkeys(granted.people, "user")}
    roles |= {OPERATOR: OPERATOR, **{name: one.role for name, one in listed.items()}}
    return [Member(name, role, keys[name].public, place.seed(name).exists()) for name, role in roles.items()]


def add(place: Place, name: str, role: Role, *, public: str | None = None) -> Member:
    """Give a person a key, or let in one whose public key they have told; the same again changes nothing.

    Raises Conflict for a name that has another key or role and for a key that another has, InvalidName, NotFound,
    ConfigError.
    """
    checked_id(name, kind="user")
    with _changing(place) as listed:
        if name in USERS:
            raise Conflict(f"{name!r} is a name of railbus's own", hint="take another one")
        seed = place.seed(name)
        if public is None:
            known = listed[name].public if name in listed and not seed.exists() else ""
            public = known or ensure_keys(place.keys, [name])[name].public
        wanted = _Listed(role, checked_public_key(public))
        if listed.get(name, wanted) != wanted:
            raise Conflict(
                f"{name!r} has a key already, as {listed[name].role}",
                hint=f"`railbus keys revoke {name}` ends that one",
            )
        others = ensure_members(place)[0]
        if twice := _shared({**others, name: UserKey(name, seed, public)}):
            raise Conflict(f"{' and '.join(map(repr, twice))} would have the same key", hint=_EACH_THEIR_OWN)
        _write(place, {**listed, name: wanted})
    return Member(name, role, public, seed.exists())


def revoke(place: Place, name: str) -> bool:
    """End a person's key, and remove its seed if it is here; False if there was neither.

    Raises Conflict for one that cannot be without a key, InvalidName.
    """
    checked_id(name, kind="user")
    with _changing(place) as listed:
        if name in USERS:
            raise Conflict(
                f"{name!r} cannot be without a key", hint=f"`railbus keys rotate {name}` gives it another one"
            )
        _write(place, {other: one for other, one in listed.items() if other != name})
        had_seed = place.seed(name).exists()
        place.seed(name).unlink(missing_ok=True)
    return name in listed or had_seed


def rotate(place: Place, name: str) -> Member:
    """Put another key in the place of one, whose holders are refused from then on; raises NotFound."""
    with _changing(place) as listed:
        if name not in USERS and name not in listed:
            raise _unknown(name, listed)
        key = replace_key(place.keys, name)
        if name in listed:
            _write(place, {**listed, name: _Listed(listed[name].role, key.public)})
    role = listed[name].role if name in listed else {HUMAN: "user", OPERATOR: OPERATOR}.get(name, "service")
    return Member(name, role, key.public, has_seed=True)


def unknown(place: Place, name: str) -> NotFound:
    """That nobody has a key under this name, with the nearest names of those who have."""
    return _unknown(name, _read(place))


def _unknown(name: str, listed: Mapping[str, _Listed]) -> NotFound:
    close = difflib.get_close_matches(name, [*listed, *USERS], n=3)
    near = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
    return NotFound(
        f"user has value {name!r}: nobody of this name has a key", hint=f"{near}`railbus keys list` shows who has one"
    )


def _shared(keys: Mapping[str, UserKey]) -> list[str]:
    """Names of those who have a key that another has as well."""
    count = Counter(key.public for key in keys.values())
    return [name for name, key in keys.items() if count[key.public] > 1]


@contextlib.contextmanager
def _changing(place: Place) -> Iterator[dict[str, _Listed]]:
    """One change at a time, of what is listed now."""
    _need_keys(place)
    fd = os.open(place.keys, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield _read(place)
    finally:
        os.close(fd)


def _need_keys(place: Place) -> None:
    if not place.keys.is_dir():
        raise NotFound(
            f"there are no keys in {str(place.keys)!r}",
            hint="`railbus up` makes those of a root, `railbus init` those of a deployment",
        )


def _read(place: Place) -> dict[str, _Listed]:
    try:
        found = json.loads(place.people.read_bytes())
        listed = {checked_id(name, kind="user"): _listed(one) for name, one in found.items()}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError, InvalidName) as exc:
        raise ConfigError(f"{str(place.people)!r} is damaged: {exc!r}", hint="mend it, or restore a copy") from exc
    if wrong := set(listed) & (set(USERS) - {HUMAN}):
        raise ConfigError(
            f"{str(place.people)!r} names services or the operator: {sorted(wrong)}", hint="remove them there"
        )
    return listed


def _listed(one: dict[str, object]) -> _Listed:
    role, public = one["role"], str(one["public"])
    for known in _ROLES:
        if role == known:
            return _Listed(known, checked_public_key(public))
    raise ValueError(f"{shorten(role)} is no role")


def _write(place: Place, listed: dict[str, _Listed]) -> None:
    content = files.to_json({name: {"role": one.role, "public": one.public} for name, one in sorted(listed.items())})
    if not place.people.exists() or place.people.read_bytes() != content:
        files.write_whole(place.people, content, mode=0o600)
