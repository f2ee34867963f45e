"""Every event from the bus as a JSON line on stdout, each at least once, however often this is killed.

python examples/ship_events.py PLACE [URL KEY_FILE] | whatever-takes-lines

PLACE is a file that remembers how far everything has been written. NATS keeps an event for a week, and so long this may
stand still. What comes twice has the same (person, producer, number). It imports nothing of railbus, and leaves nothing
on the server.
"""

import asyncio
import calendar
import itertools
import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import nats
import nats.errors
from nats.aio.client import Client

STREAM, SUBJECT = "RAILBUS_EVENTS", "railbus.evt.>"


async def after(client: Client, sequence: int) -> list[tuple[int, str, bytes]]:
    """The next messages of the stream, oldest first; none if there are none yet, or no answer."""
    inbox = client.new_inbox()
    answers = await client.subscribe(inbox)
    wanted = {"seq": sequence + 1, "batch": 256, "max_bytes": 4 << 20, "next_by_subj": SUBJECT}
    found: list[tuple[int, str, bytes]] = []
    try:
        await client.publish(f"$JS.API.DIRECT.GET.{STREAM}", json.dumps(wanted).encode(), reply=inbox)
        while "Status" not in (headers := (answer := await answers.next_msg(5)).headers or {}):
            found.append((int(headers["Nats-Sequence"]), headers["Nats-Subject"], answer.data))
    except nats.errors.Error as exc:  # NATS is away; what has come is good, the rest is asked for again
        print(f"waiting for NATS: {exc!r}", file=sys.stderr)
    finally:
        await answers.unsubscribe()
    return found


def events_in(data: bytes) -> list[dict[str, Any]]:
    """A message is one event, or a batch: version 1 has a map for each event, version 2 a list for each field."""
    message = json.loads(data) if data[:1] == b"{" else msgpack.unpackb(data)
    if "common" not in message:
        return [message]
    if "events" in message:
        return [{**message["common"], **event} for event in message["events"] if isinstance(event, dict)]
    return list(rows(message))


def rows(batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The events of a batch of version 2."""
    gaps_ns, number, data = batch["time"].get("gaps_ns", ()), batch["number"], batch.get("data", {})
    second, _, decimals = re.sub(r"(Z|\+00:00)$", "", batch["time"]["first"]).partition(".")
    first_ns = calendar.timegm(time.strptime(second, "%Y-%m-%dT%H:%M:%S")) * 10**9 + int(decimals.ljust(9, "0"))
    for at, ns in enumerate(itertools.accumulate(gaps_ns, initial=first_ns)):
        event = {**batch["common"], "number": number[at] if isinstance(number, list) else number + at}
        event["id"] = f"{event['producer']}-{event['number']}"
        event["time"] = f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(ns // 10**9))}.{ns % 10**9:09d}Z"
        if batch.get("step") is not None:
            event["step"] = batch["step"][at]
        yield event | {"data": {name: values[at] for name, values in data.items()}}


def lines_of(sequence: int, subject: str, data: bytes) -> list[str]:
    """The lines of one message; none of one that is no event, which anybody may send, and which must stop nothing.

    Who told it stands behind area, id and what of the subject, if it was a person.
    """
    person = (*subject.partition(".evt.")[2].split("."), "", "", "")[3]
    try:
        return [json.dumps({**event, "person": person} if person else event) for event in events_in(data)]
    except Exception as exc:  # noqa: BLE001
        print(f"message {sequence} is no event: {exc!r}", file=sys.stderr)
        return []


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
        for number, subject, data in found:
            if number > sequence + 1 and sequence:
                print(f"{number - sequence - 1} messages were gone before they were read", file=sys.stderr)
            sequence = number
            for line in lines_of(number, subject, data):
                print(line)
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
