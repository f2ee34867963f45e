"""`python -m railbus.routes DIR NODE NODE NODE`: what makes one server of a deployment a node of a cluster.

Writes `DIR/cluster.conf`, with which every node is started in place of `nats.conf`. It includes that file, so users and
limits are those of a single server; it takes the node's own name from the variable `RAILBUS_NATS_NODE`, and opens the
route to the other nodes, which must know its password: a random one in `DIR/keys/route` (mode 0600), made once. Safe to
run at every start. Where the deployment has certificates (`railbus init --tls --host NODE …`) routes are encrypted,
and each node must prove its name to the other; else they belong into a network of their own.
"""

from __future__ import annotations

import logging
import re
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import orjson

from railbus.embedded.certificates import TlsFiles
from railbus.embedded.server_config import CONTAINER_DEPLOY
from railbus_shared import files, logs
from railbus_shared.errors import BadSetting, ConfigError, StorageFull, shorten

logger = logging.getLogger(__name__)

ROUTE_PORT: Final = 6222
NODE_VARIABLE: Final = "RAILBUS_NATS_NODE"

_EXIT_CONFIG: Final = 2
_NAME: Final = "railbus"
_USER: Final = "route"
_NODE: Final = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?\Z")
_PASSWORD: Final = re.compile(r"[0-9a-f]{48}\Z")


def deploy_routes(folder: Path, nodes: Sequence[str]) -> bool:
    """Make what is missing in `folder` for nodes of these host names; returns whether the configuration has changed.

    Raises ConfigError for names that are none, fewer than three, or a password that is damaged or readable by others.
    """
    if len(set(nodes)) != len(nodes) or len(nodes) < 3 or len(nodes) % 2 == 0:
        raise BadSetting(
            f"a cluster of {shorten(list(nodes))} cannot lose a node and go on", hint="name 3 or 5 different hosts"
        )
    for node in nodes:
        if not _NODE.match(node):
            raise BadSetting(f"{shorten(node)} is no host name", hint="letters, digits, '-' and '.'")
    has_tls = TlsFiles(folder / "tls").server.exists()
    content = render_cluster(nodes, password=_password(folder / "keys" / "route"), has_tls=has_tls)
    path = folder / "cluster.conf"
    if path.exists() and path.read_bytes() == content:
        return False
    files.write_whole(path, content, mode=0o600)
    return True


def render_cluster(nodes: Sequence[str], *, password: str, has_tls: bool = False) -> bytes:
    """The file's content; the same for every node, which knows itself among the routes."""
    cluster: dict[str, object] = {
        "name": _NAME,
        "listen": f"0.0.0.0:{ROUTE_PORT}",
        "no_advertise": True,  # clients join the nodes that they were told of, by names that they can reach
        "authorization": {"user": _USER, "password": password, "timeout": 5},
        "routes": [f"nats-route://{_USER}:{password}@{node}:{ROUTE_PORT}" for node in nodes],
    }
    if has_tls:
        seen = TlsFiles(CONTAINER_DEPLOY / "tls")
        files_of = {"cert_file": seen.server, "key_file": seen.server_key, "ca_file": seen.authority}
        cluster["tls"] = {name: str(path) for name, path in files_of.items()} | {"timeout": 5}
    own = orjson.dumps(cluster, option=orjson.OPT_INDENT_2)
    return b'include "nats.conf"\nserver_name: $' + NODE_VARIABLE.encode() + b"\ncluster: " + own + b"\n"


def _password(path: Path) -> str:
    if not path.exists():
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        files.write_new(path, secrets.token_hex(24).encode() + b"\n", mode=0o600)
    if path.stat().st_mode & 0o077:
        raise ConfigError(f"{str(path)!r} holds a secret, and others may use it", hint=f"chmod 600 {path}")
    password = path.read_text(errors="replace").strip()
    if not _PASSWORD.match(password):
        raise ConfigError(f"{str(path)!r} holds no password of routes", hint="remove it to have a new one made")
    return password


def main(arguments: list[str]) -> int:
    logs.configure("routes")
    if not arguments:
        logger.error("give a folder and the nodes: python -m railbus.routes DIR NODE NODE NODE")
        return _EXIT_CONFIG
    folder, nodes = Path(arguments[0]), arguments[1:]
    try:
        has_changed = deploy_routes(folder, nodes)
    except (ConfigError, StorageFull) as exc:
        logger.error("cannot go on", extra={"error": exc.to_wire()})  # noqa: TRY400 - the operator's, not a bug
        return _EXIT_CONFIG
    except OSError as exc:
        logger.error("cannot write", extra={"folder": str(folder), "problem": str(exc)})  # noqa: TRY400 - likewise
        return _EXIT_CONFIG
    logger.info("deployed", extra={"folder": str(folder), "nodes": nodes, "changed": has_changed})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
