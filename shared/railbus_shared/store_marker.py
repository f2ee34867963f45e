"""What a root remembers of its NATS store, so that another one, or one that has lost streams, is not taken for it.

The file is written by whoever has ensured the streams, and by `railbus restore`, which says that the store was put back
on purpose: it may then be another one than it was, but must have every stream.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace
from pathlib import Path

import orjson

from railbus_shared import files
from railbus_shared.errors import IncarnationMismatch
from railbus_shared.layout import Layout


@dataclass(frozen=True)
class StoreMarker:
    """Empty for a root that knows no store."""

    incarnation: str = ""
    """Empty: any that is found."""
    streams: tuple[str, ...] = ()
    renewed: str = ""
    """The incarnation that the store is to be given."""

    def restored(self, *, joins: bool) -> StoreMarker:
        """For a store that was put back: it gets a new incarnation, or the one that another root gave it is taken.

        A new one, because a store that is older than the root counts from where it stood, and its numbers name other
        things than those that they named before.
        """
        return replace(self, incarnation="", renewed="" if joins else new_incarnation())


def new_incarnation() -> str:
    return secrets.token_hex(8)


def marker_path(layout: Layout) -> Path:
    return layout.state / "store.json"


def read_marker(path: Path) -> StoreMarker:
    """Raises IncarnationMismatch for a file that is damaged."""
    try:
        found = orjson.loads(path.read_bytes())
        streams = tuple(str(name) for name in found["streams"])
        return StoreMarker(str(found["incarnation"]), streams, str(found.get("renewed", "")))
    except FileNotFoundError:
        return StoreMarker()
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise IncarnationMismatch(f"marker {str(path)!r} is damaged: {exc}", hint="remove it") from exc


def write_marker(path: Path, marker: StoreMarker) -> None:
    """Left alone if it says so already."""
    renewed = {"renewed": marker.renewed} if marker.renewed else {}
    content = files.to_json({"incarnation": marker.incarnation, "streams": list(marker.streams), **renewed})
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_bytes() != content:
        files.write_whole(path, content)
