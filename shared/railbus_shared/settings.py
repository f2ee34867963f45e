"""Settings that every process shares, from the environment (`RAILBUS_*`) or from a running `railbus up`.

Only `__main__` modules and the command line read them; core code receives values.
"""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path
from typing import Annotated, Literal, TypeVar
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from railbus_shared.errors import BadSetting, InsecureUrl, InvalidName, shorten
from railbus_shared.layout import Layout
from railbus_shared.names import HostId, checked_id, this_host
from railbus_shared.subjects import DEFAULT_PREFIX

S = TypeVar("S", bound=BaseSettings)


def _host(value: str) -> str:
    try:
        return checked_id(value, kind="host")
    except InvalidName as exc:
        raise ValueError(str(exc)) from exc


class CommonSettings(BaseSettings):
    """What every process needs to join the bus and find the tree."""

    model_config = SettingsConfigDict(
        env_prefix="RAILBUS_", frozen=True, extra="ignore", use_attribute_docstrings=True, env_ignore_empty=True
    )

    root: Path = Path("learning")
    """The root of the canonical tree."""
    nats_url: str = "nats://127.0.0.1:4222"
    """Where NATS listens; the nodes of a cluster are joined by commas."""
    nats_key_file: Path | None = None
    """File with the nkey seed (`SU…`) of this process's NATS user; must not be readable by others."""
    nats_ca_file: Path | None = None
    """File with the certificates (PEM) that may vouch for a `tls://` server; those that the system trusts if unset."""
    subject_prefix: str = DEFAULT_PREFIX
    """First tokens of all subjects, so that two teams can share a server."""
    insecure: bool = False
    """Allows a URL that leaves this host without TLS; a warning in the log says so at every start."""
    host: Annotated[str, AfterValidator(_host)] = Field(default_factory=this_host)
    """Id of this host in the cluster; by default its host name."""
    run_dir: Path | None = None
    """Where a service writes `<service>.json` with its process id and HTTP address; not written if unset."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severity that reaches stderr."""
    replicas: int = Field(default=1, ge=1, le=5)
    """Copies of each stream in a NATS cluster: 3 where it has three nodes. Raised where it is more, never lowered."""
    lease_ttl_s: int = Field(default=15, ge=2, le=3600)
    """Life of a lease that is not renewed; renewed at a third of it. Long enough for a restart of NATS."""
    heartbeat_s: float = Field(default=3.0, gt=0, le=60)
    """Between two reports of a host; a report is forgotten after five times as long."""
    connect_timeout_s: float = Field(default=10.0, gt=0)
    """Longest wait for one attempt to connect."""

    @property
    def layout(self) -> Layout:
        return Layout(self.root)

    @property
    def host_id(self) -> HostId:
        return HostId(self.host)


class HttpSettings(BaseSettings):
    """Base of each service's own settings (prefix `RAILBUS_<SERVICE>_`)."""

    model_config = SettingsConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True, env_ignore_empty=True)

    http_host: str = "127.0.0.1"
    """Where health and metrics are served; loopback unless told otherwise."""
    http_names: tuple[str, ...] = ()
    """Names with a dot under which health and metrics may be asked for, as a JSON list, where they are served beyond
    loopback. Addresses and other names always may; a page in a browser must not come by a name of its own."""
    http_port: int = Field(default=0, ge=0, le=65_535)
    """0 takes any free port."""
    grace_s: float = Field(default=10.0, ge=0, le=3600)
    """Time to finish or hand back work after SIGTERM."""


def load(settings: type[S]) -> S:
    """Settings from the environment; raises BadSetting that names the variable, the value and the remedy."""
    try:
        return settings()
    except ValidationError as exc:
        fault = exc.errors(include_url=False)[0]
        prefix = settings.model_config.get("env_prefix", "")
        name = f"{prefix}{'_'.join(str(part) for part in fault['loc'])}".upper()
        raise BadSetting(
            f"setting {name} has value {shorten(fault['input'])}: {fault['msg']}", hint="see docs/settings.md"
        ) from exc
    except SettingsError as exc:
        raise BadSetting(f"a setting cannot be read: {exc}", hint="lists and maps are written as JSON") from exc


def urls_in(setting: str) -> list[str]:
    """The URLs of a setting that names several, joined by commas."""
    return [url.strip() for url in setting.split(",")]


def check_urls(setting: str, *, insecure: bool) -> None:
    """Refuse a URL that is none, or that leaves this host without TLS; raises BadSetting or InsecureUrl."""
    urls = urls_in(setting)
    for url in urls:
        _check_url(url, insecure=insecure)
    if len({uses_tls(url) for url in urls}) > 1:
        raise BadSetting(
            f"setting RAILBUS_NATS_URL has value {shorten(without_password(setting))}: some of it is TLS and some not",
            hint="name all nodes by tls://, or all by nats://",
        )


def _check_url(url: str, *, insecure: bool) -> None:
    scheme, host = _parts(url)
    if scheme not in {"nats", "tls"} or not host:
        raise BadSetting(
            f"setting RAILBUS_NATS_URL has value {shorten(without_password(url))}: not a NATS URL",
            hint="for instance nats://127.0.0.1:4222; several are joined by commas",
        )
    if insecure or not is_open(url):
        return
    raise InsecureUrl(
        f"setting RAILBUS_NATS_URL has value {shorten(without_password(url))}: it leaves this host without TLS",
        hint="use a tls:// URL, or set RAILBUS_INSECURE=1 inside a closed network",
    )


def is_open(setting: str) -> bool:
    """Whether a URL leaves this host without TLS."""
    return any(not uses_tls(url) and not _is_loopback(_parts(url)[1]) for url in urls_in(setting))


def uses_tls(setting: str) -> bool:
    """Whether a server must prove who it is; all nodes of a cluster must, or none."""
    return _parts(urls_in(setting)[0])[0] == "tls"


def without_password(url: str) -> str:
    """A URL as it may be shown: what stands before an `@` is left out."""
    return re.sub(r"//[^/]*@", "//…@", url)


def _parts(url: str) -> tuple[str, str]:
    """Scheme and host of a URL; empty where it is none."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        return "", ""
    return parts.scheme, parts.hostname or ""


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return socket.inet_pton(socket.AF_INET, host)[0] == 127
    except OSError:
        return host in {"::1", "[::1]"}


def running_bus(layout: Layout) -> CommonSettings | None:
    """Settings to join the `railbus up` that runs on this root, or None if none does."""
    path = layout.state / "bus.json"
    try:
        found = json.loads(path.read_bytes())
        url, key_file = str(found["url"]), Path(found["user_key_file"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise BadSetting(f"{path} is damaged: {exc}", hint="stop `railbus up` and remove the file") from exc
    return CommonSettings(root=layout.root, nats_url=url, nats_key_file=key_file)
