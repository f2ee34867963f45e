"""Every event from the bus as a JSON line on stdout, each at least once, however often this is killed.

python examples/ship_events.py PLACE [URL KEY_FILE] | whatever-takes-lines

PLACE is a file that remembers how far everything has been written. NATS keeps an event for a week, and so long this may
stand still. What comes twice has the same (producer, number). It imports nothing of railbus, and leaves nothing on the
server.
"""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import msgpack
import nats
import nats.errors
from nats.aio.client import Client

STREAM, SUBJECT = "RAILBUS_EVENTS", "railbus.evt.>"


async def after(client: Client, sequence: int) -> list[tuple[int, bytes]]:
    """The next messages of the stream, oldest first; none if there are none yet, or no answer."""
    inbox = client.new_inbox()
    answers = await client.subscribe(inbox)
    wanted = {"seq": sequence + 1, "batch": 256, "max_bytes": 4 << 20, "next_by_subj": SUBJECT}
    found: list[tuple[int, bytes]] = []
    try:
        await client.publish(f"$JS.API.DIRECT.GET.{STREAM}", json.dumps(wanted).encode(), reply=inbox)
        while "Status" not in (headers := (answer := await answers.next_msg(5)).headers or {}):
            found.append((int(headers["Nats-Sequence"]), answer.data))
    except nats.errors.Error as exc:  # NATS is away; what has come is good, the rest is asked for again
        print(f"waiting for NATS: {exc!r}", file=sys.stderr)
    finally:
        await answers.unsubscribe()
    return found


def events_in(data: bytes) -> list[dict[str, Any]]:
    """A message is one event, or a batch whose events share what is `common`."""
    message = json.loads(data) if data[:1] == b"{" else msgpack.unpackb(data)
    return [{**message["common"], **event} for event in message["events"]] if "common" in message else [message]


def known(place: Path) -> int:
    return int(place.read_text()) if place.exists() else 0


def remember(place: Path, sequence: int) -> None:
    temporary = place.with_name(f".{place.name}.tmp")
    temporary.write_text(str(sequence))
    temporary.replace(place)


async def main(place: Path, url: str, key_file: str) -> None:
    sequence = known(place)
    client = await nats.connect(url, nkeys_seed=key_file, max_reconnect_attempts=-1)
    while True:
        found = await after(client, sequence)
        for number, data in found:
            if number > sequence + 1 and sequence:
                print(f"{number - sequence - 1} messages were gone before they were read", file=sys.stderr)
            sequence = number
            for event in events_in(data):
                print(json.dumps(event))
        if not found:
            await asyncio.sleep(1)
            continue
        sys.stdout.flush()  # then only is the place moved on: what follows is told again, not lost
        remember(place, sequence)


if __name__ == "__main__":
    if len(sys.argv) == 4:
        bus = {"url": sys.argv[2], "user_key_file": sys.argv[3]}
    else:
        bus = json.loads(Path("learning/.railbus/bus.json").read_bytes())
    asyncio.run(main(Path(sys.argv[1]), bus["url"], bus["user_key_file"]))
