"""TLS for a deployment: an authority of its own and a certificate of the server, made by the `openssl` program.

The authority vouches for this one server, so its private key signs once and is kept for the day the names change.
`openssl` is part of nearly every system and image; the `cryptography` package would be a dependency for two calls.
"""

from __future__ import annotations

import ipaddress
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from railbus_shared import files
from railbus_shared.errors import ConfigError, shorten

_AUTHORITY_DAYS: Final = 3650
_SERVER_DAYS: Final = 825
_RENEW_S: Final = 30 * 86_400
_TIMEOUT_S: Final = 30.0
_KEY: Final = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
_AUTHORITY: Final = """\
[req]
distinguished_name = name
x509_extensions = authority
prompt = no
[name]
CN = railbus authority
[authority]
basicConstraints = critical, CA:TRUE, pathlen:0
keyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash
"""
_SERVER: Final = """\
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth, clientAuth
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
subjectAltName = {names}
"""


@dataclass(frozen=True)
class TlsFiles:
    """Where all of it lies; private keys have mode 0600."""

    folder: Path

    @property
    def authority(self) -> Path:
        """What clients are given: `RAILBUS_NATS_CA_FILE`."""
        return self.folder / "ca.crt"

    @property
    def authority_key(self) -> Path:
        return self.folder / "ca.key"

    @property
    def server(self) -> Path:
        return self.folder / "server.crt"

    @property
    def server_key(self) -> Path:
        return self.folder / "server.key"

    @property
    def made_for(self) -> Path:
        """The names in the server's certificate."""
        return self.folder / "server.names"


def ensure_certificates(where: TlsFiles, hosts: Sequence[str]) -> bool:
    """Make what is missing, and a new certificate where the names differ or it ends soon; True if one was made.

    The authority is kept, so that clients stay valid. Raises ConfigError for a name that is none or without `openssl`.
    """
    names = ", ".join(dict.fromkeys(map(_alternative_name, hosts)))
    where.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not (where.authority.exists() and where.authority_key.exists()):
        _make_authority(where)
    if _is_current(where, names):
        return False
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        extensions, request, key, signed = (folder / name for name in ("extensions", "request", "key", "signed"))
        extensions.write_text(_SERVER.format(names=names))
        _openssl("req", "-new", *_KEY, "-keyout", key, "-out", request, "-subj", "/CN=railbus NATS")
        _openssl(
            "x509", "-req", "-in", request, "-CA", where.authority, "-CAkey", where.authority_key, "-CAcreateserial",
            "-CAserial", folder / "serial", "-days", _SERVER_DAYS, "-sha256", "-extfile", extensions, "-out", signed
        )  # fmt: skip
        where.made_for.unlink(missing_ok=True)
        files.write_whole(where.server_key, key.read_bytes(), mode=0o600)
        files.write_whole(where.server, signed.read_bytes())
        files.write_whole(where.made_for, names.encode(), mode=0o600)  # last: it says that both belong together
    return True


def _make_authority(where: TlsFiles) -> None:
    """The key first: an authority without its certificate is made again, and nobody has seen it."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        config, key, certificate = (folder / name for name in ("config", "key", "certificate"))
        config.write_text(_AUTHORITY)
        _openssl(
            "req", "-x509", *_KEY, "-keyout", key, "-out", certificate, "-days", _AUTHORITY_DAYS, "-sha256", "-config",
            config
        )  # fmt: skip
        files.write_whole(where.authority_key, key.read_bytes(), mode=0o600)
        files.write_whole(where.authority, certificate.read_bytes())


def _is_current(where: TlsFiles, names: str) -> bool:
    made_for = where.folder / "server.names"
    if not (
        made_for.exists() and made_for.read_text() == names and where.server.exists() and where.server_key.exists()
    ):
        return False
    return _status("x509", "-in", where.server, "-noout", "-checkend", _RENEW_S).returncode == 0


def _alternative_name(host: str) -> str:
    """As the certificate says it; raises ConfigError."""
    try:
        return f"IP:{ipaddress.ip_address(host)}"
    except ValueError:
        pass  # a name, then
    labels = host.split(".")
    if len(host) > 253 or not all(_is_label(label) for label in labels):
        raise ConfigError(f"{shorten(host)} is neither a host name nor an address", hint="--host nats.example.com")
    return f"DNS:{host.lower()}"


def _is_label(label: str) -> bool:
    bare = label.replace("-", "a").replace("_", "a")
    return 0 < len(label) < 64 and bare.isascii() and bare.isalnum() and label[0] != "-" != label[-1]


def _openssl(*words: object) -> None:
    done = _status(*words)
    if done.returncode != 0:
        raise ConfigError(
            f"openssl {words[0]} failed: {done.stderr.strip()[-300:]}", hint="is it OpenSSL 1.1.1 or later?"
        )


def _status(*words: object) -> subprocess.CompletedProcess[str]:
    program = shutil.which("openssl")
    if program is None:
        raise ConfigError("TLS needs the program `openssl`, which is not there", hint="install the package openssl")
    return subprocess.run(
        [program, *map(str, words)], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False, umask=0o077
    )
