"""`python -m railbus.deployment DIR`, and `railbus init`: what NATS and the services need to know of each other.

Makes `DIR/keys/<user>.nk` (mode 0600) for each service and for the human, `DIR/nats.conf` for a NATS server in a
container, and certificates in `DIR/tls/` where they are asked for. Safe to run at every start, and to be killed: keys
that are there are kept, so clients stay valid, and the configuration, which follows from them and is written last, is
written again only where it would change.
"""

from __future__ import annotations

import logging
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from railbus.embedded.certificates import TlsFiles, ensure_certificates
from railbus.embedded.members import Place, ensure_members
from railbus.embedded.permissions import USERS
from railbus.embedded.server_config import CONTAINER_DEPLOY, render_for_container
from railbus_shared import files, logs
from railbus_shared.errors import ConfigError, StorageFull
from railbus_shared.settings import CommonSettings, load
from railbus_shared.subjects import DEFAULT_PREFIX

logger = logging.getLogger(__name__)

EXIT_CONFIG: Final = 2
_SERVER_NAME: Final = "railbus"
_HANDSHAKE_S: Final = 5


def deploy(folder: Path, *, tls_hosts: Sequence[str] = (), prefix: str = DEFAULT_PREFIX) -> bool:
    """Make what is missing in `folder`; returns whether the server's configuration has changed.

    With names of the server in `tls_hosts` it is reached by TLS from then on. Rights are of subjects under a prefix.
    Raises ConfigError for a key that others can read or that is damaged, StorageFull.
    """
    place, tls = Place.of_deployment(folder), TlsFiles(folder / "tls")
    keys, granted = ensure_members(place, prefix)
    is_new = bool(tls_hosts) and ensure_certificates(tls, tls_hosts)
    config = render_for_container(name=_SERVER_NAME, keys=keys, policy=granted, more=_tls_settings(tls))
    if place.config.exists() and place.config.read_bytes() == config:
        return is_new
    files.write_whole(place.config, config, mode=0o600, keep_owner=True)
    return True


def own_names() -> tuple[str, ...]:
    """Names by which a server is reached from this host, and in a deployment by its services."""
    return ("localhost", "127.0.0.1", "::1", "nats", socket.gethostname())


def _tls_settings(tls: TlsFiles) -> dict[str, object]:
    """What the server is told of certificates that are there; it sees the folder as `/deploy`."""
    if not tls.server.exists():
        return {}
    seen = TlsFiles(CONTAINER_DEPLOY / "tls")
    return {"tls": {"cert_file": str(seen.server), "key_file": str(seen.server_key), "timeout": _HANDSHAKE_S}}


def main(arguments: list[str]) -> int:
    logs.configure("deployment")
    if len(arguments) != 1:
        logger.error("give one folder: python -m railbus.deployment DIR")
        return EXIT_CONFIG
    folder = Path(arguments[0])
    try:
        has_changed = deploy(folder, prefix=load(CommonSettings).subject_prefix)
    except (ConfigError, StorageFull) as exc:
        logger.error("cannot go on", extra={"error": exc.to_wire()})  # noqa: TRY400 - the operator's, not a bug
        return EXIT_CONFIG
    except OSError as exc:
        logger.error("cannot write", extra={"folder": str(folder), "problem": str(exc)})  # noqa: TRY400 - likewise
        return EXIT_CONFIG
    logger.info("deployed", extra={"folder": str(folder), "users": list(USERS), "changed": has_changed})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
