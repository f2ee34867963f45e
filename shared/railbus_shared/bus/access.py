"""What a process shows to NATS, and what it wants to be shown: its nkey seed, and the certificate of the server."""

from __future__ import annotations

import contextlib
import logging
import ssl
from pathlib import Path
from typing import TYPE_CHECKING, Final

import nkeys

from railbus_shared.errors import BadSetting, NotAuthorized
from railbus_shared.settings import is_open, without_password

if TYPE_CHECKING:
    from railbus_shared.bus.client import RailbusClient

logger = logging.getLogger(__name__)

MAX_REFUSALS: Final = 3
"""In a row, while reconnecting; a key that the server does not know any more is not asked about for ever."""


def is_refusal(problem: str) -> bool:
    """Whether an error of the connection says that the credentials are wrong; that they came late does not."""
    said = problem.lower()
    return "authorization" in said or ("authentication" in said and "timeout" not in said)


def warn_of_open(url: str) -> None:
    """Say in the log that a connection leaves this host without TLS, if it does."""
    if is_open(url):
        logger.warning(
            "the connection to NATS is not encrypted, and all that goes over it can be read and changed on its way",
            extra={"url": without_password(url), "setting": "RAILBUS_INSECURE"},
        )


def tls_context(ca_file: Path | None) -> ssl.SSLContext:
    """Trusts the certificates in a file and no others, or what the system trusts; the host name is compared, too.

    Raises BadSetting for a file that holds none.
    """
    try:
        return ssl.create_default_context(cafile=ca_file)
    except (OSError, ssl.SSLError) as exc:
        raise BadSetting(
            f"setting RAILBUS_NATS_CA_FILE has value {str(ca_file)!r}: {exc}",
            hint="name the PEM file of the authority; `railbus init --tls` leaves it in tls/ca.crt",
        ) from exc


def read_seed(path: Path) -> str:
    """The nkey seed in a key file; raises NotAuthorized if it cannot be used."""
    try:
        mode = path.stat().st_mode & 0o777
        seed = path.read_text().strip()
    except (OSError, UnicodeError) as exc:
        raise NotAuthorized(
            f"key file {str(path)!r} cannot be read: {exc}", hint="check RAILBUS_NATS_KEY_FILE"
        ) from exc
    if mode & 0o077:
        raise NotAuthorized(f"key file {str(path)!r} can be read by others (mode {mode:04o})", hint=f"chmod 600 {path}")
    if not seed.startswith("SU") or not _is_seed(seed):
        raise NotAuthorized(f"key file {str(path)!r} holds no user seed", hint="it begins with SU; see `railbus keys`")
    return seed


def show_again(client: RailbusClient, path: Path | None) -> None:
    """Have a client that was refused show what its key file holds now: its key may have been replaced there."""
    if path is not None:
        with contextlib.suppress(NotAuthorized):  # that is told once there have been enough refusals
            client.take_seed(read_seed(path))


def _is_seed(seed: str) -> bool:
    try:
        nkeys.from_seed(bytearray(seed.encode()))
    except (nkeys.NkeysError, ValueError):
        return False
    return True
