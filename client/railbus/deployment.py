"""`python -m railbus.deployment DIR`: what NATS and the services need to know of each other, made once.

Makes `DIR/keys/<user>.nk` (mode 0600) for each service and for the human, and `DIR/nats.conf` for a NATS server in a
container. Safe to run at every start: keys that are there are kept, so clients stay valid, and the configuration, which
follows from them, is written again only where it would change.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Final

from railbus.embedded.credentials import ensure_keys
from railbus.embedded.permissions import USERS, policy
from railbus.embedded.server_config import render_for_container
from railbus_shared import files, logs
from railbus_shared.errors import ConfigError

logger = logging.getLogger(__name__)

EXIT_CONFIG: Final = 2
_SERVER_NAME: Final = "railbus"


def deploy(folder: Path) -> bool:
    """Make what is missing in `folder`; returns whether the server's configuration has changed.

    Raises ConfigError for a key that others can read or that is damaged, StorageFull.
    """
    keys = ensure_keys(folder / "keys", USERS)
    config = render_for_container(name=_SERVER_NAME, keys=keys, policy=policy())
    path = folder / "nats.conf"
    if path.exists() and path.read_bytes() == config:
        return False
    files.write_whole(path, config, mode=0o600)
    return True


def main(arguments: list[str]) -> int:
    logs.configure("deployment")
    if len(arguments) != 1:
        logger.error("give one folder: python -m railbus.deployment DIR")
        return EXIT_CONFIG
    folder = Path(arguments[0])
    try:
        has_changed = deploy(folder)
    except ConfigError as exc:
        logger.error("cannot go on", extra={"error": exc.to_wire()})  # noqa: TRY400 - the operator's, not a bug
        return EXIT_CONFIG
    except OSError as exc:
        logger.error("cannot write", extra={"folder": str(folder), "problem": str(exc)})  # noqa: TRY400 - likewise
        return EXIT_CONFIG
    logger.info("deployed", extra={"folder": str(folder), "users": list(USERS), "changed": has_changed})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
