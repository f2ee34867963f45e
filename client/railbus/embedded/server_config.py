"""nats.conf of the embedded server and of the server in a container, as pure functions.

Both know no anonymous user and acknowledge a stored message only once it is flushed to disk. The embedded one listens
on loopback only and opens no other listener (monitoring, cluster, leaf, websocket, MQTT). The one in a container
listens on every address of the container, which its network and published ports bound, and answers health checks on the
container's own loopback. The file is JSON, which nats-server reads as its own format; so quoting is never a question.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import orjson

from railbus.embedded.credentials import UserKey
from railbus.embedded.permissions import Permissions, Person, Policy
from railbus_shared.errors import BadSetting, shorten

_GIB: Final = 1 << 30
_MIB: Final = 1 << 20
_LOG_LIMIT_BYTES: Final = 10 * _MIB
_PING: Final = "10s"

_PERSON_LIMITS: Final = {"max_connections": 256, "max_subscriptions": 10_000}
"""Of all connections of one person together: what a script leaks, and what is meant ill, takes little of the memory."""

SERVICE_ACCOUNT: Final = "RAILBUS"
PERSON_ACCOUNT: Final = "PERSON_"

CONTAINER_PORT: Final = 4222
CONTAINER_HEALTH_PORT: Final = 8222
CONTAINER_STORE: Final = Path("/data")
CONTAINER_DEPLOY: Final = Path("/deploy")


@dataclass(frozen=True)
class ServerFiles:
    """What the server keeps, all in one folder of mode 0700."""

    folder: Path

    @property
    def config(self) -> Path:
        return self.folder / "nats.conf"

    @property
    def store(self) -> Path:
        return self.folder / "store"

    @property
    def log(self) -> Path:
        return self.folder / "nats-server.log"

    @property
    def pid(self) -> Path:
        return self.folder / "nats-server.pid"


@dataclass(frozen=True)
class Limits:
    """Space that JetStream may take. Our streams reserve some 2 GiB of it, so less than that refuses to create them."""

    max_file_bytes: int = 8 * _GIB
    max_memory_bytes: int = 64 * _MIB
    max_payload_bytes: int = _MIB


def render(
    files: ServerFiles,
    *,
    port: int,
    name: str,
    keys: Mapping[str, UserKey],
    policy: Policy,
    limits: Limits | None = None,
) -> bytes:
    """The file's content; port 0 takes any free one, told in the ports file.

    Raises BadSetting for a path that nats.conf cannot say, KeyError for a user without a key.
    """
    settings = {
        "listen": f"127.0.0.1:{port or -1}",
        "ports_file_dir": _path(files.folder),
        "pid_file": _path(files.pid),
        "log_file": _path(files.log),
        "logfile_size_limit": _LOG_LIMIT_BYTES,
        "logfile_max_num": 3,
    }
    return _config(settings, name=name, store=files.store, keys=keys, policy=policy, limits=limits or Limits())


def render_for_container(
    *,
    name: str,
    keys: Mapping[str, UserKey],
    policy: Policy,
    limits: Limits | None = None,
    more: Mapping[str, object] | None = None,
) -> bytes:
    """The file's content for a server that is alone in its container and keeps its streams in `/data`.

    Its log goes to stderr, and it writes nothing but the store. `more` are further settings, of TLS or of a cluster.
    Raises KeyError for a user without a key.
    """
    settings = {"listen": f"0.0.0.0:{CONTAINER_PORT}", "http": f"127.0.0.1:{CONTAINER_HEALTH_PORT}", **(more or {})}
    return _config(settings, name=name, store=CONTAINER_STORE, keys=keys, policy=policy, limits=limits or Limits())


def _config(
    settings: Mapping[str, object],
    *,
    name: str,
    store: Path,
    keys: Mapping[str, UserKey],
    policy: Policy,
    limits: Limits,
) -> bytes:
    """What every server of ours is told, after what is its own."""
    whole: dict[str, object] = {
        "server_name": name,
        **settings,
        "max_payload": limits.max_payload_bytes,
        "ping_interval": _PING,  # what the network has cut off is given no requests after three times as long
        "ping_max": 2,
        "jetstream": {
            "store_dir": _path(store),
            "sync_interval": "always",
            "max_file_store": limits.max_file_bytes,
            "max_memory_store": limits.max_memory_bytes,
        },
        "accounts": accounts(keys, policy),
    }
    return orjson.dumps(whole, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


def accounts(keys: Mapping[str, UserKey], policy: Policy) -> dict[str, object]:
    """The accounts of the server: one of the services, and one of each person. Raises KeyError for a missing key."""
    services = {
        "jetstream": "enabled",
        "users": [_user(keys[name], granted) for name, granted in policy.services.items()],
        "exports": [
            *({"service": subject} for subject in (*policy.exports.once, *policy.exports.tells)),
            *({"service": subject, "response": "stream"} for subject in policy.exports.many),
            *({"stream": subject} for subject in policy.exports.told),
        ],
    }
    people = {f"{PERSON_ACCOUNT}{name}": _person(keys[name], person) for name, person in policy.people.items()}
    return {SERVICE_ACCOUNT: services, **people}


def _person(key: UserKey, person: Person) -> dict[str, object]:
    """An account with one user; that its user may publish no more than is imported makes refusals audible."""
    asked = (*person.once, *person.many)
    granted = Permissions(publish=(*asked, *person.tells), subscribe=(">",))
    imports = [
        *({"service": {"account": SERVICE_ACCOUNT, "subject": subject}} for subject in asked),
        *({"service": {"account": SERVICE_ACCOUNT, "subject": to}, "to": own} for own, to in person.tells.items()),
        *({"stream": {"account": SERVICE_ACCOUNT, "subject": subject}} for subject in person.told),
    ]
    return {"users": [_user(key, granted)], "imports": imports, "limits": _PERSON_LIMITS}


def _user(key: UserKey, granted: Permissions) -> dict[str, object]:
    publish: dict[str, object] = {"allow": granted.publish}
    if granted.publish_deny:
        publish["deny"] = granted.publish_deny
    return {"nkey": key.public, "permissions": {"publish": publish, "subscribe": {"allow": granted.subscribe}}}


def _path(path: Path) -> str:
    """Control characters would need escapes that nats-server's format does not know."""
    text = str(path)
    if not text.isprintable():
        raise BadSetting(
            f"the root has a path that nats-server cannot be told: {shorten(text)}",
            hint="use a folder without control characters in its path",
        )
    return text
