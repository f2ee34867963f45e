"""Ids and names, and the one place that decides which strings may become part of a path or a subject.

Ids (jobs, hosts, devices) are single subject tokens. Names (datasets, models) are folder names and may hold dots, which
are written `=` where a name must stand in a subject or key.
"""

from __future__ import annotations

import re
import socket
from typing import Final, NewType

from railbus_shared.errors import InvalidName

JobId = NewType("JobId", str)
HostId = NewType("HostId", str)
DeviceId = NewType("DeviceId", str)
DatasetName = NewType("DatasetName", str)
ModelName = NewType("ModelName", str)

ID_PATTERN: Final = r"^[a-z0-9][a-z0-9_-]{0,63}$"
NAME_PATTERN: Final = r"^(?!.*\.\.)[a-z0-9][a-z0-9._-]{0,127}$"
ENTRYPOINT_PATTERN: Final = (
    r"^(?:[a-z][a-z0-9_]{0,63}|[A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z_][A-Za-z0-9_]*)*:[A-Za-z_][A-Za-z0-9_]*)$"
)
ID_RULE: Final = "1 to 64 of a-z, 0-9, '_' and '-', beginning with a letter or digit"
NAME_RULE: Final = "1 to 128 of a-z, 0-9, '.', '_' and '-', beginning with a letter or digit, without '..'"
ENTRYPOINT_RULE: Final = "a built-in's short name, or package.module:function"

# `\Z` and not `$`, which lets a trailing newline pass; the published patterns use `$` because ECMA 262 knows no `\Z`.
_ID: Final = re.compile(ID_PATTERN.removesuffix("$") + r"\Z")
_NAME: Final = re.compile(NAME_PATTERN.removesuffix("$") + r"\Z", re.DOTALL)
_ENTRYPOINT: Final = re.compile(ENTRYPOINT_PATTERN.removesuffix("$") + r"\Z")


def checked_id(value: str, *, kind: str = "id") -> str:
    """`value` itself if it may be an id; raises InvalidName otherwise."""
    if not _ID.match(value):
        raise InvalidName(kind=kind, value=value, rule=ID_RULE)
    return value


def checked_name(value: str, *, kind: str = "name") -> str:
    """`value` itself if it may be the name of a dataset or model; raises InvalidName otherwise."""
    if not _NAME.match(value):
        raise InvalidName(kind=kind, value=value, rule=NAME_RULE)
    return value


def checked_entrypoint(value: str, *, kind: str = "entrypoint") -> str:
    """`value` itself if it has the form of an entrypoint; raises InvalidName otherwise."""
    if len(value) > 200 or not _ENTRYPOINT.match(value):
        raise InvalidName(kind=kind, value=value, rule=ENTRYPOINT_RULE)
    return value


def key_token(name: str) -> str:
    """A name as a single token of a subject or key: its dots written `=`."""
    return name.replace(".", "=")


def name_from_token(token: str) -> str:
    """The inverse of `key_token`."""
    return token.replace("=", ".")


def this_host() -> HostId:
    """The id of this host, from its host name."""
    return host_id(socket.gethostname())


def host_id(host_name: str) -> HostId:
    """A host name as an id: in lower case, dots and other characters turned to `-`, cut to 64."""
    token = re.sub(r"[^a-z0-9_-]", "-", host_name.lower()).strip("-_")[:64]
    return HostId(token or "localhost")
