"""The names on the bus: every subject, stream and bucket is spelled here and nowhere else.

The tree of requests (`<prefix>.req.`) and the trees that streams capture (`<prefix>.jobs.`, `<prefix>.evt.`) are
disjoint; otherwise a stream's own acknowledgement would answer a request.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from railbus_shared.errors import BadSetting, shorten

DEFAULT_PREFIX: Final = "railbus"
USER_INBOX: Final = "_INBOX"
"""Inboxes of people and of clients that are not ours."""
SERVICE_INBOX: Final = "_RINBOX"
"""Inboxes of services: `_RINBOX.<user>.>`, which no person may listen on."""
PERSON_REPLY: Final = "_R_"
"""Where nats-server has the answer to a request from another account sent, in place of what the asker named."""
LOG_KEY: Final = "log"
"""In the bucket `leader`: on which root the log is written, which telemetry writes and nobody else does."""

_EVENTS: Final = ".evt."
_DOTS_OF_PERSON: Final = 3  # between area, id, what and person
_PREFIX: Final = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}(?:\.[a-z0-9][a-z0-9_-]{0,31}){0,3}\Z")
_REPLY: Final = re.compile(rf"(?:{USER_INBOX}|{SERVICE_INBOX}|{PERSON_REPLY})(?:\.[A-Za-z0-9_-]{{1,64}}){{1,4}}\Z")


@lru_cache(maxsize=1024)
def told_by(subject: str) -> str:
    """The person who told an event on this subject; empty where a service did.

    A service's subject ends with `<area>.<id>.<what>`. Behind a person's nats-server writes the name, on the way out of
    the account of that person, who can publish nothing that does not end so.
    """
    rest = subject.partition(_EVENTS)[2]
    return rest.rpartition(".")[2] if rest.count(".") == _DOTS_OF_PERSON else ""


def is_inbox(subject: str) -> bool:
    """Whether an answer may be published there: only under the known inboxes, never where state or commands live."""
    return _REPLY.match(subject) is not None


@dataclass(frozen=True)
class Subjects:
    """Subjects, streams and buckets under one prefix, so that two teams can share a server."""

    prefix: str = DEFAULT_PREFIX

    def __post_init__(self) -> None:
        if not _PREFIX.match(self.prefix):
            raise BadSetting(
                f"setting RAILBUS_SUBJECT_PREFIX has value {shorten(self.prefix)}: not a valid prefix",
                hint="use one to four tokens of a-z, 0-9, '_' and '-', joined by dots",
            )

    @property
    def _flat(self) -> str:
        """The prefix as part of a stream's or bucket's name; no two prefixes give the same."""
        return self.prefix.replace("_", "__").replace(".", "_")

    def _stream(self, name: str) -> str:
        return f"{self._flat}_{name}".upper()

    def _bucket(self, name: str) -> str:
        return f"{self._flat}_{name}"

    @property
    def submit(self) -> str:
        """Where job events are published."""
        return f"{self.prefix}.jobs.submit"

    @property
    def event_root(self) -> str:
        """How the subject of every event begins."""
        return f"{self.prefix}{_EVENTS}"

    @property
    def all_events(self) -> str:
        return f"{self.event_root}>"

    def event(self, area: str, subject_id: str, what: str) -> str:
        return f"{self.prefix}.evt.{area}.{subject_id}.{what}"

    def request(self, area: str, verb: str) -> str:
        return f"{self.prefix}.req.{area}.{verb}"

    def runner(self, host: str, verb: str) -> str:
        return f"{self.prefix}.req.runner.{host}.{verb}"

    @property
    def jobs_stream(self) -> str:
        return self._stream("jobs")

    @property
    def events_stream(self) -> str:
        return self._stream("events")

    @property
    def jobs(self) -> str:
        return self._bucket("jobs")

    @property
    def devices(self) -> str:
        return self._bucket("devices")

    @property
    def leases(self) -> str:
        return self._bucket("leases")

    @property
    def datasets(self) -> str:
        return self._bucket("datasets")

    @property
    def leader(self) -> str:
        return self._bucket("leader")
