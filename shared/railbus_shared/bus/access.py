"""What a process shows to NATS, and what it wants to be shown: its nkey seed, and the certificate of the server."""

from __future__ import annotations

import contextlib
import logging
import os
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

import nkeys

from railbus_shared.errors import BadSetting, BusUnavailable, NotAuthorized
from railbus_shared.settings import CommonSettings, check_urls, is_open, urls_in, uses_tls, without_password

if TYPE_CHECKING:
    from railbus_shared.bus.client import RailbusClient

logger = logging.getLogger(__name__)

_UNPROVEN: Final = "check RAILBUS_NATS_CA_FILE, and that the certificate names the host of RAILBUS_NATS_URL"
MAX_REFUSALS: Final = 3
"""In a row, while reconnecting; a key that the server does not know any more is not asked about for ever."""


class Access(Protocol):
    """Where a connection has its key from, and whom it trusts."""

    def seed(self) -> str | None:
        """The nkey seed to show now; None to show none. Raises NotAuthorized."""
        ...

    def trusted(self) -> ssl.SSLContext | None:
        """What proves the server; None where the URL wants no TLS. Raises BadSetting."""
        ...


@dataclass(frozen=True)
class FileAccess:
    """Reads the files that the settings name whenever it is asked, so that a key may be replaced in its file."""

    settings: CommonSettings

    def seed(self) -> str | None:
        path = self.settings.nats_key_file
        return read_seed(path) if path is not None else None

    def trusted(self) -> ssl.SSLContext | None:
        return tls_context(self.settings.nats_ca_file) if uses_tls(self.settings.nats_url) else None


@dataclass(frozen=True)
class HeldAccess:
    """In memory alone, for a process that may read the files no more; another key needs another process."""

    _seed: str | None = field(repr=False)
    _trusted: ssl.SSLContext | None

    @classmethod
    def read(cls, settings: CommonSettings) -> HeldAccess:
        """What the files hold now; raises NotAuthorized, BadSetting."""
        files = FileAccess(settings)
        return cls(files.seed(), files.trusted())

    def seed(self) -> str | None:
        return self._seed

    def trusted(self) -> ssl.SSLContext | None:
        return self._trusted


def is_refusal(problem: str) -> bool:
    """Whether an error of the connection says that the credentials are wrong; that they came late does not."""
    said = problem.lower()
    return "authorization" in said or ("authentication" in said and "timeout" not in said)


def urls_to_dial(settings: CommonSettings) -> list[str]:
    """The servers to try; says in the log that a connection leaves this host without TLS, if it does.

    Raises InsecureUrl unless that is allowed.
    """
    url = settings.nats_url
    check_urls(url, insecure=settings.insecure)
    if is_open(url):
        logger.warning(
            "the connection to NATS is not encrypted, and all that goes over it can be read and changed on its way",
            extra={"url": without_password(url), "setting": "RAILBUS_INSECURE"},
        )
    return urls_in(url)


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


def no_connection(url: str, problem: str, *, is_unproven: bool) -> BusUnavailable | NotAuthorized:
    """What to say of a server to which there is no connection; `is_unproven` if it is not the one that it should be."""
    name = without_password(url)
    if is_refusal(problem):
        return NotAuthorized(f"NATS at {name} refused the credentials: {problem}", hint="check RAILBUS_NATS_KEY_FILE")
    return BusUnavailable(
        f"NATS at {name} does not answer: {problem}",
        hint=_UNPROVEN if is_unproven else "start it with `railbus up`, or set RAILBUS_NATS_URL",
    )


def unknown_key(url: str, problem: str) -> NotAuthorized:
    """What to say where the server has refused, again and again, a key that it knew."""
    return NotAuthorized(
        f"NATS at {without_password(url)} knows this key no more: {problem}",
        hint="it was revoked or replaced: see `railbus keys list`, and RAILBUS_NATS_KEY_FILE",
    )


def read_seed(path: Path) -> str:
    """The nkey seed in a key file; raises NotAuthorized if it cannot be used."""
    try:
        mode = path.stat().st_mode & 0o777
        seed = path.read_text().strip()
    except (OSError, UnicodeError) as exc:
        is_powerless = isinstance(exc, PermissionError) and os.geteuid() == 0  # root, but for its capabilities
        raise NotAuthorized(
            f"key file {str(path)!r} cannot be read: {exc}",
            hint=f"chown 0:0 {path}" if is_powerless else "check RAILBUS_NATS_KEY_FILE",
        ) from exc
    if mode & 0o077:
        raise NotAuthorized(f"key file {str(path)!r} can be read by others (mode {mode:04o})", hint=f"chmod 600 {path}")
    if not seed.startswith("SU") or not _is_seed(seed):
        raise NotAuthorized(f"key file {str(path)!r} holds no user seed", hint="it begins with SU; see `railbus keys`")
    return seed


def show_again(client: RailbusClient, access: Access) -> None:
    """Have a client that was refused show the key that there is now: it may have been replaced in its file."""
    with contextlib.suppress(NotAuthorized):  # that is told once there have been enough refusals
        seed = access.seed()
        if seed is not None:
            client.take_seed(seed)


def _is_seed(seed: str) -> bool:
    try:
        nkeys.from_seed(bytearray(seed.encode()))
    except (nkeys.NkeysError, ValueError):
        return False
    return True
