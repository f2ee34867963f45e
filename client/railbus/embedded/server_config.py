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
from railbus.embedded.permissions import Permissions
from railbus_shared.errors import BadSetting, shorten

_GIB: Final = 1 << 30
_MIB: Final = 1 << 20
_LOG_LIMIT_BYTES: Final = 10 * _MIB
_PING: Final = "10s"

CONTAINER_PORT: Final = 4222
CONTAINER_HEALTH_PORT: Final = 8222
CONTAINER_STORE: Final = Path("/data")


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
    permissions: Mapping[str, Permissions],
    limits: Limits | None = None,
) -> bytes:
    """The file's content; port 0 takes any free one, told in the ports file.

    Raises BadSetting for a path that nats.conf cannot say, KeyError for a key without permissions.
    """
    settings = {
        "listen": f"127.0.0.1:{port or -1}",
        "ports_file_dir": _path(files.folder),
        "pid_file": _path(files.pid),
        "log_file": _path(files.log),
        "logfile_size_limit": _LOG_LIMIT_BYTES,
        "logfile_max_num": 3,
    }
    return _config(
        settings, name=name, store=files.store, keys=keys, permissions=permissions, limits=limits or Limits()
    )


def render_for_container(
    *, name: str, keys: Mapping[str, UserKey], permissions: Mapping[str, Permissions], limits: Limits | None = None
) -> bytes:
    """The file's content for a server that is alone in its container and keeps its streams in `/data`.

    Its log goes to stderr, and it writes nothing but the store. Raises KeyError for a key without permissions.
    """
    settings = {"listen": f"0.0.0.0:{CONTAINER_PORT}", "http": f"127.0.0.1:{CONTAINER_HEALTH_PORT}"}
    return _config(
        settings, name=name, store=CONTAINER_STORE, keys=keys, permissions=permissions, limits=limits or Limits()
    )


def _config(
    settings: Mapping[str, object],
    *,
    name: str,
    store: Path,
    keys: Mapping[str, UserKey],
    permissions: Mapping[str, Permissions],
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
        "authorization": {"users": [_user(key, permissions[user]) for user, key in keys.items()]},
    }
    return orjson.dumps(whole, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


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
