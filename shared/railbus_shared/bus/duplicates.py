"""What the server takes for a repetition, and is none.

The ids of facts can be foretold, so that whoever repeats them repeats the same; and whoever may tell events of their
own could use one first. A fact that was not stored for that is stored without its id: telemetry knows lines by keys.
"""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Final

from nats.aio.msg import Msg
from nats.js.api import PubAck

from railbus_shared.subjects import told_by

if TYPE_CHECKING:
    from railbus_shared.bus.client import RailbusClient

logger = logging.getLogger(__name__)

_MSG_ID: Final = "Nats-Msg-Id"
_TIMEOUT_S: Final = 3.0


async def stored_at(
    client: RailbusClient, ack: PubAck, subject: str, data: bytes, headers: dict[str, str], *, events: str
) -> int:
    """The sequence of what the server has acknowledged, an event if its subject begins so. Raises what nats-py does."""
    if not ack.duplicate or not subject.startswith(events) or await _is_stored(client, ack, subject, data):
        return int(ack.seq)
    logger.warning("the id of an event was someone else's", extra={"subject": subject, "sequence": ack.seq})
    without = {name: value for name, value in headers.items() if name != _MSG_ID}
    return int((await client.jetstream().publish(subject, data, timeout=_TIMEOUT_S, headers=without)).seq)


async def _is_stored(client: RailbusClient, ack: PubAck, subject: str, data: bytes) -> bool:
    """Whether the message that had the id before is ours, or is not there any more.

    On a person's subject stands the person's name as well, which a client does not know: ours says the same.
    """
    body = json.dumps({"seq": ack.seq}).encode()
    found: Msg = await client.request(f"$JS.API.DIRECT.GET.{ack.stream}", body, timeout=_TIMEOUT_S)
    stored = (found.headers or {}).get("Nats-Subject", "")
    return stored in {"", subject} or (stored == f"{subject}.{told_by(stored)}" and found.data == data)
